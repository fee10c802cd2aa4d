"""How long an experiment will take and how much disk, from measured steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dkl import config
from dkl.build.reproduce.folders import is_done, seems_trained
from dkl.build.reproduce.jobs import Job
from dkl.build.reproduce.measure import StepCost, cost_key, measure_step
from dkl.build.reproduce.preflight import DataFacts, data_key, steps_per_epoch

# Share of test images that the paper's IKL-AT classifies right, clean and under AutoAttack: the
# attacks go on with those that are still right, so that the time depends on them.
_ACCURACY = {"cifar100": (0.66, 0.32), "cifar10": (0.85, 0.57)}
_OTHER_ACCURACY = (0.9, 0.6)

# Passes of standard AutoAttack for an image that withstands it: forward with gradient, forward.
_APGD_CE = (101, 0)
_APGD_T = (9 * 101, 9)
_FAB_T = (9 * 100, 9 * 100)
_SQUARE = (0, 5000)

# The checks for masked gradients: PGD-10, PGD-100 twice, CW-100.
_MASKING_STEPS = 310
_MOST_CLASSES = 20  # whose features are kept

# Best and last are kept, and a third one exists while it is written.
_CHECKPOINTS = 3
_RECORDS_BYTES = 20 * 2**20
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class JobEstimate:
    """What one run of a recipe is expected to take.

    Args:
        name: the recipe, with a hash where it is changed.
        num_runs: runs that are left, one a seed.
        training_seconds: of one run.
        evaluation_seconds: of one run; AutoAttack most of all.
        disk_bytes: of one run.
        cost: what it was worked out from.
    """

    name: str
    num_runs: int
    training_seconds: float
    evaluation_seconds: float
    disk_bytes: int
    cost: StepCost

    @property
    def total_seconds(self) -> float:
        """Seconds of all runs, one after the other."""
        return self.num_runs * (self.training_seconds + self.evaluation_seconds)

    @property
    def total_bytes(self) -> int:
        """Disk of all runs."""
        return self.num_runs * self.disk_bytes


Measure = Callable[[config.Recipe], StepCost]


def estimate_jobs(
    jobs: Sequence[Job],
    facts: dict[str, DataFacts],
    *,
    measure: Measure = measure_step,
    progress: Callable[[str], None] = lambda _: None,
) -> list[JobEstimate]:
    """Estimate the jobs that are left, measuring each distinct kind of step once.

    A run that is half trained counts as a whole one, one that is trained for its evaluation only.

    Args:
        jobs: of all seeds.
        facts: what ``check_data`` returned.
        measure: times steps of a recipe.
        progress: told the name of the recipe that is measured.

    Returns:
        One estimate for each recipe that is left.
    """
    costs: dict[str, StepCost] = {}
    found: dict[str, JobEstimate] = {}
    for job in jobs:
        if is_done(job):
            continue
        key = cost_key(job.wanted)
        if key not in costs:
            progress(job.wanted.name)
            costs[key] = measure(job.wanted)
        trained = seems_trained(job)
        one = _estimate_job(job, facts[data_key(job.wanted)], costs[key], trained)
        label = f"{job.name} (trained)" if trained else job.name
        before = found.get(label)
        number = 1 if before is None else before.num_runs + 1
        found[label] = JobEstimate(label, number, *one, costs[key])
    return list(found.values())


def _estimate_job(
    job: Job, facts: DataFacts, cost: StepCost, trained: bool
) -> tuple[float, float, int]:
    recipe = job.wanted
    evaluations = [config.override(recipe, one).evaluation for one in job.evaluations]
    measuring = sum(
        evaluation_seconds(one, facts.num_test, recipe.data.name, cost) for one in evaluations
    )
    if trained:
        return 0.0, measuring, _features_bytes(evaluations, cost)
    return training_seconds(recipe, facts, cost), measuring, disk_bytes(evaluations, cost)


def disk_bytes(evaluations: Sequence[config.EvaluationSettings], cost: StepCost) -> int:
    """Return what a run leaves on the disk: checkpoints, records and features."""
    features = _features_bytes(evaluations, cost)
    return _CHECKPOINTS * cost.checkpoint_bytes + features + _RECORDS_BYTES


def _features_bytes(evaluations: Sequence[config.EvaluationSettings], cost: StepCost) -> int:
    kept = max(num_features_kept(one) for one in evaluations)
    return 2 * kept * cost.num_features * _FLOAT_BYTES  # clean and adversarial


def training_seconds(recipe: config.Recipe, facts: DataFacts, cost: StepCost) -> float:
    """Return the seconds of one run: its steps, and validation after its epochs.

    Example:
        >>> recipe = config.load_recipe("digits_natural", ["training.epochs=10"])
        >>> cost = StepCost(0.5, 0.001, 0.003, 1, 1, False, "cpu")
        >>> training_seconds(recipe, DataFacts(1280, 100, 100), cost)
        51.0
    """
    training, evaluation = recipe.training, recipe.evaluation
    steps = training.epochs * steps_per_epoch(recipe, facts)
    of_image = cost.clean_seconds + evaluation.validation_attack_steps * cost.gradient_seconds
    validations = training.epochs / training.validate_every
    return steps * cost.step_seconds + validations * facts.num_validation * of_image


def evaluation_seconds(
    evaluation: config.EvaluationSettings, num_test: int, data_name: str, cost: StepCost
) -> float:
    """Return the seconds of one evaluation.

    AutoAttack's phases go on with the images that are still classified right; how many these are is
    taken from the paper's IKL-AT. Square is counted with all its queries.

    Example:
        >>> settings = config.EvaluationSettings(pgd_steps=(10,), eps=8 / 255, step_size=2 / 255)
        >>> cost = StepCost(0.5, 0.001, 0.003, 1, 1, False, "cpu")
        >>> round(evaluation_seconds(settings, 100, "cifar100", cost), 6)
        3.1
    """
    count = num_test if evaluation.num_images is None else min(evaluation.num_images, num_test)
    clean, robust = _ACCURACY.get(data_name, _OTHER_ACCURACY)
    phases: list[tuple[float, tuple[int, int]]] = []  # share of the images, passes of each
    phases += [(1.0, (steps, 0)) for steps in (*evaluation.pgd_steps, *evaluation.cw_steps)]
    further = [eps for eps in evaluation.sweep if eps not in (0.0, evaluation.eps)]
    attacks = [evaluation.auto_attack] if evaluation.auto_attack is not None else []
    if evaluation.sweep_attack in ("pgd", "cw"):
        own = evaluation.pgd_steps if evaluation.sweep_attack == "pgd" else evaluation.cw_steps
        phases += [(1.0, (max(own), 0)) for _ in further]
    else:
        attacks += ["fast" if evaluation.sweep_attack == "auto_attack_fast" else "standard"] * len(
            further
        )
    for version in attacks:
        phases += [(clean, _APGD_CE), (robust, _APGD_T)]
        if version == "standard":
            phases += [(robust, _FAB_T), (robust, _SQUARE)]
    if evaluation.square:
        phases.append((clean, _SQUARE))
    if evaluation.masking_checks:
        phases.append((clean, (_MASKING_STEPS, 0)))
        phases += [] if evaluation.square else [(robust, _SQUARE)]
    gradients = count * sum(share * passes[0] for share, passes in phases)
    forwards = count * sum(share * passes[1] for share, passes in phases)
    if evaluation.features:
        gradients += num_features_kept(evaluation) * max(evaluation.pgd_steps)
    clean_seconds = num_test * cost.clean_seconds if evaluation.clean else 0.0
    return gradients * cost.gradient_seconds + forwards * cost.forward_seconds + clean_seconds


def num_features_kept(evaluation: config.EvaluationSettings) -> int:
    """Return of how many images features are kept, if there are as many."""
    return evaluation.features * _MOST_CLASSES
