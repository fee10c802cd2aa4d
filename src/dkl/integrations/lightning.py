"""IKL distillation in Lightning: a callback for the class statistics, and a module that has it.

Shapes: B samples, C classes.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.integrations.distillation import DistillationLoss, freeze
from dkl.losses import ClassStatistics

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise ImportError(
        'dkl.integrations.lightning needs lightning: pip install "dkl[lightning]"'
    ) from error

_STATE = "dkl_class_statistics"


class ClassStatisticsCallback(Callback):
    """Commit class statistics at the end of every training epoch, save them and load them.

    Your ``training_step`` calls ``statistics.update``. Keep the statistics out of the attributes
    that Lightning registers as submodules, since DistributedDataParallel would broadcast their
    buffers (``object.__setattr__`` does, as in ``DistillationModule``). In several processes
    commits and checkpoints reduce them; samples that a distributed sampler repeats to make the
    shares equal count twice.

    Args:
        statistics: the ones to look after.
    """

    def __init__(self, statistics: ClassStatistics) -> None:
        self.statistics = statistics

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Move the statistics to the module's device, and to no other dtype."""
        self.statistics.to(pl_module.device)

    def on_train_epoch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
    ) -> None:
        """Publish the epoch's class table; collective."""
        self.statistics.commit()

    def on_save_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Put the statistics of all processes into the checkpoint; collective."""
        saved = copy.deepcopy(self.statistics)
        saved.consolidate()
        checkpoint[_STATE] = saved.state_dict()

    def on_load_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Load the statistics.

        Raises:
            ValueError: training resumes from a checkpoint without them.
        """
        if _STATE in checkpoint:
            self.statistics.load_state_dict(checkpoint[_STATE])
        elif trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                "the checkpoint has no class statistics, so the table would start uniform again; "
                "it was written without ClassStatisticsCallback. To start from its weights alone "
                "load them yourself and call fit without ckpt_path"
            )


class DistillationModule(LightningModule):
    r"""Train a student on labels and on a frozen teacher's logits with IKL or GKL.

    .. math:: task\_weight\, CE(student, labels) + distill\_weight\, loss(student, teacher, labels)

    Batches are (images, labels), labels [B] or mixed [B, C]. The teacher and the loss are no
    submodules: no checkpoint copies the teacher and no process broadcasts the statistics. It brings
    its own ``ClassStatisticsCallback``.

    Args:
        student: the model to train; images in, logits [B, C] out.
        teacher: a trained model of the same form. It is put into eval mode and frozen.
        loss: the loss against the teacher, with its class statistics.
        optimizer: from the student's parameters to what Lightning's ``configure_optimizers`` may
            return: an optimizer, or a dict with a scheduler.
        task_weight: weight of the cross-entropy with the labels.
        distill_weight: weight of the loss against the teacher.

    Example:
        >>> from functools import partial
        >>> module = DistillationModule(
        ...     nn.Linear(8, 3), nn.Linear(8, 3), DistillationLoss(num_classes=3),
        ...     partial(torch.optim.SGD, lr=0.1),
        ... )
        >>> sorted(module.state_dict())
        ['student.bias', 'student.weight']
    """

    student: nn.Module
    teacher: nn.Module
    loss: DistillationLoss

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: DistillationLoss,
        optimizer: Callable[[Iterator[nn.Parameter]], Any],
        *,
        task_weight: float = 1.0,
        distill_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = student
        object.__setattr__(self, "teacher", freeze(teacher))
        object.__setattr__(self, "loss", loss)
        self.make_optimizer = optimizer
        self.task_weight = task_weight
        self.distill_weight = distill_weight

    def forward(self, images: Tensor) -> Tensor:
        """Return the student's logits [B, C]."""
        logits_BC: Tensor = self.student(images)
        return logits_BC

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch, log its terms, and feed the class statistics."""
        images, labels = batch
        student_BC = self.student(images)
        with torch.no_grad():
            teacher_BC = self.teacher(images)
        terms = {
            "train_task_loss": F.cross_entropy(student_BC, labels),
            "train_distill_loss": self.loss(student_BC, teacher_BC, labels),
        }
        self.log_dict(terms)
        self.loss.observe(teacher_BC, labels)
        task, distill = terms.values()
        loss: Tensor = self.task_weight * task + self.distill_weight * distill
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Log ``val_loss`` and ``val_accuracy`` of the student."""
        images, labels = batch
        logits_BC = self.student(images)
        accuracy = (logits_BC.argmax(1) == labels).float().mean()
        values = {"val_loss": F.cross_entropy(logits_BC, labels), "val_accuracy": accuracy}
        self.log_dict(values, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return what the given function makes of the student's parameters."""
        return self.make_optimizer(self.student.parameters())

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback of the class statistics, when the loss has some."""
        statistics = self.loss.statistics
        return [] if statistics is None else [ClassStatisticsCallback(statistics)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationModule":
        # What .to(), .double() and .cuda() call: the teacher follows, though it is no submodule.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
