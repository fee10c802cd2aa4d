"""CRD: embeddings of student and teacher agree on a sample and differ on other classes.

Source: Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020 (arXiv
1910.10699). Shapes: N training samples, B samples, D features, K negatives.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dkl.attacks import attack_mode
from dkl.losses import crd_log_normalizer, crd_loss
from dkl.losses.chunks import without_autocast
from dkl.losses.rows import check_number, compute_dtype
from dkl.losses.samples import unit_vectors
from dkl.methods.features import FeaturePair, Features
from dkl.methods.memory_bank import MemoryBanks, OtherClasses
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import (
    FrozenTeacher,
    HardLoss,
    TrainingMethod,
    hard_loss_of,
    step_output,
    warmup_factor,
)


class ContrastiveDistillation(TrainingMethod):
    """Train a student on labels and on contrasting its pooled features with the teacher's.

    Both networks' pooled features are embedded by a linear layer each, which are trained along, and
    brought to length one. The anchors of one network are compared with the rows of the other one's
    memory bank: their own, and those of K samples of other classes. The normalisers Z are N times
    the mean of exp(u'v / T) over the first optimiser step, all its micro-batches and processes, and
    stay. Banks are renewed between steps. So a split step gives the trajectory of a whole one.

    Memory: banks of 8 N D bytes (51 MB for CIFAR with D = 128, 1.3 GB for ImageNet), which
    checkpoints hold; inner products with a whole bank, 4 B N bytes, or gathered rows, 4 B K D,
    whichever is less; and twice 8 B K bytes of positions.

    Args:
        teacher: a trained model; it stays in eval mode and gets no gradients.
        pair: how features are read, and their sizes.
        labels_N: labels of all training samples; ``Batch.indices`` are positions in them, modulo N.
        weight: weight of the sum of both contrastive losses.
        num_features: D.
        num_negatives: K, drawn for each sample and step with replacement.
        temperature: T > 0.
        momentum: share of a bank's row that an update keeps, in [0, 1).
        hard_weight: weight of the loss against the labels.
        hard_loss: that loss, "ce" or "bce"; see ``hard_loss_of``.
        warmup_epochs: the contrastive loss grows linearly over these epochs; 0: none.

    Raises:
        ValueError: numbers out of range, or training samples of one class only.
    """

    log_normalizers: Tensor
    is_normalized: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        pair: FeaturePair,
        labels_N: Tensor,
        *,
        weight: float = 0.8,
        num_features: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        hard_weight: float = 1.0,
        hard_loss: HardLoss = "ce",
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        check_number("weight", weight)
        check_number("hard_weight", hard_weight)
        check_number("temperature", temperature, positive=True)
        if num_features < 1 or num_negatives < 1 or not 0 <= momentum < 1:
            raise ValueError(
                "num_features and num_negatives must be at least 1 and momentum in [0, 1), got "
                f"{num_features}, {num_negatives} and {momentum}"
            )
        self.teacher = FrozenTeacher(teacher)
        self.pair = pair
        self.student_embedding = nn.Linear(pair.student.num_features, num_features)
        self.teacher_embedding = nn.Linear(pair.teacher.num_features, num_features)
        self.banks = MemoryBanks(len(labels_N), num_features, momentum)
        self.others = OtherClasses(labels_N.cpu(), num_negatives)
        self.register_buffer("log_normalizers", torch.zeros(2))
        self.register_buffer("is_normalized", torch.tensor(False))
        self.weight = weight
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.hard_loss = hard_loss
        self.warmup_epochs = warmup_epochs
        self._knows_normalizers = False
        self._step: int | None = None
        self._first_means: list[tuple[Tensor, Tensor]] = []

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Ask the teacher, draw negatives, and renew the banks when a new step begins."""
        if context.step != self._step:
            self._step = context.step
            self.banks.commit()
        features: Features = self.teacher.read(batch.images, self.pair.read_teacher)
        extras = {
            "teacher_pooled": features.pooled,
            "contrast": self.others(batch.labels, context.draw),
        }
        prepared = replace(batch, extras={**batch.extras, **extras})
        if self._needs_normalizers():
            self._look_first(model, prepared)
        return prepared

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the loss against the labels and the contrastive losses of both networks."""
        if batch.targets is not None:
            raise ValueError(
                "the memory banks of CRD hold whole images, and this batch mixes images: leave "
                "mixup and CutMix out"
            )
        if self._needs_normalizers():
            self._settle()
        features: Features = self.pair.read_student(model, batch.images)
        student_BD, teacher_BD = self._embeddings(features.pooled, batch)
        options = {**self._options(batch), "num_items": context.num_items}
        of_student, of_teacher = (
            crd_loss(*compared, log_normalizer=log_z, **options)
            for compared, log_z in zip(
                self._compared(student_BD, teacher_BD, batch), self.log_normalizers, strict=True
            )
        )
        if context.phase == "update":
            self.banks.add(self._rows(batch), student_BD, teacher_BD, batch.mask)
        factor = self.weight * warmup_factor(context, self.warmup_epochs)
        hard = hard_loss_of(features.logits, batch, context, self.hard_loss)
        terms = {
            f"hard_{self.hard_loss}": self.hard_weight * hard,
            "contrast": factor * (of_student + of_teacher),
        }
        return step_output(terms, features.logits, batch, context)

    def on_epoch_end(self, epoch: int) -> None:
        """Renew the banks; collective."""
        super().on_epoch_end(epoch)
        self.banks.commit()

    def consolidate(self) -> None:
        """Renew the banks, which the next step would do; collective."""
        self.banks.commit()

    def _rows(self, batch: Batch) -> Tensor:
        return batch.indices % len(self.others.order_N)

    def _embeddings(self, student_pooled: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the embeddings [B, D] of both networks, of length one."""
        dtype = compute_dtype(student_pooled)
        with without_autocast(student_pooled.device):
            return (
                unit_vectors(self.student_embedding(student_pooled.to(dtype))),
                unit_vectors(self.teacher_embedding(batch.extras["teacher_pooled"].to(dtype))),
            )

    def _compared(
        self, student_BD: Tensor, teacher_BD: Tensor, batch: Batch
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (anchors, the other network's rows of them, products with negatives) of both."""
        rows_B, contrast_BK = self._rows(batch), batch.extras["contrast"]
        anchors = ((student_BD, self.banks.teacher), (teacher_BD, self.banks.student))
        with without_autocast(student_BD.device):
            return [
                (anchor_BD, bank_ND[rows_B], _products(anchor_BD, bank_ND, contrast_BK))
                for anchor_BD, bank_ND in anchors
            ]

    def _options(self, batch: Batch) -> dict[str, Any]:
        return {
            "num_samples": len(self.others.order_N),
            "temperature": self.temperature,
            "mask": batch.mask,
        }

    def _needs_normalizers(self) -> bool:
        # A number of Python's, so that no later step waits for the device.
        self._knows_normalizers = self._knows_normalizers or bool(self.is_normalized)
        return not self._knows_normalizers

    @torch.no_grad()
    def _look_first(self, model: nn.Module, batch: Batch) -> None:
        """Take in a micro-batch of the first step for the normalisers, changing no statistics."""
        with attack_mode(model, "batch-stats"):
            features: Features = self.pair.read_student(model, batch.images)
            embeddings = self._embeddings(features.pooled, batch)
        log_z = [
            crd_log_normalizer(*compared, **self._options(batch))
            for compared in self._compared(*embeddings, batch)
        ]
        self._first_means.append((torch.stack(log_z), batch.mask.sum()))

    @torch.no_grad()
    def _settle(self) -> None:
        """Set the normalisers from all micro-batches and processes of the first step."""
        log_z_M2 = torch.stack([log_z for log_z, _ in self._first_means]).double()
        count_M = torch.stack([count for _, count in self._first_means]).double()
        self._first_means.clear()
        weighted_M3 = torch.cat([log_z_M2 + count_M.log()[:, None], count_M.log()[:, None]], 1)
        logs_3 = weighted_M3.logsumexp(0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [torch.empty_like(logs_3) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, logs_3)
            logs_3 = torch.stack(gathered).logsumexp(0)
        if not math.isfinite(float(logs_3.sum())):
            raise ValueError(
                "the embeddings of the first step are not finite, so CRD cannot normalise by them; "
                "look at the student's initialisation and the teacher's weights"
            )
        self.log_normalizers.copy_(logs_3[:2] - logs_3[2])
        self.is_normalized.fill_(True)


def _products(anchor_BD: Tensor, bank_ND: Tensor, contrast_BK: Tensor) -> Tensor:
    """Return the inner products [B, K] of anchors with rows of a bank, in the smaller way."""
    bank_ND = bank_ND.to(anchor_BD.dtype)
    if len(bank_ND) <= contrast_BK.shape[1] * anchor_BD.shape[1]:
        return (anchor_BD @ bank_ND.t()).gather(1, contrast_BK)
    return torch.einsum("bd,bkd->bk", anchor_BD, bank_ND[contrast_BK])


def crd(
    teacher: nn.Module, pair: FeaturePair, labels_N: Tensor, **options: Any
) -> ContrastiveDistillation:
    """Build CRD: hard loss + 0.8 (contrast of the student + contrast of the teacher).

    Args:
        teacher: a trained model.
        pair: how features are read.
        labels_N: labels of all training samples, in the order of the training data.
        options: of ``ContrastiveDistillation``.

    Returns:
        The method; its embeddings are trained along, its banks are buffers.

    Raises:
        ValueError: numbers out of range, or training samples of one class only.
    """
    return ContrastiveDistillation(teacher, pair, labels_N, **options)
