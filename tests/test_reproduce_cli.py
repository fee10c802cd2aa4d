"""The command ``dkl reproduce``."""

import json
import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from rich.table import Table
from typer.testing import CliRunner

from dkl.build import reproduce as engine
from dkl.build.reproduce import EXPERIMENTS, Row
from dkl.build.reproduce.measure import StepCost
from dkl.cli.errors import Commands, common_options
from dkl.cli.reproduce import reproduce
from dkl.config import load_recipe, to_yaml

STUB = Path(__file__).parent / "build" / "reproduce_stub.py"
EPOCHS = ("training.epochs=3",)
ROWS = {"kl": Row("digits_trades", EPOCHS), "ikl": Row("digits_ikl_at", EPOCHS)}

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.callback()(common_options)
app.command()(reproduce)
app.command("other")(lambda: None)


class Paper:
    """Stands in for a table of ``dkl.reports``."""

    def __init__(self, name, runs, *, baseline=None):
        self.name, self.baseline = name, baseline
        self.rows = {key: [run.seed for run in of_row] for key, of_row in runs.items()}

    def to_json(self):
        return json.dumps({"rows": self.rows, "baseline": self.baseline})

    def to_markdown(self):
        return "| row |"

    def to_rich(self):
        table = Table(f"{self.name}: {self.rows}")
        return table


class Stage:
    """Small rows of digits, and stand-ins for ``dkl train``, ``dkl evaluate`` and the reports."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.out, self.scratch = folder / "out", folder / "scratch"
        (self.scratch / "recipes").mkdir(parents=True)
        self.set()
        self.reports = []
        command = [sys.executable, "-S", str(STUB), str(self.scratch)]
        real, rows = engine.plan_jobs, {"small": ROWS, "paper": ROWS}

        def plan_jobs(*arguments, **options):
            jobs = real(*arguments, **options)
            for job in jobs:
                file = self.scratch / "recipes" / f"{job.name}-{job.folder.name}.yaml"
                file.write_text(to_yaml(job.wanted))
            return jobs

        def write_report(runs, path, *, experiments):
            self.reports.append((len(runs), path.name, list(experiments)))

        monkeypatch.chdir(folder)
        monkeypatch.setitem(EXPERIMENTS, "robust-ablation", rows)
        monkeypatch.setattr(engine, "plan_jobs", plan_jobs)
        queue = partial(engine.run_queue, command=command, poll_seconds=0.01)
        monkeypatch.setattr(engine, "run_queue", queue)
        monkeypatch.setattr("dkl.reports.paper_table", Paper, raising=False)
        monkeypatch.setattr("dkl.reports.write_report", write_report)

    def set(self, **settings) -> None:
        settings = {"epochs": 3, "fail": [], "stubborn": False} | settings
        (self.scratch / "settings.json").write_text(json.dumps(settings))

    def order(self):
        file = self.scratch / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()]
        return [
            call["run"] for call in calls if (call["event"], call["verb"]) == ("begin", "train")
        ]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    return Stage(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _logging_as_before():
    logger = logging.getLogger("dkl")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers, logger.level = before


def run(*words, code=0, **options):
    words = ["reproduce", *map(str, words)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120"}, **options)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def plain(text):
    """Join what the terminal wrapped and boxed."""
    return " ".join(text.replace("\u2502", " ").split())


def names(rows, seeds):
    jobs = engine.plan_jobs(rows, seeds=seeds, out=Path("out"))
    return [f"{job.name}/{job.folder.name}" for job in jobs]


def test_an_experiment_is_run_and_shown(stage):
    result = run("robust-ablation", "--seeds", "0,1")
    folder = Path("runs/reproduce-small")
    assert stage.order() == names(ROWS, [0, 1])
    assert "robust-ablation: {'kl': [0, 1], 'ikl': [0, 1]}" in plain(result.stdout)
    assert "training" in result.stderr
    assert "of 4 runs" in result.stderr
    assert (folder / "robust-ablation.md").read_text() == "| row |\n"
    saved = json.loads((folder / "robust-ablation.json").read_text())
    assert saved == {"rows": {"kl": [0, 1], "ikl": [0, 1]}, "baseline": "kl"}
    assert stage.reports == [(4, "robust-ablation.html", ["robust-ablation"])]
    again = run("robust-ablation", "--seeds", "0,1")
    assert len(stage.order()) == 4
    assert again.stderr.count("already done") == 4


def test_some_rows_are_trained_and_all_that_is_there_is_shown(stage):
    run("robust-ablation", "--seeds", "0", "--only", "ikl", "--out", "here")
    assert stage.order() == names({"ikl": ROWS["ikl"]}, [0])
    assert json.loads(Path("here/robust-ablation.json").read_text())["baseline"] is None
    result = run("robust-ablation", "--seeds", "0", "--only", "kl", "--out", "here", "--json")
    document = json.loads(result.stdout)
    assert document["table"] == {"rows": {"kl": [0], "ikl": [0]}, "baseline": "kl"}
    assert [(job["rows"], job["seed"], job["state"]) for job in document["jobs"]] == [
        (["kl"], 0, "done")
    ]


def test_the_table_alone_trains_and_writes_nothing(stage):
    result = run("robust-ablation", "--table", "--out", "here")
    assert "Nothing is measured yet in here" in plain(result.stderr)
    assert not Path("here").exists()
    run("robust-ablation", "--seeds", "0", "--only", "kl", "--out", "here")
    Path("here/robust-ablation.md").unlink()
    result = run("robust-ablation", "--table", "--out", "here")
    assert "{'kl': [0]}" in plain(result.stdout)
    assert "Rows without a measured run: ikl" in plain(result.stderr)
    assert len(stage.order()) == 1
    assert not Path("here/robust-ablation.md").exists()


def test_failures_are_told_with_their_last_words(stage):
    first, second = names(ROWS, [0])
    stage.set(fail=[first])
    result = run("robust-ablation", "--seeds", "0", code=1)
    assert stage.order() == [first, second]
    assert f"Failed: runs/reproduce-small/{first}" in plain(result.stderr)
    assert "the loss is not finite" in result.stderr
    assert "Failed runs: 1" in result.stderr
    assert "{'ikl': [0]}" in plain(result.stdout)


def test_a_damaged_checkpoint_fails_alone(stage):
    run("robust-ablation", "--seeds", "0")
    damaged = Path("runs/reproduce-small") / names(ROWS, [0])[0]
    (damaged / "checkpoints" / "last" / "meta.json").write_text("{")
    result = run("robust-ablation", "--seeds", "0", code=1)
    assert "is damaged or incomplete" in plain(result.stderr)
    assert "already done" in result.stderr


def test_time_that_is_over_is_no_error(stage):
    result = run("robust-ablation", "--seeds", "0", "--hours", "0")
    assert "Runs left: 2" in result.stderr
    assert not (stage.scratch / "calls.jsonl").exists()


def test_an_interrupted_queue_says_how_to_go_on(stage, monkeypatch):
    queue = engine.run_queue

    def interrupted(*arguments, notify, **options):
        def interrupt(report):
            notify(report)
            if report.state == "measuring" and report.job.rows == ("kl",):
                os.kill(os.getpid(), signal.SIGTERM)

        return queue(*arguments, notify=interrupt, **options)

    monkeypatch.setattr(engine, "run_queue", interrupted)
    result = run("robust-ablation", "--seeds", "0", code=130)
    assert "runs that save a checkpoint first: 1" in plain(result.stderr)
    assert "the same command goes on" in plain(result.stderr)
    monkeypatch.setattr(engine, "run_queue", queue)
    run("robust-ablation", "--seeds", "0")
    assert stage.order() == names(ROWS, [0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("robust-ablations",), "there are: robust-ablation"),
        (("robust-ablation", "--only", "kl,trades"), "no such rows: trades; there are kl, ikl"),
        (("robust-ablation", "--seeds", "0,0"), "different whole numbers"),
        (("robust-ablation", "--scale", "large"), "'large' is not one of"),
        (("robust-ablation", "training.epoch=2"), "'epochs'"),
        (("robust-ablation", "--jobs", "0"), "--jobs"),
    ],
)
def test_bad_usage(stage, words, message):
    if words[-1] == "training.epoch=2":
        rows = {"kl": Row("digits_trades")}
        EXPERIMENTS["robust-ablation"] = {"small": rows, "paper": rows}
    assert message in plain(run(*words, code=2).stderr)


def test_a_folder_of_another_run_is_an_error_before_anything_runs(stage):
    job = engine.plan_jobs(ROWS, seeds=[0], out=Path("here"))[0]
    job.folder.mkdir(parents=True)
    other = load_recipe("digits_trades", [*EPOCHS, "method.beta=1"])
    (job.folder / "recipe.yaml").write_text(to_yaml(other))
    result = run("robust-ablation", "--out", "here", code=1)
    assert "move them away" in plain(result.stderr)
    assert str(job.folder) in plain(result.stderr)
    assert not (stage.scratch / "calls.jsonl").exists()


def test_torchrun_is_refused(stage, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in run("robust-ablation", code=1).stderr


# Scale paper


COST = StepCost(0.5, 0.001, 0.003, 2**30, 64, True, "cpu")


@pytest.fixture
def paper(stage, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        engine, "estimate_jobs", partial(engine.estimate_jobs, measure=lambda _: COST)
    )
    monkeypatch.setattr(engine, "check_disk", lambda out, needed: [])
    return stage


def test_full_scale_names_the_recipes_estimates_and_asks(paper):
    words = ("robust-ablation", "--scale", "paper", "--on-cpu", "--seeds", "0,1,2")
    result = run(*words, code=3)
    text = plain(result.stdout)
    assert "kl digits_trades digits convnet_small 3 training.epochs=3" in text
    assert "ikl digits_ikl_at digits convnet_small 3" in text
    assert "500" in text  # ms a step
    assert "Measuring a few steps of digits_trades" in result.stderr
    assert "runs/reproduce-paper" in plain(result.stderr)
    assert "18.1 GiB" in plain(result.stderr)  # 6 runs of 3 checkpoints and their records
    assert "--yes starts it" in plain(result.stderr)
    assert not (paper.scratch / "calls.jsonl").exists()
    result = run(*words, "--yes", "--json")
    assert len(json.loads(result.stdout)["jobs"]) == 6
    # What is there needs neither estimate nor consent.
    assert "Measuring" not in run(*words).stderr


def test_full_scale_tells_everything_that_is_missing_at_once(paper, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(paper.scratch))
    rows = {"kl": Row("digits_trades", (*EPOCHS, "data.name=cifar100", "data.download=false"))}
    monkeypatch.setitem(EXPERIMENTS, "robust-ablation", {"paper": rows, "small": rows})
    result = run("robust-ablation", "--scale", "paper", "--yes", code=1)
    assert "CIFAR-100 was not found" in plain(result.stderr)
    assert "no CUDA device was found; --on-cpu" in plain(result.stderr)
    assert "CIFAR-100 was not found" in plain(run("robust-ablation", code=1).stderr)


def test_a_full_disk_is_told_after_the_estimate(paper, monkeypatch):
    monkeypatch.setattr(engine, "check_disk", lambda out, needed: [f"needs {needed > 2**34}"])
    words = ("robust-ablation", "--scale", "paper", "--on-cpu", "--yes")
    assert "needs True" in run(*words, code=1).stderr


# The whole way, with real processes


TINY = (
    "training.epochs=1",
    "training.batch_size=32",
    "data.train_limit=64",
    "model.kwargs={width: 4}",
    "trackers=[]",
    "evaluation.num_images=8",
    "evaluation.pgd_steps=[2]",
    "evaluation.cw_steps=[]",
    "evaluation.auto_attack=null",
    "evaluation.sweep=[]",
    "evaluation.validation_attack_steps=1",
    "method.attack.num_steps=2",
    "method.attack.step_size=0.1",
)

SCRIPT = """
import sys
import typer
from dkl.build.reproduce import EXPERIMENTS, Row
from dkl.cli.errors import Commands, common_options
from dkl.cli.reproduce import reproduce

rows = {"kl": Row("digits_trades"), "ikl": Row("digits_ikl_at")}
EXPERIMENTS["robust-ablation"] = {"small": rows, "paper": rows}
app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.callback()(common_options)
app.command()(reproduce)
app.command("other")(lambda: None)
app()
"""


def process(folder, *words):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "reproduce", "robust-ablation", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_tiny_experiment_runs_once_in_real_processes(tmp_path):
    words = ("--seeds", "0,1", "--jobs", "2", *TINY)
    first = process(tmp_path, *words)
    assert first.stderr.count("done") == 4
    out = tmp_path / "runs" / "reproduce-small"
    runs = sorted(path.parent for path in out.glob("*/seed_*/results.jsonl"))
    assert [run.name for run in runs] == ["seed_0", "seed_1"] * 2
    for one in runs:
        metrics = [json.loads(line)["metric"] for line in (one / "results.jsonl").open()]
        assert {"clean_accuracy", "pgd_2_accuracy"} <= set(metrics)
    assert {path.suffix for path in out.glob("robust-ablation.*")} == {".md", ".json", ".html"}
    before = files(out / runs[0].parent.name)
    second = process(tmp_path, *words)
    assert second.stderr.count("already done") == 4
    assert files(out / runs[0].parent.name) == before
    assert second.stdout == first.stdout
