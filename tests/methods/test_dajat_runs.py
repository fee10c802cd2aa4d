"""DAJAT through the loop: it learns robust digits, and a stopped run goes on bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.attacks import AdversarialWeightPerturbation, PGDSettings, ThreatModel
from dkl.data import ImageData, basic_augment, load_data
from dkl.engine import AverageSettings, LoopSettings, find_checkpoint, fit, load_checkpoint
from dkl.methods import NaturalTraining
from dkl.methods.dajat import dajat
from dkl.models import create_model
from dkl.models.dual_batch_norm import add_dual_batch_norm


def digits(count: int) -> tuple[ImageData, ImageData]:
    train, test = load_data("digits")
    return train.subset(torch.arange(count)), test.subset(torch.arange(200))


def train_on_digits(out_dir: Path, method: nn.Module, data: Any, model: nn.Module, **options: Any):
    defaults = {"epochs": 2, "batch_size": 64, "trackers": (), "best_metric": None}
    settings = LoopSettings(**{**defaults, **options.pop("settings", {})})
    return fit(
        method,
        model,
        data,
        settings=settings,
        out_dir=out_dir,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        **options,
    )


def small_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return add_dual_batch_norm(create_model("convnet_small", 10, in_channels=1, width=16))


VIEWS = (basic_augment(padding=1, flip=False), basic_augment(padding=2, flip=False))
DIGITS_ATTACK = PGDSettings(ThreatModel("Linf", 0.15), 2, 0.1, "gaussian")


def test_it_learns_robust_digits(tmp_path: Path) -> None:
    train, test = digits(600)
    attack = PGDSettings(ThreatModel("Linf", 0.15), 10, 0.03, "uniform")
    found: dict[str, tuple[float, float]] = {}
    for name, method, views in (
        ("natural", NaturalTraining(), ()),
        ("dajat", dajat(DIGITS_ATTACK, beta=3.0), VIEWS),
    ):
        model = small_model()
        settings = {"epochs": 5, "batch_size": 50}
        train_on_digits(tmp_path / name, method, train, model, views=views, settings=settings)
        images, labels = test.images.float() / 255, test.labels
        adversarial = attack.attack(
            model, images, lambda z, y=labels: F.cross_entropy(z, y, reduction="none")
        )
        model.eval()
        with torch.no_grad():
            clean, robust = (
                (model(x).argmax(1) == labels).double().mean().item() for x in (images, adversarial)
            )
        found[name] = (clean, robust)
        assert not any(getattr(m, "uses_auxiliary", False) for m in model.modules())
    assert found["dajat"][0] > 0.8
    assert found["dajat"][1] > found["natural"][1] + 0.2


class Interrupting:
    """Data that asks the run to stop when a certain batch is read."""

    def __init__(self, data: ImageData, at_batch: int) -> None:
        self.data, self.at_batch = data, at_batch

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, index_batches: Any, device: Any) -> Any:
        for number, batch in enumerate(self.data.batches(index_batches, device), start=1):
            if number == self.at_batch:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.mark.parametrize("at_batch", [1, 3])
def test_stopped_run_goes_on_bit_for_bit(tmp_path: Path, at_batch: int) -> None:
    data, _ = digits(100)

    def run(name: str, data: Any, resume: bool = False) -> Any:
        return train_on_digits(
            tmp_path / name,
            dajat(DIGITS_ATTACK),
            data,
            small_model(),
            views=VIEWS,
            augment=basic_augment(padding=1, flip=False),
            weight_perturbation=AdversarialWeightPerturbation(0.01, start_epoch=1),
            weight_average=AverageSettings(decay=0.9),
            settings={"batch_size": 40},
            resume=resume,
        )

    run("straight", data)
    assert run("stopped", Interrupting(data, at_batch)).steps_done == at_batch
    assert run("stopped", data, resume=True).steps_done == 6
    straight, stopped = (
        load_checkpoint(find_checkpoint(tmp_path / name)) for name in ("straight", "stopped")
    )
    assert any(name.endswith("_auto.running_mean") for name in straight.model)
    for first, second in ((straight.model, stopped.model), (straight.average, stopped.average)):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
