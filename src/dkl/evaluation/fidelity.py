"""How closely a student follows its teacher, apart from how right either is.

Shapes: N samples, C classes.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dkl.evaluation.accuracy import predict_logits


@dataclass(frozen=True)
class Fidelity:
    """What a student has of its teacher.

    Args:
        agreement: share of samples for which both predict the same class, from 0 to 1.
        kl: mean KL divergence of the student's prediction from the teacher's, in nats.
    """

    agreement: float
    kl: float


def fidelity(student_logits: Tensor, teacher_logits: Tensor) -> Fidelity:
    r"""Compare the predictions of a student and its teacher.

    .. math:: \frac{1}{N} \sum_i [\arg\max z_i = \arg\max t_i], \quad
              \frac{1}{N} \sum_i \sum_j p_{ij} (\log p_{ij} - \log q_{ij})

    with p = softmax(t) of the teacher and q = softmax(z) of the student, at temperature 1 (Stanton
    et al., "Does Knowledge Distillation Really Work?", NeurIPS 2021: average top-1 agreement and
    average predictive KL). A student may be accurate without either, and the KL divergence sees
    what the agreement does not: how the teacher divides what it leaves to other classes.

    Args:
        student_logits: [N, C] floating point, finite.
        teacher_logits: logits of the teacher for the same samples, of the same shape.

    Returns:
        Agreement and KL divergence.

    Raises:
        ValueError: shapes that do not fit, no samples, or logits that are not finite.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
        >>> student = torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log()
        >>> found = fidelity(student, teacher)
        >>> found.agreement, round(found.kl, 4)
        (0.5, 0.1674)
    """
    _check(student_logits, teacher_logits)
    log_q_NC = F.log_softmax(student_logits.detach().double(), dim=1)
    log_p_NC = F.log_softmax(teacher_logits.detach().to(log_q_NC), dim=1)
    same_N = student_logits.argmax(dim=1) == teacher_logits.to(student_logits.device).argmax(dim=1)
    kl_N = (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(dim=1)
    # Rounding can leave equal predictions a trifle below 0.
    return Fidelity(float(same_N.double().mean()), max(0.0, float(kl_N.mean())))


def model_fidelity(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    batch_size: int = 256,
    distributed: bool = False,
) -> Fidelity:
    """Compare the predictions of two models for the same images; see ``fidelity``.

    Args:
        student: returns logits [N, C]; its mode is restored afterwards.
        teacher: likewise, of the same classes.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        batch_size: images per forward pass.
        distributed: see ``predict_logits``.

    Returns:
        Agreement and KL divergence.

    Raises:
        ValueError: images or outputs that do not fit.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> model_fidelity(model, model, torch.zeros(5, 1, 2, 2))
        Fidelity(agreement=1.0, kl=0.0)
    """
    student_NC, teacher_NC = (
        predict_logits(model, images, batch_size=batch_size, distributed=distributed)
        for model in (student, teacher)
    )
    return fidelity(student_NC, teacher_NC)


def _check(student_NC: Tensor, teacher_NC: Tensor) -> None:
    if student_NC.ndim != 2 or student_NC.shape != teacher_NC.shape or len(student_NC) == 0:
        raise ValueError(
            "fidelity compares logits [N, C] of the same samples and classes, N >= 1: the "
            f"student's are {list(student_NC.shape)}, the teacher's {list(teacher_NC.shape)}."
        )
    for who, logits_NC in (("student", student_NC), ("teacher", teacher_NC)):
        if not logits_NC.is_floating_point():
            raise ValueError(f"logits of the {who} must be floating point, got {logits_NC.dtype}.")
        if not bool(logits_NC.isfinite().all()):
            raise ValueError(
                f"logits of the {who} hold NaN or infinity. Check its weights (did training "
                "diverge?) and the normalisation."
            )
