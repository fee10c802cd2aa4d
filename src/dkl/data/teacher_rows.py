"""How a teacher's answer to one image is stored: all log-probabilities, or the k largest.

Legend: B batch, C classes, k listed classes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

StoredDtype = Literal["float16", "float32"]

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_INT16_CLASSES = 1 << 16


class TopKRows(NamedTuple):
    """What ``top_k_ikl_loss`` takes: a teacher's k most likely classes, and the rest.

    Args:
        log_probs: [B, k] float32, of softmax(logits / T) over all classes, the largest first.
        indices: [B, k] int64 classes.
        tail_log_prob: [B] float32, logarithm of the other classes' probability; -inf where k = C.
    """

    log_probs: Tensor
    indices: Tensor
    tail_log_prob: Tensor


@dataclass(frozen=True)
class RowFormat:
    """Format of stored rows.

    In float16 a log-probability l is off by at most 2^-11 |l| (and 2^-25), a probability p
    therefore by 2^-11 p |log p| <= 1.8e-4. A log-probability below -65504, the end of the range, is
    stored as -65504: its probability is zero either way.

    Args:
        num_classes: C.
        top_k: number of listed classes; None stores all log-probabilities.
        dtype: "float16" or "float32".
        temperature: T of log softmax(logits / T); other than 1 with ``top_k`` only.

    Raises:
        ValueError: a number is out of range.
    """

    num_classes: int
    top_k: int | None = None
    dtype: StoredDtype = "float16"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {self.num_classes}.")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_classes:
            raise ValueError(
                f"top_k must lie in 1 to {self.num_classes}, the number of classes, or be None "
                f"for all of them; got {self.top_k}."
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {self.dtype!r}.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive; got {self.temperature}.")
        if self.top_k is None and self.temperature != 1:
            raise ValueError(
                f"temperature belongs to top_k: all log-probabilities of a row serve at every "
                f"temperature, because they differ from the logits by a shift; got temperature="
                f"{self.temperature} without top_k."
            )

    @property
    def columns(self) -> tuple[tuple[torch.dtype, int], ...]:
        """Return type and width of each column of a row."""
        values = _DTYPES[self.dtype]
        if self.top_k is None:
            return ((values, self.num_classes),)
        classes = torch.int16 if self.num_classes <= _INT16_CLASSES else torch.int32
        return (values, self.top_k), (values, 1), (classes, self.top_k)

    def encode(self, logits_BC: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of a teacher's logits, on the CPU.

        Args:
            logits_BC: [B, C] finite floats, on any device.

        Raises:
            ValueError: another shape or type, or numbers that are not finite.

        Example:
            >>> stored = RowFormat(4, top_k=2).encode(torch.tensor([[0.0, 2.0, 1.0, 0.0]]))
            >>> [(one.dtype, one.tolist()) for one in stored][2]
            (torch.int16, [[1, 2]])
        """
        if logits_BC.ndim != 2 or logits_BC.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must have shape [B, {self.num_classes}], one for each class; got "
                f"{tuple(logits_BC.shape)}."
            )
        if not logits_BC.is_floating_point():
            raise ValueError(f"logits must be floating-point; got {logits_BC.dtype}.")
        logits_BC = logits_BC.detach()
        if logits_BC.dtype != torch.float64:
            logits_BC = logits_BC.float()
        scaled_BC = logits_BC / self.temperature
        if not bool(torch.isfinite(scaled_BC).all()):
            raise ValueError(
                "logits must be finite, so that no NaN is cached; got NaN or infinite ones. Look "
                "at the teacher: mixed precision may overflow, or a checkpoint be damaged."
            )
        log_probs_BC = torch.log_softmax(scaled_BC, 1)
        if self.top_k is None:
            return (self._rounded(log_probs_BC),)
        top = log_probs_BC.topk(self.top_k, 1)
        rest_BC = log_probs_BC.scatter(1, top.indices, -torch.inf)
        # Summed over the other classes: one minus the listed ones would cancel near one.
        tail_B1 = rest_BC.logsumexp(1, keepdim=True)
        stored_tail_B1 = self._rounded(tail_B1)
        if self.top_k == self.num_classes:
            stored_tail_B1 = torch.full_like(stored_tail_B1, -torch.inf)
        classes_Bk = top.indices.cpu()
        if self.num_classes <= _INT16_CLASSES:
            # Two bytes without a sign: the upper half of the range is stored as negative numbers.
            half = _INT16_CLASSES // 2
            classes_Bk = (classes_Bk + half) % _INT16_CLASSES - half
        return self._rounded(top.values), stored_tail_B1, classes_Bk.to(self.columns[2][0])

    def decode(
        self, columns: tuple[Tensor, ...], device: torch.device | str = "cpu"
    ) -> Tensor | TopKRows:
        """Return log-probabilities [B, C] float32, or the listed classes, on a device.

        Example:
            >>> logits = torch.tensor([[0.0, 2.0, 1.0, 0.0]])
            >>> rows = RowFormat(4, top_k=2)
            >>> rows.decode(rows.encode(logits)).indices
            tensor([[1, 2]])
        """
        moved = [column.to(device) for column in columns]
        if self.top_k is None:
            return moved[0].float()
        classes_Bk = moved[2].long()
        if self.num_classes <= _INT16_CLASSES:
            classes_Bk = classes_Bk & (_INT16_CLASSES - 1)
        return TopKRows(moved[0].float(), classes_Bk, moved[1].squeeze(1).float())

    def _rounded(self, log_probs: Tensor) -> Tensor:
        dtype = _DTYPES[self.dtype]
        return log_probs.clamp(min=torch.finfo(dtype).min).to(dtype).cpu()
