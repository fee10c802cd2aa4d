"""IKLDistillationTrainer: hand-made values, exact accumulation, and resumed runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.integrations.distillation import DistillationLoss
from dkl.losses import ikl_loss
from tests.integrations.tiny import (
    NUM_CLASSES,
    PlainNet,
    data,
    mean_table,
    mixed,
    some_table,
    two_processes,
)

pytest.importorskip("transformers")

from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from dkl.integrations.transformers import STATISTICS_FILE, IKLDistillationTrainer

NUM_SAMPLES = 24
OPTIONS = {"mse_weight": 0.5, "temperature": 2.0}


class HubModel(PlainNet):
    """A model with the arguments and the output of Hugging Face's."""

    accepts_loss_kwargs = True

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return logits, and the loss where there are labels."""
        logits = super().forward(pixel_values)
        if labels is None:
            return {"logits": logits}
        if labels.is_floating_point():
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}
        loss = F.cross_entropy(logits, labels, reduction="sum")
        num_items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / num_items, "logits": logits}


class OldHubModel(HubModel):
    """One that takes no part in exact accumulation."""

    accepts_loss_kwargs = False


def tiny_vit() -> nn.Module:
    """Return a model of the library itself, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return ViTForImageClassification(
        ViTConfig(
            image_size=2, patch_size=1, num_attention_heads=2, num_labels=NUM_CLASSES, **sizes
        )
    )


def samples(num_samples: int = NUM_SAMPLES, skip: int | None = None) -> list[dict[str, Any]]:
    images, labels = data(num_samples)
    if skip is not None:
        labels[:skip] = -100
    pairs = zip(images, labels.tolist(), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


class InOrder(IKLDistillationTrainer):
    """Hands out the samples as they come, whatever the batch size."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_trainer(
    folder: Path,
    *,
    model: nn.Module | None = None,
    loss: DistillationLoss | None = None,
    train: list[dict[str, Any]] | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    **options: Any,
) -> IKLDistillationTrainer:
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        **options,
    }
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    return InOrder(
        HubModel(1) if model is None else model,
        arguments,
        teacher=HubModel(2),
        loss=DistillationLoss(NUM_CLASSES, **OPTIONS) if loss is None else loss,
        task_weight=weights[0],
        distill_weight=weights[1],
        train_dataset=samples() if train is None else train,
    )


def same_run(ours: IKLDistillationTrainer, expected: IKLDistillationTrainer, **limits: Any) -> None:
    for name in ("model", "distillation"):
        states = getattr(expected, name).state_dict()
        for key, value in getattr(ours, name).state_dict().items():
            torch.testing.assert_close(value, states[key], **limits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_is_the_loss_made_by_hand_and_gradients_reach_the_student_alone(
    smoothing: float, tmp_path: Path
) -> None:
    options = {"weights": (0.25, 0.5), "label_smoothing_factor": smoothing}
    trainer = make_trainer(tmp_path, model=tiny_vit(), **options)
    trainer.distillation.statistics.table.copy_(some_table())
    images, labels = data(8)
    inputs = {"pixel_values": images, "labels": labels}
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    assert set(inputs) == {"pixel_values", "labels"}
    with torch.no_grad():
        student, teacher = (m(images)["logits"] for m in (trainer.model, trainer.teacher))
    task = F.cross_entropy(student, labels, label_smoothing=smoothing)
    distill = ikl_loss(student, teacher, some_table()[labels], **OPTIONS)
    torch.testing.assert_close(loss, 0.25 * task + 0.5 * distill)
    loss.backward()
    assert trainer.model.classifier.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher.parameters())
    assert not trainer.teacher.training


def test_evaluation_reports_the_task_alone_and_feeds_no_statistics(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    images, labels = data(NUM_SAMPLES)
    expected = F.cross_entropy(trainer.model(images)["logits"], labels).item()
    metrics = trainer.evaluate(samples())
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert not trainer.distillation.statistics.counts.any()


def test_table_is_committed_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    images, labels = data(NUM_SAMPLES)
    with torch.no_grad():
        expected = mean_table(trainer.teacher(images)["logits"], labels)
    torch.testing.assert_close(trainer.distillation.statistics.table, expected)
    assert not trainer.distillation.statistics.counts.any()


@pytest.mark.parametrize("skip", [None, 3])
def test_accumulated_batches_equal_whole_ones(skip: int | None, tmp_path: Path) -> None:
    train = samples(20, skip)  # the last step is a smaller one, in whole and in parts
    whole = make_trainer(tmp_path, train=train)
    whole.train()
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = make_trainer(tmp_path, train=train, **parts)
    accumulated.train()
    same_run(accumulated, whole, rtol=1e-4, atol=1e-5)


def test_models_that_know_no_item_count_are_accumulated_by_the_trainer(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, model=OldHubModel(1))
    whole.train()
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = make_trainer(tmp_path, model=OldHubModel(1), **parts)
    accumulated.train()
    same_run(accumulated, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "step"), [("epoch", 6), ("steps", 6), ("steps", 4)], ids=["epoch", "last", "mid"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    strategy: str, step: int, tmp_path: Path
) -> None:
    saving = {"save_strategy": strategy, "save_steps": 2, "num_train_epochs": 4}
    straight = make_trainer(tmp_path, **saving)
    straight.train()
    resumed = make_trainer(tmp_path / "again", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    same_run(resumed, straight, rtol=0, atol=0)
    assert not torch.equal(resumed.distillation.statistics.table, torch.full((4, 4), 0.25))


def test_resuming_finds_the_last_checkpoint(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="epoch", num_train_epochs=2).train()
    straight = make_trainer(tmp_path / "straight", num_train_epochs=3)
    straight.train()
    resumed = make_trainer(tmp_path, num_train_epochs=3)
    resumed.train(resume_from_checkpoint=True)
    same_run(resumed, straight, rtol=0, atol=0)
    (tmp_path / "checkpoint-6" / STATISTICS_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {STATISTICS_FILE}"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_sample_wise_weights_save_no_table(tmp_path: Path) -> None:
    loss = DistillationLoss(NUM_CLASSES, class_weights=False, weight_temperature=100.0)
    options = {"save_strategy": "epoch", "num_train_epochs": 1}
    make_trainer(tmp_path, loss=loss, **options).train()
    assert not (tmp_path / "checkpoint-3" / STATISTICS_FILE).exists()
    make_trainer(tmp_path, loss=loss, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("labels", ["soft", "none"])
def test_labels_that_do_not_fit(labels: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    images, hard = data(8)
    inputs = {"pixel_values": images, "labels": mixed(hard)}
    if labels == "none":
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs[
            "logits"
        ].sum()
        del inputs["labels"]
    with pytest.raises(ValueError, match="one integer per sample"):
        trainer.compute_loss(trainer.model.train(), inputs)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    reports = two_processes("transformers", tmp_path)
    alone = make_trainer(tmp_path)
    alone.train()
    for report in reports:
        torch.testing.assert_close(report["table"], alone.distillation.statistics.table)
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(report["student"][name], value)
    saved = torch.load(tmp_path / "checkpoint-5" / STATISTICS_FILE, weights_only=True)
    assert saved["counts"].sum() == 16, "the samples of both processes in two steps of the epoch"
