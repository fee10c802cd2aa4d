"""The LightningModule and its callback: hand-made values, what is saved, and resumed runs."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dkl.integrations.distillation import DistillationLoss
from dkl.losses import ikl_loss
from tests.integrations.tiny import (
    NUM_CLASSES,
    Net,
    PlainNet,
    data,
    mean_table,
    mixed,
    some_table,
    two_processes,
)

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dkl.integrations.lightning import ClassStatisticsCallback, DistillationModule

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
NUM_SAMPLES = 24


def make_module(
    student: nn.Module | None = None, teacher: nn.Module | None = None, **options: Any
) -> DistillationModule:
    loss = DistillationLoss(NUM_CLASSES, mse_weight=0.5, temperature=2.0)
    student = Net(1) if student is None else student
    teacher = Net(2) if teacher is None else teacher
    return DistillationModule(student, teacher, loss, SGD, **options)


class ResumableLoader(DataLoader):
    """A loader that goes on inside an epoch, which Lightning leaves to the loader."""

    given, start = 0, 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.given = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["given"] % len(self)


def fit(
    module: LightningModule,
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    validate: bool = False,
    batch_size: int = 8,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **options},
    )
    dataset, rank = TensorDataset(*data(NUM_SAMPLES)), int(os.environ.get("RANK", "0"))
    sampler = DistributedSampler(dataset, options.get("devices", 1), rank, shuffle=False)
    loader = ResumableLoader(dataset, batch_size=batch_size, sampler=sampler)
    trainer.fit(module, loader, loader if validate else None, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("soft", [False, True])
def test_value_is_the_loss_made_by_hand_and_gradients_reach_the_student_alone(soft: bool) -> None:
    module = make_module(task_weight=0.25, distill_weight=0.5)
    module.train()
    module.loss.statistics.table.copy_(some_table())
    images, labels = data(8)
    target = mixed(labels) if soft else labels
    loss = module.training_step((images, target), 0)
    with torch.no_grad():
        student, teacher = module.student(images), module.teacher(images)
    rows = target @ some_table() if soft else some_table()[labels]
    distill = ikl_loss(student, teacher, rows, mse_weight=0.5, temperature=2.0)
    torch.testing.assert_close(loss, 0.25 * F.cross_entropy(student, target) + 0.5 * distill)
    loss.backward()
    assert not module.teacher.training
    assert all(p.grad.abs().sum() > 0 for p in module.student.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in module.teacher.parameters())


def test_teacher_follows_the_module_and_neither_it_nor_the_statistics_are_saved_in_it() -> None:
    module = make_module().double()
    assert module.teacher.head.weight.dtype == torch.float64
    assert module.loss.statistics.sums.dtype == torch.float32
    assert all(name.startswith("student.") for name in module.state_dict())


def test_table_is_committed_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    module = make_module()
    fit(module, tmp_path, max_epochs=1, validate=True)
    images, labels = data(NUM_SAMPLES)
    with torch.no_grad():
        expected = mean_table(module.teacher(images), labels)
    torch.testing.assert_close(module.loss.statistics.table, expected)
    assert not module.loss.statistics.counts.any()


def same_run(ours: DistillationModule, expected: DistillationModule) -> None:
    for name in ("student", "loss"):
        states = getattr(expected, name).state_dict()
        for key, value in getattr(ours, name).state_dict().items():
            assert torch.equal(value, states[key]), f"{name}.{key}"


@pytest.mark.parametrize(
    ("validate", "when"),
    [
        (False, {"every_n_epochs": 1}),
        (True, {"every_n_epochs": 1}),
        (True, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
        (False, {"every_n_train_steps": 5}),
    ],
    ids=["epoch", "validation", "epoch-after-validation", "mid-epoch"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    validate: bool, when: dict[str, Any], tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **when)
    options = {"max_epochs": 4, "validate": validate, "enable_checkpointing": True}
    straight = make_module()
    fit(straight, tmp_path, callbacks=[keep], **options)
    path = sorted(tmp_path.glob("epoch=1-*.ckpt"))[0]
    resumed = make_module()
    fit(resumed, tmp_path / "again", ckpt_path=path, **{**options, "enable_checkpointing": False})
    same_run(resumed, straight)


class OwnModule(LightningModule):
    """What a user writes who takes the callback alone."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.loss_options = PlainNet(1), {"mse_weight": 2.0}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.student(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


def test_resuming_without_statistics_is_refused(tmp_path: Path) -> None:
    trainer = fit(OwnModule(), tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    callback = ClassStatisticsCallback(make_module().loss.statistics)
    options = {"max_epochs": 2, "callbacks": [callback]}
    with pytest.raises(ValueError, match="the checkpoint has no class statistics"):
        fit(OwnModule(), tmp_path, ckpt_path=tmp_path / "bare.ckpt", **options)


def test_sample_wise_weights_need_no_callback() -> None:
    loss = DistillationLoss(NUM_CLASSES, class_weights=False, weight_temperature=100.0)
    module = DistillationModule(Net(1), Net(2), loss, SGD)
    assert module.configure_callbacks() == []
    assert [type(c) for c in make_module().configure_callbacks()] == [ClassStatisticsCallback]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    reports = two_processes("lightning", tmp_path)
    alone = make_module(PlainNet(1), PlainNet(2))
    fit(alone, tmp_path, max_epochs=3)
    for report in reports:
        torch.testing.assert_close(report["table"], alone.loss.statistics.table)
        for name, value in alone.student.state_dict().items():
            torch.testing.assert_close(report["student"][name], value)
    (path,) = tmp_path.glob("step=5.ckpt")
    saved = torch.load(path, weights_only=True)["dkl_class_statistics"]
    assert saved["counts"].sum() == 16, "the samples of both processes in two steps of the epoch"
