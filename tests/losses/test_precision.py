"""Half, single and double precision, autocast, extreme logits and very many classes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.losses import decoupled_kl_loss, dkl_loss, gkl_loss, ikl_loss
from tests.reference import decoupled_kl_reference, max_relative_error, value_and_gradients

# What the arithmetic loses: float32 inside for half inputs, whose gradients are rounded at the end.
LOSS_TOLERANCE = {
    torch.float16: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float32: 2e-6,
    torch.float64: 1e-14,
}
GRADIENT_TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 3e-6,
    torch.float64: 2e-14,
}
DTYPES = list(LOSS_TOLERANCE)
CONFIGURATIONS: dict[str, Callable[..., Tensor]] = {
    "ikl": ikl_loss,
    "dkl": dkl_loss,
    "ikl-kd": partial(ikl_loss, mse_weight=8, temperature=4, weight_temperature=100),
    "gkl": partial(gkl_loss, gamma=0.3, mse_weight=12, ce_weight=5),
    "undetached": partial(ikl_loss, detach_weights=False),
    "undetached-gkl": partial(gkl_loss, gamma=0.4, detach_weights=False),
}
EACH = pytest.mark.parametrize("loss", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())


def random_pair(*shape: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    input = torch.randn(shape, generator=generator, dtype=torch.float64)
    return scale * input, scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def check_against_float64(
    loss: Callable[..., Tensor], pair: list[Tensor], dtype: torch.dtype, slack: float = 1.0
) -> None:
    value, gradients = value_and_gradients(loss, pair)
    exact, exact_gradients = value_and_gradients(loss, [tensor.double() for tensor in pair])
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert max_relative_error(value, exact) < slack * LOSS_TOLERANCE[dtype]
    for tensor, gradient, expected in zip(pair, gradients, exact_gradients, strict=True):
        assert gradient.dtype == tensor.dtype
        assert max_relative_error(gradient, expected) < slack * GRADIENT_TOLERANCE[tensor.dtype]


@EACH
@pytest.mark.parametrize("shape", [(1, 2), (16, 100), (2, 1271), (2, 5, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(
    loss: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_against_float64(loss, [tensor.to(dtype) for tensor in random_pair(*shape)], dtype)


@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_mixed_dtypes(input_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    input, target = random_pair(16, 100)
    either = {input_dtype, target_dtype}
    widest = torch.float64 if torch.float64 in either else torch.float32
    check_against_float64(ikl_loss, [input.to(input_dtype), target.to(target_dtype)], widest)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_the_weights_does_not_decide(
    dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    pair = [tensor.to(dtype) for tensor in random_pair(4, 7)]
    table = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)).to(weights_dtype)
    labels = torch.tensor([0, 6, 3, 3])
    loss = ikl_loss(*pair, class_table=table, labels=labels)
    expected = decoupled_kl_reference(*pair, class_table=table, labels=labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert max_relative_error(loss, expected) < LOSS_TOLERANCE[dtype]
    assert torch.equal(loss, ikl_loss(*pair, table[labels]))


@pytest.mark.parametrize("gamma", [0.3, 1])
@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits_whose_squares_overflow(
    dtype: torch.dtype, normalization: str, gamma: float
) -> None:
    # Differences up to 4e4 fit float16 and their squares do not, but the gradients do again.
    generator = torch.Generator().manual_seed(0)
    pair = [2e4 * (2 * torch.rand(64, 10, generator=generator) - 1) for _ in range(2)]
    weights = torch.rand(64, 10, generator=generator).softmax(1)
    loss = partial(decoupled_kl_loss, class_probs=weights, normalization=normalization, gamma=gamma)
    check_against_float64(loss, [tensor.to(dtype) for tensor in pair], dtype)


@EACH
def test_autocast_changes_nothing_for_float32(loss: Callable[..., Tensor]) -> None:
    pair = [tensor.float() for tensor in random_pair(16, 100)]
    expected = value_and_gradients(loss, pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = value_and_gradients(loss, pair)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@EACH
def test_autocast_through_a_linear_layer(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    student = torch.nn.Linear(8, 10)
    images, teacher_logits = torch.randn(16, 8), torch.randn(16, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student(images)
        assert logits.dtype == torch.bfloat16
        value = loss(logits, teacher_logits)
    assert value.dtype == torch.float32
    value.backward()
    expected = loss(logits.detach().double(), teacher_logits.double())
    assert max_relative_error(value.detach(), expected) < LOSS_TOLERANCE[torch.bfloat16]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_1e4(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    rows = torch.tensor([[1e4, -1e4, 0, 5], [-1e4, 1e4, 1e4, 1e4], [1e4, 1e4, 1e4, 1e4]])
    others = torch.tensor([[-1e4, 1e4, 0, -5], [-1e4, 1e4, 0, 9.0e3], [-1e4, -1e4, 1, 2]])
    for pair in ([rows, others], [others, rows], [rows, rows]):
        typed = [tensor.to(dtype) for tensor in pair]
        value, gradients = value_and_gradients(loss, typed)
        exact, exact_gradients = value_and_gradients(loss, [t.double() for t in typed])
        assert value.isfinite()
        assert max_relative_error(value, exact) < LOSS_TOLERANCE[dtype]
        for gradient, expected in zip(gradients, exact_gradients, strict=True):
            fits = expected.abs() < 0.99 * torch.finfo(dtype).max
            error = (gradient[fits].double() - expected[fits]).abs().max().item()
            scale = max(1.0, expected[fits].abs().max().item())  # 0 where input equals target
            assert error < scale * GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("normalization", ["rows", "weights"])
def test_logits_of_1e4_against_the_pairwise_formula(normalization: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [1e4 * (2 * torch.rand(8, 12, generator=generator) - 1).double() for _ in range(2)]
    for gamma in (0, 0.5, 1):
        options: dict[str, Any] = {"normalization": normalization, "gamma": gamma}
        ours = value_and_gradients(partial(decoupled_kl_loss, **options), pair)
        expected = value_and_gradients(partial(decoupled_kl_reference, **options), pair)
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-8)


@EACH
def test_an_offset_of_300_costs_no_accuracy(loss: Callable[..., Tensor]) -> None:
    # Without centring the value is off by 2e-3. The differences are rounded at the size of the
    # offset, hence the slack: 600 is 7e-5 apart from the next float32.
    input, target = random_pair(16, 100, scale=1.0)
    check_against_float64(loss, [input.float(), (target + 300).float()], torch.float32, slack=5)
    pair = [(input - 300).float(), (target + 300).float()]
    check_against_float64(loss, pair, torch.float32, slack=5)


@pytest.mark.parametrize("gamma", [0, 0.4, 1])
@pytest.mark.parametrize("normalization", ["rows", "weights"])
def test_100003_classes(normalization: str, gamma: float) -> None:
    pair = [tensor.float() for tensor in random_pair(3, 100_003)]
    loss = partial(decoupled_kl_loss, normalization=normalization, gamma=gamma, mse_weight=2)
    # PyTorch's own softmax is off by 4e-6 here: its sum over the classes is a float32.
    check_against_float64(loss, pair, torch.float32, slack=4)


def test_100003_classes_against_sums_over_pairs() -> None:
    # The matrix of all pairs would not fit, but the rows of a few classes do, and they are what
    # the gradient d/dm_j (1/4) sum_jk w_j w_k (d_j - d_k)^2 = w_j sum_k w_k (d_j - d_k) needs.
    input, target = random_pair(1, 100_003)
    weights = torch.rand(1, 100_003, generator=torch.Generator().manual_seed(1)).double()
    difference, row, few = (target - input)[0], weights[0], slice(0, 50)
    pairs = row[few, None] * row[None] * (difference[few, None] - difference[None])
    _, (_, gradient) = value_and_gradients(
        lambda a, b: ikl_loss(a, b, weights, ce_weight=0), (input, target)
    )
    torch.testing.assert_close(gradient[0, few], pairs.sum(1), rtol=1e-10, atol=1e-8)


def test_float64_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        single = [tensor.float() for tensor in random_pair(4, 7)]
        assert ikl_loss(*single).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
