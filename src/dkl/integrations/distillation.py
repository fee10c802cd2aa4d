"""The distillation loss that every integration holds: IKL or GKL with its class table.

Shapes: B samples, C classes.
"""

from typing import Any

from torch import Tensor, nn

from dkl.losses import ClassStatistics, GKLLoss, IKLLoss
from dkl.losses.rows import NO_LABEL


class DistillationLoss(nn.Module):
    r"""Compare a student's logits with those of a fixed teacher: IKL, or GKL where gamma is given.

    .. math:: \mathrm{IKL}(input = student, target = S(teacher))

    (equation 7 of arXiv 2305.13948, S the stop-gradient). With ``class_weights`` the weights of a
    sample are the row of its label in a class table, or the mixture of rows for soft labels
    (mixup, label smoothing); ``observe`` collects the teacher's predictions for the next table.
    No factor T^2.

    Keep it outside a module that DistributedDataParallel wraps, as ``ClassStatistics`` asks.

    Args:
        num_classes: C.
        class_weights: class-wise global information (GI); False: weights softmax(teacher / tau).
        weight_temperature: tau > 0 of the table, or of the teacher's softmax.
        gamma: power of the weights >= 0, which makes it GKL; None for IKL.
        options: ``mse_weight``, ``ce_weight``, ``temperature`` and whatever else ``ikl_loss`` takes
            when it is made.

    Raises:
        ValueError: options that do not fit.

    Example:
        >>> import torch
        >>> loss = DistillationLoss(num_classes=10, mse_weight=8.0, temperature=4.0)
        >>> student, teacher, labels = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
        >>> loss(student, teacher, labels).shape
        torch.Size([])
        >>> loss.observe(teacher, labels)
        >>> loss.commit()  # at the end of the epoch
    """

    statistics: ClassStatistics | None

    def __init__(
        self,
        num_classes: int,
        *,
        class_weights: bool = True,
        weight_temperature: float = 1.0,
        gamma: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.statistics = None
        if class_weights:
            self.statistics = ClassStatistics(num_classes, weight_temperature)
        else:
            options["weight_temperature"] = weight_temperature
        self.loss = IKLLoss(**options) if gamma is None else GKLLoss(gamma=gamma, **options)

    def forward(
        self,
        student_BC: Tensor,
        teacher_BC: Tensor,
        labels: Tensor,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss; gradients reach the student alone.

        Args:
            student_BC: logits of the student.
            teacher_BC: logits of the teacher.
            labels: [B] integers in [0, C), ``-100`` where a sample does not count; or [B, C] soft
                labels.
            num_items: samples of the whole optimizer step, of which these are a share: the shares
                of a step then add up to its mean (for GKL: of the micro-batches' values).
        """
        soft = labels.is_floating_point()
        weights: dict[str, Tensor] = {} if soft else {"labels": labels}
        if self.statistics is not None and soft:
            weights["class_probs"] = self.statistics.rows(labels)
        elif self.statistics is not None:
            weights["class_table"] = self.statistics.table
        loss: Tensor = self.loss(student_BC, teacher_BC.detach(), **weights)
        if num_items is None:
            return loss
        counted = labels.shape[0] if soft else (labels != NO_LABEL).sum()
        return loss * (counted / num_items)

    def observe(self, teacher_BC: Tensor, labels: Tensor) -> None:
        """Add the teacher's predictions of a training batch to the next class table; local."""
        if self.statistics is not None:
            self.statistics.update(teacher_BC, labels)

    def commit(self) -> None:
        """Publish the epoch's class table; collective, so call it in every process."""
        if self.statistics is not None:
            self.statistics.commit()


def freeze(teacher: nn.Module) -> nn.Module:
    """Return the teacher in eval mode, its parameters without gradients."""
    return teacher.eval().requires_grad_(False)
