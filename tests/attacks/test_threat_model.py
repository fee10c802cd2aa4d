import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from dkl.attacks import ThreatModel, parse_number
from dkl.attacks.noise import gaussian_noise, uniform_noise

THREATS = [
    ThreatModel("Linf", "8/255"),
    ThreatModel("Linf", 0.3),
    ThreatModel("Linf", 0),
    ThreatModel("L2", 0.5),
    ThreatModel("L2", 3.0),
    ThreatModel("L2", 0),
]
SHAPES = [(5, 3, 6, 6), (1, 1, 8, 8), (7, 4), (0, 3, 4, 4), (3, 1)]


def distances(threat, perturbed, clean):
    order = math.inf if threat.norm == "Linf" else 2
    return torch.linalg.vector_norm((perturbed - clean).flatten(1).double(), order, dim=1)


def cases(seed=0):
    """Clean images with pixels at both ends of the range, and perturbed ones near and far."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for scale in (0.0, 1e-3, 0.1, 1.0, 100.0):
            clean = torch.rand(shape, generator=generator)
            clean = torch.where(torch.rand(shape, generator=generator) < 0.2, clean.round(), clean)
            yield clean, clean + scale * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("value", [0.2, "0.2", "51/255", " 51 / 255 ", "2e-1"])
def test_parse_number_reads_every_spelling(value):
    assert parse_number(value) == pytest.approx(0.2, abs=1e-15)


@pytest.mark.parametrize(
    "value", ["", "eight", "8/", "1/2/3", "1/0", "nan", "inf", float("nan"), True, None, "8,255"]
)
def test_parse_number_says_what_it_wants(value):
    with pytest.raises(ValueError, match="expected a finite number such as"):
        parse_number(value)


def test_eps_as_text_is_a_float():
    threat = ThreatModel("Linf", "8/255")
    assert threat.eps == 8 / 255
    assert threat == ThreatModel("Linf", 8 / 255)
    assert replace(threat, eps="4/255").eps == 4 / 255
    with pytest.raises(FrozenInstanceError):
        threat.eps = 0.1


@pytest.mark.parametrize("eps", [8, "8", 8.0])
def test_eps_in_pixel_values_is_refused(eps):
    with pytest.raises(ValueError, match=r"eps has to be in \[0, 1\].*Did you mean 8/255\?"):
        ThreatModel("Linf", eps)


def test_bad_norm_and_negative_eps_are_refused():
    with pytest.raises(ValueError, match='"Linf" or "L2"; got \'linf\''):
        ThreatModel("linf", 0.1)
    with pytest.raises(ValueError, match=r"at least 0; got -0\.1"):
        ThreatModel("L2", -0.1)
    assert ThreatModel("L2", 8).eps == 8.0


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_projection_properties(threat):
    for clean, perturbed in cases():
        before = perturbed.clone()
        projected = threat.project(perturbed, clean)
        assert torch.equal(perturbed, before)
        assert ((projected >= 0) & (projected <= 1)).all()
        assert (distances(threat, projected, clean) <= threat.eps * (1 + 1e-6) + 1e-6).all()
        torch.testing.assert_close(threat.project(projected, clean), projected, atol=1e-6, rtol=0)
        assert torch.equal(threat.project(clean, clean), clean)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_allowed_images_are_left_alone(threat):
    for clean, perturbed in cases(seed=1):
        allowed = threat.project(clean + 0.9 * (threat.project(perturbed, clean) - clean), clean)
        assert torch.equal(threat.project(allowed, clean), allowed)


def test_projection_onto_the_ball_is_the_nearest_point():
    threat = ThreatModel("L2", 0.1)
    clean = torch.full((4, 10), 0.5, dtype=torch.float64)
    perturbed = clean + torch.randn(4, 10, dtype=torch.float64)
    delta = threat.project(perturbed, clean) - clean
    expected = 0.1 * (perturbed - clean) / (perturbed - clean).norm(dim=1, keepdim=True)
    torch.testing.assert_close(delta, expected)


def test_projection_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"same shape; got \(4, 3\) and \(1, 3\)"):
        ThreatModel("Linf", 0.1).project(torch.zeros(4, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1.0, 1e25])
def test_step_has_the_given_length_whatever_the_scale_of_the_gradient(norm, scale):
    threat = ThreatModel(norm, 0.5)
    gradient = torch.randn(6, 3, 4, 4).abs().add(0.1)
    images = torch.zeros_like(gradient)
    moved = threat.step(images, gradient * scale, 0.25)
    torch.testing.assert_close(distances(threat, moved, images), torch.full((6,), 0.25).double())
    torch.testing.assert_close(moved, threat.step(images, gradient, 0.25))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_zero_gradient_moves_nothing_and_nan_stays_visible(norm):
    images, gradient = torch.rand(3, 5), torch.randn(3, 5)
    gradient[1] = 0.0
    gradient[2, 0] = torch.nan
    moved = ThreatModel(norm, 0.5).step(images, gradient, 0.1)
    assert moved[0].isfinite().all()
    assert torch.equal(moved[1], images[1])
    assert moved[2].isnan().any()
    assert ThreatModel(norm, 0.5).project(moved, images)[2].isnan().any()


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_start_is_allowed(threat, dtype):
    torch.manual_seed(0)
    slack = 1e-6 if dtype != torch.bfloat16 else 2**-8 * (10 if threat.norm == "L2" else 1)
    for shape in SHAPES:
        clean = torch.rand(shape).to(dtype)
        start = threat.random_start(clean, "uniform")
        assert start.dtype == dtype
        assert ((start >= 0) & (start <= 1)).all()
        assert (distances(threat, start, clean) <= threat.eps + slack).all()


def test_uniform_starts_fill_the_ball():
    torch.manual_seed(0)
    clean = torch.full((4000, 3), 0.5)
    delta = ThreatModel("Linf", 0.25).random_start(clean, "uniform") - clean
    assert delta.mean().abs() < 0.01
    assert delta.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.03)
    delta = ThreatModel("L2", 0.25).random_start(clean, "uniform") - clean
    # In a ball of three dimensions (r / eps)^3 is uniform.
    shares = (delta.norm(dim=1) / 0.25) ** 3
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.02)
    assert delta.mean(dim=0).abs().max() < 0.01


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_gaussian_start_is_not_projected(norm):
    torch.manual_seed(0)
    clean = torch.zeros(100, 3, 5, 5)
    delta = ThreatModel(norm, 1e-6).random_start(clean, "gaussian")
    assert delta.std().item() == pytest.approx(0.001, rel=0.05)
    assert delta.mean().abs() < 1e-4
    assert (delta < 0).any()


def test_start_none_is_a_copy():
    images = torch.rand(2, 3)
    start = ThreatModel("L2", 0.5).random_start(images, "none")
    assert torch.equal(start, images)
    assert start.data_ptr() != images.data_ptr()


def test_unknown_start_is_refused():
    with pytest.raises(ValueError, match=r"random_start has to be.*got 'normal'"):
        ThreatModel("L2", 0.5).random_start(torch.rand(2, 3), "normal")


def test_draws_decide_the_noise_sample_by_sample():
    calls = []

    def draw(k):
        calls.append(k)
        rows = torch.arange(4.0).unsqueeze(1) + torch.arange(float(k))
        return (rows * 0.37).frac()

    images = torch.zeros(4, 1, 3, 3)
    assert torch.equal(uniform_noise(images, draw), draw(9).reshape(4, 1, 3, 3))
    torch.testing.assert_close(
        gaussian_noise(images, draw)[1:], gaussian_noise(images[1:], lambda k: draw(k)[1:])
    )
    # 9 numbers from 5 pairs.
    assert calls == [9, 9, 10, 10]


def test_a_draw_of_zeros_gives_finite_noise():
    images = torch.zeros(2, 5)
    assert gaussian_noise(images, lambda k: torch.zeros(2, k)).isfinite().all()
    nearly_one = 1 - 2**-24
    assert gaussian_noise(images, lambda k: torch.full((2, k), nearly_one)).isfinite().all()
    start = ThreatModel("L2", 0.5).random_start(images, "uniform", lambda k: torch.zeros(2, k))
    assert torch.equal(start, images)


def test_a_draw_of_another_batch_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 3\); it returned shape \(2, 3\)"):
        uniform_noise(torch.zeros(4, 3), lambda k: torch.rand(2, k))


def test_gaussian_noise_is_standard_normal():
    torch.manual_seed(0)
    noise = gaussian_noise(torch.zeros(2000, 7))
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert (noise**4).mean().item() == pytest.approx(3.0, abs=0.2)
    correlations = torch.corrcoef(noise.T) - torch.eye(7)
    assert correlations.abs().max() < 0.1
