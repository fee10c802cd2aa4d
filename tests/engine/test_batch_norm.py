"""Momentum of batch-norm layers, and their parameters apart from weight decay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import relative_difference, trained, weights_of
from tiny_training import (
    InterruptingData,
    TinyData,
    TinyMethod,
    assert_same_run,
    sgd,
    tiny_fit,
    tiny_model,
    tiny_settings,
)
from torch import Tensor, nn

from dkl.engine import AverageSettings, LoopSettings, cosine, find_checkpoint, load_checkpoint
from dkl.engine.batch_norm import momentum_of


class Watching(TinyMethod):
    """Keeps the momentum in force and what batch-norm is fed in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.momenta: list[float] = []
        self.fed: list[Tensor] = []

    def loss(self, model, batch, context):
        self.momenta.append(model[3].momentum)
        handle = model[3].register_forward_hook(
            lambda layer, inputs, output: self.fed.append(inputs[0].detach())
        )
        output = super().loss(model, batch, context)
        handle.remove()
        return output


def run(out_dir: Path, method: nn.Module | None = None, settings: Any = None, **options: Any):
    model = tiny_model(batch_norm=True)
    tiny_fit(out_dir, model=model, method=method, settings=settings or tiny_settings(), **options)
    return model


DM_AT = {"batch_norm_momentum": 0.01, "batch_norm_first_momentum": 1.0}


def test_momenta_of_a_run(tmp_path: Path) -> None:
    def momenta(name: str, **settings: Any) -> list[float]:
        method = Watching()
        run(tmp_path / name, method, tiny_settings(**settings))
        return method.momenta

    assert momenta("default") == [0.1] * 6
    assert momenta("set", batch_norm_momentum=0.01) == [0.01] * 6
    assert momenta("both", **DM_AT) == [1.0] + [0.01] * 5
    assert momenta("first alone", batch_norm_first_momentum=1.0) == [1.0] + [0.1] * 5
    assert momenta("accumulated", **DM_AT, accumulation=2) == [1.0] * 2 + [0.01] * 10


def test_first_step_replaces_the_initial_statistics(tmp_path: Path) -> None:
    method = Watching()
    model = run(tmp_path, method, tiny_settings(epochs=1, **DM_AT))
    mean = variance = None
    for number, rows in enumerate(method.fed):
        # Both forwards of the first step replace, those of the later ones move by a hundredth.
        share = 1.0 if number < 2 else 0.01
        before = (0.0, 1.0) if mean is None else (mean, variance)
        mean = (1 - share) * before[0] + share * rows.mean(0)
        variance = (1 - share) * before[1] + share * rows.var(0)
    torch.testing.assert_close(model[3].running_mean, mean)
    torch.testing.assert_close(model[3].running_var, variance)


@pytest.mark.parametrize("at_batch", [1, 2, 4])
def test_first_momentum_is_that_of_the_very_first_step_only_after_a_resume(
    tmp_path: Path, at_batch: int
) -> None:
    settings = tiny_settings(**DM_AT)
    run(tmp_path / "straight", settings=settings)
    run(tmp_path / "stopped", settings=settings, data=InterruptingData(at_batch))
    method = Watching()
    run(tmp_path / "stopped", method, settings, resume=True)
    assert method.momenta == [0.01] * (6 - at_batch)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_run_that_broke_off_in_its_first_step_starts_with_the_first_momentum(
    tmp_path: Path,
) -> None:
    class Crashing(TinyData):
        def batches(self, index_batches, device):
            raise OSError("the disk went away")
            yield

    settings = tiny_settings(**DM_AT)
    with pytest.raises(OSError, match="went away"):
        run(tmp_path / "run", settings=settings, data=Crashing())
    method = Watching()
    run(tmp_path / "run", method, settings, resume=True)
    assert method.momenta == [1.0] + [0.01] * 5


def test_momentum_comes_back_after_an_error() -> None:
    layers = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.BatchNorm1d(2, momentum=None))

    def failing() -> None:
        with momentum_of(layers, 1.0):
            assert [layer.momentum for layer in layers] == [1.0, 1.0]
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert [layer.momentum for layer in layers] == [0.3, None]


@pytest.mark.parametrize("name", ["batch_norm_momentum", "batch_norm_first_momentum"])
def test_momentum_that_would_be_ignored_or_makes_no_sense(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} would be ignored: Sequential has no batch-norm"):
        tiny_fit(tmp_path, settings=tiny_settings(**{name: 0.5}))
    assert not (tmp_path / "checkpoints").exists()
    for momentum in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\]"):
            tiny_settings(**{name: momentum})


def groups_of(out_dir: Path) -> list[dict[str, Any]]:
    return load_checkpoint(find_checkpoint(out_dir)).training["optimizer"]["param_groups"]


def test_groups_of_the_optimiser(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    assert [len(group["params"]) for group in groups_of(tmp_path / "whole")] == [7]
    run(tmp_path / "apart", settings=tiny_settings(decay_batch_norm=False), schedule=cosine(2))
    decayed, spared = groups_of(tmp_path / "apart")
    # Two layers and the method's scale; weight and bias of batch-norm.
    assert (len(decayed["params"]), len(spared["params"])) == (5, 2)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-3, 0.0)
    assert decayed["initial_lr"] == spared["initial_lr"] == 0.05
    assert decayed["lr"] == spared["lr"] == pytest.approx(0.05 * cosine(2)(5 / 3))


def test_only_batch_norm_is_spared(tmp_path: Path) -> None:
    """With no other gradient, weight decay alone moves the weights: w (1 - lr wd)."""

    class Nothing(TinyMethod):
        def loss(self, model, batch, context):
            output = super().loss(model, batch, context)
            return type(output)(output.loss * 0, output.logits, output.parts, output.counts)

    def decaying(parameters):
        return torch.optim.SGD(parameters, lr=0.5, weight_decay=0.1)

    class Guided(Nothing):
        """Trains a batch-norm layer of its own, which is spared as well."""

        def __init__(self) -> None:
            super().__init__()
            self.guide = nn.BatchNorm1d(3)

    method = Guided()
    options = {"make_optimizer": decaying, "method": method}
    settings = tiny_settings(epochs=1, batch_size=22, decay_batch_norm=False)
    start = tiny_model(batch_norm=True).double()
    model = run(tmp_path, settings=settings, **options)
    for (name, ours), theirs in zip(model.named_parameters(), start.parameters(), strict=True):
        factor = 1.0 if name.startswith("3.") else 0.95
        torch.testing.assert_close(ours, factor * theirs)
    assert torch.equal(method.guide.weight, torch.ones(3, dtype=torch.float64))
    assert method.scale.item() == 0.95


def test_resume_with_groups_bit_for_bit(tmp_path: Path) -> None:
    settings = tiny_settings(decay_batch_norm=False, **DM_AT)
    options = {
        "settings": settings,
        "schedule": cosine(2),
        "momentum_schedule": lambda progress: 0.5 + progress / 10,
        "weight_average": AverageSettings(decay=0.9, per="epoch", buffers="copy"),
    }
    run(tmp_path / "straight", **options)
    run(tmp_path / "stopped", data=InterruptingData(2), **options)
    run(tmp_path / "stopped", resume=True, **options)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert [group["initial_lr"] for group in groups_of(tmp_path / "stopped")] == [0.05, 0.05]


def test_without_decay_the_groups_make_no_difference(tmp_path: Path) -> None:
    def plain(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    options = {"make_optimizer": plain}
    first = weights_of(run(tmp_path / "one", **options))
    settings = tiny_settings(decay_batch_norm=False)
    assert torch.equal(weights_of(run(tmp_path / "two", settings=settings, **options)), first)


def test_factories_that_refuse_groups(tmp_path: Path) -> None:
    def of_trainable(parameters):
        return sgd([parameter for parameter in parameters if parameter.requires_grad])

    def flattening(groups):
        return sgd([parameter for group in groups for parameter in group["params"]])

    settings = tiny_settings(decay_batch_norm=False)
    for number, (factory, reason) in enumerate(
        ((of_trainable, "'dict' object has no attribute"), (flattening, "decays batch-norm"))
    ):
        with pytest.raises(ValueError, match=f"pass on the list of parameter groups.*{reason}"):
            run(tmp_path / str(number), settings=settings, make_optimizer=factory)
        assert not (tmp_path / str(number) / "checkpoints").exists()


def test_groups_without_batch_norm_would_be_ignored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decay_batch_norm=False would be ignored"):
        tiny_fit(tmp_path, settings=tiny_settings(decay_batch_norm=False))


def test_they_belong_to_the_trajectory() -> None:
    names = {"batch_norm_momentum", "batch_norm_first_momentum", "decay_batch_norm"}
    assert names <= LoopSettings(epochs=1, batch_size=1).trajectory().keys()


def test_defaults_are_what_they_were(tmp_path: Path) -> None:
    """The end of a run before any of these settings existed, as recorded then."""
    model = tiny_model(batch_norm=True)
    weights = trained(tmp_path, "run", model=model, validate=None)
    assert weights.sum().item() == pytest.approx(0.2226238812393988, rel=1e-9)
    assert weights.norm().item() == pytest.approx(3.863637289844735, rel=1e-9)
    moved = relative_difference(weights, weights_of(tiny_model(batch_norm=True).double()))
    assert moved > 0.01
