"""torch.compile, torch.func, and derivatives of first and second order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, vmap

from dkl.losses import (
    GKLLoss,
    decoupled_kl_loss,
    dkl_loss,
    gkl_loss,
    ikl_loss,
    jsd_loss,
    kl_loss,
    reverse_kl_loss,
)
from tests.reference import decoupled_kl_reference, value_and_gradients

TABLE = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1
LABELS = torch.tensor([4, -100, 0, 1])
MASK = torch.tensor([True, True, False, True])
CONFIGURATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "ikl": (ikl_loss, {}),
    "dkl-hot": (dkl_loss, {"temperature": 2, "weight_temperature": 2, "mse_weight": 0.25}),
    "gkl": (gkl_loss, {"gamma": 0.4}),
    "table": (ikl_loss, {"class_table": TABLE, "labels": LABELS}),
    "table-mask": (gkl_loss, {"class_table": TABLE, "labels": LABELS, "mask": MASK, "gamma": 0.4}),
    "mask": (ikl_loss, {"mask": MASK, "reduction": "sum"}),
    "none": (gkl_loss, {"labels": LABELS, "reduction": "none"}),
    "class_probs": (ikl_loss, {"class_probs": TABLE[:4], "detach_weights": False}),
    "num_items": (gkl_loss, {"num_items": 7, "denominator": torch.tensor(3.0)}),
    "kl": (kl_loss, {"temperature": 4, "mask": MASK}),
    "reverse_kl": (reverse_kl_loss, {}),
    "jsd": (jsd_loss, {"mask": MASK}),
}
EACH = pytest.mark.parametrize(
    ("function", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys()
)


def random_pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    input = torch.randn(shape, generator=generator, dtype=torch.float64)
    return 2 * input, 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


@EACH
def test_compiles_to_one_graph(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    torch.compiler.reset()
    loss = partial(function, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pair = random_pair(4, 5)
    ours, expected = value_and_gradients(compiled, pair), value_and_gradients(loss, pair)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-15)


def test_compiles_with_parts() -> None:
    torch.compiler.reset()
    compiled = torch.compile(ikl_loss, fullgraph=True, backend="aot_eager")
    loss, parts = compiled(*random_pair(4, 5), return_parts=True)
    torch.testing.assert_close(loss, parts.weighted_mse + parts.soft_cross_entropy)


def test_compiled_module_follows_shapes_and_new_options() -> None:
    torch.compiler.reset()
    module = GKLLoss(gamma=0.4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 5), (8, 9), (3, 2), (2, 5, 3, 3)):
        pair = random_pair(*shape)
        torch.testing.assert_close(compiled(*pair), module(*pair), rtol=1e-13, atol=0)
    function = torch.compile(ikl_loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 2.0, 4.5, 7.25):  # a schedule: the number becomes dynamic
        pair = random_pair(4, 5)
        torch.testing.assert_close(
            function(*pair, temperature=temperature),
            ikl_loss(*pair, temperature=temperature),
            rtol=1e-13,
            atol=0,
        )


def test_compiled_half_precision_gradients_keep_their_dtype() -> None:
    torch.compiler.reset()
    compiled = torch.compile(ikl_loss, fullgraph=True, backend="aot_eager")
    pair = [tensor.bfloat16() for tensor in random_pair(4, 5)]
    ours, expected = value_and_gradients(compiled, pair), value_and_gradients(ikl_loss, pair)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours, expected)


@EACH
def test_func_grad_is_autograd(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    pair = random_pair(4, 5)

    def loss(input: Tensor, target: Tensor) -> Tensor:
        return function(input, target, **options).sum()

    _, expected = value_and_gradients(loss, pair)
    torch.testing.assert_close(list(grad(loss, argnums=(0, 1))(*pair)), expected)


@EACH
def test_vmap_over_batches(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    input, target = random_pair(3, 4, 5)
    loss = partial(function, **options)
    expected = torch.stack([loss(a, b) for a, b in zip(input, target, strict=True)])
    torch.testing.assert_close(vmap(loss)(input, target), expected, rtol=1e-13, atol=0)
    gradients = vmap(grad(lambda a, b: loss(a, b).sum()))(input, target)
    alone = [value_and_gradients(loss, (a, b))[1][0] for a, b in zip(input, target, strict=True)]
    torch.testing.assert_close(gradients, torch.stack(alone), rtol=1e-12, atol=1e-15)


def test_vmap_over_labels_and_masks() -> None:
    input, target = random_pair(3, 4, 5)
    labels = torch.tensor([[0, 1, 2, 3], [-100, 4, 4, 0], [1, 1, -100, -100]])
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.7

    def loss(input: Tensor, target: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return gkl_loss(input, target, class_table=TABLE, labels=labels, mask=mask)

    expected = torch.stack([loss(*row) for row in zip(input, target, labels, mask, strict=True)])
    torch.testing.assert_close(vmap(loss)(input, target, labels, mask), expected)


@EACH
def test_jacrev(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    input, target = random_pair(4, 5)
    fitting = {name: value for name, value in options.items() if name != "num_items"}
    per_row = partial(function, **{**fitting, "reduction": "none"})
    jacobian = jacrev(per_row)(input, target)
    for row in range(4):
        _, (expected, _) = value_and_gradients(
            lambda a, b, row=row: per_row(a, b)[row], (input, target)
        )
        torch.testing.assert_close(jacobian[row], expected)


def test_hessian_is_that_of_the_pairwise_formula() -> None:
    input, target = random_pair(2, 4)
    for detach_weights in (True, False):
        ours, expected = (
            hessian(partial(function, detach_weights=detach_weights), argnums=(0, 1))(input, target)
            for function in (decoupled_kl_loss, decoupled_kl_reference)
        )
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_gradcheck_and_gradgradcheck_of_all_that_is_not_detached(
    normalization: str, gamma: float
) -> None:
    input, target = (tensor.requires_grad_() for tensor in random_pair(3, 4))
    weights = (TABLE[:3, :4].clone()).requires_grad_()

    def wmse(input: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        return decoupled_kl_loss(
            input,
            target,
            *weights,
            ce_weight=0,
            mse_weight=3,
            gamma=gamma,
            normalization=normalization,
            detach_weights=False,
            mask=torch.tensor([True, False, True]),
            reduction="none",
        )

    def soft_ce(input: Tensor) -> Tensor:  # its target is detached
        return decoupled_kl_loss(input, target, mse_weight=0, temperature=2, reduction="none")

    for check in (gradcheck, gradgradcheck):
        assert check(wmse, (input, target))
        assert check(wmse, (input, target, weights))
        assert check(soft_ce, (input,))


def test_gradcheck_of_a_class_table() -> None:
    input, target = (tensor.requires_grad_() for tensor in random_pair(4, 5))
    table = TABLE.clone().requires_grad_()

    def wmse(input: Tensor, target: Tensor, table: Tensor) -> Tensor:
        return ikl_loss(
            input, target, class_table=table, labels=LABELS, ce_weight=0, detach_weights=False
        )

    assert gradcheck(wmse, (input, target, table))
    assert gradgradcheck(wmse, (input, target, table))


def test_forward_mode() -> None:
    input, target = random_pair(4, 5)
    tangent = random_pair(4, 5)[1]
    for loss in (ikl_loss, gkl_loss, kl_loss, jsd_loss):
        _, slope = torch.func.jvp(lambda a, loss=loss: loss(a, target), (input,), (tangent,))
        _, (gradient,) = value_and_gradients(lambda a, loss=loss: loss(a, target), (input,))
        torch.testing.assert_close(slope, (gradient * tangent).sum())


def test_fake_tensors_find_the_shape_without_computing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        pair = torch.empty(4, 5, 8, 8, requires_grad=True), torch.empty(4, 5, 8, 8)
        labels = torch.zeros(4, 8, 8, dtype=torch.long)
        loss = ikl_loss(*pair, class_table=torch.empty(5, 5), labels=labels, mask=labels == 0)
        loss.backward()
    assert loss.shape == ()
    assert pair[0].grad is not None
