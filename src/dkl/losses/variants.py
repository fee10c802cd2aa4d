"""DKL, IKL and GKL: settings of the one engine, as functions and thin modules."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from dkl.losses.backends import FUSED_BACKENDS
from dkl.losses.decoupled import DecoupledOptions, DecoupledParts, decoupled_kl_loss

LossOrParts = Tensor | tuple[Tensor, DecoupledParts]
_PER_CALL = {"class_probs", "class_table", "labels", "mask", "denominator", "num_items"}


@overload
def dkl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[True],
    **options: Unpack[DecoupledOptions],
) -> tuple[Tensor, DecoupledParts]: ...
@overload
def dkl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[DecoupledOptions],
) -> Tensor: ...
def dkl_loss(input: Tensor, target: Tensor, class_probs: Any = None, **options: Any) -> LossOrParts:
    r"""Compute the decoupled KL loss, whose gradients are those of the KL divergence.

    .. math::
        \frac{a}{4} \sum_{jk} w_j w_k (\Delta m_{jk} - S(\Delta n_{jk}))^2
        - b \sum_j S(softmax(m)_j) \log softmax(n)_j

    with m = target, n = input and S the stop-gradient (Theorem 1 of arXiv 2305.13948): with both
    weights 1 and both temperatures 1 its gradients for input and target equal those of ``kl_loss``
    (the values differ); at another temperature T they do with ``mse_weight=1 / T**2`` and
    ``weight_temperature=T``.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the prediction; gradient from the soft
            cross-entropy only.
        target: logits of the reference; gradient from the weighted MSE only.
        class_probs: weights of each row, input's shape; default softmax(target).
        **options: those of :func:`decoupled_kl_loss`, except ``break_asymmetry``.

    Returns:
        The loss, or with ``return_parts`` the loss and its terms.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> from dkl import kl_loss
        >>> a = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
        >>> b = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
        >>> ours = torch.autograd.grad(dkl_loss(a, b), (a, b))
        >>> kl = torch.autograd.grad(kl_loss(a, b), (a, b))
        >>> all(torch.allclose(x, y) for x, y in zip(ours, kl))
        True
    """
    if "break_asymmetry" in options:
        raise ValueError("dkl_loss has break_asymmetry=False; use ikl_loss for the other")
    loss: LossOrParts = decoupled_kl_loss(
        input, target, class_probs, break_asymmetry=False, **options
    )
    return loss


@overload
def ikl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[True],
    **options: Unpack[DecoupledOptions],
) -> tuple[Tensor, DecoupledParts]: ...
@overload
def ikl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[DecoupledOptions],
) -> Tensor: ...
def ikl_loss(input: Tensor, target: Tensor, class_probs: Any = None, **options: Any) -> LossOrParts:
    r"""Compute the improved KL loss: the decoupled loss whose wMSE reaches both arguments.

    .. math::
        \frac{a}{4} \sum_{jk} w_j w_k (\Delta m_{jk} - \Delta n_{jk})^2
        - b \sum_j S(softmax(m / T)_j) \log softmax(n / T)_j

    with m = target, n = input (equation 7 of arXiv 2305.13948). Class-wise global information
    needs ``class_table`` and ``labels``; without them the weights are softmax(target).

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the prediction; gradient from both terms.
        target: logits of the reference; gradient from the weighted MSE.
        class_probs: weights of each row, input's shape.
        **options: those of :func:`decoupled_kl_loss`, whose defaults are IKL's.

    Returns:
        The loss, or with ``return_parts`` the loss and its terms.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> from dkl import ClassStatistics
        >>> student = torch.randn(4, 10, requires_grad=True)
        >>> teacher, labels = torch.randn(4, 10), torch.tensor([0, 3, 3, 9])
        >>> statistics = ClassStatistics(num_classes=10)
        >>> statistics.update(teacher, labels)
        >>> statistics.commit()
        >>> loss = ikl_loss(student, teacher, class_table=statistics.table, labels=labels)
        >>> loss.backward()
    """
    loss: LossOrParts = decoupled_kl_loss(input, target, class_probs, **options)
    return loss


@overload
def gkl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[True],
    **options: Unpack[DecoupledOptions],
) -> tuple[Tensor, DecoupledParts]: ...
@overload
def gkl_loss(
    input: Tensor,
    target: Tensor,
    class_probs: Tensor | None = ...,
    *,
    return_parts: Literal[False] = ...,
    **options: Unpack[DecoupledOptions],
) -> Tensor: ...
def gkl_loss(input: Tensor, target: Tensor, class_probs: Any = None, **options: Any) -> LossOrParts:
    r"""Compute the generalized KL loss: IKL with smoother weights and a weighted mean.

    .. math::
        \frac{a}{4 D} \sum_i \sum_{jk} (w_{ij} w_{ik})^\gamma (\Delta m_{jk} - \Delta n_{jk})^2
        + \frac{b}{n} \sum_i ce_i, \quad D = \sum_i \Big(\sum_j w_{ij}^\gamma\Big)^2

    (arXiv 2503.08038). With gamma = 1 and weights that sum to one it is the IKL loss. The rows of
    a batch share D: to split a batch exactly, pass ``denominator`` and ``num_items`` of the whole.

    Args:
        input: [N, C] or [N, C, d1, ...] logits of the prediction; gradient from both terms.
        target: logits of the reference; gradient from the weighted MSE.
        class_probs: weights of each row, input's shape.
        **options: those of :func:`decoupled_kl_loss`, except ``normalization``.

    Returns:
        The loss, or with ``return_parts`` the loss and its terms.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> student, teacher = torch.randn(4, 10), torch.randn(4, 10)
        >>> same = gkl_loss(student, teacher) - ikl_loss(student, teacher)
        >>> bool(same.abs() < 1e-4)
        True
    """
    if "normalization" in options:
        raise ValueError("gkl_loss has normalization='weights'; use ikl_loss for 'rows'")
    loss: LossOrParts = decoupled_kl_loss(
        input, target, class_probs, normalization="weights", **options
    )
    return loss


class _DecoupledModule(nn.Module):
    """Holds the options of a loss; what differs from call to call goes to ``forward``."""

    _function: Callable[..., LossOrParts]

    def __init__(self, *, return_parts: bool = False, **options: Unpack[DecoupledOptions]) -> None:
        super().__init__()
        per_call = sorted(_PER_CALL & set(options))
        if per_call:
            raise ValueError(
                f"pass {', '.join(per_call)} to the call, not to the making of the loss"
            )
        self.options: dict[str, Any] = {**options, "return_parts": return_parts}
        # One call on a tiny input, so that a wrong option is reported here and not in training; by
        # the reference, since a backend may need a device that only the real input is on.
        one_row, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
        fused = self.options.get("backend") in FUSED_BACKENDS
        checked = {**self.options, "backend": "reference"} if fused else self.options
        self._function(one_row, one_row, labels=labels, **checked)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        class_probs: Tensor | None = None,
        *,
        class_table: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        denominator: float | Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> LossOrParts:
        """Return the loss; the arguments are those of the function."""
        return self._function(
            input,
            target,
            class_probs,
            class_table=class_table,
            labels=labels,
            mask=mask,
            denominator=denominator,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Show the settings in ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DKLLoss(_DecoupledModule):
    """Module form of :func:`dkl_loss`; options as keywords, tensors when called.

    Example:
        >>> loss = DKLLoss(temperature=4.0, weight_temperature=4.0, mse_weight=1 / 16)
        >>> loss(torch.randn(4, 10), torch.randn(4, 10)).shape
        torch.Size([])
    """

    _function = staticmethod(dkl_loss)


class IKLLoss(_DecoupledModule):
    """Module form of :func:`ikl_loss`; options as keywords, tensors when called.

    Example:
        >>> loss = IKLLoss(mse_weight=20.0, ce_weight=4.0)
        >>> table, labels = torch.full((10, 10), 0.1), torch.randint(10, (4,))
        >>> clean, adversarial = torch.randn(4, 10), torch.randn(4, 10)
        >>> loss(adversarial, clean, class_table=table, labels=labels).shape
        torch.Size([])
    """

    _function = staticmethod(ikl_loss)


class GKLLoss(_DecoupledModule):
    """Module form of :func:`gkl_loss`; options as keywords, tensors when called.

    Example:
        >>> loss = GKLLoss(mse_weight=20.0, ce_weight=4.0, gamma=0.4)
        >>> loss(torch.randn(4, 10), torch.randn(4, 10)).shape
        torch.Size([])
    """

    _function = staticmethod(gkl_loss)


def from_authors(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    T: float = 1.0,
    T2: float | None = None,
    gamma: float | None = None,
) -> DecoupledOptions:
    """Translate the names of the authors' code into options of our losses.

    Their ALPHA weighs the soft cross-entropy and their BETA the weighted MSE, the other way round
    than the paper's letters. Their distillation code has T (soft cross-entropy) and T2 (weights).
    Their adversarial scripts' single ``--T`` is the temperature of the class table: pass it to
    ``ClassStatistics(temperature=...)`` and leave T and T2 alone.

    Args:
        alpha: their ALPHA >= 0, becomes ``ce_weight``.
        beta: their BETA >= 0, becomes ``mse_weight``.
        T: their T > 0, becomes ``temperature``.
        T2: their T2 > 0, becomes ``weight_temperature``; with class-wise weights (their GI) leave
            it out here and pass it to ``ClassStatistics``.
        gamma: their GAMMA >= 0 (GKL).

    Returns:
        Keyword options for ``ikl_loss``, ``gkl_loss`` and their modules.

    Example:
        >>> from_authors(alpha=1, beta=8, T=4, T2=100)
        {'ce_weight': 1, 'mse_weight': 8, 'temperature': 4, 'weight_temperature': 100}
    """
    options: DecoupledOptions = {"ce_weight": alpha, "mse_weight": beta, "temperature": T}
    if T2 is not None:
        options["weight_temperature"] = T2
    if gamma is not None:
        options["gamma"] = gamma
    return options
