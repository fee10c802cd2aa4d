"""KL, reverse KL and Jensen-Shannon against PyTorch's own formulas."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dkl.losses import jsd_loss, kl_loss, reverse_kl_loss
from tests.reference import max_relative_error, value_and_gradients

Loss = Callable[..., Tensor]
SHAPES = [(1, 1), (4, 2), (7, 10), (3, 1271), (2, 5, 3, 2), (3, 4, 6), (0, 5), (2, 3, 0, 4)]


def kl_formula(input: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return KL(target || input) for every row, by PyTorch's function."""
    log_q = F.log_softmax(input / temperature, 1)
    log_p = F.log_softmax(target / temperature, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def jsd_formula(input: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the Jensen-Shannon divergence for every row, from probabilities."""
    q, p = (input / temperature).softmax(1), (target / temperature).softmax(1)
    m = (p + q) / 2
    return 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1)


FORMULAS: dict[str, tuple[Loss, Loss]] = {
    "kl": (kl_loss, kl_formula),
    "reverse_kl": (reverse_kl_loss, lambda a, b, t: kl_formula(b, a, t)),
    "jsd": (jsd_loss, jsd_formula),
}
EACH = pytest.mark.parametrize(("loss", "formula"), FORMULAS.values(), ids=FORMULAS.keys())
EACH_LOSS = pytest.mark.parametrize("loss", [kl_loss, reverse_kl_loss, jsd_loss])


def random_pair(shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    input = torch.randn(shape, generator=generator, dtype=torch.float64)
    return scale * input, scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@EACH
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(
    loss: Loss, formula: Loss, temperature: float, shape: tuple[int, ...]
) -> None:
    pair = random_pair(shape)
    upstream = torch.randn(shape[:1] + shape[2:], dtype=torch.float64)
    values, gradients = value_and_gradients(
        lambda a, b: loss(a, b, temperature=temperature, reduction="none"), pair, upstream
    )
    expected, expected_gradients = value_and_gradients(
        lambda a, b: formula(a, b, temperature), pair, upstream
    )
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-13)


@EACH
@pytest.mark.parametrize("masked", [False, True])
def test_reductions(loss: Loss, formula: Loss, masked: bool) -> None:
    pair = random_pair((4, 5, 6))
    mask = torch.rand(4, 6) < 0.5 if masked else None
    counted = torch.ones(4, 6, dtype=torch.bool) if mask is None else mask
    expected = formula(*pair, 1.0)
    values = loss(*pair, mask=mask, reduction="none")
    torch.testing.assert_close(values, expected * counted, rtol=1e-11, atol=0)
    torch.testing.assert_close(loss(*pair, mask=mask), expected[counted].mean())
    torch.testing.assert_close(loss(*pair, mask=mask, reduction="sum"), expected[counted].sum())


def test_mean_is_batchmean_of_pytorch() -> None:
    student, teacher = random_pair((8, 10))
    expected = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(kl_loss(student, teacher), expected)


@EACH_LOSS
def test_gradcheck_and_gradgradcheck(loss: Loss) -> None:
    pair = [tensor.requires_grad_() for tensor in random_pair((3, 4))]

    def hot_loss(a: Tensor, b: Tensor) -> Tensor:
        return loss(a, b, temperature=2, reduction="none")

    assert torch.autograd.gradcheck(hot_loss, pair)
    assert torch.autograd.gradgradcheck(hot_loss, pair)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 1e4])
def test_jsd_is_symmetric_and_at_most_log_2(scale: float) -> None:
    input, target = random_pair((200, 6), scale)
    values = jsd_loss(input, target, reduction="none")
    swapped = jsd_loss(target, input, reduction="none")
    torch.testing.assert_close(values, swapped, rtol=1e-13, atol=1e-16)
    assert values.max() <= math.log(2) + 1e-15
    assert values.min() >= -1e-16


def test_reverse_kl_swaps_the_arguments() -> None:
    input, target = random_pair((7, 10))
    assert torch.equal(reverse_kl_loss(input, target), kl_loss(target, input))
    assert not torch.allclose(reverse_kl_loss(input, target), kl_loss(input, target))


@EACH_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(loss: Loss, dtype: torch.dtype) -> None:
    sure = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype)
    opposite = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype)
    values, gradients = value_and_gradients(
        lambda a, b: loss(a, b, reduction="none"), (sure, opposite)
    )
    most = math.log(2) if loss is jsd_loss else 2e4
    torch.testing.assert_close(values, torch.tensor([most, 0.0], dtype=dtype))
    assert all(gradient.isfinite().all() for gradient in gradients)


@EACH_LOSS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(loss: Loss, dtype: torch.dtype) -> None:
    pair = [tensor.to(dtype) for tensor in random_pair((7, 100))]
    value, gradients = value_and_gradients(loss, pair)
    exact, exact_gradients = value_and_gradients(loss, [tensor.double() for tensor in pair])
    assert value.dtype == torch.float32
    assert max_relative_error(value, exact) < 1e-6
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        assert max_relative_error(gradient, expected) < max(1e-6, torch.finfo(dtype).eps)


@EACH_LOSS
def test_nan_in_rows_that_do_not_count(loss: Loss) -> None:
    input, target = random_pair((3, 4))
    expected, expected_gradients = value_and_gradients(loss, (input[1:], target[1:]))
    input[0], target[0, 2] = float("nan"), float("inf")
    mask = torch.tensor([False, True, True])
    value, gradients = value_and_gradients(lambda a, b: loss(a, b, mask=mask), (input, target))
    torch.testing.assert_close(value, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        torch.testing.assert_close(gradient[1:], expected_gradient)


@EACH_LOSS
def test_nothing_counts(loss: Loss) -> None:
    none = torch.zeros(3, dtype=torch.bool)
    for pair, mask in ((random_pair((3, 4)), none), (random_pair((0, 4)), None)):
        value, gradients = value_and_gradients(lambda a, b, m=mask: loss(a, b, mask=m), pair)
        assert value == 0.0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
