"""Properties that hold for every input, checked on many random ones."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dkl.losses import dkl_loss, gkl_loss, ikl_loss, jsd_loss, kl_loss, reverse_kl_loss
from tests.reference import value_and_gradients

Loss = Callable[..., Tensor]
WEIGHTS = torch.rand(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
ONLY_WMSE: dict[str, Loss] = {
    "wmse": partial(ikl_loss, ce_weight=0),
    "wmse-hot": partial(ikl_loss, ce_weight=0, weight_temperature=3),
    "gkl-wmse": partial(gkl_loss, ce_weight=0, gamma=0.3),
    "dkl-wmse": partial(dkl_loss, ce_weight=0),
}
DIVERGENCES: dict[str, Loss] = {
    "kl": kl_loss,
    "kl-hot": partial(kl_loss, temperature=4),
    "reverse-kl": reverse_kl_loss,
    "jsd": jsd_loss,
    "jsd-cold": partial(jsd_loss, temperature=0.5),
}
WHOLE: dict[str, Loss] = {
    "ikl": ikl_loss,
    "ikl-hot": partial(ikl_loss, temperature=4, mse_weight=5, ce_weight=8),
    "dkl": dkl_loss,
    "gkl": partial(gkl_loss, gamma=0.4),
    "undetached": partial(ikl_loss, detach_weights=False),
}
EVERY = ONLY_WMSE | DIVERGENCES | WHOLE


def random_pair(seed: int = 0, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    return scale * first, scale * torch.randn(6, 9, generator=generator, dtype=torch.float64)


def each(losses: dict[str, Loss]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", losses.values(), ids=losses.keys())


@each(EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_a_shift_of_any_row_changes_nothing(loss: Loss, seed: int) -> None:
    input, target = random_pair(seed)
    shift_input, shift_target = 300 * random_pair(seed + 50)[0][:, :1], random_pair(seed)[1][:, :1]
    expected = value_and_gradients(loss, (input, target))
    shifted = value_and_gradients(loss, (input + shift_input, target - shift_target))
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-11)


@each(EVERY)
def test_gradients_of_a_row_sum_to_zero(loss: Loss) -> None:
    _, gradients = value_and_gradients(loss, random_pair())
    for gradient in gradients:
        assert gradient.sum(1).abs().max() < 1e-13


@each(ONLY_WMSE | DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_zero_where_input_equals_target(loss: Loss, dtype: torch.dtype) -> None:
    logits = random_pair()[0].to(dtype)
    values = loss(logits, logits.clone(), reduction="none")
    assert torch.equal(values, torch.zeros_like(values))


@each(EVERY)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_gradients_vanish_where_input_equals_target(
    loss: Loss, dtype: torch.dtype, rounding: float
) -> None:
    logits = random_pair()[0].to(dtype)
    _, gradients = value_and_gradients(loss, (logits, logits))
    assert max(gradient.abs().max().item() for gradient in gradients) < rounding


@each(EVERY)
def test_order_of_the_classes_does_not_matter(loss: Loss) -> None:
    input, target = random_pair()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    value, gradients = value_and_gradients(loss, (input, target))
    permuted, permuted_gradients = value_and_gradients(loss, (input[:, order], target[:, order]))
    torch.testing.assert_close(permuted, value, rtol=1e-13, atol=1e-15)
    for before, after in zip(gradients, permuted_gradients, strict=True):
        torch.testing.assert_close(after, before[:, order], rtol=1e-11, atol=1e-14)


@each({name: loss for name, loss in (ONLY_WMSE | WHOLE).items() if "hot" not in name})
def test_order_of_the_classes_does_not_matter_for_weights_either(loss: Loss) -> None:
    input, target = random_pair()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    inverse = order.argsort()
    value = loss(input, target, WEIGHTS)
    permuted = loss(input[:, order], target[:, order], WEIGHTS[:, order])
    torch.testing.assert_close(permuted, value, rtol=1e-13, atol=0)

    table = torch.rand(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 8, 3, 3, 5, 1])
    value = loss(input, target, class_table=table, labels=labels)
    permuted = loss(
        input[:, order],
        target[:, order],
        class_table=table[order][:, order],
        labels=inverse[labels],
    )
    torch.testing.assert_close(permuted, value, rtol=1e-13, atol=0)


@each({name: loss for name, loss in EVERY.items() if "gkl" not in name})
def test_rows_are_independent(loss: Loss) -> None:
    input, target = random_pair()
    values = loss(input, target, reduction="none")
    for row in range(len(values)):
        alone = loss(input[row : row + 1], target[row : row + 1])
        torch.testing.assert_close(values[row], alone, rtol=1e-13, atol=1e-15)
    _, gradients = value_and_gradients(
        lambda a, b: loss(a, b, reduction="none")[2], (input, target)
    )
    for gradient in gradients:
        others = gradient[torch.arange(6) != 2]
        assert torch.equal(others, torch.zeros_like(others))


@each(EVERY)
def test_order_of_the_rows_does_not_matter(loss: Loss) -> None:
    input, target = random_pair()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    values = loss(input, target, reduction="none")
    permuted = loss(input[order], target[order], reduction="none")
    torch.testing.assert_close(permuted, values[order], rtol=1e-13, atol=1e-15)


@each(EVERY)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 1e4])
def test_never_negative(loss: Loss, scale: float) -> None:
    for seed in range(5):
        values = loss(*random_pair(seed, scale), reduction="none")
        assert values.min() >= -1e-15


@each(ONLY_WMSE)
def test_wmse_is_quadratic_in_the_difference(loss: Loss) -> None:
    input, target = random_pair()
    half = target + (input - target) / 2
    torch.testing.assert_close(4 * loss(half, target), loss(input, target), rtol=1e-12, atol=0)


def test_wmse_does_not_depend_on_the_temperature_of_the_soft_label() -> None:
    pair = random_pair()
    once, hot = ikl_loss(*pair, ce_weight=0), ikl_loss(*pair, ce_weight=0, temperature=9)
    assert torch.equal(once, hot)
