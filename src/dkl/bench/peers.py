"""What our loss is compared with, by name: KL as people write it, and the published forms of IKL.

Shapes: N rows, C classes; n = input, m = target, w = softmax(m), d = m - n. All of them are means
over rows with the defaults of ``dkl.ikl_loss``; weights and soft label are detached.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes input and target logits [N, C] and returns a scalar."""

KL = "kl, eager"
KL_COMPILED = "kl, compiled"
KL_LIGER = "kl, Liger"
JSD_LIGER = "jsd, Liger"
PAIRWISE = "ikl, pairwise"
EXPANDED = "ikl, expanded"
OURS = "ikl, "

# Differences of n and of m, their difference, its square, the product of weights, the weighted
# square, and the gradients of the last two that autograd holds at once.
_PAIRWISE_TENSORS = 8
PAIRWISE_LIMIT = 2**31
"""Bytes that the pairwise form may take: at [64, 1000] in float32 it takes just less."""


def eager_kl(input_NC: Tensor, target_NC: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(input)) as it is usually written: the baseline."""
    return F.kl_div(F.log_softmax(input_NC, 1), F.softmax(target_NC, 1), reduction="batchmean")


def pairwise_ikl(input_NC: Tensor, target_NC: Tensor) -> Tensor:
    """Return the IKL loss from all pairs of classes (Algorithm 1 of arXiv 2305.13948).

    (1/4) sum_jk w_j w_k (d_j - d_k)^2 term by term, in tensors [N, C, C].
    """
    weights_NC = F.softmax(target_NC.detach(), 1)
    target_NCC = target_NC[:, :, None] - target_NC[:, None, :]
    input_NCC = input_NC[:, :, None] - input_NC[:, None, :]
    pairs_NCC = weights_NC[:, :, None] * weights_NC[:, None, :]
    squares_NCC = (target_NCC - input_NCC).square()
    mse = 0.25 * (pairs_NCC * squares_NCC).sum() / input_NC.shape[0]
    return mse + _soft_cross_entropy(input_NC, weights_NC)


def expanded_ikl(input_NC: Tensor, target_NC: Tensor) -> Tensor:
    """Return the IKL loss from the square multiplied out (Algorithm 2 of arXiv 2305.13948).

    (1/2) (sum_j w_j d_j^2 - (sum_j w_j d_j)^2): O(C), right for weights that sum to one, and
    inexact where the logits have an offset, because two large numbers cancel.
    """
    weights_NC = F.softmax(target_NC.detach(), 1)
    difference_NC = target_NC - input_NC
    mean_square_N = (weights_NC * difference_NC.square()).sum(1)
    mean_N = (weights_NC * difference_NC).sum(1)
    mse = 0.5 * (mean_square_N - mean_N.square()).mean()
    return mse + _soft_cross_entropy(input_NC, weights_NC)


def _soft_cross_entropy(input_NC: Tensor, label_NC: Tensor) -> Tensor:
    return -(label_NC * F.log_softmax(input_NC, 1)).sum(1).mean()


def our_ikl(backend: str) -> Loss:
    """Return ``dkl.ikl_loss`` with a backend."""
    from dkl.losses import ikl_loss

    return lambda input_NC, target_NC: ikl_loss(input_NC, target_NC, backend=backend)


def liger_losses() -> dict[str, Loss]:
    """Return Liger's KL and JSD kernels where the package is installed, else nothing.

    They take log-probabilities and give gradients to the input only; log_softmax is part of what
    is compared, as the logits are what a model returns.
    """
    if find_spec("liger_kernel") is None:
        return {}
    kl: Any = import_module("liger_kernel.transformers.kl_div").LigerKLDIVLoss("batchmean")
    jsd: Any = import_module("liger_kernel.transformers.jsd").LigerJSD(beta=0.5)

    def liger_kl(input_NC: Tensor, target_NC: Tensor) -> Tensor:
        loss: Tensor = kl(F.log_softmax(input_NC, 1), F.softmax(target_NC, 1))
        return loss

    def liger_jsd(input_NC: Tensor, target_NC: Tensor) -> Tensor:
        loss: Tensor = jsd(F.log_softmax(input_NC, 1), F.log_softmax(target_NC, 1))
        return loss

    return {KL_LIGER: liger_kl, JSD_LIGER: liger_jsd}


def find_loss(method: str) -> Loss:
    """Return the loss with a name that ``method_names`` gives.

    Raises:
        ValueError: no such method.
    """
    if method == KL_COMPILED:
        compiled: Loss = torch.compile(eager_kl, dynamic=False)
        return compiled
    known: dict[str, Loss] = {KL: eager_kl, PAIRWISE: pairwise_ikl, EXPANDED: expanded_ikl}
    if method in known:
        return known[method]
    if method.startswith(OURS):
        return our_ikl(method.removeprefix(OURS))
    liger = liger_losses()
    if method in liger:
        return liger[method]
    raise ValueError(f"no benchmark method {method!r}; there are {[*known, KL_COMPILED, *liger]}")


def method_names(
    shape: tuple[int, int],
    *,
    backends: tuple[str, ...],
    device: str,
    item_size: int,
    target_grad: bool,
    compile: bool,
) -> list[str]:
    """Return the methods for a shape, the baseline first.

    Args:
        shape: (N, C).
        backends: of ``dkl.ikl_loss``.
        device: "cpu" or "cuda"; Liger's kernels need "cuda".
        item_size: bytes of an element.
        target_grad: whether the target needs a gradient, which Liger's kernels do not give.
        compile: whether to include the compiled KL.
    """
    num_rows, num_classes = shape
    names = [KL]
    if compile:
        names.append(KL_COMPILED)
    if torch.device(device).type == "cuda" and not target_grad:
        names += list(liger_losses())
    if num_rows * num_classes**2 * item_size * _PAIRWISE_TENSORS <= PAIRWISE_LIMIT:
        names.append(PAIRWISE)
    names.append(EXPANDED)
    return names + [f"{OURS}{backend}" for backend in backends]
