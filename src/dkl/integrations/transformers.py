"""IKL distillation with Hugging Face's Trainer, for image and sequence classification.

Shapes: B samples, C classes.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkl.integrations.distillation import DistillationLoss, freeze
from dkl.losses import ClassStatistics

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "dkl.integrations.transformers needs transformers and accelerate: pip install "
        '"dkl[transformers]"'
    ) from error

STATISTICS_FILE = "class_statistics.pt"


class ClassStatisticsCallback(TrainerCallback):
    """Commit class statistics at the end of every epoch, and save them beside each checkpoint.

    Args:
        statistics: the ones to look after; ``IKLDistillationTrainer`` adds this callback itself.
    """

    def __init__(self, statistics: ClassStatistics) -> None:
        self.statistics = statistics

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Publish the epoch's class table; collective."""
        self.statistics.commit()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the statistics of all processes into the checkpoint's folder; collective."""
        saved = copy.deepcopy(self.statistics)
        if float(state.epoch).is_integer():
            # A checkpoint of an epoch's last step is written before that epoch's end is announced,
            # and training resumes from it in the next one.
            saved.commit()
        else:
            saved.consolidate()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        unfinished = folder / f"{STATISTICS_FILE}.tmp"
        torch.save(saved.state_dict(), unfinished)
        unfinished.replace(folder / STATISTICS_FILE)


class IKLDistillationTrainer(Trainer):
    r"""Train a student on labels and on a frozen teacher's logits with IKL or GKL.

    .. math:: task\_weight\, L_{task} + distill\_weight\, loss(student, teacher, labels)

    The first term is what ``Trainer`` computes: the model's own loss, label smoothing, a
    ``compute_loss_func``. Gradient accumulation is exact for both (``num_items_in_batch``). The
    class statistics are committed at the end of an epoch, saved with every checkpoint and loaded by
    ``train(resume_from_checkpoint=...)``. Evaluation reports the task's loss alone. In several
    processes samples that Accelerate repeats to fill the last batch count twice in the table.

    Args:
        trainer_arguments: those of ``Trainer``.
        teacher: a trained model with the student's classes; takes the student's inputs without
            ``labels``. It is frozen and moved to the training device.
        loss: the loss against the teacher, with its class statistics.
        task_weight: weight of the task's loss.
        distill_weight: weight of the loss against the teacher.
        trainer_options: those of ``Trainer``.

    Raises:
        ValueError: several GPUs in one process (``DataParallel``), whose replicas would not share
            the loss; start one process per GPU with torchrun or ``accelerate launch``.
    """

    def __init__(
        self,
        *trainer_arguments: Any,
        teacher: nn.Module,
        loss: DistillationLoss,
        task_weight: float = 1.0,
        distill_weight: float = 1.0,
        **trainer_options: Any,
    ) -> None:
        super().__init__(*trainer_arguments, **trainer_options)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"IKLDistillationTrainer needs one process per GPU, got {self.args.n_gpu} GPUs in "
                "this one: start it with torchrun or accelerate launch, or show it one GPU"
            )
        self.teacher = freeze(teacher).to(self.args.device)
        self.distillation = loss.to(self.args.device)
        self.task_weight = task_weight
        self.distill_weight = distill_weight
        if loss.statistics is not None:
            self.add_callback(ClassStatisticsCallback(loss.statistics))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch as ``Trainer`` scales it, and feed the statistics.

        Raises:
            ValueError: labels that are no integers [B].
        """
        # Trainer's label smoothing takes the labels out of the dict that it is given.
        task_loss, outputs = super().compute_loss(
            model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if not model.training:
            return (task_loss, outputs) if return_outputs else task_loss
        student_BC = logits_of(outputs)
        labels = _checked_labels(inputs.get("labels"), student_BC)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_BC = logits_of(
                self.teacher(**{name: x for name, x in inputs.items() if name != "labels"})
            )
        distill_loss = self.distillation(student_BC, teacher_BC, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The items are then those of all processes, over which the gradients are averaged.
            distill_loss = distill_loss * (self.accelerator.num_processes // self.get_tp_size())
        self.distillation.observe(teacher_BC, labels)
        loss = self.task_weight * task_loss + self.distill_weight * distill_loss
        return (loss, outputs) if return_outputs else loss

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any
    ) -> Any:
        """Train as ``Trainer`` does; a resumed run takes the class statistics up again.

        Raises:
            ValueError: the checkpoint has no class statistics.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        statistics = self.distillation.statistics
        if folder and statistics is not None:
            path = Path(str(folder)) / STATISTICS_FILE
            if not path.is_file():
                raise ValueError(
                    f"{folder} has no {STATISTICS_FILE}, so the class table would start uniform "
                    "again; resume from a checkpoint that IKLDistillationTrainer finished writing"
                )
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            statistics.load_state_dict(state)
        return super().train(resume_from_checkpoint, *arguments, **options)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits [B, C] of a model's output: its ``logits``, or itself when a tensor."""
    logits_BC: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return logits_BC


def _checked_labels(labels: Any, logits_BC: Tensor) -> Tensor:
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        came = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else labels
        raise ValueError(
            "IKLDistillationTrainer needs inputs['labels'] with one integer per sample, as logits "
            f"{list(logits_BC.shape)} have; got {came}. Mixed labels (mixup) would miscount "
            "Trainer's num_items_in_batch: use timm, Lightning or a loop of your own for them"
        )
    return labels
