"""Memory banks of embeddings of all training samples, the same in every process.

Shapes: N training samples, D features of an embedding, B samples of a micro-batch, K negatives.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dkl.attacks import Draw
from dkl.losses.samples import unit_vectors

# One uniform number has 24 bits, too few to choose evenly among more samples than this.
_ONE_DRAW = 1 << 16
_COARSE = 1 << 20


class MemoryBanks(nn.Module):
    """The last embeddings of every training sample by both networks, 8 N D bytes in float32.

    An update moves rows towards new embeddings and brings them to length one:
    v := unit(momentum v + (1 - momentum) u). Updates of an optimiser step are held back until
    ``commit``, so that all its micro-batches read the same banks, and are gathered from all
    processes there: banks are equal everywhere, however a step is split.

    Args:
        num_samples: N.
        num_features: D.
        momentum: in [0, 1), the share that the old row keeps.
    """

    student: Tensor
    teacher: Tensor

    def __init__(self, num_samples: int, num_features: int, momentum: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(num_features / 3)
        for name in ("student", "teacher"):
            bank_ND = torch.empty(num_samples, num_features).uniform_(-bound, bound)
            self.register_buffer(name, bank_ND)
        self.momentum = momentum
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(
        self, indices_B: Tensor, student_BD: Tensor, teacher_BD: Tensor, mask_B: Tensor
    ) -> None:
        """Remember embeddings for ``commit``; rows whose mask is False do not count."""
        shares_B = mask_B.to(self.student.dtype)
        both_B2D = torch.stack([student_BD, teacher_BD], 1).to(self.student.dtype)
        # Filled, not multiplied: what does not count may be NaN.
        self._pending.append(
            (indices_B, both_B2D.masked_fill(~mask_B[:, None, None], 0.0), shares_B)
        )

    @torch.no_grad()
    def commit(self) -> None:
        """Move the rows of the samples that were added; collective."""
        if not self._pending:
            return
        indices, both, shares = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        indices, both, shares = (_of_all_processes(value) for value in (indices, both, shares))
        rows, places = torch.unique(indices, return_inverse=True)
        # A sample that came twice counts with its mean.
        count = shares.new_zeros(len(rows)).index_add_(0, places, shares)
        sums = both.new_zeros(len(rows), *both.shape[1:]).index_add_(0, places, both)
        new = sums / count.clamp(min=1)[:, None, None]
        for number, bank_ND in enumerate((self.student, self.teacher)):
            old = bank_ND[rows]
            moved = unit_vectors(torch.lerp(new[:, number], old, self.momentum))
            bank_ND[rows] = torch.where(count[:, None] > 0, moved, old)


class OtherClasses(nn.Module):
    """Draws training samples of other classes, evenly and with replacement.

    Args:
        labels_N: classes of the training samples, at least two of them.

    Raises:
        ValueError: all samples are of one class.

    Example:
        >>> others = OtherClasses(torch.tensor([0, 1, 0, 1, 1]))
        >>> numbers = torch.tensor([[0.0, 0.5], [0.0, 0.99]])
        >>> others(torch.tensor([0, 1]), lambda k: numbers)
        tensor([[1, 3],
                [0, 2]])
    """

    order_N: Tensor
    first_C: Tensor
    count_C: Tensor

    def __init__(self, labels_N: Tensor, num_negatives: int = 2) -> None:
        super().__init__()
        count_C = torch.bincount(labels_N)
        if int(count_C.max()) == len(labels_N):
            raise ValueError(
                "contrast needs training samples of at least two classes, got "
                f"{len(labels_N)} samples of one"
            )
        self.num_negatives = num_negatives
        # They follow from the data, so checkpoints need not hold them.
        self.register_buffer("order_N", labels_N.argsort(stable=True), persistent=False)
        self.register_buffer("first_C", count_C.cumsum(0) - count_C, persistent=False)
        self.register_buffer("count_C", count_C, persistent=False)

    def forward(self, labels_B: Tensor, draw: Draw) -> Tensor:
        """Return [B, K] positions of samples with other labels.

        Args:
            labels_B: labels of the anchors.
            draw: gives uniform numbers in [0, 1), [B, k].
        """
        total = len(self.order_N)
        if total <= _ONE_DRAW:
            share_BK = draw(self.num_negatives).double()
        else:
            coarse_BK, fine_BK = draw(2 * self.num_negatives).double().chunk(2, dim=1)
            share_BK = ((coarse_BK * _COARSE).floor() + fine_BK) / _COARSE
        own_B1 = self.count_C[labels_B][:, None]
        # Samples sorted by class, with the anchor's own class skipped.
        place_BK = (share_BK * (total - own_B1)).long()
        place_BK = place_BK + own_B1 * (place_BK >= self.first_C[labels_B][:, None])
        chosen_BK: Tensor = self.order_N[place_BK]
        return chosen_BK


def _of_all_processes(value: Tensor) -> Tensor:
    """Return the values of all processes, of equal shapes, one after the other; collective."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)
