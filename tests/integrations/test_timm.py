"""IKLDistillationTask: its value is the loss made by hand, and it keeps timm's promises."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.losses import gkl_loss, ikl_loss
from tests.integrations.tiny import (
    Net,
    PlainNet,
    data,
    mean_table,
    mixed,
    some_table,
    two_processes,
)

pytest.importorskip("timm", minversion="1.0.31")

from timm.loss import SoftTargetCrossEntropy
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver

from dkl.integrations.timm import IKLDistillationTask


def make_task(**options: Any) -> IKLDistillationTask:
    options = {"steps_per_epoch": 0, "verbose": False, **options}
    if options.get("class_weights") is False:
        options["steps_per_epoch"] = None
    return IKLDistillationTask(Net(1), Net(2), options.pop("criterion", None), **options)


def logits(task: IKLDistillationTask, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return task.trainable_module(images), task.teacher.model(images)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_value_is_the_loss_made_by_hand(soft: bool, gamma: float | None) -> None:
    options = {"mse_weight": 3.0, "ce_weight": 2.0, "temperature": 4.0}
    criterion = SoftTargetCrossEntropy() if soft else nn.CrossEntropyLoss()
    weights = {"distill_loss_weight": 0.5, "task_loss_weight": 0.25}
    task = make_task(criterion=criterion, gamma=gamma, **options, **weights)
    task.distillation.statistics.table.copy_(some_table())
    images, labels = data(8)
    target = mixed(labels) if soft else labels
    result = task(images, target)
    student, teacher = logits(task, images)
    rows = target @ some_table() if soft else some_table()[labels]
    distill = (
        ikl_loss(student, teacher, rows, **options)
        if gamma is None
        else gkl_loss(student, teacher, rows, gamma=gamma, **options)
    )
    expected = 0.25 * F.cross_entropy(student, target) + 0.5 * distill
    torch.testing.assert_close(result["loss"], expected)
    torch.testing.assert_close(result["kd_loss"], distill)
    torch.testing.assert_close(result["output"], student)


def test_sample_wise_weights() -> None:
    task = make_task(class_weights=False, weight_temperature=100.0)
    images, labels = data(8)
    student, teacher = logits(task, images)
    expected = ikl_loss(student, teacher, weight_temperature=100.0)
    torch.testing.assert_close(task(images, labels)["kd_loss"], expected)
    assert task.get_task_state() == {}


def test_teacher_sees_images_normalised_for_it() -> None:
    task = IKLDistillationTask(Net(1), Net(2, std=0.5), steps_per_epoch=0, verbose=False)
    images, labels = data(8)
    student, teacher = logits(task, images)
    with torch.no_grad():
        teacher = task.teacher.model(images / 0.5)
    expected = ikl_loss(student, teacher, torch.full_like(teacher, 0.25))
    torch.testing.assert_close(task(images, labels)["kd_loss"], expected)


def test_gradients_reach_the_student_alone_and_the_teacher_stays_in_eval() -> None:
    task = make_task().train()
    assert task.trainable_module.training
    assert not task.teacher.model.training
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    task(*data(8))["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in task.trainable_module.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in task.teacher.parameters())
    for name, value in task.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    trained = {id(p) for p in task.get_trainable_module().parameters()}
    assert trained == {id(p) for p in task.parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["steps", "train", "commit"])
def test_table_is_committed_at_the_end_of_an_epoch(how: str) -> None:
    task = make_task(steps_per_epoch={"steps": 2, "train": None, "commit": 0}[how])
    images, labels = data(16)
    task.train()
    for part in (slice(0, 8), slice(8, 16)):
        assert torch.equal(task.distillation.statistics.table, torch.full((4, 4), 0.25))
        task(images[part], labels[part])
    if how == "train":
        task.eval()
        task(images, labels)  # validation does not count
        task.train()
    elif how == "commit":
        task.train()
        assert task.distillation.statistics.counts.sum() == 16
        task.commit()
    expected = mean_table(logits(task, images)[1], labels)
    torch.testing.assert_close(task.distillation.statistics.table, expected)
    assert not task.distillation.statistics.counts.any()


def test_a_loop_that_never_says_where_epochs_end_is_warned() -> None:
    task = make_task(steps_per_epoch=None)
    with pytest.warns(UserWarning, match="steps_per_epoch=len\\(loader\\)"):
        task(*data(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task(*data(8))
        make_task(steps_per_epoch=None).train()(*data(8))


def epochs(task: IKLDistillationTask, optimizer: torch.optim.Optimizer, which: range) -> None:
    for epoch in which:
        task.train()
        for step in range(2):
            loss = task(*data(8, seed=10 * epoch + step))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def optimizer_of(task: IKLDistillationTask) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("steps_per_epoch", [2, None])
def test_resuming_timms_checkpoint_equals_going_on(
    steps_per_epoch: int | None, tmp_path: Path
) -> None:
    straight = make_task(steps_per_epoch=steps_per_epoch)
    straight.setup_ema(decay=0.5)
    optimizer = optimizer_of(straight)
    epochs(straight, optimizer, range(2))
    path = tmp_path / "checkpoint.pth.tar"
    saver = CheckpointSaver(straight.get_trainable_module(), optimizer, task=straight)
    saver._save(path, epoch=1)
    assert "task_state_ema" not in torch.load(path, weights_only=True)
    epochs(straight, optimizer, range(2, 4))

    resumed = make_task(steps_per_epoch=steps_per_epoch)
    optimizer = optimizer_of(resumed)
    start = resume_task_checkpoint(resumed, path, optimizer, log_info=False)
    assert start == 2
    epochs(resumed, optimizer, range(start, 4))
    for module in ("trainable_module", "distillation"):
        expected = getattr(straight, module).state_dict()
        for name, value in getattr(resumed, module).state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert not torch.equal(resumed.distillation.statistics.table, torch.full((4, 4), 0.25))


def test_a_state_of_other_class_weights_is_refused() -> None:
    state = make_task().get_task_state()
    with pytest.raises(RuntimeError, match="checkpoint has class statistics and the task has none"):
        make_task(class_weights=False).load_task_state(state)
    with pytest.raises(RuntimeError, match="task has class statistics and the checkpoint has none"):
        make_task().load_task_state({"projection": {}})
    with pytest.warns(UserWarning, match="the class table starts uniform"):
        make_task().load_task_state(None)


def test_compiled_task_has_the_same_value() -> None:
    plain, compiled = make_task(), make_task()
    assert compiled.compile(backend="eager") is compiled.get_eval_model()
    images, labels = data(8)
    torch.testing.assert_close(compiled(images, labels)["loss"], plain(images, labels)["loss"])
    assert compiled.distillation.statistics.counts.sum() == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "mse"}, "loss_type must be 'ikl'"),
        ({"steps_per_epoch": -1}, "len\\(loader\\)"),
        ({"temperature": 0.0}, "temperature"),
        ({"mse_weight": -1.0}, "mse_weight"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**options)


def test_steps_without_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="would be ignored"):
        IKLDistillationTask(Net(1), Net(2), class_weights=False, steps_per_epoch=3, verbose=False)


def test_several_processes_must_know_where_epochs_end() -> None:
    with pytest.raises(ValueError, match="before a checkpoint is written"):
        make_task(steps_per_epoch=None).prepare_distributed()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    reports = two_processes("timm", tmp_path)
    alone = IKLDistillationTask(PlainNet(1), PlainNet(2), steps_per_epoch=2, verbose=False)
    epochs(alone, optimizer_of(alone), range(3))
    for report in reports:
        torch.testing.assert_close(report["table"], alone.distillation.statistics.table)
        for name, value in alone.trainable_module.state_dict().items():
            torch.testing.assert_close(report["student"][name], value)
