"""Views, mixed images, sources with an order of their own, and what a context says of the rate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fit import relative_difference, trained
from tiny_training import (
    NUM_CLASSES,
    InterruptingData,
    TinyData,
    TinyMethod,
    TinyPerturbation,
    assert_same_run,
    tiny_fit,
    tiny_settings,
)
from torch import Tensor

from dkl.engine import SampleNoise, cosine
from dkl.engine.plan import draw_partners, source_order
from dkl.engine.recorder import read_rows
from dkl.methods.protocol import Batch, StepContext, StepOutput


def darken(images: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    return images * draw(1).view(-1, 1, 1, 1)


def invert(images: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    return 1 - images * draw(1).view(-1, 1, 1, 1)


def blend(images: Tensor, partners: Tensor, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    share_B = draw(2)[:, 1]
    share = share_B.view(-1, 1, 1, 1)
    return share * images + (1 - share) * partners, share_B


class Classified(TinyData):
    num_classes = NUM_CLASSES


class InterruptingClassified(InterruptingData):
    num_classes = NUM_CLASSES


class ViewMethod(TinyMethod):
    """Learns from views and from mixed labels, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []

    def prepare(self, model, batch: Batch, context: StepContext) -> Batch:
        self.batches.append(batch)
        prepared = super().prepare(model, batch, context)
        return replace(prepared, extras={**batch.extras, **prepared.extras})

    def loss(self, model, batch: Batch, context: StepContext) -> StepOutput:
        output = super().loss(model, batch, context)
        rows = 0.0
        for name in sorted(batch.extras):
            if name.startswith("view_"):
                rows = rows + F.cross_entropy(
                    model(batch.extras[name]), batch.labels, reduction="none"
                )
        if batch.targets is not None:
            rows = rows - (batch.targets * model(batch.images).log_softmax(1)).sum(1)
        more = torch.where(batch.mask, rows, 0.0).sum() / context.num_items
        return replace(output, loss=output.loss + more * context.loss_scale)


ALL: dict[str, Any] = {"views": [darken, invert], "mix": blend}


def fitted(out_dir: Path, **options: Any) -> ViewMethod:
    method = ViewMethod()
    tiny_fit(out_dir, method=method, **{"data": Classified()} | options)
    return method


def noise_of(stream: str, step: int, batch: Batch) -> SampleNoise:
    return SampleNoise(0, stream, step, batch.indices, torch.float64)


def test_views_are_made_of_the_raw_images_by_noise_of_their_own(tmp_path: Path) -> None:
    data = Classified()
    method = fitted(tmp_path, views=[darken, darken], data=data)
    for step, batch in enumerate(method.batches):
        raw = data.images[batch.indices].double() / 255
        for name in ("view_1", "view_2"):
            assert torch.equal(batch.extras[name], darken(raw, noise_of(name, step, batch)))
        assert not torch.equal(batch.extras["view_1"], batch.extras["view_2"])
        assert batch.targets is None
    assert method.batches[-1].extras.keys() == {"view_1", "view_2"}


def test_views_alone_change_nothing(tmp_path: Path) -> None:
    plain = trained(tmp_path, "plain")
    assert torch.equal(trained(tmp_path, "views", views=[darken, invert]), plain)


def test_without_views_and_mixing_batches_are_as_before(tmp_path: Path) -> None:
    for batch in fitted(tmp_path).batches:
        assert (batch.extras, batch.targets) == ({}, None)


def test_views_follow_the_memory_format(tmp_path: Path) -> None:
    settings = tiny_settings(channels_last=True)
    batch = fitted(tmp_path, **ALL, settings=settings).batches[0]
    for images in (batch.images, *batch.extras.values()):
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_mixed_batch_is_its_formula(tmp_path: Path) -> None:
    """Images, partners and labels of every step, from data and noise alone."""
    data = Classified()
    method = fitted(tmp_path, mix=blend, data=data, augment=darken)
    for step, batch in enumerate(method.batches):
        epoch = step // 3
        order = source_order(data, seed=0, epoch=epoch)
        partners = draw_partners(batch.indices, order, seed=0, step=step)
        own = darken(data.images[batch.indices].double() / 255, noise_of("augment", step, batch))
        other = darken(
            data.images[partners].double() / 255, noise_of("augment_partner", step, batch)
        )
        images, share = blend(own, other, noise_of("mix", step, batch))
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, data.labels[batch.indices])
        eye = torch.eye(NUM_CLASSES, dtype=torch.float64)
        expected = share[:, None] * eye[batch.labels]
        expected = expected + (1 - share)[:, None] * eye[data.labels[partners]]
        torch.testing.assert_close(batch.targets, expected, rtol=0, atol=1e-15)
    asked = list(chain(*(indices[: len(indices) // 2] for indices in data.asked)))
    assert sorted(asked[:22]) == list(range(22))


def test_partners_are_uniform_over_the_epoch_and_fresh_at_every_step() -> None:
    order = torch.arange(100, 110)
    indices = torch.arange(2000)
    partners = draw_partners(indices, order, seed=0, step=0)
    counts = torch.bincount(partners - 100, minlength=10)
    assert counts.sum() == 2000
    assert (counts - 200).abs().max() < 70  # five deviations
    for other in ({"seed": 1, "step": 0}, {"seed": 0, "step": 1}):
        same = (draw_partners(indices, order, **other) == partners).double().mean()
        assert 0.05 < same < 0.15
    some = torch.tensor([1999, 3])
    assert torch.equal(draw_partners(some, order, seed=0, step=0), partners[some])


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_splitting_changes_nothing(tmp_path: Path, accumulation: int) -> None:
    options = {"weight_perturbation": TinyPerturbation(), **ALL}
    whole = trained(tmp_path, "whole", method=ViewMethod(), data=Classified(), **options)
    split = trained(
        tmp_path,
        "split",
        method=ViewMethod(),
        data=Classified(),
        settings=tiny_settings(accumulation=accumulation),
        **options,
    )
    assert relative_difference(split, whole) < 1e-12
    plain = trained(tmp_path, "plain", method=ViewMethod(), data=Classified())
    assert relative_difference(plain, whole) > 1e-3
    rows = [read_rows(tmp_path / name / "records.jsonl") for name in ("whole", "split")]
    for first, second in zip(*rows, strict=True):
        for key in {"loss", "accuracy", "train_loss", "train_accuracy"} & first.keys():
            assert first[key] == pytest.approx(second[key], rel=1e-9)


@pytest.mark.parametrize("at_batch", [1, 4])
def test_stopped_run_goes_on_bit_for_bit(tmp_path: Path, at_batch: int) -> None:
    fitted(tmp_path / "straight", **ALL)
    fitted(tmp_path / "stopped", data=InterruptingClassified(at_batch), **ALL)
    resumed = fitted(tmp_path / "stopped", resume=True, **ALL)
    assert len(resumed.batches) == 6 - at_batch
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_accuracy_of_mixed_labels_is_the_share_of_the_predicted_class(tmp_path: Path) -> None:
    outputs = []

    class Watching(ViewMethod):
        def loss(self, model, batch, context):
            outputs.append((super().loss(model, batch, context), batch))
            return outputs[-1][0]

    settings = tiny_settings(epochs=1, accumulation=4)
    tiny_fit(tmp_path, method=Watching(), data=Classified(), mix=blend, settings=settings)
    row = next(r for r in read_rows(tmp_path / "records.jsonl") if r.get("step") == 3)
    total = 0.0
    for output, batch in outputs[-4:]:
        share = batch.targets.gather(1, output.logits.argmax(1, keepdim=True))[:, 0]
        total += float(share[batch.mask].sum())
    assert row["accuracy"] == pytest.approx(total / 6)
    assert 0 < row["accuracy"] < 1


def test_mixing_needs_the_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give TinyData an attribute num_classes"):
        tiny_fit(tmp_path, mix=blend, data=TinyData())
    tiny_fit(tmp_path, mix=blend, data=Classified())


def test_a_mix_of_another_shape_is_refused(tmp_path: Path) -> None:
    def bad(images, partners, draw):
        return images, draw(1)

    with pytest.raises(ValueError, match=r"share .* each of 8 samples; got shape \(8, 1\)"):
        tiny_fit(tmp_path, mix=bad, data=Classified())


def test_a_nonfinite_step_keeps_views_and_labels(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from dkl.engine import NonFiniteLossError

    class Exploding(ViewMethod):
        def loss(self, model, batch, context):
            output = super().loss(model, batch, context)
            return replace(output, loss=output.loss * torch.inf)

    with pytest.raises(NonFiniteLossError):
        tiny_fit(tmp_path, method=Exploding(), data=Classified(), **ALL)
    saved = load_file(tmp_path / "nonfinite" / "step_00000000.safetensors")
    assert {"targets", "extras.view_1", "extras.view_2"} <= saved.keys()
    assert saved["targets"].shape == (8, NUM_CLASSES)


@dataclass
class Ordered(TinyData):
    """Yields 8 samples an epoch out of 22, drawn with replacement."""

    num_classes = NUM_CLASSES
    make: Callable[[int, int], Any] | None = None

    def __len__(self) -> int:
        return 8

    def epoch_order(self, *, seed: int, epoch: int) -> Tensor:
        if self.make is not None:
            return self.make(seed, epoch)
        generator = torch.Generator().manual_seed(100 * seed + epoch)
        return torch.randint(5, 22, (8,), generator=generator)


def test_source_with_an_order_of_its_own(tmp_path: Path) -> None:
    data = Ordered(make=lambda seed, epoch: torch.tensor([21, 3, 3, 3, 20, 9, 7, 21]) - epoch)
    settings = tiny_settings(batch_size=3)
    method = ViewMethod()
    tiny_fit(tmp_path, data=data, method=method, settings=settings)
    assert data.asked == [[21, 3, 3], [3, 20, 9], [7, 21], [20, 2, 2], [2, 19, 8], [6, 20]]
    rows = read_rows(tmp_path / "records.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "epoch"] == [3, 6]
    # A sample that comes twice in a step is the same image both times, in another step another.
    images = method.batches[0].images
    assert torch.equal(images[1], images[2])
    assert not torch.equal(method.batches[1].images[0], images[1])


def test_splitting_a_source_with_an_order_changes_nothing(tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> Tensor:
        settings = tiny_settings(epochs=3, batch_size=3, **changes)
        return trained(
            tmp_path, name, method=ViewMethod(), data=Ordered(), settings=settings, **ALL
        )

    whole = run("whole")
    assert relative_difference(run("split", accumulation=2), whole) < 1e-12
    assert relative_difference(run("other", seed=1), whole) > 1e-3


def test_partners_of_an_ordered_source_are_samples_of_its_epoch(tmp_path: Path) -> None:
    data = Ordered(make=lambda seed, epoch: torch.arange(8) + 7 * epoch)
    tiny_fit(tmp_path, data=data, mix=blend, settings=tiny_settings(batch_size=4))
    for epoch in range(2):
        asked = set(chain(*data.asked[2 * epoch : 2 * epoch + 2]))
        assert asked == set(range(7 * epoch, 7 * epoch + 8))
    assert any(len(set(indices[4:]) - set(indices[:4])) > 0 for indices in data.asked)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(7), r"must return \[8\] int64.*shape \(7,\)"),
        (torch.arange(8.0), "got torch.float32"),
        (torch.arange(8) - 1, "positions from 0; got -1"),
    ],
)
def test_orders_that_do_not_fit(tmp_path: Path, order: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, data=Ordered(make=lambda seed, epoch: order))
    assert not (tmp_path / "checkpoints").exists()


def test_order_and_no_shuffling_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shuffle=False would be ignored: Ordered\.epoch_order"):
        tiny_fit(tmp_path, data=Ordered(), settings=tiny_settings(shuffle=False))


def test_context_says_what_the_rate_is(tmp_path: Path) -> None:
    rates = []

    class Watching(TinyMethod):
        def prepare(self, model, batch, context):
            rates.append((context.learning_rate, context.rate_factor))
            return super().prepare(model, batch, context)

        def loss(self, model, batch, context):
            assert rates[-1] == (context.learning_rate, context.rate_factor)
            return super().loss(model, batch, context)

    tiny_fit(tmp_path / "cosine", method=Watching(), schedule=cosine(2))
    factors = [cosine(2)(step / 3) for step in range(6)]
    assert [factor for _, factor in rates] == pytest.approx(factors)
    assert [rate for rate, _ in rates] == pytest.approx([0.05 * factor for factor in factors])
    recorded = [r for r in read_rows(tmp_path / "cosine/records.jsonl") if r["kind"] == "step"]
    assert [rate for rate, _ in rates] == [row["learning_rate"] for row in recorded]
    rates.clear()
    still = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    tiny_fit(tmp_path / "still", method=Watching(), make_optimizer=still)
    assert set(rates) == {(0.0, 1.0)}
