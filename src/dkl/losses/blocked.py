"""The ``blocked`` backend: plain PyTorch operations, in place, on blocks that stay in cache.

No compiler is needed. The formula is that of ``row_kernel.py``; R rows of a block, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dkl.losses.blocks import Block, run_blocks, take_weights
from dkl.losses.row_kernel import RowOptions, RowResult, RowWeights, Scale

_FEW_CLASSES = 32
"""Below this rows are processed as columns: PyTorch's softmax over a short last dimension costs as
much as ten softmaxes of the same size over the first one."""

Buffers = Sequence[Tensor | None]
"""Where results may be written; None for new memory."""


def decoupled_rows(
    input: Tensor,
    target: Tensor,
    weights: RowWeights,
    counted_N: Tensor | None,
    scales: tuple[Scale, Scale],
    options: RowOptions,
    needs: tuple[bool, bool],
    *,
    upstream_N: Tensor | None = None,
) -> RowResult:
    """Return rows and gradients; the arguments are those of ``run_blocks``."""
    scratch = _Scratch()

    def compute(block: Block) -> tuple[Tensor, Tensor]:
        return _compute(block, scratch)

    return run_blocks(
        compute, input, target, weights, counted_N, scales, options, needs, upstream_N=upstream_N
    )


class _Scratch:
    """Four buffers that blocks share: new memory for each would be handed out page by page."""

    def __init__(self) -> None:
        self.buffers: Sequence[Tensor] = ()

    def like(self, block: Tensor) -> Sequence[Tensor]:
        """Return four tensors of the shape of a block; the first block is the largest."""
        if not self.buffers:
            self.buffers = [block.new_empty(block.shape) for _ in range(4)]
        if self.buffers[0].shape == block.shape:
            return self.buffers
        return [buffer.view(-1)[: block.numel()].view(block.shape) for buffer in self.buffers]


def decoupled_sum(
    input_NC: Tensor,
    target_NC: Tensor,
    weights: RowWeights,
    scales: tuple[float, float],
    options: RowOptions,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the scaled sum over few rows that all count, and its gradients.

    With little to do, the number of operations is what costs: here are none but those needed.
    """
    (mse_scale, ce_scale), temperature = scales, options.temperature
    dim, input, target = 1, input_NC, target_NC
    given = take_weights(weights, None, input.dtype, None)
    if input.shape[1] < _FEW_CLASSES:
        dim = 0
        input, target = input.t().contiguous(), target.t().contiguous()
        given = None if given is None else given.t().contiguous()
    label, log_prediction = _soft_labels(input, target, temperature, dim)
    weights_and_sums = _weights(given, target, label, options, dim)
    pull, centred = _pull(input, target, *weights_and_sums, dim)
    # u = -b p / T has the sum -b / T over the classes, so that the backward of log softmax,
    # u - q sum(u), is b (q - p) / T in one pass.
    if temperature == 1.0:
        terms = torch.mul(label.mul_(-ce_scale), log_prediction)
    else:
        terms = torch.mul(label, log_prediction).mul_(-ce_scale)
        label.mul_(-ce_scale / temperature)
    value = terms.addcmul_(pull, centred, value=0.5 * mse_scale).sum()
    input_gradient = target_gradient = None
    if needs[0]:
        input_gradient = torch._log_softmax_backward_data(label, log_prediction, dim, label.dtype)
        if options.break_asymmetry:
            input_gradient.sub_(pull, alpha=mse_scale)
        input_gradient = input_gradient if dim == 1 else input_gradient.t().contiguous()
    if needs[1]:
        pull.mul_(mse_scale)
        target_gradient = pull if dim == 1 else pull.t().contiguous()
    return value, input_gradient, target_gradient


def _compute(block: Block, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    if block.input_RC.shape[1] >= _FEW_CLASSES:
        return _formula(block, 1, scratch)
    input_RC, target_RC, weights_RC, mse_scale, ce_scale, options, *gradients = block
    turned = Block(
        input_RC.t().contiguous(),
        target_RC.t().contiguous(),
        None if weights_RC is None else weights_RC.t().contiguous(),
        mse_scale,
        ce_scale,
        options,
        *(None if x is None else x.t() for x in gradients),
    )
    return _formula(turned, 0, scratch)


def _formula(block: Block, dim: int, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Compute a block whose classes are in dimension ``dim``."""
    input, target, given, mse_scale, ce_scale, options, input_gradient, target_gradient = block
    first, second, third, fourth = scratch.like(input)
    label, log_prediction = _soft_labels(
        input, target, options.temperature, dim, (first, second, third)
    )
    ce = torch.mul(label, log_prediction, out=third).sum(dim).neg_()
    weights, total = _weights(given, target, label, options, dim)
    pull, centred = _pull(input, target, weights, total, dim, (third, fourth))
    mse = centred.mul_(pull).sum(dim).mul_(0.5)
    if target_gradient is not None:
        torch.mul(pull, mse_scale, out=target_gradient)
    if input_gradient is not None:
        label.mul_(ce_scale * (-1.0 / options.temperature))  # b (q - p) / T, as above
        found = input_gradient if input_gradient.is_contiguous() else centred
        torch._log_softmax_backward_data(label, log_prediction, dim, label.dtype, out=found)
        if not options.break_asymmetry:
            input_gradient.copy_(found)
        elif isinstance(mse_scale, Tensor):
            torch.sub(found, pull.mul_(mse_scale), out=input_gradient)
        else:
            torch.sub(found, pull, alpha=mse_scale, out=input_gradient)
    return mse, ce


def _soft_labels(
    input: Tensor, target: Tensor, temperature: float, dim: int, out: Buffers = (None, None, None)
) -> tuple[Tensor, Tensor]:
    """Return p = softmax(m / T) and log q = log softmax(n / T)."""
    if temperature != 1.0:
        target = torch.div(target, temperature, out=out[2])
    label = torch.softmax(target, dim, out=out[0])
    if temperature != 1.0:
        input = torch.div(input, temperature, out=out[2])
    return label, torch.log_softmax(input, dim, out=out[1])


def _pull(
    input: Tensor,
    target: Tensor,
    weights: Tensor,
    total: Tensor | None,
    dim: int,
    out: Buffers = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return W w (d - mu) and d - mu; half their inner product is the weighted MSE.

    The mean is taken out twice: rounding leaves eps mu after the first time, which is much where
    the classes that have weight lie close together and far from the others.
    """
    centred = torch.sub(target, input, out=out[0])
    pull = torch.mul(weights, centred, out=out[1])
    mean = pull.sum(dim, keepdim=True)
    if total is None:
        centred.sub_(mean)
        # w (d - sum_j w_j d_j) is what the backward of softmax computes, in one pass
        torch._softmax_backward_data(centred, weights, dim, weights.dtype, grad_input=pull)
        return pull, centred
    # A row whose weights are all zero contributes zero, not 0/0.
    divisor = total.masked_fill(total == 0, 1.0)
    centred.sub_(mean.div_(divisor))
    torch.mul(weights, centred, out=pull)
    rest = pull.sum(dim, keepdim=True).div_(divisor)
    return pull.addcmul_(weights, rest, value=-1.0).mul_(total), centred


def _weights(
    given: Tensor | None, target: Tensor, label: Tensor, options: RowOptions, dim: int
) -> tuple[Tensor, Tensor | None]:
    """Return the powered weights, which may be the label, and their sums (None where one)."""
    gamma, tau = options.gamma, options.weight_temperature
    if given is not None:
        weights = given if gamma == 1.0 else given.pow(gamma)
        return weights, weights.sum(dim, keepdim=True)
    if gamma == 1.0:
        shared = tau == options.temperature
        return label if shared else torch.softmax(target / tau, dim), None
    # in log space, so that probabilities that underflow keep their power
    weights = torch.log_softmax(target / tau, dim).mul_(gamma).exp_()
    return weights, weights.sum(dim, keepdim=True)
