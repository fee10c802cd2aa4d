"""Backends that make the gradient in the forward pass against the reference formula.

tests/losses/test_decoupled.py holds the crossed options; here is what only a fused backend can get
wrong: blocks, layouts, upstream gradients, what is kept for the backward pass, and when.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.losses import blocks, compiled, decoupled_kl_loss, fused, gkl_loss, ikl_loss
from dkl.losses.hand_out import Problem
from dkl.losses.row_kernel import RowOptions, RowWeights
from tests.losses.test_decoupled import SOURCES, random_case
from tests.reference import max_relative_error, value_and_gradients

FUSED = pytest.mark.parametrize("backend", ["auto", "blocked", "compile"])
QUICK = pytest.mark.parametrize("backend", ["auto", "blocked"])


def both(
    pair: tuple[Tensor, Tensor],
    backend: str,
    upstream: Any = 1.0,
    needs: tuple[bool, bool] = (True, True),
    **options: Any,
) -> list[tuple[Tensor, list[Tensor]]]:
    """Return value and gradients of a backend and of the reference."""
    found = []
    for name in (backend, "reference"):
        leaves = [
            x.detach().clone().requires_grad_(need) for x, need in zip(pair, needs, strict=True)
        ]
        value = decoupled_kl_loss(*leaves, backend=name, **options)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad((value * upstream).sum(), wanted) if wanted else ()
        found.append((value.detach(), list(gradients)))
    return found


def assert_same(found: list[tuple[Tensor, list[Tensor]]], tolerance: float = 1e-12) -> None:
    (value, gradients), (expected, expected_gradients) = found
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    assert max_relative_error(value, expected) < tolerance
    assert len(gradients) == len(expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == wanted.dtype
        assert gradient.shape == wanted.shape
        assert max_relative_error(gradient, wanted) < tolerance


def logits(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (3 * first).to(dtype), (3 * second).to(dtype)


# The compiled backend: programs are slow to make, so that a few cases stand for all.

COMPILED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "dkl": {"break_asymmetry": False, "temperature": 4.0, "weight_temperature": 4.0},
    "two temperatures": {"temperature": 4.0, "weight_temperature": 100.0, "mse_weight": 8.0},
    "gkl": {"normalization": "weights", "gamma": 0.4, "weight_temperature": 2.0},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_options(name: str) -> None:
    for shape in ((7, 10), (1, 5), (3, 1), (4, 5, 3), (0, 4)):
        upstream = torch.linspace(-1, 2, shape[0] * (shape[2] if len(shape) > 2 else 1)).double()
        rows = upstream.reshape(shape[:1] + shape[2:]) if name == "none" else 1.7
        assert_same(both(logits(*shape), "compile", rows, **COMPILED[name]))


@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("source", ["class_probs", "class_table"])
def test_compiled_weights(source: str, gamma: float) -> None:
    for seed in (0, 1):  # the second has a mask
        case = random_case((9, 6), source, seed)
        pair = (case.pop("input"), case.pop("target"))
        assert_same(both(pair, "compile", 1.7, gamma=gamma, **case))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_compiled_gradients_that_are_needed(needs: tuple[bool, bool]) -> None:
    assert_same(both(logits(6, 9), "compile", needs=needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_precision(dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    pair = logits(16, 100, dtype=dtype)
    found = both(pair, "compile")
    exact = both((pair[0].double(), pair[1].double()), "reference")[1]
    assert found[0][0].dtype == torch.float32
    assert max_relative_error(found[0][0], exact[0]) < 2e-6
    for gradient, expected in zip(found[0][1], exact[1], strict=True):
        assert gradient.dtype == dtype
        assert max_relative_error(gradient, expected) < tolerance


def test_compiled_once_for_all_sizes_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled._program.cache_clear()
    calls: list[object] = []
    real = torch._dynamo.utils.counters
    real.clear()
    for shape, temperature in (((5, 7), 1.0), ((9, 7), 2.0), ((4, 33), 3.0), ((64, 6), 5.5)):
        pair = logits(*shape)
        options = {"temperature": temperature, "weight_temperature": temperature}
        assert_same(both(pair, "compile", **options))
        calls.append(real["stats"]["unique_graphs"])
    assert calls == [1, 1, 1, 1]


# Blocks: as many as there are rows, and any layout.


@QUICK
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(7, 10), (5, 40), (3, 6, 4), (4, 33, 2, 3)], ids=str)
@pytest.mark.parametrize("elements", [1, 64, 1 << 18])
def test_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    source: str,
    shape: tuple[int, ...],
    elements: int,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for seed in (0, 1):
        case = random_case(shape, source, seed)
        pair = (case.pop("input"), case.pop("target"))
        assert_same(both(pair, backend, 0.3, **case))
        assert_same(both(pair, backend, normalization="weights", gamma=0.4, **case))


@QUICK
@pytest.mark.parametrize("num_classes", [5, 40])
def test_layouts(backend: str, num_classes: int) -> None:
    pair = logits(6, num_classes)
    wide = tuple(x.repeat_interleave(2, 1)[:, ::2] for x in pair)
    turned = tuple(x.t().contiguous().t() for x in pair)
    one_row = (pair[0], pair[1][:1].expand(6, -1))
    maps = tuple(x.reshape(2, 3, num_classes).movedim(-1, 1) for x in pair)
    for strided in (wide, turned, one_row, maps):
        assert_same(both(strided, backend))
    images = tuple(
        x.reshape(6, num_classes, 1, 1)
        .expand(6, num_classes, 2, 3)
        .contiguous(memory_format=torch.channels_last)
        for x in pair
    )
    assert_same(both(images, backend))


@QUICK
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_maps_and_mixed_dtypes(backend: str, dtype: torch.dtype) -> None:
    first, second = logits(4, 6, 5, dtype=dtype)
    upstream = torch.linspace(-1, 2, 20).reshape(4, 5)
    for pair in ((first, second), (first, second.float()), (first.float(), second)):
        assert_same(both(pair, backend, 1.5), tolerance=8e-3)
        assert_same(both(pair, backend, upstream, reduction="none"), tolerance=8e-3)


# What the backward pass is given and what it keeps.


@FUSED
def test_a_kept_graph_gives_the_same_again(backend: str) -> None:
    pair = [x.requires_grad_() for x in logits(5, 8)]
    loss = ikl_loss(*pair, backend=backend)
    first = torch.autograd.grad(loss, pair, torch.tensor(2.5).double(), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # ours to change: the graph must not notice
    second = torch.autograd.grad(loss, pair, torch.tensor(1.0).double(), retain_graph=True)
    again = [gradient.clone() for gradient in second]
    for gradient in second:
        gradient.zero_()
    last = torch.autograd.grad(loss, pair, torch.tensor(-3.0).double())
    for a, b, c in zip(copies, again, last, strict=True):
        torch.testing.assert_close(a, 2.5 * b)
        torch.testing.assert_close(c, -3.0 * b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, pair)


@FUSED
@pytest.mark.parametrize("num_classes", [10, 100])
def test_nearly_equal_logits_lose_no_digits(backend: str, num_classes: int) -> None:
    # Early steps of an attack: the difference is 1e-5 of the logits, and exact in float32.
    target, noise = (x.float() for x in logits(16, num_classes))
    pair = (target + 1e-4 * noise, target)
    (value, ours), _ = both(pair, backend, ce_weight=0.0)
    _, (exact, expected) = both((pair[0].double(), pair[1].double()), backend, ce_weight=0.0)
    assert max_relative_error(value, exact) < 3e-6
    for gradient, wanted in zip(ours, expected, strict=True):
        assert max_relative_error(gradient, wanted) < 3e-6


@FUSED
def test_gradients_add_up_in_leaves(backend: str) -> None:
    input, target = logits(5, 8)
    leaf = input.clone().requires_grad_()
    for factor in (1.0, 2.0, 0.5):
        (factor * ikl_loss(leaf, target, backend=backend)).backward()
    expected = value_and_gradients(lambda x: ikl_loss(x, target, backend="reference"), [input])[1][
        0
    ]
    torch.testing.assert_close(leaf.grad, 3.5 * expected)


@pytest.mark.parametrize("shape", [(4, 6), (600, 300)], ids=str)
def test_a_graph_may_be_kept_for_many_backward_passes(shape: tuple[int, ...]) -> None:
    input, target = logits(*shape)
    leaf = input.clone().requires_grad_()
    loss = ikl_loss(leaf, target)
    for _ in range(3):
        loss.backward(retain_graph=True)
    expected = value_and_gradients(lambda x: ikl_loss(x, target, backend="reference"), [input])[1][
        0
    ]
    torch.testing.assert_close(leaf.grad, 3 * expected)


@QUICK
@pytest.mark.parametrize("shape", [(4, 6), (5, 40), (3, 5, 4)], ids=str)
def test_second_derivatives_are_right(backend: str, shape: tuple[int, ...]) -> None:
    found = []
    weights = logits(*shape, seed=1)
    for name in (backend, "reference"):
        pair = [x.requires_grad_() for x in logits(*shape)]
        loss = gkl_loss(*pair, gamma=0.5, backend=name, reduction="none")
        first = torch.autograd.grad(loss.square().sum(), pair, create_graph=True)
        assert all(gradient.requires_grad for gradient in first)
        total = sum((g * w).sum() for g, w in zip(first, weights, strict=True))
        found.append(torch.autograd.grad(total, pair))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@QUICK
def test_second_derivatives_without_keeping_the_graph(backend: str) -> None:
    pair = [x.requires_grad_() for x in logits(4, 6)]
    found = []
    for retain_graph in (False, True):
        loss = ikl_loss(*pair, backend=backend)
        (first,) = torch.autograd.grad(loss, pair[:1], create_graph=True, retain_graph=retain_graph)
        found.append(torch.autograd.grad(first.square().sum(), pair[0])[0])
    assert torch.equal(*found)


def test_float16_gradients_under_a_loss_scale_do_not_vanish() -> None:
    # one part in 2**16 of a gradient of 1e-7: zero in float16 unless the scale comes first
    pair = logits(512, 1000, dtype=torch.float16)
    scale = 2.0**16
    for backend in ("auto", "blocked"):
        found = both(pair, backend, scale)
        exact = both((pair[0].double(), pair[1].double()), "reference", scale)[1]
        for ours, expected in zip(found[0][1], exact[1], strict=True):
            visible = expected.abs() > 2.0**-14
            error = (ours.double() - expected).abs()[visible] / expected.abs()[visible]
            assert error.max() < 2e-3


@QUICK
def test_only_needed_gradients_are_made(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = blocks.run_blocks

    def spy(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        seen.append((result.input_gradient is not None, result.target_gradient is not None))
        return result

    monkeypatch.setattr("dkl.losses.blocked.run_blocks", spy)
    input, target = logits(300, 400)  # too many for the way of few elements
    for needs in ((False, False), (True, False), (False, True), (True, True)):
        with torch.set_grad_enabled(any(needs)):
            ikl_loss(
                input.clone().requires_grad_(needs[0]),
                target.clone().requires_grad_(needs[1]),
                backend=backend,
            )
    assert seen == [(False, False), (True, False), (False, True), (True, True)]


def test_large_inputs_go_through_the_registered_operator() -> None:
    few, many = logits(4, 5), logits(600, 300)
    names = []
    for pair in (few, many):
        leaf = pair[0].requires_grad_()
        names.append(type(ikl_loss(leaf, pair[1]).grad_fn).__name__)
    assert "HandOut" in names[0]
    assert "dkl_decoupled_rows" in names[1]
    assert_same(both(many, "auto"))


def test_a_changed_class_table_is_noticed_where_it_matters() -> None:
    table = torch.rand(5, 5).double()
    labels = torch.tensor([0, 3, 3, 1])
    for backend in ("auto", "blocked"):
        pair = [x.requires_grad_() for x in logits(4, 5)]
        loss = ikl_loss(*pair, class_table=table, labels=labels, backend=backend)
        expected = torch.autograd.grad(loss, pair, retain_graph=True)
        table.add_(1.0)
        assert all(map(torch.equal, torch.autograd.grad(loss, pair, retain_graph=True), expected))
        with pytest.raises(RuntimeError, match="class_table was changed between"):
            torch.autograd.grad(loss, pair, create_graph=True)


# Under torch.compile, torch.func and the checks of PyTorch.


def test_the_operator_passes_the_checks_of_pytorch() -> None:
    for shape, summed in (((4, 5), True), ((3, 5, 2), False)):
        input, target = (x.requires_grad_() for x in logits(*shape))
        problem = Problem(
            RowWeights(),
            None,
            (0.5, 0.25),
            RowOptions(2.0, 3.0, 0.5),
            summed,
            "blocked",
        )
        arguments = (*fused._flat(input, target, problem), True, True)
        torch.library.opcheck(
            fused._registered_rows,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_explicit_backend_is_one_operator_under_compile(
    normalization: str, reduction: str
) -> None:
    torch.compiler.reset()
    labels = torch.tensor([0, 4, -100, 2])
    table = torch.rand(5, 5).double()

    def loss(input: Tensor, target: Tensor) -> Tensor:
        value = decoupled_kl_loss(
            2 * input,
            target,
            class_table=table,
            labels=labels,
            normalization=normalization,
            reduction=reduction,
            backend="blocked",
        )
        return 3 * value.sum()

    pair = logits(4, 5)
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, expected = value_and_gradients(whole, pair), value_and_gradients(loss, pair)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_explicit_backends_refuse_what_they_cannot_do() -> None:
    pair = logits(4, 5)
    with pytest.raises(ValueError, match=r"torch\.func transform"):
        torch.func.grad(lambda x: ikl_loss(x, pair[1], backend="blocked"))(pair[0])
    with pytest.raises(ValueError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        ikl_loss(*pair, backend="blocked")
    with pytest.raises(ValueError, match="tensor that needs a gradient"):
        ikl_loss(*pair, mse_weight=torch.tensor(1.0, requires_grad=True), backend="blocked")
    with pytest.raises(ValueError, match="backend='triton' cannot compute this"):
        ikl_loss(*pair, backend="triton")


def test_auto_takes_learned_weights_to_the_reference() -> None:
    pair = logits(4, 5)
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    ikl_loss(*pair, mse_weight=weight).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, ikl_loss(*pair, ce_weight=0.0))


@QUICK
def test_nan_where_nothing_counts_stays_there(backend: str) -> None:
    for shape in ((6, 5), (6, 40), (3, 5, 2)):
        first, second = logits(*shape)
        counts = torch.ones(shape[:1] + shape[2:], dtype=torch.bool)
        counts[1] = False
        for values in (first, second):
            values[1] = torch.nan
        for options in ({}, {"normalization": "weights", "gamma": 0.3}, {"reduction": "none"}):
            found = both((first, second), backend, mask=counts, **options)
            assert_same(found)
            assert all(g[1].eq(0).all() for g in found[0][1])
