"""What the papers prove: equal gradients of losses with different values, in float64."""

import pytest
import torch
from torch import Tensor

from dkl.losses import dkl_loss, gkl_loss, ikl_loss, kl_loss, reverse_kl_loss
from tests.reference import max_relative_error, value_and_gradients

SHAPES = [(1, 1), (1, 2), (5, 2), (7, 10), (16, 100), (3, 257), (2, 1271), (2, 5, 3, 4), (3, 4, 6)]
TEMPERATURES = [1.0, 0.5, 2.0, 4.0, 30.0]
SCALES = [0.1, 1.0, 5.0, 30.0]


def random_pair(shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    input = torch.randn(shape, generator=generator, dtype=torch.float64)
    return scale * input, scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_theorem_1_dkl_has_the_gradients_of_kl(
    shape: tuple[int, ...], temperature: float, scale: float
) -> None:
    pair = random_pair(shape, scale)
    _, ours = value_and_gradients(
        lambda input, target: dkl_loss(
            input,
            target,
            temperature=temperature,
            weight_temperature=temperature,
            mse_weight=1 / temperature**2,
        ),
        pair,
    )
    _, expected = value_and_gradients(
        lambda input, target: kl_loss(input, target, temperature=temperature), pair
    )
    for gradient, kl_gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, kl_gradient, rtol=0, atol=1e-12)
        # Relative too, except with one class or saturated rows, where there is no gradient at all.
        if kl_gradient.abs().max() > 1e-2:
            assert max_relative_error(gradient, kl_gradient) < 1e-12


def test_theorem_1_needs_the_stated_weights() -> None:
    pair = random_pair((7, 10))
    _, kl_gradients = value_and_gradients(lambda a, b: kl_loss(a, b, temperature=2), pair)
    _, without = value_and_gradients(
        lambda a, b: dkl_loss(a, b, temperature=2, weight_temperature=2), pair
    )
    assert torch.allclose(without[0], kl_gradients[0])
    assert max_relative_error(without[1], kl_gradients[1]) > 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dkl_is_ikl_with_a_stop_gradient_in_the_wmse(shape: tuple[int, ...]) -> None:
    pair = random_pair(shape)
    dkl, dkl_gradients = value_and_gradients(dkl_loss, pair)
    split, split_gradients = value_and_gradients(
        lambda input, target: (
            ikl_loss(input.detach(), target, ce_weight=0) + ikl_loss(input, target, mse_weight=0)
        ),
        pair,
    )
    torch.testing.assert_close(dkl, split, rtol=1e-13, atol=0)
    torch.testing.assert_close(dkl_gradients, split_gradients, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dkl, ikl_loss(*pair), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reverse_kl_gradient_is_the_wmse_gradient_with_student_weights(
    shape: tuple[int, ...],
) -> None:
    student, teacher = random_pair(shape)
    _, (reverse,) = value_and_gradients(lambda s: reverse_kl_loss(s, teacher), (student,))
    _, (wmse,) = value_and_gradients(
        lambda s: ikl_loss(s, teacher, student.softmax(1), ce_weight=0), (student,)
    )
    torch.testing.assert_close(wmse, reverse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", ["sample", "class_probs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gkl_is_ikl_at_gamma_1_with_weights_that_sum_to_one(
    shape: tuple[int, ...], weights: str
) -> None:
    pair = random_pair(shape)
    class_probs = None if weights == "sample" else random_pair(shape)[1].cos().softmax(1)
    gkl, gkl_gradients = value_and_gradients(
        lambda a, b: gkl_loss(a, b, class_probs, mse_weight=7, ce_weight=3, temperature=2), pair
    )
    ikl, ikl_gradients = value_and_gradients(
        lambda a, b: ikl_loss(a, b, class_probs, mse_weight=7, ce_weight=3, temperature=2), pair
    )
    torch.testing.assert_close(gkl, ikl, rtol=1e-12, atol=0)
    torch.testing.assert_close(gkl_gradients, ikl_gradients, rtol=1e-12, atol=1e-14)


def test_gkl_at_gamma_1_differs_from_ikl_where_weights_do_not_sum_to_one() -> None:
    pair = random_pair((7, 10))
    weights = torch.rand(7, 10, dtype=torch.float64)
    assert not torch.allclose(gkl_loss(*pair, weights), ikl_loss(*pair, weights), rtol=0.1)


def test_gkl_at_gamma_0_does_not_depend_on_the_weights() -> None:
    pair = random_pair((7, 10))
    uniform = value_and_gradients(lambda a, b: gkl_loss(a, b, gamma=0), pair)
    weights = torch.rand(7, 10, dtype=torch.float64)
    weights[0, 0] = 0
    others = value_and_gradients(lambda a, b: gkl_loss(a, b, weights, gamma=0), pair)
    torch.testing.assert_close(uniform, others, rtol=1e-13, atol=0)
    smoother = value_and_gradients(lambda a, b: gkl_loss(a, b, weights, gamma=0.5), pair)
    assert not torch.allclose(smoother[0], others[0], rtol=1e-3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_cross_entropy_gradient_is_the_gradient_of_t_squared_kd_divided_by_t_squared(
    temperature: float,
) -> None:
    student, teacher = random_pair((7, 10))
    _, (soft_ce,) = value_and_gradients(
        lambda s: ikl_loss(s, teacher, mse_weight=0, temperature=temperature), (student,)
    )
    _, (kd,) = value_and_gradients(
        lambda s: temperature**2 * kl_loss(s, teacher, temperature=temperature), (student,)
    )
    torch.testing.assert_close(soft_ce, kd / temperature**2, rtol=0, atol=1e-14)
