"""Which backend computes the decoupled KL loss.

docs/performance.md has the measurements behind ``choose_backend``.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dkl.losses import blocked
from dkl.losses.row_kernel import LossOptions, RowKernel

FUSED_BACKENDS = ("blocked", "compile", "triton")
BACKENDS = ("auto", "reference", *FUSED_BACKENDS)

_TENSORS = {Tensor, torch.nn.Parameter}
_PLAIN = {int, float, bool, str, type(None)}


def row_kernel(backend: str) -> RowKernel:
    """Return the function of a backend that computes rows and their gradients.

    Args:
        backend: "blocked", "compile" or "triton".

    Raises:
        RuntimeError: the backend cannot run here.
    """
    if backend == "blocked":
        return blocked.decoupled_rows
    if backend == "compile":
        from dkl.losses import compiled

        return compiled.decoupled_rows
    try:
        from dkl.losses import triton_kernels
    except ImportError as error:
        raise RuntimeError(
            "backend='triton' needs the package triton, which PyTorch brings along for CUDA and "
            f"ROCm on Linux; use backend='auto'. It said: {error}"
        ) from error
    return triton_kernels.decoupled_rows


def choose_backend(backend: str, input: Tensor, target: Tensor, options: LossOptions) -> str:
    """Return the backend that computes a loss.

    Args:
        backend: what was asked for.
        input: logits n.
        target: logits m.
        options: of the loss.

    Returns:
        A name in ``BACKENDS`` other than "auto".

    Raises:
        ValueError: a fused backend was asked for that cannot compute this.
    """
    if backend == "reference":
        return backend
    if backend == "auto":
        # While torch.compile traces, the reference formula lets the caller's graph fuse it.
        if torch.compiler.is_compiling() or _obstacle(input, target, options) is not None:
            return "reference"
        return "blocked" if input.is_cpu else fastest_backend(input.device)
    obstacle = _obstacle(input, target, options)
    if obstacle is None and backend == "triton":
        obstacle = _triton_obstacle(input.device)
    if obstacle is not None:
        raise ValueError(
            f"backend={backend!r} cannot compute this, because {obstacle}; use backend='auto' or "
            "'reference'"
        )
    return backend


def fastest_backend(device: torch.device) -> str:
    """Return the backend that "auto" stands for on a device."""
    if device.type == "cpu":
        return "blocked"
    return "triton" if _triton_obstacle(device) is None else "reference"


def _obstacle(input: Tensor, target: Tensor, options: LossOptions) -> str | None:
    """Return why no fused backend can compute a loss, or None."""
    (class_probs, class_table, _), _, rows, *numbers = options
    weights = class_probs if class_probs is not None else class_table
    weights = target if weights is None else weights
    if not options.detach_weights and weights.requires_grad and torch.is_grad_enabled():
        return "detach_weights=False asks for the gradient through the class weights"
    if not _PLAIN.issuperset(map(type, (*numbers, *rows))) and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*numbers, *rows)
    ):
        return "an option is a tensor that needs a gradient"
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    kinds = {type(input), type(target), type(weights)}
    if not _TENSORS.issuperset(kinds):
        return f"it knows plain tensors and not {(kinds - _TENSORS).pop().__name__}"
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    try:
        from dkl.losses import triton_kernels
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    available, reason = triton_kernels.is_available(device)
    return None if available else reason
