"""The queue of ``dkl reproduce``, with a stand-in for the command that it starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dkl.build.reproduce import JobReport, Row, plan_jobs, run_queue
from dkl.build.reproduce.folders import QUEUE_LOCK, is_done, only_queue, take_lock
from dkl.config import override, to_yaml

STUB = Path(__file__).with_name("reproduce_stub.py")
EPOCHS = 3
ROWS = {
    "a": Row("digits_trades", (f"training.epochs={EPOCHS}",)),
    "b": Row("digits_ikl_at", (f"training.epochs={EPOCHS}",)),
}


class Bench:
    """A folder for runs, one for the stand-in, and what the stand-in was asked to do."""

    def __init__(self, folder: Path) -> None:
        self.out, self.scratch = folder / "out", folder / "scratch"
        (self.scratch / "recipes").mkdir(parents=True)
        self.hold = self.scratch / "hold"
        self.command = [sys.executable, "-S", str(STUB), str(self.scratch)]
        self.set()

    def set(self, **settings) -> None:
        settings = {"epochs": EPOCHS, "fail": [], "stubborn": False} | settings
        (self.scratch / "settings.json").write_text(json.dumps(settings))

    def plan(self, rows=None, seeds=(0,)):
        jobs = plan_jobs(ROWS if rows is None else rows, seeds=seeds, out=self.out)
        for job in jobs:
            file = self.scratch / "recipes" / f"{job.name}-{job.folder.name}.yaml"
            file.write_text(to_yaml(job.wanted))
        return jobs

    def run(self, jobs, **options):
        options = {"command": self.command, "poll_seconds": 0.01} | options
        return run_queue(jobs, self.out, **options)

    def calls(self, event="begin"):
        file = self.scratch / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [one for one in map(json.loads, lines) if one["event"] == event]

    def order(self):
        return [(call["verb"], call["run"]) for call in self.calls()]

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Bench(tmp_path)


def states(result):
    return [report.state for report in result.reports]


def epoch(job) -> int:
    meta = job.folder / "checkpoints" / "last" / "meta.json"
    return json.loads(meta.read_text())["epoch"] if meta.exists() else 0


def test_all_rows_of_a_seed_come_first_and_nothing_is_done_twice(bench):
    jobs = bench.plan(seeds=(0, 4))
    names = [f"{job.name}/seed_{job.seed}" for job in jobs]
    assert [job.rows for job in jobs] == [("a",), ("b",)] * 2
    assert [job.seed for job in jobs] == [0, 0, 4, 4]
    seen = []
    result = bench.run(jobs, notify=lambda report: seen.append((report.job.seed, report.state)))
    assert bench.order() == [(verb, name) for name in names for verb in ("train", "evaluate")]
    assert seen[:3] == [(0, "training"), (0, "measuring"), (0, "done")]
    assert states(result) == ["done"] * 4
    assert all(report.seconds > 0 for report in result.reports)
    assert not result.interrupted
    train, evaluate = (call["words"] for call in bench.calls()[:2])
    place = ["--out", str(jobs[0].folder), "--seed", "0"]
    assert train == ["digits_trades", f"training.epochs={EPOCHS}", *place, "--no-evaluate"]
    assert evaluate == [str(jobs[0].folder), "--checkpoint", "best"]
    assert "train digits_trades" in (jobs[0].folder / "log.txt").read_text()

    again = bench.run(jobs)
    assert states(again) == ["already done"] * 4
    assert len(bench.calls()) == 8


def test_a_run_serves_several_rows_and_further_evaluations(bench):
    sweep = "evaluation.sweep=[0.1,0.2]"
    epochs = ROWS["a"].overrides
    rows = {**ROWS, "swept": Row("digits_trades", (*epochs, sweep)), "twin": ROWS["a"]}
    jobs = bench.plan(rows)
    assert [job.rows for job in jobs] == [("a", "swept", "twin"), ("b",)]
    assert jobs[0].evaluations == ((), (sweep,))
    bench.run(bench.plan())
    assert [call["verb"] for call in bench.calls()] == ["train", "evaluate"] * 2
    assert states(bench.run(jobs)) == ["done", "already done"]
    assert [call["words"][1] for call in bench.calls()[4:]] == [sweep]
    assert states(bench.run(jobs)) == ["already done"] * 2


def test_an_evaluation_that_changes_nothing_is_the_recipe_s_own(bench):
    bench.run(bench.plan({"a": ROWS["a"]}))
    own = bench.plan()[0].wanted.evaluation.num_images
    same = Row("digits_trades", (*ROWS["a"].overrides, f"evaluation.num_images={own}"))
    assert states(bench.run(bench.plan({"same": same}))) == ["already done"]


def test_what_fails_does_not_stop_the_others_and_is_tried_again(bench):
    jobs = bench.plan()
    bench.set(fail=[f"{jobs[0].name}/seed_0"])
    result = bench.run(jobs)
    assert states(result) == ["failed", "done"]
    assert result.reports[0].message.splitlines() == [
        "exit code 1",
        "line one",
        "the loss is not finite",
    ]
    bench.set()
    assert states(bench.run(jobs)) == ["done", "already done"]
    assert "--resume" in bench.calls()[-2]["words"]  # of a run whose recipe was written


def test_a_run_that_is_trained_alone_is_only_measured(bench):
    jobs = bench.plan({"a": ROWS["a"]})
    bench.run(jobs)
    (jobs[0].folder / "results.jsonl").unlink()
    (jobs[0].folder / "measured.json").unlink()
    bench.run(jobs)
    assert [call["verb"] for call in bench.calls()] == ["train", "evaluate", "evaluate"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_jobs_save_a_checkpoint_and_the_same_call_goes_on(bench, number):
    bench.hold.touch()
    jobs, told = bench.plan(), []

    def interrupt(report: JobReport) -> None:
        if report.state == "training":
            bench.wait_for(lambda: epoch(report.job) == 1)
            os.kill(os.getpid(), number)

    result = bench.run(jobs, notify=interrupt, on_stop=told.append)
    assert result.interrupted
    assert states(result) == ["stopped", "waiting"]
    assert told == [1]
    assert epoch(jobs[0]) == 1
    bench.hold.unlink()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert states(bench.run(jobs)) == ["done", "done"]
    resumed = bench.calls()[1]["words"]
    assert resumed[0] == str(jobs[0].folder / "recipe.yaml")
    assert "--resume" in resumed


def test_a_second_ctrl_c_kills(bench):
    bench.set(stubborn=True)
    bench.hold.touch()

    def interrupt(report: JobReport) -> None:
        if report.state == "training":
            bench.wait_for(bench.calls)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        bench.run(
            bench.plan(),
            notify=interrupt,
            on_stop=lambda _: os.kill(os.getpid(), signal.SIGINT),
        )
    descriptor = take_lock(bench.plan()[0].folder / "job.lock")
    assert descriptor is not None  # so that its process is dead
    os.close(descriptor)


QUEUE = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_reproduce_queue import Bench
bench = Bench.__new__(Bench)
bench.out, bench.scratch = Path({out!r}), Path({scratch!r})
bench.command = {command!r}
bench.run(bench.plan())
"""


def test_a_killed_queue_leaves_nothing_that_two_processes_work_on(bench):
    bench.hold.touch()
    jobs = bench.plan()
    script = QUEUE.format(
        tests=str(Path(__file__).parent),
        out=str(bench.out),
        scratch=str(bench.scratch),
        command=bench.command,
    )
    queue = subprocess.Popen([sys.executable, "-c", script])
    bench.wait_for(lambda: epoch(jobs[0]) == 1)
    queue.kill()
    queue.wait()
    seen = []

    def release(report: JobReport) -> None:
        seen.append(report.state)
        if report.state == "held":  # the job outlives its queue, and is waited for
            bench.hold.unlink()

    assert states(bench.run(jobs, notify=release)) == ["done", "done"]
    assert seen[:3] == ["held", "measuring", "done"]
    assert [call["verb"] for call in bench.calls()] == ["train", "evaluate"] * 2
    assert [call["run"] for call in bench.calls()] == [call["run"] for call in bench.calls("end")]


def test_a_queue_keeps_others_out_of_its_folder(bench):
    jobs = bench.plan()
    message = f"process {os.getpid()}.*another --out"
    with only_queue(bench.out), pytest.raises(ValueError, match=message):
        bench.run(jobs)
    assert bench.calls() == []
    assert (bench.out / QUEUE_LOCK).exists()
    assert states(bench.run(jobs)) == ["done", "done"]


def test_jobs_at_a_time_share_the_cores(bench, monkeypatch):
    bench.hold.touch()
    monkeypatch.setattr("dkl.build.reproduce.queue._num_cores", lambda: 8)
    jobs, most = bench.plan(seeds=(0, 1)), []

    def count(report: JobReport) -> None:
        latest[report.job.folder] = report.state
        most.append(sum(state in ("training", "measuring") for state in latest.values()))
        if most[-1] == 2 and bench.hold.exists():
            bench.wait_for(lambda: len(bench.calls()) == 2)
            bench.hold.unlink()

    latest: dict[Path, str] = {}
    assert states(bench.run(jobs, num_parallel=2, notify=count)) == ["done"] * 4
    assert max(most) == 2
    assert {call["threads"] for call in bench.calls()} == {"4"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    bench.run(bench.plan(seeds=(2,)), num_parallel=2)
    assert bench.calls()[-1]["threads"] == "3"


def test_no_job_starts_after_the_time_is_over(bench, monkeypatch):
    jobs = bench.plan(seeds=(0, 1))
    result = bench.run(jobs, hours=0.0)
    assert states(result) == ["waiting"] * 4
    assert not result.interrupted
    assert bench.calls() == []

    hours = [0.0]
    clock = SimpleNamespace(monotonic=lambda: 3600 * hours[0], sleep=time.sleep)
    monkeypatch.setattr("dkl.build.reproduce.queue.time", clock)

    def pass_time(report: JobReport) -> None:
        hours[0] += report.state == "training"

    result = bench.run(jobs, hours=1.5, notify=pass_time)
    assert states(result) == ["done", "done", "waiting", "waiting"]
    assert [report.seconds for report in result.reports] == [3600.0, 3600.0, None, None]


def test_folders_of_other_runs_are_refused_all_at_once(bench):
    jobs = bench.plan(seeds=(0, 1, 2))
    bench.run(jobs[:3])
    other = override(jobs[0].wanted, ["training.batch_size=32", "description=else"])
    (jobs[0].folder / "recipe.yaml").write_text(to_yaml(other))
    (jobs[1].folder / "recipe.yaml").unlink()
    (jobs[2].folder / "recipe.yaml").write_text("seed: nonsense")
    jobs[3].folder.mkdir(parents=True)
    (jobs[3].folder / "recipe.yaml").write_text(to_yaml(jobs[1].wanted))
    with pytest.raises(ValueError, match="move them away") as error:
        bench.run(jobs)
    lines = str(error.value).splitlines()[1:]
    size = jobs[0].wanted.training.batch_size
    assert f"{jobs[0].folder}: training.batch_size is 32, wanted {size}" in lines[0]
    assert lines[0].endswith(str(size))  # a description decides nothing
    assert f"{jobs[1].folder}: checkpoints without recipe.yaml" in lines[1]
    assert "is no recipe of this version" in lines[2]
    assert f"{jobs[3].folder}: its seed is 0, wanted 1" in str(error.value)


def test_a_run_that_differs_in_words_only_is_taken_as_it_is(bench):
    jobs = bench.plan({"a": ROWS["a"]})
    bench.run(jobs)
    reworded = override(jobs[0].wanted, ["description=else", "trackers=[]"])
    (jobs[0].folder / "recipe.yaml").write_text(to_yaml(reworded))
    assert states(bench.run(jobs)) == ["already done"]


def test_a_damaged_checkpoint_fails_alone(bench):
    jobs = bench.plan()
    bench.run(jobs)
    (jobs[0].folder / "checkpoints" / "last" / "meta.json").write_text("{")
    result = bench.run(jobs)
    assert states(result) == ["failed", "already done"]
    assert "damaged" in result.reports[0].message


def test_a_process_that_ends_well_without_finishing_is_a_failure(bench):
    bench.set(epochs=EPOCHS - 1)
    result = bench.run(bench.plan({"a": ROWS["a"]}))
    assert states(result) == ["failed"]
    assert "before the end of training" in result.reports[0].message


def test_what_is_measured_is_noted_for_these_weights_only(bench):
    job = bench.plan({"a": ROWS["a"]})[0]
    bench.run([job])
    assert is_done(job)
    meta = job.folder / "checkpoints" / "best" / "meta.json"
    changed = json.loads(meta.read_text()) | {"files": {"model": "other weights"}}
    meta.write_text(json.dumps(changed))
    assert not is_done(job)
    assert states(bench.run([job])) == ["done"]
    assert bench.order()[-1][0] == "evaluate"
