"""Our loop and the package's own evaluation give the same result, sample by sample."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

import pytest
import torch

from dkl.evaluation import auto_attack
from dkl.evaluation.auto_attack_phases import PhaseSettings, Plan, plan_phases

# The package's evaluation switches off tracers and reseeds generators: it gets its own process.
PACKAGE_EVALUATION = """
import sys
import torch
from pyautoattack import AutoAttack

cases, threads, out = torch.load(sys.argv[1], weights_only=False)
torch.set_num_threads(threads)
results = {}
for name, case in cases.items():
    ensemble = AutoAttack(
        case["model"].eval().requires_grad_(False), norm=case["norm"], eps=case["eps"],
        seed=case["seed"], version="standard",
    )
    ensemble.attacks_to_run = case["attacks"]
    # Under L1 the package's own number of targets stands: it is part of what is compared.
    if case["norm"] != "L1" or case["n_targets"] < 5:
        ensemble.apgd_targeted.n_target_classes = case["n_targets"]
    ensemble.fab.n_target_classes = case["n_targets"]
    ensemble.square.n_queries = case["n_queries"]
    results[name] = ensemble.run_standard_evaluation(
        case["images"], case["labels"], batch_size=case["batch_size"]
    )
torch.save(results, out)
"""

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


@dataclass(frozen=True)
class Case:
    num_classes: int
    norm: str
    eps: float
    attacks: tuple[str, ...] = STANDARD
    num_samples: int = 30
    batch_size: int = 20
    n_targets: int = 9
    n_queries: int = 200
    seed: int = 0
    whole_ensemble: bool = True


# The later attacks find little that the first ones left, so they are compared alone as well.
CASES = {
    "standard": Case(10, "Linf", 0.1, num_samples=60, batch_size=40, n_queries=5000),
    "standard-L2": Case(10, "L2", 0.5, n_queries=100, seed=3),
    "standard-L1": Case(10, "L1", 2.0, num_samples=20, n_queries=100),
    "5-classes-L1": Case(5, "L1", 2.5, num_samples=16, n_targets=4, n_queries=50),
    "fast": Case(10, "Linf", 0.12, attacks=STANDARD[:2], batch_size=15),
    "5-classes": Case(5, "Linf", 0.1, n_targets=4),
    "3-classes": Case(3, "Linf", 0.15, attacks=("apgd-ce", "fab", "square")),
    "2-classes": Case(2, "L2", 1.0, attacks=("apgd-ce", "fab", "square")),
    "apgd-t": Case(10, "Linf", 0.1, attacks=("apgd-t",), num_samples=16, whole_ensemble=False),
    "fab-t": Case(10, "Linf", 0.1, attacks=("fab-t",), num_samples=16, whole_ensemble=False),
    "fab-t-L2": Case(10, "L2", 0.5, attacks=("fab-t",), num_samples=16, whole_ensemble=False),
    "fab-t-L1": Case(10, "L1", 2.0, attacks=("fab-t",), num_samples=16, whole_ensemble=False),
    "square": Case(10, "Linf", 0.12, attacks=("square",)),
    "square-L2": Case(10, "L2", 0.7, attacks=("square",)),
    "square-L1": Case(10, "L1", 4.0, attacks=("square",)),
}


@pytest.fixture(scope="module")
def package_results(tmp_path_factory, train_problem):
    folder = tmp_path_factory.mktemp("package")
    cases = {}
    for name, case in CASES.items():
        problem = train_problem(case.num_classes).take(case.num_samples)
        cases[name] = {
            "model": problem.model,
            "images": problem.images,
            "labels": problem.labels,
            "norm": case.norm,
            "eps": case.eps,
            "attacks": list(case.attacks),
            "n_targets": case.n_targets,
            "n_queries": case.n_queries,
            "batch_size": case.batch_size,
            "seed": case.seed,
        }
    torch.save((cases, torch.get_num_threads(), folder / "out.pt"), folder / "in.pt")
    subprocess.run(
        [sys.executable, "-c", PACKAGE_EVALUATION, str(folder / "in.pt")], check=True, timeout=250
    )
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_package_sample_by_sample(name, package_results, make_problem, monkeypatch):
    case = CASES[name]
    module = sys.modules["dkl.evaluation.auto_attack"]
    if case.whole_ensemble:
        monkeypatch.setattr("dkl.evaluation.auto_attack_phases.SQUARE_QUERIES", case.n_queries)
    else:
        alone = PhaseSettings(
            case.attacks[0],
            n_targets=case.n_targets if case.attacks[0].endswith("-t") else None,
        )
        monkeypatch.setattr(module, "plan_phases", lambda *_: Plan((alone,), True, ()))
    problem = make_problem(case.num_classes, case.num_samples)
    result = auto_attack(
        problem.model,
        problem.images,
        problem.labels,
        eps=case.eps,
        norm=case.norm,
        version={"fast": "fast", "square": "square"}.get(name.split("-")[0], "standard"),
        batch_size=case.batch_size,
        seed=case.seed,
        return_adversarial=True,
    )
    adversarial, predictions = package_results[name]
    assert tuple(record.name for record in result.attacks) == case.attacks
    assert torch.equal(result.robust, predictions == problem.labels)
    assert torch.equal(result.predictions, predictions)
    assert torch.equal(result.adversarial, adversarial)
    # Where nothing or everything breaks, equality would say little.
    assert 0 < result.robust.sum() < result.clean_correct.sum()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_standard_settings_are_the_package_s(norm):
    """The numbers of restarts, targets and queries are the ones the package sets."""
    from pyautoattack import AutoAttack

    ensemble = AutoAttack(torch.nn.Identity(), version="standard", eps=0.1, norm=norm)
    by_name = {phase.name: phase for phase in plan_phases("standard", 10, norm).phases}
    assert by_name["apgd-ce"].shrinks_radius == ensemble.apgd.use_largereps
    assert by_name["apgd-t"].shrinks_radius == ensemble.apgd_targeted.use_largereps
    assert list(by_name) == ensemble.attacks_to_run
    assert by_name["apgd-ce"].n_restarts == ensemble.apgd.n_restarts
    assert by_name["apgd-t"].n_restarts == ensemble.apgd_targeted.n_restarts
    assert by_name["apgd-t"].n_targets == ensemble.apgd_targeted.n_target_classes
    assert by_name["fab-t"].n_restarts == ensemble.fab.n_restarts
    assert by_name["fab-t"].n_targets == ensemble.fab.n_target_classes
    assert by_name["square"].n_queries == ensemble.square.n_queries
    assert by_name["square"].n_restarts == ensemble.square.n_restarts


def test_canary_the_package_is_the_version_that_was_checked():
    """A new version must be read and compared before it may be pinned."""
    import pyautoattack

    assert pyautoattack.__version__ == "0.2.0"
    assert version("pyautoattack") == "0.2.0"
