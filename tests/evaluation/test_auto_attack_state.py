"""An evaluation that was stopped goes on where it was, or not at all."""

import os
import sys

import pytest
import torch
from torch import nn

from dkl.evaluation import StateMismatchError, auto_attack
from dkl.evaluation.state import EvaluationState, hash_model, hash_tensors

SETTINGS = {"eps": 0.1, "version": "fast", "batch_size": 12, "return_adversarial": True}

pytestmark = pytest.mark.usefixtures("quick_attacks")


class StopHereError(Exception):
    pass


def run(problem, progress=None, **settings):
    return auto_attack(
        problem.model, problem.images, problem.labels, progress=progress, **SETTINGS | settings
    )


def same(first, second):
    assert torch.equal(first.robust, second.robust)
    assert torch.equal(first.clean_correct, second.clean_correct)
    assert torch.equal(first.predictions, second.predictions)
    assert torch.equal(first.adversarial, second.adversarial)
    for left, right in zip(first.attacks, second.attacks, strict=True):
        assert torch.equal(left.broken, right.broken)
        assert left.num_attacked == right.num_attacked
    assert first.notes == second.notes


def stop_after(num_batches):
    seen = []

    def progress(step):
        seen.append(step)
        if len(seen) == num_batches:
            raise StopHereError

    return progress


def test_every_stopping_point_gives_the_straight_result(digits, tmp_path):
    problem = digits.take(40)
    batches = []
    straight = run(problem, progress=batches.append)
    assert len(batches) >= 5
    for num_batches in range(1, len(batches) + 1):
        folder = tmp_path / str(num_batches)
        with pytest.raises(StopHereError):
            run(problem, state_dir=folder, progress=stop_after(num_batches))
        same(run(problem, state_dir=folder), straight)


def test_a_finished_evaluation_is_only_read(digits, tmp_path, monkeypatch):
    problem = digits.take(20)
    first = run(problem, state_dir=tmp_path)
    monkeypatch.setattr(
        sys.modules["dkl.evaluation.auto_attack"],
        "build_attack",
        lambda *_args, **_settings: pytest.fail,
    )
    again = run(problem, state_dir=str(tmp_path))
    same(first, again)
    assert [r.seconds for r in first.attacks] == [r.seconds for r in again.attacks]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"eps": 0.11}, "eps: 0.1 there, 0.11 here"),
        ({"norm": "L2"}, "norm"),
        ({"version": "standard"}, "version"),
        ({"batch_size": 13}, "batch_size: 12 there, 13 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"return_adversarial": False}, "return_adversarial"),
    ],
)
def test_other_settings_are_refused(digits, tmp_path, changed, name):
    run(digits.take(5), state_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StateMismatchError, match=name):
        run(digits.take(5), state_dir=tmp_path, **changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_weights_and_data_are_refused(digits, make_problem, tmp_path):
    run(digits.take(5), state_dir=tmp_path)
    with pytest.raises(StateMismatchError, match="data"):
        run(digits.take(6), state_dir=tmp_path)
    relabelled = make_problem(10, 5)
    relabelled.labels[0] += 1 - 2 * (relabelled.labels[0] > 5).long()
    with pytest.raises(StateMismatchError, match="data"):
        run(relabelled, state_dir=tmp_path)
    retrained = make_problem(10, 5)
    with torch.no_grad():
        retrained.model[1].weight[0, 0] += 1e-6
    with pytest.raises(StateMismatchError, match="weights"):
        run(retrained, state_dir=tmp_path)


def test_foreign_and_damaged_folders_are_refused(digits, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(StateMismatchError, match=r"thesis\.txt"):
        run(digits.take(5), state_dir=foreign)
    assert (foreign / "thesis.txt").read_text() == "precious"

    folder = tmp_path / "state"
    run(digits.take(5), state_dir=folder)
    batch = folder / "0-apgd-ce-00000.npz"
    whole = batch.read_bytes()
    batch.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateMismatchError, match="Delete this file"):
        run(digits.take(5), state_dir=folder)
    batch.unlink()
    same(run(digits.take(5), state_dir=folder), run(digits.take(5)))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StateMismatchError, match="cannot be read"):
        run(digits.take(5), state_dir=folder)


def test_batches_that_do_not_fit_are_refused(digits, tmp_path):
    state = EvaluationState(tmp_path, {"a": 1})
    state.save("x", {"indices": torch.arange(3)})
    folder = tmp_path / "state"
    run(digits.take(5), state_dir=folder)
    (folder / "0-apgd-ce-00000.npz").write_bytes((tmp_path / "x.npz").read_bytes())
    with pytest.raises(StateMismatchError, match="does not fit"):
        run(digits.take(5), state_dir=folder)


def test_a_failed_write_leaves_nothing_half_done(tmp_path, monkeypatch):
    state = EvaluationState(tmp_path, {"a": 1})
    state.save("x", {"flags": torch.ones(3)})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        state.save("x", {"flags": torch.zeros(3)})
    assert torch.equal(state.load("x")["flags"], torch.ones(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "x.npz"]
    assert state.load("y") is None


def test_hashes_see_what_matters():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert hash_model(model) == hash_model(model)
    smooth = nn.Sequential(model[0], nn.SiLU())
    assert hash_model(smooth) != hash_model(model)
    model.register_buffer("mean", torch.zeros(1), persistent=False)
    first = hash_model(model)
    model.mean += 1
    assert hash_model(model) != first
    assert hash_tensors(torch.zeros(2)) != hash_tensors(torch.zeros(2).int())
    assert hash_tensors(torch.ones(2).bfloat16()) != hash_tensors(torch.zeros(2).bfloat16())
    strided = torch.arange(6).reshape(2, 3).t()
    assert hash_tensors(strided) == hash_tensors(strided.contiguous())
