"""Maps and sequences are rows in another order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.losses import (
    IKLLoss,
    KLLoss,
    dkl_loss,
    gkl_loss,
    ikl_loss,
    jsd_loss,
    kl_loss,
    sequence_loss,
)
from tests.reference import value_and_gradients

LOSSES: dict[str, Callable[..., Tensor]] = {
    "ikl": ikl_loss,
    "dkl": partial(dkl_loss, temperature=2),
    "gkl": partial(gkl_loss, gamma=0.4),
    "kl": kl_loss,
    "jsd": jsd_loss,
}
EACH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def random_sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    return 3 * input, 3 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)


@EACH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sequences_are_their_rows(loss: Callable[..., Tensor], reduction: str) -> None:
    pair = random_sequences()
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    ours = value_and_gradients(
        lambda a, b: sequence_loss(loss)(a, b, mask=mask, reduction=reduction), pair
    )
    expected = value_and_gradients(
        lambda a, b: loss(
            a.reshape(-1, 11), b.reshape(-1, 11), mask=mask.reshape(-1), reduction=reduction
        ).reshape((2, 7) if reduction == "none" else ()),
        pair,
    )
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-16)


@EACH
def test_maps_are_their_rows(loss: Callable[..., Tensor]) -> None:
    maps = [tensor.reshape(2, 7, 11, 1).permute(0, 2, 1, 3) for tensor in random_sequences()]
    values = loss(*maps, reduction="none")
    rows = [tensor.permute(0, 2, 3, 1).reshape(-1, 11) for tensor in maps]
    assert values.shape == (2, 7, 1)
    torch.testing.assert_close(values.reshape(-1), loss(*rows, reduction="none"))
    torch.testing.assert_close(loss(*maps), loss(*rows))


def test_every_weight_source_for_sequences() -> None:
    input, target = random_sequences()
    generator = torch.Generator().manual_seed(2)
    table = torch.rand(11, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (2, 7), generator=generator)
    by_table = sequence_loss(ikl_loss)(input, target, class_table=table, labels=labels)
    by_rows = sequence_loss(ikl_loss)(input, target, table[labels])
    by_keyword = sequence_loss(IKLLoss())(input, target, class_probs=table[labels])
    assert torch.equal(by_table, by_rows)
    assert torch.equal(by_table, by_keyword)


def test_padding_with_ignored_labels() -> None:
    input, target = random_sequences()
    table = torch.rand(11, 11, dtype=torch.float64)
    labels = torch.tensor([[3, 8, 1, -100, -100, -100, -100], [9, 9, 2, 4, 0, 1, -100]])
    input[0, 3:] = float("nan")
    loss = sequence_loss(gkl_loss)(input, target, class_table=table, labels=labels)
    counted = labels != -100
    expected = gkl_loss(input[counted], target[counted], table[labels[counted]])
    torch.testing.assert_close(loss, expected)


def test_modules_and_parts_pass_through() -> None:
    pair = random_sequences()
    torch.testing.assert_close(
        sequence_loss(KLLoss(temperature=2.0))(*pair),
        sequence_loss(kl_loss)(*pair, temperature=2.0),
    )
    loss, parts = sequence_loss(IKLLoss(return_parts=True))(*pair)
    torch.testing.assert_close(loss, parts.weighted_mse + parts.soft_cross_entropy)


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 4, 4)], ids=str)
def test_only_sequences(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"sequence_loss needs \[B, T, C\]") as caught:
        sequence_loss(ikl_loss)(logits, logits)
    assert str(list(shape)) in str(caught.value)


def test_a_mask_in_the_place_of_class_probs_is_refused() -> None:
    pair = random_sequences()
    positional: Any = torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="got class_probs"):
        sequence_loss(kl_loss)(*pair, positional)
