"""The O(C) loss against the pairwise [N, C, C] formula of its definition."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.losses import decoupled_kl_loss
from tests.reference import decoupled_kl_reference, max_relative_error, value_and_gradients

SHAPES = [
    (1, 1), (5, 1), (1, 2), (4, 2), (7, 10), (3, 33), (2, 1271), (0, 10), (0, 1), (3, 5, 6),
    (2, 5, 3, 4), (2, 1, 2, 2), (2, 4, 0, 3),
]  # fmt: skip
SMALL_SHAPES = [shape for shape in SHAPES if shape[1] < 1000]
SOURCES = ["sample", "class_probs", "class_table"]
BACKENDS = ["reference", "auto", "blocked"]  # the others have parity suites of their own
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
CROSSED = list(
    itertools.product(
        SOURCES, ["rows", "weights"], ["mean", "sum", "none"], [True, False], [True, False]
    )
)


def random_case(shape: tuple[int, ...], source: str, seed: int) -> dict[str, Tensor]:
    """Return tensors of a case: logits, and where the source asks for them weights and labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    case = {"input": 3 * normal(*shape), "target": 3 * normal(*shape)}
    row_shape, num_classes = shape[:1] + shape[2:], shape[1]
    if source == "class_probs":
        case["class_probs"] = normal(*shape).exp()
    if source == "class_table":
        case["class_table"] = normal(num_classes, num_classes).exp()
        labels = torch.randint(num_classes, row_shape, generator=generator)
        labels[torch.rand(row_shape, generator=generator) < 0.2] = -100
        case["labels"] = labels
    if seed % 2:
        case["mask"] = torch.rand(row_shape, generator=generator) < 0.7
    return case


def check_against_reference(case: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Compare the value and the gradient for every floating-point tensor of the case."""
    differentiable = [name for name, tensor in case.items() if tensor.is_floating_point()]
    fixed = {name: tensor for name, tensor in case.items() if name not in differentiable}
    row_shape = case["input"].shape[:1] + case["input"].shape[2:]
    # an upstream gradient that is not one, and differs between rows where there are rows
    upstream = torch.linspace(-0.7, 2.3, max(row_shape.numel(), 1), dtype=torch.float64)
    upstream = (
        upstream[: row_shape.numel()].reshape(row_shape)
        if options.get("reduction") == "none"
        else upstream[-1]
    )
    results = [
        value_and_gradients(
            lambda *tensors, function=function, options=options: function(
                **dict(zip(differentiable, tensors, strict=True)), **fixed, **options
            ),
            [case[name] for name in differentiable],
            upstream,
        )
        for function, options in (
            (decoupled_kl_loss, options),
            (decoupled_kl_reference, {k: v for k, v in options.items() if k != "backend"}),
        )
    ]
    (value, gradients), (expected, expected_gradients) = results
    assert value.shape == expected.shape
    assert max_relative_error(value, expected) < 1e-12
    for name, gradient, expected_gradient in zip(
        differentiable, gradients, expected_gradients, strict=True
    ):
        scale = max(1.0, expected_gradient.abs().sum().item())
        error = (gradient - expected_gradient).abs().sum().item()
        assert error < 1e-11 * scale, name


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("source", "normalization", "reduction", "break_asymmetry", "detach_weights"), CROSSED
)
def test_options_crossed(
    source: str,
    normalization: str,
    reduction: str,
    break_asymmetry: bool,
    detach_weights: bool,
    backend: str,
) -> None:
    key = (source, normalization, reduction, break_asymmetry, detach_weights)
    chosen = random.Random(CROSSED.index(key))
    for shape in SMALL_SHAPES:
        case = random_case(shape, source, seed=chosen.randrange(1000))
        options: dict[str, Any] = {
            "normalization": normalization,
            "reduction": reduction,
            "break_asymmetry": break_asymmetry,
            "detach_weights": detach_weights,
            "mse_weight": chosen.choice([0, 0.3, 1, 20.0]),
            "ce_weight": chosen.choice([0, 1, 4.0]),
            "temperature": chosen.choice([1, 0.5, 4.0]),
            "gamma": chosen.choice([0, 0.2, 1, 2.5]),
        }
        if source == "sample":
            options["weight_temperature"] = chosen.choice([1, 4.0, 100.0])
        if reduction == "mean" and chosen.random() < 0.5:
            options["num_items"] = chosen.choice([3, 17.5])
        if normalization == "weights" and chosen.random() < 0.5:
            options["denominator"] = chosen.choice([2, 0.3])
        if backend == "blocked" and not detach_weights:
            with pytest.raises(ValueError, match="detach_weights=False asks for the gradient"):
                check_against_reference(case, {**options, "backend": backend})
        else:
            check_against_reference(case, {**options, "backend": backend})


@EVERY_BACKEND
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_defaults_on_every_shape(shape: tuple[int, ...], source: str, backend: str) -> None:
    for seed in (0, 1):
        check_against_reference(random_case(shape, source, seed), {"backend": backend})


def test_labels_that_are_ignored_by_another_index() -> None:
    case = random_case((7, 10), "class_table", seed=0)
    case["labels"] = torch.tensor([0, 1, 255, 9, 9, 255, 4])
    check_against_reference(case, {"ignore_index": 255})


def test_ignored_labels_count_with_other_weight_sources_too() -> None:
    case = random_case((7, 10), "class_probs", seed=0)
    case["labels"] = torch.tensor([0, 1, -100, 9, 9, -100, 4])
    check_against_reference(case, {"normalization": "weights"})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    pair = random_case((7, 160), "sample", seed=0)
    table = torch.rand(160, 160, dtype=torch.float64)
    # 156 is what -100 wraps to in uint8
    labels = torch.tensor([0, 1, 120, 9, 9, 3, 4 if dtype == torch.int8 else 156])
    expected = decoupled_kl_loss(**pair, class_table=table, labels=labels, reduction="none")
    ours = decoupled_kl_loss(**pair, class_table=table, labels=labels.to(dtype), reduction="none")
    assert torch.equal(ours, expected)
    assert ours.min() > 0


def test_rows_without_weight_contribute_nothing() -> None:
    case = random_case((4, 5), "class_probs", seed=0)
    case["class_probs"][1] = 0
    case["class_probs"][2, :4] = 0  # one class with weight has no pair
    for normalization in ("rows", "weights"):
        options = {"normalization": normalization, "ce_weight": 0, "detach_weights": False}
        check_against_reference(case, options)
        values = decoupled_kl_loss(**case, **options, reduction="none")
        assert values[1] == values[2] == 0
    case["class_probs"][:] = 0
    value, gradients = value_and_gradients(
        lambda a, b: decoupled_kl_loss(
            a, b, case["class_probs"], normalization="weights", ce_weight=0
        ),
        (case["input"], case["target"]),
    )
    assert value == 0
    assert all(torch.equal(gradient, torch.zeros(4, 5).double()) for gradient in gradients)


@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_agree(normalization: str, masked: bool) -> None:
    case = random_case((6, 9, 4), "class_table", seed=int(masked))
    options: dict[str, Any] = {**case, "normalization": normalization, "mse_weight": 3.0}
    counted = case["labels"] != -100
    if masked:
        counted = counted & case["mask"]
    values = decoupled_kl_loss(**options, reduction="none")
    mean = decoupled_kl_loss(**options)
    total = decoupled_kl_loss(**options, reduction="sum")
    assert values.shape == (6, 4)
    assert torch.equal(values[~counted], torch.zeros_like(values[~counted]))
    torch.testing.assert_close(values[counted].mean(), mean)
    torch.testing.assert_close(total / counted.sum(), mean)
    torch.testing.assert_close(decoupled_kl_loss(**options, num_items=counted.sum()), mean)


@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_chunks_equal_the_whole(normalization: str, as_tensor: bool) -> None:
    case = random_case((12, 7), "class_table", seed=1)
    options: dict[str, Any] = {"normalization": normalization, "gamma": 0.5, "mse_weight": 4.0}
    table = case.pop("class_table")
    counted = case["mask"] & (case["labels"] != -100)
    num_items: Any = counted.sum()
    shared: dict[str, Any] = {"num_items": num_items if as_tensor else num_items.item()}
    if normalization == "weights":
        weight_sums = table[case["labels"][counted]].pow(0.5).sum(1)
        denominator = weight_sums.square().sum()
        shared["denominator"] = denominator if as_tensor else denominator.item()

    def loss(part: slice, input: Tensor, target: Tensor, **more: Any) -> Tensor:
        return decoupled_kl_loss(
            input[part],
            target[part],
            class_table=table,
            labels=case["labels"][part],
            mask=case["mask"][part],
            **options,
            **more,
        )

    pair = (case["input"], case["target"])
    whole = value_and_gradients(lambda a, b: loss(slice(None), a, b), pair)
    chunks = [slice(0, 5), slice(5, 6), slice(6, 12)]
    summed = value_and_gradients(
        lambda a, b: torch.stack([loss(part, a, b, **shared) for part in chunks]).sum(), pair
    )
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_zero_items_in_all_chunks_are_no_loss(normalization: str, zero: Any) -> None:
    case = random_case((3, 4), "sample", seed=0)
    more = {"denominator": zero} if normalization == "weights" else {}
    value, gradients = value_and_gradients(
        lambda a, b: decoupled_kl_loss(
            a,
            b,
            mask=torch.zeros(3, dtype=torch.bool),
            num_items=zero,
            normalization=normalization,
            **more,
        ),
        (case["input"], case["target"]),
    )
    assert value == 0
    assert all(torch.equal(gradient, torch.zeros(3, 4).double()) for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divisors_do_not_change_the_dtype(dtype: torch.dtype) -> None:
    case = random_case((3, 4), "sample", seed=0)
    pair = (case["input"].to(dtype), case["target"].to(dtype))
    for other in (torch.float64, torch.float16, torch.int64):
        loss = decoupled_kl_loss(
            *pair,
            normalization="weights",
            num_items=torch.tensor(3, dtype=other),
            denominator=torch.tensor(2, dtype=other),
        )
        assert loss.dtype == dtype


@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parts_are_the_two_terms(normalization: str, reduction: str) -> None:
    case = random_case((4, 6, 3), "class_table", seed=1)
    for name in ("input", "target"):
        case[name].requires_grad_()
    options: dict[str, Any] = {**case, "normalization": normalization, "reduction": reduction}
    loss, parts = decoupled_kl_loss(**options, mse_weight=7.0, ce_weight=3.0, return_parts=True)
    mse, ce = parts.weighted_mse, parts.soft_cross_entropy
    torch.testing.assert_close(loss, 7 * mse + 3 * ce)
    torch.testing.assert_close(decoupled_kl_loss(**options, ce_weight=0), mse, check_stride=False)
    torch.testing.assert_close(decoupled_kl_loss(**options, mse_weight=0), ce)
    assert loss.requires_grad
    assert not mse.requires_grad
    assert not ce.requires_grad
    assert torch.equal(loss, decoupled_kl_loss(**options, mse_weight=7.0, ce_weight=3.0))


def test_no_gradient_reaches_the_weights_unless_asked() -> None:
    case = random_case((4, 5), "class_probs", seed=0)
    case["class_probs"].requires_grad_()
    assert not decoupled_kl_loss(**case).requires_grad
    assert decoupled_kl_loss(**case, detach_weights=False).requires_grad


def test_inputs_are_left_as_they_were() -> None:
    case = random_case((2, 5, 3), "class_table", seed=1)
    before = {name: tensor.clone() for name, tensor in case.items()}
    decoupled_kl_loss(**case)
    assert all(torch.equal(case[name], before[name]) for name in case)


def test_strided_views_are_as_good_as_copies() -> None:
    case = random_case((6, 10), "sample", seed=0)
    strided = {name: tensor.repeat_interleave(2, 1)[:, ::2] for name, tensor in case.items()}
    assert not strided["input"].is_contiguous()
    torch.testing.assert_close(decoupled_kl_loss(**strided), decoupled_kl_loss(**case))
    maps = {name: torch.stack([tensor] * 3, 2) for name, tensor in case.items()}
    channels_last = {
        name: tensor[..., None].contiguous(memory_format=torch.channels_last)
        for name, tensor in maps.items()
    }
    torch.testing.assert_close(decoupled_kl_loss(**channels_last), decoupled_kl_loss(**case))
