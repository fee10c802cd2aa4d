"""Global random state and numerical switches: saved, restored, put back."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture_rng(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator of this process, as tensors and plain numbers.

    Args:
        device: the training device; its generator is included.

    Example:
        >>> state = capture_rng(torch.device("cpu"))
        >>> first = torch.rand(2)
        >>> restore_rng(state, torch.device("cpu"))
        >>> torch.equal(first, torch.rand(2))
        True
    """
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss_next],
        "numpy": [str(name), [int(key) for key in keys], position, has_gauss, gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Put back what ``capture_rng`` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave every global generator as it was, whatever is drawn inside."""
    state = capture_rng(device)
    try:
        yield
    finally:
        restore_rng(state, device)


@contextmanager
def numerics(deterministic: bool) -> Iterator[None]:
    """Set PyTorch's switches for determinism, and put them back on exit.

    Deterministic runs refuse operations without a deterministic implementation; others let cuDNN
    measure which convolution is fastest.
    """
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if deterministic:
        # cuBLAS reads this when its first handle is made, and refuses determinism without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if deterministic:
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not deterministic
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
