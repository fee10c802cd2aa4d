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
from dkl.build.image_access import first_images
from dkl.build.objects import build_data
from dkl.build.reproduce.decoding_cost import decoding_cost
from dkl.build.reproduce.stand_in_teachers import with_random_teacher
from dkl.build.runs import device_for_evaluation, load_run_model
from dkl.build.training import train_recipe
from dkl.engine.recorder import RECORDS, read_rows
from dkl.engine.state import find_checkpoint

CPU_BATCH = 4
"""Images of the first steps on a CPU, where a whole batch of a large network takes minutes."""
_GPU_STEPS, _CPU_STEPS = 8, 1


@dataclass(frozen=True)
class StepCost:
    """What was measured on the present device.

    Args:
        step_seconds: one optimiser step of the recipe's batch size, images decoded by its workers.
        forward_seconds: one forward pass of one image in evaluation mode.
        gradient_seconds: one forward and backward pass, to the image, likewise.
        checkpoint_bytes: one checkpoint.
        num_features: numbers that the last linear layer sees of an image.
        is_extrapolated: the steps that were timed had fewer images than the recipe's, and were
            extrapolated in proportion.
        device: "cpu" or "cuda".
        decode_seconds: the recipe's workers together decode one training image; 0.0 for images in
            memory.
        waits_for_images: decoding takes longer than computing.
        peak_bytes: most memory that the steps took on a GPU; None on a CPU.
    """

    step_seconds: float
    forward_seconds: float
    gradient_seconds: float
    checkpoint_bytes: int
    num_features: int
    is_extrapolated: bool
    device: str
    decode_seconds: float = 0.0
    waits_for_images: bool = False
    peak_bytes: int | None = None

    @property
    def clean_seconds(self) -> float:
        """Seconds for one image that is decoded and classified."""
        return max(self.forward_seconds, self.decode_seconds)


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


def measure_step(recipe: config.Recipe, *, patience: float = 20.0) -> StepCost:
    """Train a few steps of a recipe on the first of its images, in a folder that is thrown away.

    The full epsilon, averaging and weight perturbation are on from the first step, as they are for
    most of training. A first epoch warms the device up, the second one is timed. A teacher has
    random weights, which cost the same.

    Args:
        recipe: resolved; its data must be there.
        patience: on a CPU the steps of few images are extrapolated to those of a whole batch, and
            timed with all of it only where that promises to take less than so many seconds each.

    Returns:
        The cost.
    """
    whole = recipe.training.batch_size
    if device_for_evaluation().type != "cpu":
        return _measure(recipe, whole, _GPU_STEPS)
    cost = _measure(recipe, min(whole, CPU_BATCH), _CPU_STEPS)
    if cost.is_extrapolated and cost.step_seconds < patience:
        return _measure(recipe, whole, _CPU_STEPS)
    return cost


def _measure(recipe: config.Recipe, batch: int, num_steps: int) -> StepCost:
    device = device_for_evaluation()
    on_cpu = device.type == "cpu"
    whole = recipe.training.batch_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with TemporaryDirectory(prefix="dkl-estimate-") as scratch:
        taught = with_random_teacher(recipe, Path(scratch))
        short = shortened(taught, batch, num_steps, {})
        run = Path(scratch) / "run"
        seconds = _step_seconds(taught, batch, num_steps, run)
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        files = find_checkpoint(run, "last").iterdir()
        data = build_data(short.data, recipe.seed).train
        decoding = decoding_cost(recipe, data, batch)
        here = batch * decoding.per_sample * decoding.alone_seconds
        computing = max(seconds - here, 0.0) * whole / batch
        model = measurable(load_run_model(run, short, data, "last")[0].to(device))
        if recipe.training.channels_last:
            model.to(memory_format=torch.channels_last)
        count = batch if on_cpu else recipe.evaluation.batch_size
        images = first_images(data, count).images.to(device) / 255
        forward, gradient = _attack_seconds(model, images)
        return StepCost(
            step_seconds=decoding.step_seconds(computing, whole, on_cpu=on_cpu),
            forward_seconds=forward,
            gradient_seconds=gradient,
            checkpoint_bytes=sum(file.stat().st_size for file in files),
            num_features=_num_features(model),
            is_extrapolated=batch < whole,
            device=device.type,
            decode_seconds=decoding.image_seconds,
            waits_for_images=decoding.is_waited_for(computing, whole),
            peak_bytes=peak,
        )


def _step_seconds(recipe: config.Recipe, batch: int, num_steps: int, run: Path) -> float:
    every = getattr(recipe.method, "update_every", 1)
    if every == 1:
        return seconds_per_step(shortened(recipe, batch, num_steps, {}), run, num_steps)
    # A second network that is trained every so many steps.
    often, rare = (
        seconds_per_step(
            shortened(recipe, batch, num_steps, {"update_every": n}), folder, num_steps
        )
        for n, folder in ((1, run), (10**6, run.with_name("rare")))
    )
    return rare + max(often - rare, 0.0) / every


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
    if recipe.data.in_files:
        # Decoded in between: workers would start for an epoch of a few steps.
        data["decoding"] = (data["decoding"] or {}) | {"workers": 0, "repeats": 1}
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
    if train_recipe(recipe, run, validate=False).stopped_early:
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
