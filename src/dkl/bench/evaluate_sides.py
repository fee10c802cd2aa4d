"""One trained model, and two ways to run AutoAttack on it: the package's loop and ours.

Shapes: N samples.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkl import config
from dkl.build.checks import measurable
from dkl.build.image_access import first_images
from dkl.build.objects import build_data
from dkl.build.runs import load_run_model, read_recipe
from dkl.engine.randomness import preserved_rng
from dkl.evaluation import AutoAttackResult, auto_attack
from dkl.evaluation.auto_attack_phases import Version, load_package, plan_phases
from dkl.evaluation.inputs import EvaluationNorm


class FlagMismatchError(RuntimeError):
    """Two evaluations of one model disagree, so timing them means nothing."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how.

    Args:
        model: with trained weights, in evaluation mode.
        images: [N, C, H, W] float32 in [0, 1], on the device of the model.
        labels: [N] int64, likewise.
        eps: radius of the attacks.
        norm: "Linf" or "L2".
        version: "standard" or "fast".
        batch_size: samples per batch.
        seed: of the attacks.
        settings: what was trained and with which weights, as JSON values.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    eps: float
    norm: EvaluationNorm
    version: Version
    batch_size: int
    seed: int
    settings: Mapping[str, Any]

    def channels_last(self) -> "Subject":
        """Return the same with the weights of convolutions in that memory format."""
        model = copy.deepcopy(self.model).to(memory_format=torch.channels_last)
        return replace(self, model=model)

    def has_convolutions(self) -> bool:
        """Whether the memory format can matter."""
        return any(isinstance(module, nn.Conv2d) for module in self.model.modules())


@dataclass(frozen=True)
class Finding:
    """What an evaluation says about each sample.

    Args:
        robust: [N] bool.
        predictions: [N] int64 class of the adversarial image where one was found, else the clean.
    """

    robust: Tensor
    predictions: Tensor

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that are robust, from 0 to 1."""
        return float(self.robust.double().mean())

    def differences(self, other: "Finding") -> dict[str, int]:
        """Return how many samples have another flag, and how many another prediction."""
        return {
            "flags": int((self.robust != other.robust).sum()),
            "predictions": int((self.predictions != other.predictions).sum()),
        }


def check_same(first: Finding, second: Finding, *, what: str) -> None:
    """Refuse two evaluations that differ in any sample.

    Args:
        first: what one found.
        second: what the other found on the same model.
        what: the two, for the message.

    Raises:
        FlagMismatchError: flags or predictions differ; the message names the first samples.

    Example:
        >>> found = Finding(torch.tensor([True, False]), torch.tensor([3, 1]))
        >>> check_same(found, found, what="pyautoattack and dkl")
        >>> other = Finding(torch.tensor([True, True]), torch.tensor([3, 4]))
        >>> check_same(found, other, what="pyautoattack and dkl")
        Traceback (most recent call last):
        ...
        dkl.bench.evaluate_sides.FlagMismatchError: pyautoattack and dkl do not agree ...
    """
    for name in ("robust", "predictions"):
        first_N, second_N = getattr(first, name), getattr(second, name)
        differing = (first_N != second_N).nonzero().flatten().tolist()
        if differing:
            index = differing[0]
            raise FlagMismatchError(
                f"{what} do not agree on {name!r} in {len(differing)} of {len(first_N)} samples, "
                f"{differing[:10]}: sample {index} is {first_N[index].item()} for one and "
                f"{second_N[index].item()} for the other. They have to run the same attacks on the "
                "same batches with the same seed, in arithmetic that gives the same bits twice."
            )


def package_evaluation(subject: Subject) -> Finding:
    """Evaluate with the package's own loop, as its documentation does.

    The model is in evaluation mode and its parameters require gradients.
    """
    package, _ = load_package()
    with torch.no_grad():
        num_classes = subject.model(subject.images[:1]).shape[1]
    phases = plan_phases(subject.version, num_classes).phases
    with _left_as_found(subject.model), preserved_rng(subject.images.device):
        ensemble = package.AutoAttack(
            subject.model,
            norm=subject.norm,
            eps=subject.eps,
            seed=subject.seed,
            device=subject.images.device,
            version="standard",
        )
        ensemble.attacks_to_run = [phase.name for phase in phases]
        for phase in phases:
            # With fewer than 10 classes the package's own numbers of targets do not exist.
            if phase.name == "apgd-t":
                ensemble.apgd_targeted.n_target_classes = phase.n_targets
            elif phase.name == "fab-t":
                ensemble.fab.n_target_classes = phase.n_targets
            elif phase.name == "square":
                ensemble.square.n_queries = phase.n_queries
        _, predictions_N = ensemble.run_standard_evaluation(
            subject.images, subject.labels, batch_size=subject.batch_size
        )
    return Finding(predictions_N == subject.labels, predictions_N)


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Keep Python's tracer, which the package switches off, and drop its parameter gradients."""
    tracer = sys.gettrace()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        sys.settrace(tracer)


def our_evaluation(subject: Subject, *, distributed: bool = False) -> AutoAttackResult:
    """Evaluate with our loop; ``distributed`` shares the batches among processes."""
    return auto_attack(
        subject.model,
        subject.images,
        subject.labels,
        eps=subject.eps,
        norm=subject.norm,
        version=subject.version,
        batch_size=subject.batch_size,
        seed=subject.seed,
        distributed=distributed,
    )


def load_subject(
    run: Path,
    *,
    num_images: int,
    version: Version,
    seed: int = 0,
    epsilon: float | str | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
) -> Subject:
    """Load a run's model and test images, to be attacked as its recipe says.

    Args:
        run: a run folder of ``dkl train``, or one of its checkpoints.
        num_images: attack the first N test images.
        version: "standard" or "fast".
        seed: of the attacks.
        epsilon: the radius; None: the recipe's ``evaluation.eps``.
        batch_size: None: the recipe's ``evaluation.batch_size``.
        device: where to attack.

    Raises:
        ValueError: not a run, no such number of images, or no radius.
    """
    _, recipe = read_recipe(run)
    if epsilon is not None:
        recipe = config.override(recipe, [f"evaluation.eps={epsilon}"])
    attack = recipe.evaluation
    if attack.eps is None:
        raise ValueError(f"the recipe of {run} names no evaluation.eps: give epsilon here")
    splits = build_data(recipe.data, recipe.seed)
    if not 1 <= num_images <= len(splits.test):
        raise ValueError(
            f"num_images must be from 1 to {len(splits.test)}, the test images of {recipe.name}; "
            f"got {num_images}"
        )
    which = "last" if recipe.training.best_metric is None else "best"
    model, weights_hash = load_run_model(run, recipe, splits.train, which)
    return Subject(
        model=measurable(model.to(device)).eval(),
        images=first_images(splits.test, num_images).images.to(device).float() / 255,
        labels=splits.test.labels[:num_images].to(device),
        eps=attack.eps,
        norm=attack.norm,
        version=version,
        batch_size=batch_size or attack.batch_size,
        seed=seed,
        settings={"recipe": config.resolved(recipe), "weights_hash": weights_hash},
    )
