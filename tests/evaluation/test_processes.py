"""Two processes that share an evaluation give the result of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dkl.evaluation import (
    auto_attack,
    epsilon_sweep,
    masking_checks,
    pgd_robust,
    predict_logits,
    transfer_robust,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")

SETTINGS = {"eps": 0.12, "version": "standard", "batch_size": 12, "return_adversarial": True}

# What each process does, and what one process does alone.
OTHERS = {
    "pgd": lambda *data, **how: pgd_robust(*data, eps=0.12, num_steps=5, batch_size=12, **how),
    "transfer": lambda model, *data, **how: transfer_robust(
        model, model, *data, eps=0.12, num_steps=3, batch_size=12, **how
    ),
    "sweep": lambda *data, **how: (
        epsilon_sweep(*data, [0.1, 0.15], num_steps=3, batch_size=12, **how).robust
    ),
    "sweep_auto_attack": lambda *data, **how: (
        epsilon_sweep(*data, [0.1, 0.15], attack="auto_attack", batch_size=12, **how).robust
    ),
    "logits": lambda model, images, _labels, **how: predict_logits(
        model, images, batch_size=12, **how
    ),
    "masking": lambda *data, **how: masking_checks(*data, eps=0.12, batch_size=12, **how),
}

# Weaker attacks, as the fixture `quick_attacks` makes them in this process.
WORKER = """
import sys
from pathlib import Path

import pyautoattack
import torch
import torch.distributed as dist

from dkl.evaluation import auto_attack, auto_attack_phases

class QuickAutoAttack(pyautoattack.AutoAttack):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 10
        self.fab.n_iter = 5

rank, folder, case = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
pyautoattack.AutoAttack = QuickAutoAttack
auto_attack_phases.SQUARE_QUERIES = 30
model, images, labels, settings, threads = torch.load(folder / "in.pt", weights_only=False)
torch.set_num_threads(threads)
dist.init_process_group(
    "gloo", init_method=(folder / f"store_{case}").as_uri(), rank=rank, world_size=2
)
seen, refusal, result = [], "", None
if case == "state":
    settings["state_dir"] = folder / "state"
if case == "unlike" and rank == 1:
    model[1].bias.data[0] += 1.0
try:
    if case == "others":
        sys.path.insert(0, settings.pop("tests"))
        from test_processes import OTHERS

        result = {
            name: run(model, images, labels, distributed=True) for name, run in OTHERS.items()
        }
    else:
        result = auto_attack(
            model, images, labels, distributed=True, progress=seen.append, **settings
        )
except ValueError as error:
    refusal = str(error)
torch.save((result, len(seen), refusal), folder / f"{case}_{rank}.pt")
dist.destroy_process_group()
"""


def run_two(problem, folder, case):
    """Run the worker in two processes; return what each got, saw and was told."""
    settings = SETTINGS | ({"tests": str(Path(__file__).parent)} if case == "others" else {})
    inputs = problem.model, problem.images, problem.labels, settings, torch.get_num_threads()
    torch.save(inputs, folder / "in.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"{case}_{rank}.pt", weights_only=False) for rank in range(2)]


def alone(problem, **settings):
    return auto_attack(problem.model, problem.images, problem.labels, **SETTINGS | settings)


def same(first, second):
    for name in ("robust", "clean_correct", "predictions", "adversarial"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for left, right in zip(first.attacks, second.attacks, strict=True):
        assert torch.equal(left.broken, right.broken)
        assert left.num_attacked == right.num_attacked
    assert first.notes == second.notes


@pytest.mark.usefixtures("quick_attacks")
def test_two_processes_get_the_result_of_one(digits, tmp_path):
    problem = digits.take(40)
    batches = []
    expected = alone(problem, progress=batches.append)
    assert len(batches) >= 8
    assert 0 < expected.robust.sum() < expected.clean_correct.sum()
    (first, seen_first, _), (second, seen_second, _) = run_two(problem, tmp_path, "plain")
    same(first, expected)
    same(second, expected)
    # The work was shared, not done twice.
    assert seen_first + seen_second == len(batches)
    assert min(seen_first, seen_second) > 0


@pytest.mark.usefixtures("quick_attacks")
def test_one_process_takes_up_what_two_began(digits, tmp_path):
    problem = digits.take(40)
    run_two(problem, tmp_path, "state")
    saved = {path: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()}
    same(alone(problem, state_dir=tmp_path / "state"), alone(problem))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()} == saved


@pytest.mark.usefixtures("quick_attacks")
def test_every_measurement_can_be_shared(digits, tmp_path):
    problem = digits.take(40)
    data = (problem.model, problem.images, problem.labels)
    expected = {name: run(*data) for name, run in OTHERS.items()}
    assert 0 < expected["pgd"].sum() < 40
    for found, _, refusal in run_two(problem, tmp_path, "others"):
        assert refusal == ""
        assert found["masking"] == expected["masking"]
        for name in set(OTHERS) - {"masking"}:
            assert torch.equal(found[name], expected[name]), name


def test_processes_with_different_weights_are_refused(digits, tmp_path):
    for result, _, refusal in run_two(digits.take(20), tmp_path, "unlike"):
        assert result is None
        assert "weights differ" in refusal


@pytest.mark.usefixtures("quick_attacks")
def test_what_fails_in_the_first_process_ends_the_others_too(digits, tmp_path):
    """The folder is refused by the process that opens it; the other is told and does not wait."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes.txt").write_text("not a state")
    (_, _, own), (_, _, told) = run_two(digits.take(20), tmp_path, "state")
    assert "not the state of an evaluation" in own
    assert "the first of 2 processes failed: StateMismatchError" in told


def test_sharing_needs_a_process_group(digits):
    with pytest.raises(ValueError, match="init_process_group"):
        alone(digits.take(4), distributed=True)
