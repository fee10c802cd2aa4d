"""A loss that is not finite ends a run, with the batch that did it kept for inspection."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from dkl.engine.watch import StepTrace

FOLDER = "nonfinite"


class NonFiniteLossError(RuntimeError):
    """The loss or the weights became NaN or infinite."""


def report_nonfinite(accelerator: Accelerator, run_dir: Path, trace: StepTrace, what: str) -> None:
    """Save the batch of a step and raise; collective.

    Args:
        accelerator: its processes take part; the first one writes.
        run_dir: folder of the run.
        trace: the step.
        what: what was not finite.

    Raises:
        NonFiniteLossError: always.
    """
    path = run_dir / FOLDER / f"step_{trace.step:08d}.safetensors"
    tensors = _gather_batches(accelerator, trace)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    raise NonFiniteLossError(
        f"{what} not finite at step {trace.step} (epoch {trace.epoch + 1}); the batch of that step "
        f"is saved in {path}. The last checkpoint is from before it. Try a lower learning rate, "
        f"warm-up, clip_norm, or mixed_precision='no'; look for NaN in the images, and for a loss "
        f"that takes the logarithm or a quotient of something that can be zero"
    )


def all_finite(module: nn.Module) -> bool:
    """Return whether all parameters are finite.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> all_finite(layer)
        True
        >>> _ = nn.init.constant_(layer.bias, math.nan)
        >>> all_finite(layer)
        False
    """
    parameters = [parameter.detach() for parameter in module.parameters()]
    if not parameters:
        return True
    norms = torch._foreach_norm(parameters, math.inf)
    return bool(torch.isfinite(torch.stack([norm.double() for norm in norms])).all())


def _gather_batches(accelerator: Accelerator, trace: StepTrace) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {}
    for batch in trace.batches:
        named = {
            "images": batch.images,
            "labels": batch.labels,
            "indices": batch.indices,
            "mask": batch.mask,
            **({} if batch.targets is None else {"targets": batch.targets}),
            **{f"extras.{name}": value for name, value in batch.extras.items()},
        }
        for name, tensor in named.items():
            columns.setdefault(name, []).append(tensor.detach().contiguous())
    return {
        name: accelerator.gather(torch.cat(parts)).cpu().contiguous()
        for name, parts in columns.items()
    }
