"""Attacks with settings of every image's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.attacks import (
    ThreatModel,
    cross_entropy_objective,
    margin_objective,
    per_sample_pgd,
    pgd_attack,
)
from tests.attacks.test_pgd import keyed_draw, make_batch, make_model

MODES = ("eval", "train", "batch-stats")


def same_for_all(num_images, eps, num_steps, step_size, dtype=torch.float32):
    return {
        "eps_B": torch.full((num_images,), eps, dtype=dtype),
        "num_steps_B": torch.full((num_images,), num_steps),
        "step_size_B": torch.full((num_images,), step_size, dtype=dtype),
    }


def mixed(num_images, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return {
        "eps_B": torch.rand(num_images, generator=generator, dtype=dtype) * 0.2,
        "num_steps_B": torch.randint(1, 6, (num_images,), generator=generator),
        "step_size_B": torch.rand(num_images, generator=generator, dtype=dtype) * 0.1,
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_strategy_for_all_is_plain_pgd_bit_for_bit(mode, dtype):
    images, labels = make_batch(dtype=dtype)
    results = []
    for per_sample in (False, True):
        model = make_model(dtype)
        shared = {
            "model": model,
            "images": images,
            "objective": cross_entropy_objective(labels),
            "batch_norm": mode,
            "draw": keyed_draw(range(len(images))),
        }
        if per_sample:
            settings = same_for_all(len(images), 8 / 255, 5, 2 / 255, dtype)
            found = per_sample_pgd(**shared, start_eps=8 / 255, **settings)
        else:
            found = pgd_attack(
                **shared,
                threat=ThreatModel("Linf", 8 / 255),
                num_steps=5,
                step_size=2 / 255,
                random_start="uniform",
            )
        results.append((found, model[1].running_mean.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][0] - images).abs().max() > 0.02


def test_every_image_gets_the_attack_it_would_get_alone():
    model = make_model(torch.float64)
    images, labels = make_batch(dtype=torch.float64)
    settings = mixed(len(images))
    together = per_sample_pgd(
        model,
        images,
        cross_entropy_objective(labels),
        start_eps=0.1,
        draw=keyed_draw(range(len(images))),
        **settings,
    )
    for i in range(len(images)):
        row = slice(i, i + 1)
        start = ThreatModel("Linf", 0.1).random_start(images[row], "uniform", keyed_draw([i]))
        x = start.double()
        eps, size = settings["eps_B"][i], settings["step_size_B"][i]
        model.eval()
        for _ in range(int(settings["num_steps_B"][i])):
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(x), labels[row]), x)
            x = x.detach() + size * g.sign()
            x = torch.min(torch.max(x, images[row] - eps), images[row] + eps).clamp(0, 1)
        torch.testing.assert_close(together[row], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_stays_in_every_images_own_ball(mode):
    images, labels = make_batch(8)
    settings = mixed(8, torch.float32)
    before = images.clone()
    for objective in (cross_entropy_objective(labels), margin_objective(labels)):
        found = per_sample_pgd(
            make_model(), images, objective, start_eps=0.3, batch_norm=mode, **settings
        )
        distance = (found - images).flatten(1).abs().amax(1)
        assert (distance <= settings["eps_B"] + 1e-6).all()
        assert ((found >= 0) & (found <= 1)).all()
        assert found.dtype == images.dtype
        assert not found.requires_grad
    assert torch.equal(images, before)


def test_images_whose_steps_are_used_up_leave_the_forward_pass_in_eval_mode_only():
    images, labels = make_batch(4)
    settings = same_for_all(4, 0.1, 1, 0.05) | {"num_steps_B": torch.tensor([3, 1, 2, 3])}
    sizes = []
    for mode in ("eval", "batch-stats"):
        model, seen = make_model(), []
        model.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        per_sample_pgd(
            model,
            images,
            cross_entropy_objective(labels),
            start_eps=0.1,
            batch_norm=mode,
            **settings,
        )
        sizes.append(seen)
    assert sizes == [[4, 3, 2], [4, 4, 4]]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reduction_of_the_objective_does_not_matter(reduction):
    images, labels = make_batch(dtype=torch.float64)
    found = [
        per_sample_pgd(
            make_model(torch.float64),
            images,
            lambda logits, kind=kind: F.cross_entropy(logits, labels, reduction=kind),
            start_eps=0,
            **mixed(len(images)),
        )
        for kind in ("none", reduction)
    ]
    torch.testing.assert_close(found[1], found[0])


def test_last_projection_is_into_one_ball_for_all():
    images, labels = make_batch()
    shared = {
        "model": make_model(),
        "images": images,
        "objective": cross_entropy_objective(labels),
        "start_eps": 0.05,
    }
    settings = same_for_all(len(images), 0.2, 4, 0.1)
    wide = per_sample_pgd(**shared, **settings, draw=keyed_draw(range(len(images))))
    narrow = per_sample_pgd(
        **shared, **settings, draw=keyed_draw(range(len(images))), project_eps="0.05"
    )
    assert (wide - images).abs().max() > 0.15
    assert torch.equal(narrow, ThreatModel("Linf", 0.05).project(wide, images))


def test_memory_format_and_parameter_gradients_are_kept():
    model = make_model()
    images, labels = make_batch(4)
    images = images.contiguous(memory_format=torch.channels_last)
    model[6].bias.grad = torch.ones(4)
    settings = same_for_all(4, 0.1, 1, 0.05) | {"num_steps_B": torch.tensor([3, 1, 2, 3])}
    objective = cross_entropy_objective(labels)
    found = per_sample_pgd(model, images, objective, start_eps=0.1, **settings)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model[6].bias.grad, torch.ones(4))
    assert model[0].weight.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nan_gradient_makes_the_image_nan():
    model = nn.Linear(2, 2)
    images = torch.full((2, 2), 0.5)
    found = per_sample_pgd(
        model,
        images,
        lambda logits: logits.sum(1) * torch.tensor([1.0, float("nan")]),
        start_eps=0,
        **same_for_all(2, 0.1, 2, 0.1),
    )
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_no_images():
    found = per_sample_pgd(
        nn.Linear(2, 2),
        torch.empty(0, 2),
        lambda logits: logits.sum(1),
        start_eps=0.1,
        **same_for_all(0, 0.1, 2, 0.1),
    )
    assert found.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps_B": torch.tensor([0.1])}, r"eps_B needs one number for each of the 2 images"),
        ({"eps_B": torch.tensor([8.0, 0.1])}, r"eps_B has to be in \[0, 1\].*0.1 to 8.*255"),
        ({"step_size_B": torch.tensor([0.1, torch.nan])}, r"step_size_B has to be in \[0, 1\]"),
        ({"num_steps_B": torch.tensor([2, 0])}, "at least 1 everywhere; got 0"),
        ({"num_steps_B": torch.tensor([2.0, 1.0])}, "has to hold integers; got torch.float32"),
        ({"start_eps": 8}, r"eps has to be in \[0, 1\].*Did you mean 8/255"),
        ({"project_eps": 8}, r"eps has to be in \[0, 1\].*Did you mean 8/255"),
        ({"images": torch.full((2, 2), 3.0)}, r"images have to be in \[0, 1\]"),
        ({"objective": lambda logits: logits[:1].sum(1)}, "has to return 2 values"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {
        "model": nn.Linear(2, 2),
        "images": torch.rand(2, 2),
        "objective": lambda logits: logits.sum(1),
        "start_eps": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        per_sample_pgd(**(arguments | same_for_all(2, 0.1, 2, 0.1) | changes))
