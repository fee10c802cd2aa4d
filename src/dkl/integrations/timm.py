"""IKL distillation as a training task of timm.

Shapes: B samples, C classes.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dkl.integrations.distillation import DistillationLoss, freeze

try:
    from timm.task import LogitDistillationTask
    from timm.utils.model import unwrap_model
except ImportError as error:
    raise ImportError(
        'dkl.integrations.timm needs the tasks of timm >= 1.0.31: pip install "dkl[timm]"'
    ) from error

_STATE = "class_statistics"


class IKLDistillationTask(LogitDistillationTask):
    r"""Train a student on labels and on a teacher's logits with IKL, or with GKL where gamma is.

    .. math:: task\_weight\, criterion(student, target) + distill\_weight\,
        \mathrm{IKL}(input = student, target = teacher)

    with timm's two weights, in timm's ways to give them. It goes where timm's own
    ``LogitDistillationTask`` goes. The teacher's logits on the augmented batch feed the class
    statistics; mixed or smoothed targets [B, C] count by shares. The statistics lie outside the
    student that DistributedDataParallel wraps, and travel in timm's task state.

    Args:
        student_model: the model to train; ``num_classes`` and ``pretrained_cfg`` as timm has them.
        teacher_model: a name of timm, a module or a ``DistillationTeacher``.
        criterion: the loss with the targets; timm makes one from ``criterion_kwargs`` if None.
        mse_weight: a >= 0, of the weighted MSE.
        ce_weight: b >= 0, of the soft cross-entropy.
        temperature: T > 0 of the soft cross-entropy. No factor T^2, unlike timm's KL.
        weight_temperature: tau > 0 of the class table, or of the teacher's softmax.
        class_weights: class-wise global information (GI); False: weights softmax(teacher / tau).
        gamma: power of the weights, for GKL, whose denominator is that of the batch at hand.
        steps_per_epoch: ``len(loader)``: the table is committed after so many training batches. 0:
            you call ``commit()``. None: ``task.train()`` commits what was collected, for loops
            that call it when an epoch starts; for one process only.
        loss_type: "ikl"; "kl", which timm's train script always passes, means the same here.
        task_options: the other arguments of timm's task (``distill_loss_weight``,
            ``task_loss_weight``, ``criterion_kwargs``, ``device``, ``dtype``, ``verbose``, ...).

    Raises:
        ValueError: options that do not fit or would be ignored.

    Example:
        >>> import timm
        >>> student, teacher = (timm.create_model("test_resnet", num_classes=10) for _ in range(2))
        >>> task = IKLDistillationTask(
        ...     student, teacher, nn.CrossEntropyLoss(), steps_per_epoch=100, verbose=False
        ... )
        >>> sorted(task(torch.rand(2, 3, 32, 32), torch.tensor([3, 5])))
        ['kd_loss', 'loss', 'output', 'task_loss']
    """

    student_mean: Tensor
    student_std: Tensor

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: Any,
        criterion: nn.Module | None = None,
        *,
        mse_weight: float = 1.0,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        class_weights: bool = True,
        gamma: float | None = None,
        steps_per_epoch: int | None = None,
        loss_type: str = "ikl",
        **task_options: Any,
    ) -> None:
        if loss_type not in ("ikl", "kl"):
            raise ValueError(
                f"loss_type must be 'ikl' (or 'kl', the script's word), got {loss_type!r}"
            )
        if steps_per_epoch is not None and not class_weights:
            raise ValueError("steps_per_epoch would be ignored: class_weights=False has no table")
        if steps_per_epoch is not None and steps_per_epoch < 0:
            raise ValueError(f"steps_per_epoch must be len(loader), or 0; got {steps_per_epoch}")
        super().__init__(
            student_model, teacher_model, criterion, temperature=temperature, **task_options
        )
        freeze(self.teacher)
        self.loss_type = "ikl" if gamma is None else "gkl"
        self.distillation = DistillationLoss(
            unwrap_model(student_model).num_classes,  # type: ignore[no-untyped-call]
            class_weights=class_weights,
            weight_temperature=weight_temperature,
            gamma=gamma,
            mse_weight=mse_weight,
            ce_weight=ce_weight,
            temperature=temperature,
        ).to(self.device)
        self.steps_per_epoch = steps_per_epoch
        self._steps = 0
        self._told_of_epochs = not class_weights or steps_per_epoch is not None

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return timm's ``loss``, ``output``, ``task_loss`` and ``kd_loss`` of a batch.

        Args:
            input: images, normalised for the student.
            target: [B] labels, or [B, C] mixed or smoothed ones.
        """
        student_BC = self.trainable_module(input)
        teacher_BC = self._ask_teacher(input)
        terms = {
            "task_loss": self.criterion(student_BC, target),
            "kd_loss": self.distillation(student_BC, teacher_BC, target),
        }
        # timm's script sets the mode of the student alone.
        if unwrap_model(self.trainable_module).training:  # type: ignore[no-untyped-call]
            self._observe(teacher_BC, target)
        loss = self.task_loss_weight * terms["task_loss"]
        loss = loss + self.distill_loss_weight * terms["kd_loss"]
        return {"loss": loss, "output": student_BC, **terms}

    @torch.no_grad()
    def _ask_teacher(self, input: Tensor) -> Tensor:
        seen = self.teacher.normalize_input(input, self.student_mean, self.student_std)
        logits_BC: Tensor = self.teacher(seen)
        return logits_BC

    def _observe(self, teacher_BC: Tensor, target: Tensor) -> None:
        if not self._told_of_epochs:
            self._told_of_epochs = True
            warnings.warn(
                "the class table stays uniform until someone says where epochs end: pass "
                "steps_per_epoch=len(loader), or call task.train() when an epoch starts, or "
                "task.commit() when it ends",
                stacklevel=3,
            )
        self.distillation.observe(teacher_BC, target)
        self._steps += 1
        if self._steps == self.steps_per_epoch:
            self.commit()

    def commit(self) -> None:
        """Publish the class table of the epoch that ends; collective, in every process."""
        self.distillation.commit()
        self._steps = 0

    def train(self, mode: bool = True) -> "IKLDistillationTask":
        """Set the student's mode, the teacher stays in eval; may commit (``steps_per_epoch``)."""
        super().train(mode)
        if mode and self.steps_per_epoch is None:
            self._told_of_epochs = True
            if self._steps:
                self.commit()
        return self

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> "IKLDistillationTask":
        """Wrap the student in DistributedDataParallel; teacher and statistics stay outside.

        Raises:
            ValueError: the table would be committed after the first process saved its part alone.
        """
        if self.distillation.statistics is not None and self.steps_per_epoch is None:
            raise ValueError(
                "in several processes the class table must be committed before a checkpoint is "
                "written: pass steps_per_epoch=len(loader), or 0 and call task.commit() in every "
                "process at the end of an epoch"
            )
        super().prepare_distributed(device_ids, **ddp_kwargs)
        return self

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the class statistics for a checkpoint; averaged weights have none of their own."""
        state: dict[str, Any] = super().get_task_state(module, ema)
        if not ema and self.distillation.statistics is not None:
            state = {**state, _STATE: self.distillation.statistics.state_dict()}
        return state

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the class statistics; timm resumes where an epoch starts, and so does the count.

        Raises:
            RuntimeError: strict, and the state is of a task with other class weights.
        """
        super().load_task_state(state, strict, module, ema)
        statistics = self.distillation.statistics
        if ema or (statistics is None and not state):
            return
        if statistics is None or not state or _STATE not in state:
            has, lacks = ("task", "checkpoint") if statistics else ("checkpoint", "task")
            message = f"the {has} has class statistics and the {lacks} has none"
            if state and strict:
                raise RuntimeError(f"{message}; give the task the class_weights it was saved with")
            if statistics is not None:
                warnings.warn(f"{message}: the class table starts uniform", stacklevel=2)
            return
        statistics.load_state_dict(state[_STATE])
        collected = self.steps_per_epoch is None and bool(statistics.counts.any())
        self._steps = int(collected)
