"""DAJAT against its formula written out, its two sets of statistics, and its switches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.attacks import AdversarialWeightPerturbation, PGDSettings, ThreatModel
from dkl.methods.dajat import DAJAT, dajat, statistics_of
from dkl.methods.protocol import Batch
from dkl.models.dual_batch_norm import add_dual_batch_norm
from tests.methods.conftest import NUM_CLASSES, make_batch, make_context
from tests.methods.trajectories import Trajectory, check, fill, rewrite

ATTACK = PGDSettings(ThreatModel("Linf", 0.1), num_steps=3, step_size=0.05, random_start="gaussian")


class TwoNorms(nn.Module):
    """The least that can be switched: two batch-norms inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base, self.auxiliary = nn.BatchNorm1d(size), nn.BatchNorm1d(size)
        self.uses_auxiliary = False

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.auxiliary if self.uses_auxiliary else self.base)(inputs)


class Network(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 6), norm
        self.last = nn.Linear(6, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.norm(self.first(images.flatten(1))).tanh())

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """Return base and auxiliary layer."""
        if isinstance(self.norm, TwoNorms):
            return self.norm.base, self.norm.auxiliary
        return self.norm, self.norm_auto


def network(kind: str) -> Network:
    if kind == "stub":
        return fill(Network(TwoNorms(6))).train()
    return fill(add_dual_batch_norm(Network(nn.BatchNorm1d(6)))).train()


KINDS = ("stub", "real")


def batch_with_views(num_samples: int = 8, num_views: int = 2) -> Batch:
    views = {f"view_{k}": make_batch(num_samples, seed=k).images for k in range(1, num_views + 1)}
    return replace(make_batch(num_samples), extras=views)


def views_of(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield clean and adversarial images of each view."""
    yield batch.images, batch.extras["adversarial"]
    for k in (1, 2):
        yield batch.extras[f"view_{k}"], batch.extras[f"adversarial_view_{k}"]


def by_hand(model: Network, images: Tensor, norm: nn.Module) -> Tensor:
    """Forward with batch statistics, nothing switched, no buffer touched."""
    hidden = images.flatten(1) @ model.first.weight.T + model.first.bias
    centred = hidden - hidden.mean(0)
    scaled = centred / (centred.square().mean(0) + norm.eps).sqrt()
    return (scaled * norm.weight + norm.bias).tanh() @ model.last.weight.T + model.last.bias


def smoothed_ce(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    targets = (1 - smoothing) * F.one_hot(labels, NUM_CLASSES).double() + smoothing / NUM_CLASSES
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1).mean()


def step(method: DAJAT, model: nn.Module, batch: Batch, **changes: Any):
    context = make_context(batch, **changes)
    prepared = method.prepare(model, batch, context)
    return method.loss(model, prepared, context), prepared


def assert_equal_gradients(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    parameters = dict(model.named_parameters())
    keep = {"retain_graph": True, "materialize_grads": True}
    first = torch.autograd.grad(ours, parameters.values(), **keep)
    second = torch.autograd.grad(theirs, parameters.values(), **keep)
    for name, a, b in zip(parameters, first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_the_formulas(kind: str, smoothing: float) -> None:
    method = dajat(ATTACK, beta=3.0, js_weight=1.7, label_smoothing=smoothing)
    model, batch = network(kind), batch_with_views()
    output, prepared = step(method, model, batch)
    base, auxiliary = model.norms()
    terms, predictions = [], []
    for number, (images, adversarial) in enumerate(views_of(prepared)):
        norm = auxiliary if number else base
        clean = by_hand(model, images, norm)
        p, q = clean.softmax(1), by_hand(model, adversarial, norm).softmax(1)
        terms.append(smoothed_ce(clean, batch.labels, smoothing) + 3.0 * kl(p, q))
        predictions.append(p)
    mean = sum(predictions) / 3
    expected = sum(terms) / 3 + 1.7 * sum(kl(p, mean) for p in predictions) / 3
    assert_equal_gradients(model, output.loss, expected)
    torch.testing.assert_close(output.logits, by_hand(model, batch.images, base))
    assert not output.logits.requires_grad
    assert output.parts.keys() == {"loss", "clean_ce", "robust", "consistency"}
    assert output.parts["consistency"] > 0
    torch.testing.assert_close(output.parts["loss"], expected.detach() * 8)


@pytest.mark.parametrize("kind", KINDS)
def test_direction_pass_is_the_basic_views_loss(kind: str) -> None:
    method = dajat(ATTACK, beta=3.0, label_smoothing=0.2, smooth_direction=False)
    model, batch = network(kind), batch_with_views()
    context = make_context(batch, phase="direction")
    prepared = method.prepare(model, batch, context)
    base, auxiliary = model.norms()
    clean = by_hand(model, batch.images, base)
    p, q = clean.softmax(1), by_hand(model, prepared.extras["adversarial"], base).softmax(1)
    expected = F.cross_entropy(clean, batch.labels) + 3.0 * kl(p, q)
    assert_equal_gradients(model, method.loss(model, prepared, context).loss, expected)
    # Every parameter has a part in it, as DistributedDataParallel asks for.
    method.loss(model, prepared, context).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not auxiliary.weight.grad.any()
    assert base.weight.grad.any()
    smooth = dajat(ATTACK, beta=3.0, label_smoothing=0.2)
    expected = smoothed_ce(clean, batch.labels, 0.2) + 3.0 * kl(p, q)
    assert_equal_gradients(model, smooth.loss(model, prepared, context).loss, expected)


def moved(norm: nn.Module, fed: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return running mean and variance after these batches of hidden values."""
    mean, variance = torch.zeros(6).double(), torch.ones(6).double()
    for hidden in fed:
        mean = (1 - norm.momentum) * mean + norm.momentum * hidden.mean(0)
        variance = (1 - norm.momentum) * variance + norm.momentum * hidden.var(0)
    return mean, variance


@pytest.mark.parametrize("kind", KINDS)
def test_each_set_of_statistics_sees_its_views_only_adversarial_before_clean(kind: str) -> None:
    model, batch = network(kind), batch_with_views()
    _, prepared = step(dajat(ATTACK), model, batch)
    fed = [
        [model.first(images.flatten(1)).detach() for images in (adversarial, clean)]
        for clean, adversarial in views_of(prepared)
    ]
    for norm, hidden in zip(model.norms(), (fed[0], fed[1] + fed[2]), strict=True):
        mean, variance = moved(norm, hidden)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-12, atol=1e-14)
        assert norm.num_batches_tracked == len(hidden)


def forwards(model: Network) -> list[tuple[bool, bool]]:
    """Collect (training, uses_auxiliary) of every forward pass from now on."""
    seen: list[tuple[bool, bool]] = []
    model.register_forward_hook(
        lambda module, inputs, output: seen.append((module.training, module.norm.uses_auxiliary))
    )
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_use_the_statistics_of_their_view(kind: str) -> None:
    model, batch = network(kind), batch_with_views()
    step(dajat(ATTACK), model, batch)  # now the two sets differ
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = forwards(model)
    context = make_context(batch)
    prepared = dajat(ATTACK).prepare(model, batch, context)
    one = ATTACK.num_steps + 1
    assert seen == [(False, False)] * one + [(False, True)] * 2 * one
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # Once more with the hidden layer's output normalised by hand.
    draw = make_context(batch).draw
    for number, (images, adversarial) in enumerate(views_of(prepared)):
        norm = model.norms()[min(number, 1)]
        plain = nn.Sequential(
            nn.Flatten(), model.first, nn.BatchNorm1d(6), nn.Tanh(), model.last
        ).double()
        plain[2].load_state_dict(norm.state_dict())
        clean = plain.eval()(images).detach()
        found = ATTACK.attack(
            plain,
            images,
            lambda logits, clean=clean: F.kl_div(
                logits.log_softmax(1), clean.softmax(1), reduction="none"
            ).sum(1),
            draw=draw,
        )
        torch.testing.assert_close(adversarial, found, rtol=0, atol=1e-12)
        assert (adversarial - images).abs().max() <= 0.1 + 1e-12


def test_views_start_from_noise_of_their_own() -> None:
    calls = []
    batch = batch_with_views()
    context = make_context(batch)

    def draw(num_columns: int) -> Tensor:
        calls.append(num_columns)
        return context.draw(num_columns)

    dajat(ATTACK).prepare(network("stub"), batch, replace(context, draw=draw))
    assert len(calls) >= 3
    assert len(calls) % 3 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_weight_perturbation_leaves_no_trace_of_its_direction_pass(kind: str) -> None:
    method, model, batch = dajat(ATTACK), network(kind), batch_with_views()
    context = make_context(batch)
    prepared = method.prepare(model, batch, context)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = model.first.weight.clone()

    def direction() -> None:
        method.loss(model, prepared, replace(context, phase="direction")).loss.backward()

    with AdversarialWeightPerturbation(0.01).perturbed(model, direction):
        assert not torch.equal(model.first.weight, weights)
        for name, value in model.named_buffers():
            assert torch.equal(value, before[name])
        assert not model.norm.uses_auxiliary
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(list(model.named_buffers())) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_base_statistics_are_back_after_every_call_and_after_errors(kind: str) -> None:
    method, model, batch = dajat(ATTACK), network(kind), batch_with_views()
    context = make_context(batch)
    prepared = method.prepare(model, batch, context)
    assert not model.norm.uses_auxiliary
    method.loss(model, prepared, context)
    assert not model.norm.uses_auxiliary

    def fail(module: nn.Module, inputs: Any) -> None:
        if module.norm.uses_auxiliary:
            raise KeyError("on purpose")

    model.register_forward_pre_hook(fail)
    for call in (
        lambda: method.prepare(model, batch, context),
        lambda: method.loss(model, prepared, context),
    ):
        with pytest.raises(KeyError, match="on purpose"):
            call()
        assert not model.norm.uses_auxiliary
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_switching_reaches_through_a_wrapper() -> None:
    model = network("real")
    wrapper = nn.ModuleDict({"module": model})
    with statistics_of(wrapper, auxiliary=True):
        assert model.norm.uses_auxiliary
    assert not model.norm.uses_auxiliary


def test_a_model_whose_batch_norm_cannot_be_switched_is_refused() -> None:
    model = fill(Network(nn.BatchNorm1d(6)))
    with pytest.raises(ValueError, match=r"cannot be switched.*add_dual_batch_norm"):
        step(dajat(ATTACK), model, batch_with_views())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: replace(b, extras={}), "needs view_1, view_2 .* the batch has none"),
        (
            lambda b: replace(b, extras={"view_1": b.images}),
            "num_views=2 .* the batch has view_1",
        ),
        (
            lambda b: replace(b, extras={**b.extras, "view_3": b.images}),
            "the batch has view_1, view_2, view_3",
        ),
        (
            lambda b: replace(b, extras={**b.extras, "view_2": b.images[:4]}),
            r"view_2 must have the shape of the images, \[8, 1, 4, 4\]; got \[4, 1, 4, 4\]",
        ),
        (lambda b: replace(b, targets=torch.rand(8, NUM_CLASSES)), "mixed labels"),
    ],
)
def test_batches_that_do_not_fit(change: Any, message: str) -> None:
    batch = change(batch_with_views())
    with pytest.raises(ValueError, match=message):
        step(dajat(ATTACK), network("stub"), batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be finite"),
        ({"js_weight": float("nan")}, "js_weight must be finite"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"num_views": 0}, "at least 1; got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dajat(ATTACK, **options)


def cut(batch: Batch, start: int, stop: int, padding: int) -> Batch:
    """Return a part of a batch, with duplicates of its first sample that do not count."""
    rows = torch.cat([torch.arange(start, stop), torch.full((padding,), start)])
    return Batch(
        batch.images[rows],
        batch.labels[rows],
        torch.arange(len(rows)) < stop - start,
        batch.indices[rows],
        {name: value[rows] for name, value in batch.extras.items()},
    )


@pytest.mark.parametrize("phase", ["update", "direction"])
def test_parts_of_a_step_add_up_to_the_whole(model: nn.Module, phase: str) -> None:
    """Without batch-norm, which sees parts; this model has none, and nothing to switch."""
    method, whole = dajat(ATTACK, label_smoothing=0.1), batch_with_views(7)
    assert not method.couples_batch
    parameters = list(model.parameters())
    expected = step(method, model, whole, phase=phase)[0]
    gradients = torch.autograd.grad(expected.loss, parameters)
    total, value, counts = [torch.zeros_like(p) for p in parameters], 0.0, 0
    for start, stop, padding in ((0, 4, 0), (4, 7, 2)):
        part = cut(whole, start, stop, padding)
        output = step(method, model, part, whole=whole, phase=phase)[0]
        found = torch.autograd.grad(output.loss, parameters)
        total = [a + b for a, b in zip(total, found, strict=True)]
        value, counts = value + output.loss, counts + output.counts
    torch.testing.assert_close(value, expected.loss, rtol=1e-12, atol=0)
    assert counts == 7
    for a, b in zip(total, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_an_attack_schedule_is_asked_for_each_epoch() -> None:
    asked = []

    def schedule(epoch: int, num_epochs: int) -> PGDSettings:
        asked.append((epoch, num_epochs))
        return ATTACK

    batch = batch_with_views()
    dajat(schedule).prepare(network("stub"), batch, make_context(batch, epoch=3))
    assert asked == [(3, 10)] * 3


TRAJECTORIES = {
    "dajat": Trajectory(
        lambda: dajat(ATTACK, beta=4.0, label_smoothing=0.125, smooth_direction=False),
        lambda: network("real"),
        num_views=2,
        awp=0.01,
    )
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_twenty_steps_are_the_stored_ones(name: str) -> None:
    check(name, TRAJECTORIES[name])


if __name__ == "__main__":
    rewrite(TRAJECTORIES, __spec__.name)
