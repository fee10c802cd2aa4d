"""Rows that do not count, whatever they hold, reach neither the loss nor any gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.losses import dkl_loss, gkl_loss, ikl_loss
from tests.reference import value_and_gradients

LOSSES: dict[str, Any] = {"dkl": dkl_loss, "ikl": ikl_loss, "gkl": gkl_loss}
BAD = [float("nan"), float("inf"), -float("inf")]
KEEP = torch.tensor([True, False, True, True, False])
LABELS = torch.tensor([2, 3, 0, 2, 1])


def clean_case() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("input", "target", "class_probs")
    return {
        name: torch.randn(5, 4, generator=generator, dtype=torch.float64).abs() for name in names
    }


def spoil(tensors: dict[str, Tensor], bad: float, *, whole_row: bool) -> dict[str, Tensor]:
    spoiled = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in spoiled.values():
        if whole_row:
            tensor[~KEEP] = bad
        else:
            tensor[~KEEP, 1] = bad
    return spoiled


@pytest.mark.parametrize("by", ["mask", "ignore_index", "both"])
@pytest.mark.parametrize("whole_row", [True, False])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_non_finite_rows(loss: Any, gamma: float, bad: float, whole_row: bool, by: str) -> None:
    if by == "mask":
        which: dict[str, Any] = {"mask": KEEP}
    elif by == "ignore_index":
        which = {"labels": LABELS.where(KEEP, -100)}
    else:
        first = torch.tensor([True, False, True, True, True])
        last = torch.tensor([2, 3, 0, 2, -1])
        which = {"mask": first, "labels": last, "ignore_index": -1}
    tensors = clean_case()
    kept = [tensor[KEEP] for tensor in tensors.values()]
    options = {"gamma": gamma, "detach_weights": False}
    expected, expected_gradients = value_and_gradients(lambda *t: loss(*t, **options), kept)
    spoiled = spoil(tensors, bad, whole_row=whole_row)
    value, gradients = value_and_gradients(
        lambda *t: loss(*t, **options, **which), list(spoiled.values())
    )
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient[~KEEP], torch.zeros_like(gradient[~KEEP]))
        torch.testing.assert_close(gradient[KEEP], expected_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_non_finite_rows_under_other_reductions(reduction: str, bad: float) -> None:
    spoiled = spoil(clean_case(), bad, whole_row=True)
    value, gradients = value_and_gradients(
        lambda *t: gkl_loss(*t, mask=KEEP, reduction=reduction), list(spoiled.values())[:2]
    )
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if reduction == "none":
        assert torch.equal(value[~KEEP], torch.zeros(2, dtype=torch.float64))
        assert value[KEEP].min() > 0


def test_non_finite_rows_reach_no_part() -> None:
    spoiled = spoil(clean_case(), float("nan"), whole_row=True)
    _, parts = ikl_loss(spoiled["input"], spoiled["target"], mask=KEEP, return_parts=True)
    assert parts.weighted_mse.isfinite()
    assert parts.soft_cross_entropy.isfinite()


@pytest.mark.parametrize("gamma", [0.5, 1])
def test_rows_that_do_not_count_reach_no_row_of_the_table(gamma: float) -> None:
    tensors = clean_case()
    table = torch.rand(4, 4, dtype=torch.float64) + 0.1
    # An uncounted row must be gathered from somewhere: no row of the table may show it, even one
    # with zeros (infinite gradient of their power) or NaN.
    for bad in (0.0, float("nan")):
        table[3] = table[1] = bad
        for where in (LABELS, torch.tensor([2, 77, 0, 2, -9])):
            value, (gradient,) = value_and_gradients(
                lambda t, labels=where: ikl_loss(
                    tensors["input"],
                    tensors["target"],
                    class_table=t,
                    labels=labels,
                    mask=KEEP,
                    gamma=gamma,
                    detach_weights=False,
                ),
                [table],
            )
            assert value.isfinite()
            assert gradient[[0, 2]].isfinite().all()
            assert torch.equal(gradient[[1, 3]], torch.zeros(2, 4, dtype=torch.float64))


def test_row_0_of_the_table_is_safe_from_ignored_labels() -> None:
    tensors = clean_case()
    table = torch.rand(4, 4, dtype=torch.float64) + 0.1
    table[0] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    labels = torch.tensor([2, -100, 1, 2, -100])
    _, (gradient,) = value_and_gradients(
        lambda t: ikl_loss(
            tensors["input"],
            tensors["target"],
            class_table=t,
            labels=labels,
            gamma=0.5,
            detach_weights=False,
        ),
        [table],
    )
    assert gradient.isfinite().all()
    assert torch.equal(gradient[0], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", [0.0, *BAD])
def test_nothing_counts(normalization: str, reduction: str, bad: float) -> None:
    tensors = [torch.full((5, 4), bad, dtype=torch.float64) for _ in range(3)]
    for which in (
        {"mask": torch.zeros(5, dtype=torch.bool)},
        {"labels": torch.full((5,), -100)},
    ):
        value, gradients = value_and_gradients(
            lambda *t, which=which: ikl_loss(
                *t,
                normalization=normalization,
                reduction=reduction,
                detach_weights=False,
                **which,
            ),
            tensors,
        )
        assert torch.equal(value, torch.zeros_like(value))
        assert all(torch.equal(gradient, torch.zeros(5, 4).double()) for gradient in gradients)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("normalization", ["rows", "weights"])
def test_no_rows(shape: tuple[int, ...], normalization: str) -> None:
    row_shape = shape[:1] + shape[2:]
    table = torch.rand(4, 4)
    labels = torch.zeros(row_shape, dtype=torch.long)
    for more in ({}, {"mask": labels == 0}, {"class_table": table, "labels": labels}):
        value, gradients = value_and_gradients(
            lambda a, b, more=more: ikl_loss(a, b, normalization=normalization, **more),
            [torch.zeros(shape), torch.zeros(shape)],
        )
        assert value.shape == ()
        assert value == 0.0
        assert all(gradient.shape == shape for gradient in gradients)
    none = ikl_loss(torch.zeros(shape), torch.zeros(shape), reduction="none")
    assert none.shape == row_shape


def test_a_mask_of_a_map_acts_on_positions() -> None:
    generator = torch.Generator().manual_seed(3)
    pair = [torch.randn(2, 5, 3, 4, generator=generator) for _ in range(2)]
    mask = torch.rand(2, 3, 4, generator=generator) < 0.5
    rows = [tensor.permute(0, 2, 3, 1)[mask] for tensor in pair]
    torch.testing.assert_close(gkl_loss(*pair, mask=mask), gkl_loss(*rows))
