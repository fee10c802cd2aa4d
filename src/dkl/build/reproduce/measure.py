"""A few real optimiser steps of a recipe, timed, and what its network costs to attack."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from dkl import config
from dkl.build.checks import measurable
from dkl.build.objects import build_data
from dkl.build.runs import device_for_evaluation, load_run_model
from dkl.build.training import train_recipe
from dkl.engine.recorder import RECORDS, read_rows
from dkl.engine.state import find_checkpoint

CPU_BATCH = 4
"""Images of a measured step on a CPU, where a whole batch of a large network takes minutes."""
_GPU_STEPS, _CPU_STEPS = 8, 1


@dataclass(frozen=True)
class StepCost:
    """What was measured on the present device.

    Args:
        step_seconds: one optimiser step of the recipe's batch size.
        forward_seconds: one forward pass of one image in evaluation mode.
        gradient_seconds: one forward and backward pass, to the image, likewise.
        checkpoint_bytes: one checkpoint.
        num_features: numbers that the last linear layer sees of an image.
        is_extrapolated: the steps that were timed had fewer images than the recipe's, and were
            extrapolated in proportion.
        device: "cpu" or "cuda".
    """

    step_seconds: float
    forward_seconds: float
    gradient_seconds: float
    checkpoint_bytes: int
    num_features: int
    is_extrapolated: bool
    device: str


def cost_key(recipe: config.Recipe) -> str:
    """Name what decides the cost of a step: recipes that differ in weights or rates share it.

    Example:
        >>> one, other = (config.load_recipe("digits_ikl_at", [f"method.mse_weight={a}"])
        ...               for a in (5, 20))
        >>> cost_key(one) == cost_key(other) != cost_key(config.load_recipe("digits_trades"))
        True
    """
    values = config.resolved(shortened(recipe, recipe.training.batch_size, 1, {}))
    kept = {key: values[key] for key in ("data", "model", "method", "training", "averaging")}
    perturbed = recipe.weight_perturbation is not None
    return repr((_without_floats(kept), perturbed, recipe.evaluation.batch_size))


def measure_step(recipe: config.Recipe) -> StepCost:
    """Train a few steps of a recipe on the first of its images, in a folder that is thrown away.

    The full epsilon, averaging and weight perturbation are on from the first step, as they are for
    most of training. A first epoch warms the device up, the second one is timed.

    Args:
        recipe: resolved; its data must be there.

    Returns:
        The cost.
    """
    device = device_for_evaluation()
    on_cpu = device.type == "cpu"
    batch = min(recipe.training.batch_size, CPU_BATCH) if on_cpu else recipe.training.batch_size
    num_steps = _CPU_STEPS if on_cpu else _GPU_STEPS
    every = getattr(recipe.method, "update_every", 1)
    with TemporaryDirectory(prefix="dkl-estimate-") as scratch:
        run = Path(scratch) / "run"
        if every == 1:
            seconds = seconds_per_step(shortened(recipe, batch, num_steps, {}), run, num_steps)
        else:  # a second network that is trained every so many steps
            often, rare = (
                seconds_per_step(
                    shortened(recipe, batch, num_steps, {"update_every": n}), folder, num_steps
                )
                for n, folder in ((1, run), (10**6, Path(scratch) / "rare"))
            )
            seconds = rare + max(often - rare, 0.0) / every
        files = find_checkpoint(run, "last").iterdir()
        short = shortened(recipe, batch, num_steps, {})
        data = build_data(short.data, recipe.seed).train
        model = measurable(load_run_model(run, short, data, "last")[0].to(device))
        if recipe.training.channels_last:
            model.to(memory_format=torch.channels_last)
        images = data.images[: batch if on_cpu else recipe.evaluation.batch_size].to(device) / 255
        forward, gradient = _attack_seconds(model, images)
        return StepCost(
            step_seconds=seconds * recipe.training.batch_size / batch,
            forward_seconds=forward,
            gradient_seconds=gradient,
            checkpoint_bytes=sum(file.stat().st_size for file in files),
            num_features=_num_features(model),
            is_extrapolated=batch < recipe.training.batch_size,
            device=device.type,
        )


def shortened(
    recipe: config.Recipe, batch: int, num_steps: int, method: dict[str, Any]
) -> config.Recipe:
    """Return the recipe cut down to two epochs of some steps that cost what steps usually do.

    Args:
        recipe: resolved.
        batch: samples of a step.
        num_steps: steps of an epoch.
        method: settings of the method that are changed.
    """
    values = config.resolved(recipe)
    values["method"] |= method
    attack = values["method"].get("attack")
    if attack is not None:
        attack["epsilon_ramp_epochs"] = None
        if attack["budget"] == "high_intended":  # 2, 3, 4 and 5 steps: 3.5 in the mean
            attack |= {"budget": None, "num_steps": 4, "step_size": attack["eps"] / 2}
    data, training = values["data"], values["training"]
    data |= {"validation_fraction": 0.0, "train_limit": batch * num_steps}
    if data["generated"] is not None:
        # Images are read alike from wherever they come; real ones need no conversion.
        data["generated"] |= {"parts": [], "held_out": True, "samples_per_epoch": batch * num_steps}
    training |= {
        "epochs": 2,
        "batch_size": batch,
        "accumulation": training["accumulation"] if batch % training["accumulation"] == 0 else 1,
        "drop_last": False,
        "checkpoint_every_steps": None,
        "validate_every": 1,
        "best_metric": None,
    }
    values |= {"schedule": {"kind": "constant"}, "trackers": [], "tuning": None}
    for section in ("weight_perturbation", "averaging"):
        if values[section] is not None:
            values[section]["start_epoch"] = 0
    values["evaluation"]["validation_attack_steps"] = 0
    return config.Recipe.model_validate(values)


def seconds_per_step(recipe: config.Recipe, run: Path, num_steps: int) -> float:
    """Train a ``shortened`` recipe and return the seconds of a step of its last epoch."""
    if train_recipe(recipe, run).stopped_early:
        raise KeyboardInterrupt
    last = [row for row in read_rows(run / RECORDS) if row["kind"] == "epoch"][-1]
    # A GPU tells after each step how the one before went: the last one's time is not in it.
    waited_for = num_steps if device_for_evaluation().type == "cpu" else max(num_steps - 1, 1)
    return float(last["seconds"]) / waited_for


def _attack_seconds(model: nn.Module, images_NCHW: torch.Tensor) -> tuple[float, float]:
    """Return seconds for one image: forward, and forward with the gradient of the image."""
    model.requires_grad_(False)

    def forward() -> None:
        with torch.no_grad():
            model(images_NCHW)

    def gradient() -> None:
        images = images_NCHW.clone().requires_grad_(True)
        torch.autograd.grad(model(images).sum(), images)

    count = len(images_NCHW)
    return _best_seconds(forward) / count, _best_seconds(gradient) / count


def _best_seconds(work: Callable[[], None], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _num_features(model: nn.Module) -> int:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1].in_features if linear else 0


def _without_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_floats(inner) for inner in value]
    return None if isinstance(value, float) else value
