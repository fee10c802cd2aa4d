"""The loop: what it feeds to a method, what it does with gradients, what it writes."""

import json
import math
from dataclasses import replace
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import torch
from tiny_training import (
    TinyData,
    TinyMethod,
    TinyPerturbation,
    sgd,
    tiny_fit,
    tiny_model,
    tiny_settings,
)
from torch import nn

from dkl.engine import (
    AverageSettings,
    SampleNoise,
    cosine,
    find_checkpoint,
    load_checkpoint,
    load_weights,
)
from dkl.engine.recorder import read_rows


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in model.parameters()])


def trained(tmp_path: Path, name: str, **options) -> torch.Tensor:
    return weights_of(tiny_fit(tmp_path / name, **options)[1])


def relative_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    result, _ = tiny_fit(tmp_path, settings=tiny_settings(epochs=15))
    epochs = [row for row in read_rows(tmp_path / "records.jsonl") if row["kind"] == "epoch"]
    assert epochs[-1]["train_loss"] < 0.7 * epochs[0]["train_loss"]
    assert epochs[-1]["train_accuracy"] > epochs[0]["train_accuracy"]
    assert result.epochs_done == 15
    assert not result.stopped_early


def test_every_epoch_sees_every_sample_once_in_a_new_order(tmp_path: Path) -> None:
    data = TinyData()
    tiny_fit(tmp_path, data=data)
    epochs = [list(chain(*data.asked[:3])), list(chain(*data.asked[3:]))]
    assert [len(batch) for batch in data.asked] == [8, 8, 6] * 2
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(22))
    assert epochs[0] != epochs[1]


def test_records(tmp_path: Path) -> None:
    tiny_fit(tmp_path, settings=tiny_settings(record_every_steps=2))
    rows = read_rows(tmp_path / "records.jsonl")
    assert [(row["kind"], row["epoch"], row["step"]) for row in rows] == [
        ("step", 0, 2),
        ("epoch", 0, 3),
        ("step", 1, 4),
        ("step", 1, 6),
        ("epoch", 1, 6),
    ]
    assert {"loss", "accuracy", "learning_rate"} <= rows[0].keys()
    expected = {"train_loss", "train_accuracy", "val_loss", "seconds", "images_per_second"}
    assert expected <= rows[1].keys()


def test_epoch_loss_is_the_mean_over_samples_of_the_steps(tmp_path: Path) -> None:
    tiny_fit(tmp_path, settings=tiny_settings(epochs=1))
    *steps, epoch = read_rows(tmp_path / "records.jsonl")
    assert epoch["train_loss"] == pytest.approx(
        sum(n * row["loss"] for n, row in zip((8, 8, 6), steps, strict=True)) / 22
    )


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_accumulation_changes_nothing(tmp_path: Path, accumulation: int) -> None:
    whole = trained(tmp_path, "whole", weight_perturbation=TinyPerturbation())
    split = trained(
        tmp_path,
        "split",
        settings=tiny_settings(accumulation=accumulation),
        weight_perturbation=TinyPerturbation(),
    )
    assert relative_difference(split, whole) < 1e-12
    rows = [read_rows(tmp_path / name / "records.jsonl") for name in ("whole", "split")]
    for first, second in zip(*rows, strict=True):
        for key in {"loss", "accuracy", "train_loss", "train_accuracy", "val_loss"} & first.keys():
            assert first[key] == pytest.approx(second[key], rel=1e-9)


def test_same_seed_same_bits_and_other_seed_others(tmp_path: Path) -> None:
    first, second = trained(tmp_path, "first"), trained(tmp_path, "second")
    assert torch.equal(first, second)
    other = trained(tmp_path, "other", settings=tiny_settings(seed=1))
    assert relative_difference(other, first) > 1e-3


def test_validation_does_not_change_the_trajectory(tmp_path: Path) -> None:
    def run(name: str, **options) -> torch.Tensor:
        return trained(tmp_path, name, model=tiny_model(dropout=0.3), **options)

    assert torch.equal(run("with"), run("without", validate=None))


def test_drawn_noise_reaches_prepare_loss_and_augment_apart(tmp_path: Path) -> None:
    drawn: dict[str, torch.Tensor] = {}

    class Drawing(TinyMethod):
        def prepare(self, model, batch, context):
            drawn["prepare"] = context.draw(4)
            return super().prepare(model, batch, context)

        def loss(self, model, batch, context):
            name = f"loss {context.phase}"
            drawn[name] = replace(context).draw(4)
            return super().loss(model, batch, context)

    def augment(images, draw):
        drawn["augment"] = draw(4)
        return images

    tiny_fit(tmp_path, method=Drawing(), augment=augment, weight_perturbation=TinyPerturbation())
    assert torch.equal(drawn.pop("loss direction"), drawn["loss update"])
    values = torch.stack([value.flatten() for value in drawn.values()])
    assert len(values) == 3
    assert len(values.unique()) == values.numel()


def test_noise_is_fresh_at_every_step_and_the_same_in_every_run(tmp_path: Path) -> None:
    def run(name: str) -> dict[str, list[torch.Tensor]]:
        drawn: dict[str, list[torch.Tensor]] = {"augment": [], "prepare": []}

        class Drawing(TinyMethod):
            def prepare(self, model, batch, context):
                drawn["prepare"].append(context.draw(1).flatten())
                return super().prepare(model, batch, context)

        def augment(images, draw):
            drawn["augment"].append(draw(1).flatten())
            return images

        tiny_fit(tmp_path / name, method=Drawing(), augment=augment)
        return drawn

    first, second = run("first"), run("second")
    for name, values in first.items():
        assert torch.equal(torch.cat(values), torch.cat(second[name]))
        assert len(torch.cat(values).unique()) == 2 * 22


def test_method_is_prepared_once_and_told_the_truth(tmp_path: Path) -> None:
    contexts = []

    class Watching(TinyMethod):
        def prepare(self, model, batch, context):
            contexts.append(context)
            assert model.training
            return super().prepare(model, batch, context)

    data, method = TinyData(), Watching()
    tiny_fit(tmp_path, method=method, data=data, settings=tiny_settings(accumulation=3))
    assert len(contexts) == 2 * 3 * 3
    last = contexts[-1]
    assert (last.epoch, last.num_epochs, last.step, last.loss_scale) == (1, 2, 5, 1.0)
    assert [int(context.num_items) for context in contexts[6:9]] == [6, 6, 6]
    asked = list(chain(*data.asked[6:9]))[:6]
    assert contexts[8].step_labels.tolist() == data.labels[asked].tolist()
    assert method.phases == ["update"] * 18


def test_padding_does_not_count(tmp_path: Path) -> None:
    method = TinyMethod()
    tiny_fit(tmp_path, method=method, settings=tiny_settings(accumulation=4))
    assert torch.equal(method.histogram, torch.bincount(TinyData().labels).double())


def test_parameters_of_the_method_are_trained(tmp_path: Path) -> None:
    method = TinyMethod()
    tiny_fit(tmp_path, method=method)
    assert method.scale.item() != 1
    frozen = TinyMethod(trainable=False)
    tiny_fit(tmp_path / "frozen", method=frozen)
    assert frozen.scale.item() == 1


@pytest.mark.parametrize("step_inside", [True, False])
def test_weight_perturbation(tmp_path: Path, step_inside: bool) -> None:
    # The reference: the same update by hand, for the single step of one epoch.
    settings = tiny_settings(epochs=1, batch_size=22)
    perturbation = TinyPerturbation(step_inside=step_inside)
    method = TinyMethod(trainable=False)
    ours = trained(
        tmp_path, "ours", method=method, settings=settings, weight_perturbation=perturbation
    )
    assert method.phases == ["direction", "update"]

    captured: dict[str, torch.Tensor] = {}

    class Recording(TinyMethod):
        def loss(self, model, batch, context):
            captured["batch"], captured["context"] = batch, context
            return super().loss(model, batch, context)

    plain = trained(tmp_path, "plain", method=Recording(trainable=False), settings=settings)
    assert relative_difference(ours, plain) > 1e-4
    model = tiny_model().double()
    optimizer = sgd(model.parameters())
    step = captured["context"].step
    context = lambda: replace(captured["context"], draw=_redraw(settings, captured["batch"], step))  # noqa: E731
    method = TinyMethod(trainable=False)

    def backward() -> None:
        method.loss(model, captured["batch"], context()).loss.backward()

    with perturbation.perturbed(model, backward):
        backward()
        if step_inside:
            optimizer.step()
    if not step_inside:
        optimizer.step()
    assert relative_difference(ours, weights_of(model)) < 1e-12


def _redraw(settings, batch, step):
    return SampleNoise(settings.seed, "loss", step, batch.indices, torch.float64)


def test_weight_perturbation_waits_for_its_epoch(tmp_path: Path) -> None:
    method = TinyMethod()
    tiny_fit(tmp_path, method=method, weight_perturbation=TinyPerturbation(start_epoch=1))
    assert method.phases == ["update"] * 3 + ["direction", "update"] * 3


def test_schedules_set_the_rates(tmp_path: Path) -> None:
    tiny_fit(tmp_path, schedule=cosine(2), momentum_schedule=lambda progress: 0.5 + progress / 10)
    rows = [r for r in read_rows(tmp_path / "records.jsonl") if r["kind"] == "step"]
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [0.05 * cosine(2)(step / 3) for step in range(6)]
    )
    checkpoint = load_checkpoint(find_checkpoint(tmp_path))
    group = checkpoint.training["optimizer"]["param_groups"][0]
    assert group["momentum"] == pytest.approx(0.5 + 5 / 3 / 10)


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    def plain_sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    before = weights_of(tiny_model().double())
    after = trained(
        tmp_path,
        "clipped",
        method=TinyMethod(trainable=False),
        make_optimizer=plain_sgd,
        settings=tiny_settings(epochs=1, batch_size=22, clip_norm=0.01),
    )
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_best_is_chosen_by_validation(tmp_path: Path) -> None:
    values = iter([0.5, 0.9, math.nan, 0.9, 0.7])
    result, _ = tiny_fit(
        tmp_path,
        settings=tiny_settings(epochs=5, best_metric="val_accuracy", best_mode="max"),
        validate=lambda model: {"val_accuracy": next(values)},
    )
    assert result.best_value == 0.9
    assert result.best_checkpoint.name == "step_00000006_epoch_00002"
    assert find_checkpoint(tmp_path, "best") == result.best_checkpoint.resolve()
    assert find_checkpoint(tmp_path, "last") == result.last_checkpoint.resolve()


def test_without_validation_there_is_no_best(tmp_path: Path) -> None:
    result, _ = tiny_fit(tmp_path, validate=None)
    assert result.best_checkpoint is None
    assert result.best_value is None


def test_validate_every_and_the_last(tmp_path: Path) -> None:
    calls = []
    tiny_fit(
        tmp_path,
        settings=tiny_settings(epochs=5, validate_every=2),
        validate=lambda model: calls.append(1) or {"val_loss": 1.0},
    )
    rows = [r for r in read_rows(tmp_path / "records.jsonl") if r["kind"] == "epoch"]
    assert [("val_loss" in row) for row in rows] == [False, True, False, True, True]
    assert len(calls) == 3


def test_average_is_what_is_validated_and_loaded(tmp_path: Path) -> None:
    seen = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append(weights_of(model))
        return {"val_loss": 1.0 / len(seen)}

    _, model = tiny_fit(
        tmp_path, validate=validate, weight_average=AverageSettings(decay=0.9, per="step")
    )
    assert relative_difference(seen[-1], weights_of(model)) > 1e-3
    other = tiny_model().double()
    other.load_state_dict(load_weights(tmp_path, "last"))
    assert torch.equal(weights_of(other), seen[-1])
    other.load_state_dict(load_weights(tmp_path, "last", prefer_average=False))
    assert torch.equal(weights_of(other), weights_of(model))


def test_average_per_epoch(tmp_path: Path) -> None:
    _, model = tiny_fit(
        tmp_path,
        validate=None,
        settings=tiny_settings(epochs=1),
        weight_average=AverageSettings(decay=0.75, per="epoch"),
    )
    average = load_weights(tmp_path, "last")
    start = tiny_model().double().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(average[name], 0.75 * start[name] + 0.25 * tensor)


@pytest.mark.parametrize("start", [0, 1])
def test_average_per_epoch_is_that_of_the_saved_checkpoints(tmp_path: Path, start: int) -> None:
    """Online, the average needs none of the files of an average over epoch checkpoints.

    start 1 begins with the first epoch's checkpoint, start 0 with the initial weights.
    """
    tau, model = 0.9, tiny_model(dropout=0.3, batch_norm=True)
    tiny_fit(
        tmp_path,
        model=model,
        settings=tiny_settings(epochs=6, keep_last=7),
        weight_average=AverageSettings(decay=tau, per="epoch", start_epoch=start),
    )
    folders = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert len(folders) == 7
    checkpoints = [load_checkpoint(folder) for folder in folders]
    offline = checkpoints[start].model
    for checkpoint in checkpoints[start + 1 :]:
        for name, value in checkpoint.model.items():
            if value.is_floating_point():
                offline[name] = tau * offline[name] + (1 - tau) * value
            else:
                offline[name] = value
        for name, value in checkpoint.average.items():
            torch.testing.assert_close(value, offline[name], rtol=1e-12, atol=1e-14)
    assert {"3.running_mean", "3.running_var", "3.num_batches_tracked"} <= offline.keys()
    assert relative_difference(offline["3.running_var"], model[3].running_var) > 1e-4


def test_copied_buffers_are_the_models_after_every_epoch(tmp_path: Path) -> None:
    tiny_fit(
        tmp_path,
        model=tiny_model(batch_norm=True),
        settings=tiny_settings(keep_last=3),
        weight_average=AverageSettings(decay=0.9, ramp=True, start_epoch=0.5, buffers="copy"),
    )
    for folder in sorted((tmp_path / "checkpoints").glob("step_*")):
        checkpoint = load_checkpoint(folder)
        for name in ("3.running_mean", "3.running_var", "3.num_batches_tracked"):
            assert torch.equal(checkpoint.average[name], checkpoint.model[name])
    assert not torch.equal(checkpoint.average["1.weight"], checkpoint.model["1.weight"])


def test_checkpoint_says_where_it_is_from(tmp_path: Path) -> None:
    tiny_fit(tmp_path, recipe={"name": "tiny", "seed": 0})
    meta = json.loads((find_checkpoint(tmp_path) / "meta.json").read_text())
    assert meta["recipe"] == {"name": "tiny", "seed": 0}
    assert (meta["epoch"], meta["step"], meta["step_in_epoch"]) == (2, 6, 0)
    assert meta["best"]["metric"] == "val_loss"
    assert meta["versions"]["torch"] == metadata.version("torch")


def test_bf16_trains_in_float32_weights(tmp_path: Path) -> None:
    dtypes = set()

    class Looking(TinyMethod):
        def loss(self, model, batch, context):
            output = super().loss(model, batch, context)
            dtypes.add(output.logits.dtype)
            return output

    settings = tiny_settings(dtype="float32", mixed_precision="bf16")
    _, model = tiny_fit(tmp_path, method=Looking(), settings=settings)
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # A later run in this process is free to choose again.
    tiny_fit(tmp_path / "again", method=Looking())
    assert dtypes == {torch.bfloat16, torch.float64}


@pytest.mark.slow
def test_compiled_model_trains_the_same_and_is_given_back(tmp_path: Path) -> None:
    compiled = tiny_model()
    ours = trained(
        tmp_path,
        "compiled",
        model=compiled,
        settings=tiny_settings(compile_model=True),
        weight_average=AverageSettings(decay=0.9),
        weight_perturbation=TinyPerturbation(),
    )
    plain = trained(tmp_path, "plain", weight_perturbation=TinyPerturbation())
    assert relative_difference(ours, plain) < 1e-6
    assert compiled._compiled_call_impl is None
    assert load_weights(tmp_path / "compiled", "last").keys() == compiled.state_dict().keys()


def test_channels_last(tmp_path: Path) -> None:
    formats = []

    class Looking(TinyMethod):
        def loss(self, model, batch, context):
            formats.append(batch.images.is_contiguous(memory_format=torch.channels_last))
            return super().loss(model, batch, context)

    def convolutional() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))

    plain = trained(tmp_path, "plain", model=convolutional())
    other = trained(
        tmp_path,
        "other",
        model=convolutional(),
        method=Looking(),
        settings=tiny_settings(channels_last=True),
    )
    assert relative_difference(other, plain) < 1e-12
    assert all(formats)


def test_deterministic_switch_is_put_back(tmp_path: Path) -> None:
    seen = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return {"val_loss": 1.0}

    tiny_fit(tmp_path, settings=tiny_settings(deterministic=True), validate=validate)
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


class BadData(TinyData):
    """Data whose batches are changed by a function."""

    change = staticmethod(lambda images, labels: (images, labels))

    def batches(self, index_batches, device):
        for images, labels in super().batches(index_batches, device):
            yield self.change(images, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images[:, 0], labels), r"images \[8, C, H, W\]"),
        (lambda images, labels: (images[:4], labels), r"labels \[8\] for 8 indices"),
        (lambda images, labels: (images.long(), labels), "uint8 in 0..255 or floats"),
        (lambda images, labels: (images, labels.float()), "labels must be integers"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, change, message: str) -> None:
    data = BadData()
    data.change = change
    with pytest.raises(ValueError, match=message):
        tiny_fit(tmp_path, data=data)


def test_data_that_ends_early(tmp_path: Path) -> None:
    class Short(TinyData):
        def batches(self, index_batches, device):
            yield next(super().batches(index_batches, device))

    with pytest.raises(ValueError, match="gave 1 batches where 3 were asked for"):
        tiny_fit(tmp_path, data=Short())


def test_float_images_are_taken_as_they_are(tmp_path: Path) -> None:
    class Floats(TinyData):
        def batches(self, index_batches, device):
            for images, labels in super().batches(index_batches, device):
                yield images.double() / 255, labels

    assert torch.equal(trained(tmp_path, "uint8"), trained(tmp_path, "floats", data=Floats()))


def test_method_without_state_is_refused(tmp_path: Path) -> None:
    class NotAModule:
        couples_batch = False

    with pytest.raises(ValueError, match=r"must be an nn\.Module.*NotAModule"):
        tiny_fit(tmp_path, method=NotAModule())


def test_unknown_best_metric(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'val_accuracy'.*\['val_loss'\]"):
        tiny_fit(tmp_path, settings=tiny_settings(best_metric="val_accuracy"))


def test_coupling_methods_warn_when_split(tmp_path: Path, caplog) -> None:
    class Coupling(TinyMethod):
        couples_batch = True

    tiny_fit(tmp_path / "whole", method=Coupling())
    assert "couples" not in caplog.text
    tiny_fit(tmp_path / "split", method=Coupling(), settings=tiny_settings(accumulation=2))
    assert "Coupling couples the samples" in caplog.text


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        tiny_fit(tmp_path, settings=tiny_settings(dtype="float32", mixed_precision="fp16"))


def test_all_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="epochs") as caught:
        tiny_settings(
            epochs=0,
            batch_size=-1,
            seed=-1,
            clip_norm=0.0,
            dtype="float16",
            best_mode="high",
            trackers=("paper",),
            checkpoint_every_steps=0,
        )
    for name in ("batch_size", "seed", "clip_norm", "dtype", "best_mode", "paper", "checkpoint_ev"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="float32"):
        tiny_settings(mixed_precision="bf16")
