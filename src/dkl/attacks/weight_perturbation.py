"""Adversarial weight perturbation (Wu et al., 2020) as a context manager."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AdversarialWeightPerturbation:
    """Train at weights moved a little in the direction that raises the training loss.

    For every weight tensor w (a parameter with "weight" in its name and at least two dimensions:
    convolutions and linear layers, neither norms nor biases) with gradient g of the training loss:

        w <- w + gamma ||w||_2 g / (||g||_2 + 1e-20)                         (Wu et al., 2020)

    and after the update the same amount is subtracted. No second model is needed, because only
    the direction of g counts.

    Args:
        gamma: size of the perturbation relative to the weight; 0.005 and 0.01 are published.
            0 does nothing at all: no direction pass either.
        start_epoch: first epoch (counted from 0) that uses it.
        step_inside: where the training loop makes its optimiser step. True (``official``: what
            published code does): inside ``perturbed``, at the perturbed weights, so that
            weight decay sees those; the perturbation is subtracted afterwards. False: after it,
            when the weights are back, with the gradients found at the perturbed weights.
            ``perturbed`` does the same for both.

    Raises:
        ValueError: if gamma is not a finite number of at least 0 or start_epoch is negative.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> images = torch.rand(4, 2)
        >>> awp = AdversarialWeightPerturbation(gamma=0.01)
        >>> with awp.perturbed(model, lambda: model(images).square().mean().backward()):
        ...     model(images).square().mean().backward()
        ...     optimizer.step()
    """

    gamma: float
    start_epoch: int = 0
    step_inside: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(
                f"gamma has to be a finite number of at least 0, such as 0.005; got {self.gamma}."
            )
        if self.start_epoch < 0:
            raise ValueError(f"start_epoch counts from 0; got {self.start_epoch}.")

    def active_in(self, epoch: int) -> bool:
        """Return whether weights are perturbed in an epoch.

        Args:
            epoch: counted from 0.

        Returns:
            True from ``start_epoch`` on, unless gamma is 0.

        Example:
            >>> AdversarialWeightPerturbation(0.005, start_epoch=10).active_in(9)
            False
        """
        return self.gamma > 0 and epoch >= self.start_epoch

    @contextmanager
    def perturbed(self, model: nn.Module, compute_gradients: Callable[[], None]) -> Iterator[None]:
        """Perturb the weights for the length of a ``with`` block.

        The direction pass leaves no trace: buffers of the model (batch-norm statistics and their
        counters) and earlier ``.grad`` values come back bit for bit. On exit the weights are
        ``copy + (now - perturbed)``: without an optimiser step in between that is the copy, bit
        for bit. If the block raises, the copy comes back whatever happened in it. Forward and
        backward passes of the update belong inside the block, since weights change in place.

        Args:
            model: the network; under DistributedDataParallel the wrapper or the bare network.
                Parameters that are frozen or get no gradient stay as they are.
            compute_gradients: makes forward and backward passes of the whole training batch, so
                that ``.grad`` of the parameters holds the gradient; under several processes the
                reduced one, so that every process perturbs alike. Its scale does not matter. A
                weight whose gradient has no finite norm is left alone (a gradient scaler skips
                the update of such a step anyway).

        Yields:
            Nothing.

        Raises:
            ValueError: if no weight is trainable, or the pass gives none a gradient.
        """
        if self.gamma == 0:
            yield
            return
        weights, deltas = self._find_perturbation(model, compute_gradients)
        copies = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                torch._foreach_add_(weights, deltas)
            _forget_autocast_copies()
            perturbed_weights = [weight.detach().clone() for weight in weights]
            yield
        except BaseException:
            with torch.no_grad():
                torch._foreach_copy_(weights, copies)
            raise
        else:
            _subtract_perturbation(weights, copies, perturbed_weights)
        finally:
            _forget_autocast_copies()

    def _find_perturbation(
        self, model: nn.Module, compute_gradients: Callable[[], None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the direction pass; return the weights to move and by how much."""
        candidates: list[Tensor] = [
            parameter
            for name, parameter in model.named_parameters()
            if "weight" in name and parameter.ndim >= 2 and parameter.requires_grad
        ]
        if not candidates:
            raise ValueError(
                'found no trainable parameter with "weight" in its name and two or more '
                "dimensions to perturb. Leave attack_mode first, or unfreeze the model."
            )
        with _preserved_buffers(model), _preserved_gradients(model):
            compute_gradients()
            weights = [weight for weight in candidates if weight.grad is not None]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            if not weights:
                raise ValueError(
                    "compute_gradients() left every weight without .grad; it has to call "
                    "backward() on the training loss of this model."
                )
            # Made while the gradients last: data-parallel wrappers reuse their memory.
            return weights, _perturbations(weights, gradients, self.gamma)


@torch.no_grad()
def _perturbations(weights: list[Tensor], gradients: list[Tensor], gamma: float) -> list[Tensor]:
    wide = any(weight.dtype == torch.float64 for weight in weights)
    norm_dtype = torch.float64 if wide else torch.float32
    weight_norms = torch._foreach_norm(weights, 2, norm_dtype)
    gradient_norms = torch._foreach_norm(gradients, 2, norm_dtype)
    deltas = []
    for gradient, weight_norm, gradient_norm in zip(
        gradients, weight_norms, gradient_norms, strict=True
    ):
        scale = gamma * weight_norm / (gradient_norm + 1e-20)
        # On the device, without waiting for the answer.
        finite = torch.isfinite(gradient_norm + weight_norm)
        deltas.append(torch.where(finite, (gradient * scale).to(gradient.dtype), 0.0))
    return deltas


@torch.no_grad()
def _subtract_perturbation(
    weights: list[Tensor], copies: list[Tensor], perturbed_weights: list[Tensor]
) -> None:
    for weight, copy, perturbed in zip(weights, copies, perturbed_weights, strict=True):
        # Where nothing moved take the copy itself: adding a zero would turn -0.0 into 0.0.
        weight.copy_(torch.where(weight == perturbed, copy, copy + (weight - perturbed)))


def _forget_autocast_copies() -> None:
    # Autocast keeps low-precision copies of weights until its outermost block ends; after a change
    # in place it would go on with the old ones.
    torch.clear_autocast_cache()


@contextmanager
def _preserved_buffers(model: nn.Module) -> Iterator[None]:
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, copy in saved:
                # A forward pass may write into a buffer or put another tensor in its place.
                buffer.copy_(copy)
                module._buffers[name] = buffer


@contextmanager
def _preserved_gradients(model: nn.Module) -> Iterator[None]:
    # Values are kept beside the tensors, which may be views of a data-parallel bucket.
    saved = [
        (parameter, parameter.grad, None if parameter.grad is None else parameter.grad.clone())
        for parameter in model.parameters()
    ]
    for parameter, _, _ in saved:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient, copy in saved:
            if gradient is not None and copy is not None:
                gradient.copy_(copy)
            parameter.grad = gradient
