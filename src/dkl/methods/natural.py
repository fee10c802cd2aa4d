"""Natural training: cross-entropy on clean images."""

from torch import nn

from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import TrainingMethod, hard_cross_entropy, step_output


class NaturalTraining(TrainingMethod):
    """Train with the cross-entropy of clean images.

    Args:
        label_smoothing: in [0, 1).

    Example:
        >>> NaturalTraining(label_smoothing=0.1).couples_batch
        False
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:  # noqa: ARG002
        """Return the batch as it is."""
        return batch

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the cross-entropy of the clean images."""
        logits_BC = model(batch.images)
        ce = hard_cross_entropy(logits_BC, batch, context, self.label_smoothing)
        return step_output({"clean_ce": ce}, logits_BC, batch, context)
