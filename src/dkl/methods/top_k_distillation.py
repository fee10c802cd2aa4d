"""KD and IKL-KD from a teacher's k most likely classes and one bucket for all others.

Teacher and student are both compared on k + 1 buckets: the listed classes, and the rest. That is
exact for these buckets at the cached temperature, and the method of all classes where k = C. How a
student spreads its probability over the classes of the rest is left to the labels.

Shapes: B samples, k listed classes.
"""

from typing import Any

import torch
from torch import Tensor

from dkl.losses import top_k_ikl_loss
from dkl.methods.cached_teacher import CachedTopKTeacher
from dkl.methods.logit_distillation import LogitDistillation
from dkl.methods.protocol import Batch, StepContext


def top_k_kd(
    teacher: CachedTopKTeacher,
    *,
    hard_weight: float = 0.1,
    soft_weight: float = 0.9,
    **options: Any,
) -> LogitDistillation:
    """Build knowledge distillation on buckets: hard loss + soft_weight T^2 KL(teacher, student).

    The divergence of the buckets is at most that of all classes.

    Args:
        teacher: its cached answers; T is theirs.
        hard_weight: weight of the loss against the labels.
        soft_weight: weight of T^2 KL.
        options: ``hard_loss`` and ``warmup_epochs`` of ``LogitDistillation``.

    Returns:
        The method.
    """
    temperature = teacher.temperature

    def soft(student_BC: Tensor, listed_Bk: Tensor, batch: Batch, context: StepContext) -> Tensor:
        rest_B = batch.extras["teacher_rest"]
        cross_entropy: Tensor = top_k_ikl_loss(
            student_BC,
            listed_Bk,
            batch.extras["teacher_classes"],
            target_tail_log_prob=rest_B,
            temperature=temperature,
            mse_weight=0.0,
            mask=batch.mask,
            reduction="sum",
        )
        # What no gradient reaches, so that the loss is zero where the student is the teacher.
        probs = torch.softmax(torch.cat([listed_Bk, rest_B[:, None]], 1), 1)
        entropy_B = torch.special.entr(probs).sum(1).masked_fill(~batch.mask, 0.0)
        divergence = cross_entropy - entropy_B.sum()
        share: Tensor = soft_weight * temperature**2 * divergence / context.num_items
        return share

    return LogitDistillation(teacher, soft, hard_weight=hard_weight, **options)


def top_k_ikl_kd(
    teacher: CachedTopKTeacher,
    *,
    mse_weight: float = 1.0,
    ce_weight: float = 1.0,
    weight_temperature: float = 1.0,
    **options: Any,
) -> LogitDistillation:
    """Build IKL-KD on buckets: hard loss + ``top_k_ikl_loss``, weights of the teacher's own rows.

    Args:
        teacher: its cached answers; the temperature is theirs.
        mse_weight: weight of the weighted mean squared error.
        ce_weight: weight of the soft cross-entropy.
        weight_temperature: tau of the weights softmax(teacher / tau) over the buckets.
        options: ``hard_weight``, ``hard_loss`` and ``warmup_epochs`` of ``LogitDistillation``.

    Returns:
        The method. It has no class table: the rest is another set of classes in every row.
    """

    def soft(student_BC: Tensor, listed_Bk: Tensor, batch: Batch, context: StepContext) -> Tensor:
        value: Tensor = top_k_ikl_loss(
            student_BC,
            listed_Bk,
            batch.extras["teacher_classes"],
            target_tail_log_prob=batch.extras["teacher_rest"],
            temperature=teacher.temperature,
            mse_weight=mse_weight,
            ce_weight=ce_weight,
            weight_temperature=weight_temperature,
            mask=batch.mask,
            reduction="sum",
        )
        return value / context.num_items

    return LogitDistillation(teacher, soft, **options)
