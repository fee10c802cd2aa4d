"""The benchmark of AutoAttack times two evaluations only if they agree on every sample."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from dkl import config
from dkl.bench import evaluate
from dkl.bench.evaluate import OURS, PACKAGE, EvaluateBench, run
from dkl.bench.evaluate_sides import (
    FlagMismatchError,
    Subject,
    load_subject,
    our_evaluation,
    package_evaluation,
)
from dkl.bench.evaluate_workers import Workers, workers
from dkl.bench.rows import BenchRow
from dkl.bench.steps import torch_threads
from dkl.build.training import train_recipe

pyautoattack = pytest.importorskip("pyautoattack", reason="the benchmark's peer is not installed")
AT_FULL_STRENGTH = pyautoattack.AutoAttack


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Both sides build their attacks from this class: few steps and queries in either."""

    class FewSteps(pyautoattack.AutoAttack):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.apgd.n_iter = self.apgd_targeted.n_iter = 10
            self.fab.n_iter = 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyautoattack, "AutoAttack", FewSteps)
        patch.setattr("dkl.evaluation.auto_attack_phases.SQUARE_QUERIES", 30)
        yield


@pytest.fixture(scope="module")
def trained():
    """Return a small convolutional network, trained in a moment, with unseen images."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
        for _ in range(30):
            noisy = (images[100:] + 0.1 * torch.randn_like(images[100:])).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(noisy), labels[100:]).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), images[:30].contiguous(), labels[:30]


@pytest.fixture(scope="module")
def subject(trained):
    model, images, labels = trained
    settings = {"recipe": {"name": "tiny"}, "weights_hash": "0"}
    return Subject(model, images, labels, 0.1, "Linf", "standard", 12, 0, settings)


@pytest.fixture(scope="module")
def rows(subject):
    return EvaluateBench(subject).rows(rounds=2)


def by_metric(rows, metric):
    return {row.method: row.value for row in rows if row.metric == metric}


def test_both_find_the_same_with_all_four_attacks(rows):
    assert rows[0].settings["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert by_metric(rows, "flags_differing") == {OURS: 0.0, f"{OURS}, channels_last": 0.0}
    assert by_metric(rows, "predictions_differing") == {OURS: 0.0, f"{OURS}, channels_last": 0.0}
    robust = by_metric(rows, "robust_accuracy")
    assert robust[OURS] == robust[PACKAGE]
    # Where nothing or everything breaks, equality would say little.
    assert 0 < robust[OURS] < rows[0].settings["clean_accuracy"]
    shares = by_metric(rows, "share")
    assert sum(share for name, share in shares.items() if "channels_last" not in name) == (
        pytest.approx(1.0)
    )


def test_rows_are_complete(rows):
    times = [row for row in rows if row.metric == "time"]
    assert [row.method for row in times] == [
        PACKAGE,
        OURS,
        f"{PACKAGE}, channels_last",
        f"{OURS}, channels_last",
    ]
    for row in times:
        assert row.baseline == PACKAGE
        assert (row.repeats, row.unit) == (2, "s")
        assert row.value > 0
    assert times[0].ratio == 1.0
    assert set(by_metric(rows, "ratio_to_package_in_this_format")) == {f"{OURS}, channels_last"}
    assert set(by_metric(rows, "flags_differing_from_contiguous")) == {f"{OURS}, channels_last"}
    for row in rows:
        assert row.table == "evaluate"
        assert row.case == "tiny, 30 images 1x8x8, standard AutoAttack"
        assert {"eps", "norm", "seed", "threads", "batch_size"} <= set(row.settings)
        assert row.origin["settings_hash"] == rows[0].origin["settings_hash"]
        assert BenchRow.from_json(row.to_json()) == row


def test_memory_format_is_left_out_where_there_are_no_convolutions(subject):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    assert list(EvaluateBench(replace(subject, model=linear)).functions) == [PACKAGE, OURS]
    assert list(EvaluateBench(subject, channels_last=False).functions) == [PACKAGE, OURS]


@pytest.mark.parametrize("field", ["robust", "predictions"])
def test_one_altered_sample_of_the_package_is_an_error(subject, monkeypatch, field):
    def altered(subject):
        found = package_evaluation(subject)
        values = getattr(found, field).clone()
        values[7] = not values[7] if field == "robust" else (values[7] + 1) % 10
        return replace(found, **{field: values})

    monkeypatch.setattr(evaluate, "package_evaluation", altered)
    with pytest.raises(FlagMismatchError, match=rf"'{field}' in 1 of 30 samples, \[7\]"):
        EvaluateBench(subject, channels_last=False).rows(rounds=1)


def test_one_altered_sample_of_ours_is_an_error(subject, monkeypatch):
    def altered(subject):
        result = our_evaluation(subject)
        robust = result.robust.clone()
        robust[3] = ~robust[3]
        return replace(result, robust=robust)

    monkeypatch.setattr(evaluate, "our_evaluation", altered)
    with pytest.raises(FlagMismatchError, match=rf"{PACKAGE} and {OURS} .*\[3\]: sample 3"):
        EvaluateBench(subject, channels_last=False).rows(rounds=1)


def test_a_side_that_changes_its_mind_is_an_error(subject, monkeypatch):
    calls = iter(range(10))

    def fickle(subject):
        finding = package_evaluation(subject)
        return replace(finding, predictions=(finding.predictions + next(calls)) % 10)

    monkeypatch.setattr(evaluate, "package_evaluation", fickle)
    with pytest.raises(FlagMismatchError):
        EvaluateBench(subject, channels_last=False).rows(rounds=1)


def test_the_package_leaves_no_traces(subject):
    def tracer(_frame, _event, _argument):
        return None

    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    state = torch.get_rng_state()
    outer = sys.gettrace()
    sys.settrace(tracer)
    try:
        package_evaluation(subject)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(outer)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in subject.model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    changes = [*evaluate.QUICK_TRAINING, "data.train_limit=200"]
    train_recipe(config.load_recipe(evaluate.RECIPE, changes), folder)
    return folder


def test_a_run_is_evaluated_as_its_recipe_says(run_folder):
    subject = load_subject(run_folder, num_images=9, version="fast", seed=4)
    assert (subject.eps, subject.norm, subject.seed) == (0.1, "Linf", 4)
    assert subject.batch_size == 256
    assert subject.images.shape == (9, 1, 8, 8)
    assert (subject.images.dtype, float(subject.images.max())) == (torch.float32, 1.0)
    changed = load_subject(run_folder, num_images=9, version="fast", epsilon="51/255", batch_size=4)
    assert (changed.eps, changed.batch_size) == (0.2, 4)
    assert changed.settings["weights_hash"] == subject.settings["weights_hash"]


def test_what_cannot_be_evaluated_is_refused(run_folder, tmp_path):
    with pytest.raises(ValueError, match="from 1 to 355"):
        load_subject(run_folder, num_images=356, version="fast")
    with pytest.raises(ValueError, match="neither a run nor inside one"):
        run(quick=True, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="rounds >= 1"):
        run(quick=True, checkpoint=run_folder, rounds=0)


def test_the_whole_benchmark_of_a_run(run_folder):
    told = []
    state = torch.get_rng_state()
    rows = run(
        quick=True,
        checkpoint=run_folder,
        rounds=1,
        num_images=12,
        epsilon=0.05,
        progress=told.append,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert by_metric(rows, "flags_differing") == {OURS: 0.0}
    assert rows[0].settings["eps"] == 0.05
    assert rows[0].settings["attacks"] == ["apgd-ce", "apgd-t"]
    assert len(told) == 1


def test_without_a_run_a_model_is_trained_first():
    told = []
    rows = run(quick=True, rounds=1, seed=3, progress=told.append)
    assert "training digits_trades for 6 epochs" in told[0]
    assert rows[0].settings["recipe"]["seed"] == rows[0].settings["seed"] == 3
    assert rows[0].settings["clean_accuracy"] > 0.5
    robust = by_metric(rows, "robust_accuracy")
    assert 0 < robust[OURS] < 1
    assert by_metric(rows, "flags_differing") == {OURS: 0.0}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_processes_that_share_the_work_find_the_same(subject, monkeypatch):
    monkeypatch.setattr(pyautoattack, "AutoAttack", AT_FULL_STRENGTH)  # as it is in new processes
    few = replace(
        subject,
        images=subject.images[:4],
        labels=subject.labels[:4],
        version="fast",
        batch_size=2,
        eps=0.05,
    )
    bench = EvaluateBench(few, channels_last=False)
    with ExitStack() as stack:
        with torch_threads(2):  # of which each process gets one
            team = stack.enter_context(workers(few, 2))
        bench.add_workers(team, 2)
        rows = bench.rows(rounds=1)
    shared = f"{OURS}, 2 processes"
    assert by_metric(rows, "flags_differing") == {OURS: 0.0, shared: 0.0}
    assert set(by_metric(rows, "time")) == {PACKAGE, OURS, shared}
    assert 0 < by_metric(rows, "robust_accuracy")[shared] < 1


def test_a_process_that_fails_is_an_error():
    own, other = Pipe()
    team = Workers([own])
    other.send(RuntimeError("ValueError: labels must be in [0, 10)"))
    with pytest.raises(RuntimeError, match="failed: ValueError: labels"):
        team.evaluate()
    other.close()
    with pytest.raises(RuntimeError, match="is gone"):
        team.wait_until_ready()


@pytest.mark.parametrize(
    ("batch_size", "threads", "message"),
    [(16, 2, "batch_size of at most 15"), (2, 1, "at least as many threads")],
)
def test_processes_that_cannot_share_fairly_are_refused(subject, batch_size, threads, message):
    changed = replace(subject, batch_size=batch_size)
    with torch_threads(threads), pytest.raises(ValueError, match=message), workers(changed, 2):
        pass
