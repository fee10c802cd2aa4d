"""Class-wise global information: the mean prediction of every class, gathered over an epoch.

Shapes: B samples, C classes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.losses.rows import NO_LABEL, check_number


class ClassStatistics(nn.Module):
    r"""Collect the class table whose row y is the mean softmax(logits / tau) of class y.

    .. math:: table_y \leftarrow \mu\, table_y + (1 - \mu) \operatorname{mean}_{i: y_i = y}
        softmax(logits_i / \tau)

    (section 3.3 of arXiv 2305.13948; there mu = 0 and one commit per epoch.) Before the first
    commit every row is uniform; a class without samples keeps its row.

    Keep it outside a module wrapped by DistributedDataParallel, whose buffer broadcast would
    overwrite the sums of all processes but one. ``update`` is local; ``commit`` and ``consolidate``
    are collective: call them in every process.

    Args:
        num_classes: C >= 1.
        temperature: tau > 0 of the softmax.
        dtype: of the buffers, float32 or float64. Default: float64 where that is torch's default
            dtype, else float32, since counts stop growing early in half precision.

    Raises:
        ValueError: arguments that do not fit.

    Example:
        >>> statistics = ClassStatistics(num_classes=3)
        >>> logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 9.0, 0.0]])
        >>> statistics.update(logits, labels=torch.tensor([0, 0]))
        >>> statistics.commit()
        >>> statistics.table[0].round(decimals=2).tolist()
        [0.75, 0.25, 0.0]
    """

    table: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self, num_classes: int, temperature: float = 1.0, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        check_number("temperature", temperature, positive=True)
        if dtype is None:
            is_double = torch.get_default_dtype() == torch.float64
            dtype = torch.float64 if is_double else torch.float32
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.num_classes = num_classes
        self.temperature = temperature
        uniform = torch.full((num_classes, num_classes), 1 / num_classes, dtype=dtype)
        self.register_buffer("table", uniform)
        self.register_buffer("sums", torch.zeros_like(uniform))
        self.register_buffer("counts", torch.zeros_like(uniform[0]))

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Add the predictions of a batch; local to the process, no gradients, no host sync.

        Args:
            logits: [B, C] of the reference (clean images, teacher).
            labels: [B] integers, ``-100`` skipped, or [B, C] soft labels >= 0 (mixup).
            mask: [B] bool; False rows are skipped. So are rows with non-finite logits.

        Raises:
            ValueError: shapes or dtypes that do not fit, labels out of range.
        """
        soft = self._check(logits, labels, mask)
        dtype = self.sums.dtype
        scaled_BC = logits.detach().to(dtype) / self.temperature
        counted = scaled_BC.isfinite().all(1)
        if mask is not None:
            counted = counted & mask
        if soft:
            labels_BC = labels.detach().to(dtype)
            counted = counted & labels_BC.isfinite().all(1)
        else:
            counted = counted & (labels.long() != NO_LABEL)
        probs_BC = F.softmax(scaled_BC.masked_fill(~counted[:, None], 0.0), 1)
        if soft:
            labels_BC = labels_BC.masked_fill(~counted[:, None], 0.0)
            self.sums += _exact_matmul(labels_BC.t(), probs_BC)
            self.counts += labels_BC.sum(0)
            return
        index = labels.long().masked_fill(~counted, 0)
        # The checked addition goes to a copy, so that an unknown label changes nothing.
        self.counts.copy_(self._counted_labels(index, counted))
        self.sums.index_add_(0, index, probs_BC * counted[:, None])

    def _counted_labels(self, index: Tensor, counted: Tensor) -> Tensor:
        try:
            return self.counts.index_add(0, index, counted.to(self.counts.dtype))
        except (IndexError, RuntimeError) as error:
            raise self._unknown_label(index) from error

    def _unknown_label(self, labels: Tensor) -> ValueError:
        return ValueError(
            f"labels must be in [0, {self.num_classes}), or {NO_LABEL} in update() where a sample "
            f"does not count, got {labels.min().item()} to {labels.max().item()}"
        )

    def _check(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> bool:
        """Raise on shapes and dtypes that do not fit; return whether the labels are soft."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must be [B, {self.num_classes}], got {list(logits.shape)}")
        soft = labels.ndim == 2
        expected = logits.shape if soft else logits.shape[:1]
        if labels.shape != expected or not _is_kind(labels, soft):
            raise ValueError(
                f"labels must be integers [B] or floats [B, C] with B, C = {list(logits.shape)}, "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if mask is not None and (mask.shape != logits.shape[:1] or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool [B], got {mask.dtype} {list(mask.shape)}")
        return soft

    @torch.no_grad()
    def commit(self, momentum: float = 0.0) -> None:
        """Move what was collected, over all processes, into the table, and start anew; collective.

        Args:
            momentum: mu in [0, 1): share of the old table that stays.

        Raises:
            ValueError: momentum out of range.
        """
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self._all_reduce()
        mean = self.sums / self.counts.clamp(min=torch.finfo(self.counts.dtype).tiny)[:, None]
        updated = momentum * self.table + (1 - momentum) * mean
        self.table.copy_(torch.where(self.counts[:, None] > 0, updated, self.table))
        self.sums.zero_()
        self.counts.zero_()

    @torch.no_grad()
    def consolidate(self) -> None:
        """Move the running sums of all processes to the first one; collective.

        No total changes, so it may be called at any time; a checkpoint written by the first process
        afterwards holds the reduced sums.
        """
        self._all_reduce()
        if _rank() > 0:
            self.sums.zero_()
            self.counts.zero_()

    def _all_reduce(self) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.cat([self.sums, self.counts[:, None]], 1)
            dist.all_reduce(both)
            self.sums.copy_(both[:, :-1])
            self.counts.copy_(both[:, -1])

    def rows(self, labels: Tensor) -> Tensor:
        """Return the table's rows for labels [B], or their mixture for soft labels [B, C].

        Args:
            labels: [B] integers in [0, C), or [B, C] soft labels.

        Returns:
            [B, C] weights for ``class_probs``.

        Raises:
            ValueError: labels of a wrong shape or dtype, or out of range.
        """
        soft = labels.ndim == 2
        fits = labels.shape[1] == self.num_classes if soft else labels.ndim == 1
        if not (fits and _is_kind(labels, soft)):
            raise ValueError(
                f"labels must be integers [B] or floats [B, C] with C = {self.num_classes}, "
                f"got {labels.dtype} {list(labels.shape)}; maps take class_table and labels instead"
            )
        if soft:
            return _exact_matmul(labels.to(self.table.dtype), self.table)
        try:
            return self.table.index_select(0, labels.long())
        except IndexError as error:
            raise self._unknown_label(labels) from error

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if _rank() > 0:  # the saved sums are totals: only the first process may carry them
            self.sums = torch.zeros_like(self.sums)
            self.counts = torch.zeros_like(self.counts)

    def extra_repr(self) -> str:
        """Show the settings in ``repr``."""
        return f"num_classes={self.num_classes}, temperature={self.temperature}"


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _is_kind(labels: Tensor, soft: bool) -> bool:
    floating = labels.is_floating_point()
    return floating if soft else not floating and labels.dtype != torch.bool


def _exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply in the dtype of the tensors, which autocast would lower."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right
