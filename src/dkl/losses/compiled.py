"""The ``compile`` backend: the formula of a block, fused into one program by torch.compile.

The formula is that of ``row_kernel.py``; R rows of a block, C classes. One program serves any
number of rows and classes and any numbers; every combination of the rest (where weights come from,
which gradients are needed, dtypes) has its own, in which nothing is that was not asked for.
"""

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

from dkl.losses.blocks import Block, run_blocks
from dkl.losses.row_kernel import RowOptions, RowResult, RowWeights, Scale
from dkl.losses.rows import compute_dtype

_BLOCK_ELEMENTS = 1 << 18  # 1 MiB in float32: the best of 2**16 to 2**19 where it was measured

Program = Callable[..., tuple[Tensor, Tensor]]


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
    """Return rows and gradients; the arguments are those of ``run_blocks``.

    Raises:
        RuntimeError: the compiler does not work here.
    """
    dtype = compute_dtype(input, target)
    numbers = (*scales, options.temperature, options.weight_temperature, options.gamma)
    # A tensor, because the compiler would take plain numbers for constants of the program.
    numbers_5 = torch.stack([torch.as_tensor(x, dtype=dtype, device=input.device) for x in numbers])
    given = weights.class_probs is not None or weights.class_table is not None
    same_temperature = options.weight_temperature == options.temperature
    program = _program(
        (
            "given" if given else "label" if same_temperature else "softmax",
            options.gamma != 1.0,
            options.break_asymmetry,
            needs,
            (input.dtype, target.dtype),
        )
    )

    def compute(block: Block) -> tuple[Tensor, Tensor]:
        return program(
            block.input_RC,
            block.target_RC,
            block.weights_RC,
            numbers_5,
            block.input_gradient_RC,
            block.target_gradient_RC,
        )

    try:
        return run_blocks(
            compute,
            input,
            target,
            weights,
            counted_N,
            scales,
            options,
            needs,
            upstream_N=upstream_N,
            block_elements=_BLOCK_ELEMENTS,
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "torch" and "inductor" in str(error).lower():
            raise RuntimeError(
                "backend='compile' needs torch.compile with a working C++ compiler (such as g++) "
                f"on the CPU, which failed here; use backend='blocked' or 'auto'. It said: {error}"
            ) from error
        raise


@functools.cache
def _program(key: tuple[str, bool, bool, tuple[bool, bool], tuple[torch.dtype, ...]]) -> Program:
    source, powered, break_asymmetry, _, _ = key

    def program(
        input_RC: Tensor,
        target_RC: Tensor,
        weights_RC: Tensor | None,
        numbers_5: Tensor,
        input_gradient_RC: Tensor | None,
        target_gradient_RC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return _formula(
            input_RC,
            target_RC,
            weights_RC,
            numbers_5,
            input_gradient_RC,
            target_gradient_RC,
            source,
            powered,
            break_asymmetry,
        )

    # Code of its own, because PyTorch limits how many programs one piece of code may have.
    code = program.__code__.replace(co_name=f"program_{abs(hash(key))}")
    own = FunctionType(code, program.__globals__, None, None, program.__closure__)
    compiled: Program = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled


def _formula(
    input_RC: Tensor,
    target_RC: Tensor,
    weights_RC: Tensor | None,
    numbers_5: Tensor,
    input_gradient_RC: Tensor | None,
    target_gradient_RC: Tensor | None,
    source: str,
    powered: bool,
    break_asymmetry: bool,
) -> tuple[Tensor, Tensor]:
    mse_scale, ce_scale, temperature, tau, gamma = numbers_5.unbind()
    input_RC, target_RC = input_RC.to(numbers_5.dtype), target_RC.to(numbers_5.dtype)

    logits_RC = (input_RC - input_RC.amax(1, keepdim=True)) / temperature
    exp_RC = logits_RC.exp()
    sum_R1 = exp_RC.sum(1, keepdim=True)
    label_RC = torch.softmax(target_RC / temperature, 1)
    ce_R = sum_R1.log().squeeze(1) - (label_RC * logits_RC).sum(1)

    weights_RC, total_R1 = _weights(target_RC, label_RC, weights_RC, tau, gamma, source, powered)
    # Of the logits themselves, whose difference is exact where they are nearly equal. The mean is
    # taken out twice: rounding leaves eps mu after the first time.
    centred_RC = target_RC - input_RC
    total = 1.0 if total_R1 is None else total_R1
    divisor = 1.0 if total_R1 is None else torch.where(total_R1 == 0, 1.0, total_R1)
    centred_RC = centred_RC - (weights_RC * centred_RC).sum(1, keepdim=True) / divisor
    centred_RC = centred_RC - (weights_RC * centred_RC).sum(1, keepdim=True) / divisor
    pull_RC = total * (weights_RC * centred_RC)
    mse_R = 0.5 * (pull_RC * centred_RC).sum(1)

    if input_gradient_RC is not None:
        ce_RC = (exp_RC / sum_R1 - label_RC) * (ce_scale / temperature)
        input_gradient_RC.copy_(ce_RC - mse_scale * pull_RC if break_asymmetry else ce_RC)
    if target_gradient_RC is not None:
        target_gradient_RC.copy_(mse_scale * pull_RC)
    return mse_R, ce_R


def _weights(
    target_RC: Tensor,
    label_RC: Tensor,
    weights_RC: Tensor | None,
    tau: Tensor,
    gamma: Tensor,
    source: str,
    powered: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the powered weights and their sums (None where one)."""
    if source == "given" and weights_RC is not None:
        weights_RC = weights_RC.to(target_RC.dtype)
        weights_RC = weights_RC.pow(gamma) if powered else weights_RC
    elif powered:  # in log space, so that probabilities that underflow keep their power
        weights_RC = (gamma * torch.log_softmax(target_RC / tau, 1)).exp()
    else:
        return (label_RC if source == "label" else torch.softmax(target_RC / tau, 1)), None
    return weights_RC, weights_RC.sum(1, keepdim=True)
