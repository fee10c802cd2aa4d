"""Adaptors that bring other layouts to the losses' classes-in-dim-1 form.

Maps [N, C, H, W] need none: the losses take them as they are, one row per position.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def sequence_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Let a loss take sequences [B, T, C], classes last, as language models return them.

    Args:
        loss: any loss of this package, function or module.

    Returns:
        The loss with ``input``, ``target`` and ``class_probs`` as [B, T, C]; ``labels`` and
        ``mask`` are [B, T], and reduction "none" gives [B, T]. Gradients are those of the loss.

    Raises:
        ValueError: when called with logits that are not three-dimensional.

    Example:
        >>> import torch
        >>> from dkl import ikl_loss
        >>> student, teacher = torch.randn(2, 5, 100), torch.randn(2, 5, 100)
        >>> labels = torch.tensor([[3, 8, 1, -100, -100], [9, 9, 2, 4, -100]])
        >>> sequence_loss(ikl_loss)(student, teacher, labels=labels, reduction="none").shape
        torch.Size([2, 5])
    """

    def on_sequences(
        input: Tensor, target: Tensor, class_probs: Tensor | None = None, **options: Any
    ) -> Any:
        logits = [value for value in (input, target, class_probs) if value is not None]
        for value in logits:
            if value.ndim != 3:
                raise ValueError(f"sequence_loss needs [B, T, C], got {list(value.shape)}")
        return loss(*(value.movedim(-1, 1) for value in logits), **options)

    return on_sequences
