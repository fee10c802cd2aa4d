"""Teachers that have been asked before: their answers are read, no network runs.

Shapes: B samples, C classes, k listed classes.
"""

from collections.abc import Callable

from torch import Tensor, nn

from dkl.methods.protocol import Batch, StepContext

ReadRows = Callable[[Tensor, int], Tensor]
"""(indices [B], epoch) -> log-probabilities [B, C] for the images that this epoch makes of them."""

TopKAnswer = tuple[Tensor, Tensor, Tensor]
"""Log-probabilities [B, k] at a temperature, classes [B, k] int64, logarithm of the rest [B]."""

ReadTopK = Callable[[Tensor, int], TopKAnswer]
"""(indices [B], epoch) -> the k most likely classes."""


class CachedTeacher(nn.Module):
    """Log-probabilities of all classes in place of a teacher's logits.

    They differ from the logits by a shift of each row. Softmax at any temperature, and with it KL,
    JSD, DKD, DIST and class means, do not notice a shift; nor does the weighted MSE of IKL and GKL,
    which is on differences within a row.

    Args:
        read: gives the rows of samples, on the device of the indices.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).log_softmax(1)
        >>> CachedTeacher(lambda indices, epoch: rows[indices]).state_dict()
        OrderedDict()
    """

    def __init__(self, read: ReadRows) -> None:
        super().__init__()
        self.read = read

    def answers(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Return ``teacher_logits`` [B, C], in the dtype of the images."""
        rows_BC = self.read(batch.indices, context.epoch)
        return {"teacher_logits": rows_BC.to(batch.images.dtype)}


class CachedTopKTeacher(nn.Module):
    """The k most likely classes of a teacher and the probability of the rest, at one temperature.

    Args:
        read: gives the rows of samples, on the device of the indices.
        temperature: T > 0 of the softmax that the rows are of; it cannot be changed.
    """

    def __init__(self, read: ReadTopK, temperature: float) -> None:
        super().__init__()
        self.read = read
        self.temperature = temperature

    def answers(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """Return ``teacher_logits`` [B, k] (listed only), ``teacher_classes``, ``teacher_rest``."""
        listed_Bk, classes_Bk, rest_B = self.read(batch.indices, context.epoch)
        dtype = batch.images.dtype
        return {
            "teacher_logits": listed_Bk.to(dtype),
            "teacher_classes": classes_Bk,
            "teacher_rest": rest_B.to(dtype),
        }
