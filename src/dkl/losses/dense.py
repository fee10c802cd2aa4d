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
        if class_probs is not None:
            options["class_probs"] = _classes_second("class_probs", class_probs)
        return loss(_classes_second("input", input), _classes_second("target", target), **options)

    return on_sequences


def _classes_second(name: str, values_BTC: Tensor) -> Tensor:
    if values_BTC.ndim != 3:
        raise ValueError(
            f"sequence_loss needs [B, T, C] logits and class_probs, got {name} of shape "
            f"{list(values_BTC.shape)}; losses take [N, C] and maps [N, C, d1, ...] directly"
        )
    return values_BTC.movedim(-1, 1)
