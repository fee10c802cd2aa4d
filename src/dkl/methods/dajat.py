"""DAJAT: adversarial training on the images and on AutoAugment views, with two batch-norms.

Source: Addepalli, Jain and Babu, "Efficient and Effective Augmentation Strategy for Adversarial
Training", NeurIPS 2022. Shapes: B samples, C classes, K further views.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dkl.attacks import PGDSettings
from dkl.losses import kl_loss
from dkl.losses.robust import jensen_shannon_views
from dkl.losses.rows import check_number
from dkl.methods.adversarial import AttackSchedule, adversarial_images, kl_inner
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import (
    TrainingMethod,
    check_label_smoothing,
    hard_cross_entropy,
    smoothing_in,
    step_output,
)


@contextmanager
def statistics_of(model: nn.Module, *, auxiliary: bool) -> Iterator[None]:
    """Let switchable batch-norm layers take their auxiliary or their base statistics inside.

    Afterwards, even after an error, all take the base ones. Switchable is every module with an
    attribute ``uses_auxiliary``; a model without batch-norm has nothing to switch.

    Args:
        model: the network or a wrapper around it.
        auxiliary: which statistics, scales and shifts.

    Yields:
        Nothing.

    Raises:
        ValueError: if the model has batch-norm layers and none is switchable.
    """
    switches: list[Any] = [m for m in model.modules() if hasattr(m, "uses_auxiliary")]
    if not switches and _batch_norms(model):
        raise ValueError(
            "DAJAT keeps batch-norm statistics of views apart from those of the images, and this "
            "model's batch-norm layers cannot be switched: pass it through "
            "dkl.models.dual_batch_norm.add_dual_batch_norm (model.dual_batch_norm: true), and "
            "leave training.batch_norm 'local', because 'sync' replaces the layers"
        )
    for module in switches:
        module.uses_auxiliary = auxiliary
    try:
        yield
    finally:
        for module in switches:
            module.uses_auxiliary = False


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the layers with statistics of either kind."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) or hasattr(module, "uses_auxiliary")
    ]


def _nothing_of_batch_norm(model: nn.Module) -> Tensor | float:
    """Return a zero that depends on all that batch-norm layers train."""
    found = (parameter for layer in _batch_norms(model) for parameter in layer.parameters())
    return 0.0 * sum(p.sum() for p in dict.fromkeys(found) if p.requires_grad)


class DAJAT(TrainingMethod):
    """Train on K + 1 views v of every image: the basic one (v = 0) and K augmented ones.

        1/(K+1) sum_v [ CE(z(x_v), y) + beta KL(p(x_v), p(x'_v)) ]  +  w JS(p(x_0), ..., p(x_K))

    with JS the mean over views of KL(p(x_v), mean of the p) (Addepalli et al. 2022). Gradients
    reach every prediction. Each view is attacked and forwarded by itself, adversarial images before
    clean ones; the basic view with the base statistics of batch-norm, the others with the auxiliary
    ones, in attacks as well. Outside its methods the model always takes the base ones, with which
    it is evaluated and deployed. A direction pass of weight perturbation takes the basic view's
    loss alone. Training accuracy is that of the basic view.

    Args:
        attack: PGD settings or a schedule of them; it maximises KL(p(x_v), p(x'_v)).
        beta: >= 0, weight of the KL terms.
        js_weight: >= 0, w.
        label_smoothing: of the clean cross-entropy, in [0, 1), over all classes as in torch.
        smooth_direction: smooth labels in the direction pass too.
        num_views: K >= 1; the views are ``extras["view_1"]`` and so on.

    Raises:
        ValueError: options out of range.
    """

    def __init__(
        self,
        attack: PGDSettings | AttackSchedule,
        *,
        beta: float = 9.0,
        js_weight: float = 2.0,
        label_smoothing: float = 0.0,
        smooth_direction: bool = True,
        num_views: int = 2,
    ) -> None:
        super().__init__()
        check_number("beta", beta)
        check_number("js_weight", js_weight)
        check_label_smoothing(label_smoothing)
        if num_views < 1:
            raise ValueError(
                f"num_views counts the views beside the basic one, at least 1; got {num_views}. "
                "Without any it is dkl.methods.trades"
            )
        self.attack = attack
        self.beta = beta
        self.js_weight = js_weight
        self.label_smoothing = label_smoothing
        self.smooth_direction = smooth_direction
        self.num_views = num_views

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Attack every view, each with its own statistics."""
        extras = dict(batch.extras)
        for number, view in enumerate(self._views(batch)):
            with statistics_of(model, auxiliary=number > 0):
                (found,) = adversarial_images(model, [view], kl_inner, self.attack, context)
            extras[_adversarial_name(number)] = found
        return replace(batch, extras=extras)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the loss of all views, or in a direction pass that of the basic one."""
        views = self._views(batch)
        if context.phase == "direction":
            views = views[:1]
        clean: list[Tensor] = []
        attacked: list[Tensor] = []
        for number, view in enumerate(views):
            with statistics_of(model, auxiliary=number > 0):
                attacked.append(model(batch.extras[_adversarial_name(number)]))
                clean.append(model(view.images))
        terms = self._means(clean, attacked, batch, context)
        if len(views) > 1:
            divergence = jensen_shannon_views(clean, mask=batch.mask, reduction="sum")
            terms["consistency"] = self.js_weight * divergence / context.num_items
        else:
            # DistributedDataParallel waits for a gradient of every parameter: auxiliary ones get 0.
            terms["clean_ce"] = terms["clean_ce"] + _nothing_of_batch_norm(model)
        return step_output(terms, clean[0], batch, context)

    def _means(
        self, clean: list[Tensor], attacked: list[Tensor], batch: Batch, context: StepContext
    ) -> dict[str, Tensor]:
        """Return both terms of TRADES, each the mean over views."""
        smoothing = smoothing_in(context, self.label_smoothing, self.smooth_direction)
        labels = [hard_cross_entropy(clean_BC, batch, context, smoothing) for clean_BC in clean]
        divergences = [
            kl_loss(attacked_BC, clean_BC, mask=batch.mask, reduction="sum")
            for attacked_BC, clean_BC in zip(attacked, clean, strict=True)
        ]
        return {
            "clean_ce": torch.stack(labels).mean(),
            "robust": self.beta * torch.stack(divergences).mean() / context.num_items,
        }

    def _views(self, batch: Batch) -> list[Batch]:
        """Return the basic view and the others as batches of the same samples."""
        if batch.targets is not None:
            raise ValueError(
                "DAJAT compares views of the same image, and mixed labels (CutMix) belong to the "
                "basic view alone: leave CutMix out"
            )
        names = [f"view_{number}" for number in range(1, self.num_views + 1)]
        given = sorted(name for name in batch.extras if name.startswith("view_"))
        if given != sorted(names):
            raise ValueError(
                f"DAJAT with num_views={self.num_views} needs {', '.join(names)} of every image; "
                f"the batch has {', '.join(given) or 'none'}. Give the data as many further views "
                "(data.views), or set num_views to theirs"
            )
        for name in names:
            if batch.extras[name].shape != batch.images.shape:
                raise ValueError(
                    f"{name} must have the shape of the images, {list(batch.images.shape)}; got "
                    f"{list(batch.extras[name].shape)}"
                )
        return [batch, *(replace(batch, images=batch.extras[name]) for name in names)]


def _adversarial_name(number: int) -> str:
    return "adversarial" if number == 0 else f"adversarial_view_{number}"


def dajat(
    attack: PGDSettings | AttackSchedule,
    *,
    beta: float = 9.0,
    js_weight: float = 2.0,
    label_smoothing: float = 0.0,
    smooth_direction: bool = True,
    num_views: int = 2,
) -> DAJAT:
    """Build DAJAT: TRADES on every view, and the divergence of their predictions (NeurIPS 2022).

    With K views beside the basic one,
    1/(K+1) sum_v [CE(z(x_v), y) + beta KL(p(x_v), p(x'_v))] + js_weight JS(p(x_0), ..., p(x_K)).

    Args:
        attack: PGD settings or a schedule of them; it maximises the KL divergence.
        beta: >= 0, weight of the KL terms; 9 is published for CIFAR-100, 10 and 11 for CIFAR-10.
        js_weight: >= 0, weight of the Jensen-Shannon divergence; published 2, and 3 for CIFAR-10 on
            WRN-34-10.
        label_smoothing: of the clean cross-entropy, in [0, 1), over all classes as in torch. The
            published 0.9 for the label and 0.1 / 99 for each other class is 0.1 * 100 / 99.
        smooth_direction: smooth labels in AWP's direction pass too; published code does not.
        num_views: K >= 1.

    Returns:
        The method. Its model needs ``dkl.models.dual_batch_norm.add_dual_batch_norm`` if it has
        batch-norm.

    Raises:
        ValueError: options out of range; later, a model or batches that do not fit.

    Example:
        >>> from dkl.attacks import ThreatModel
        >>> attack = PGDSettings(ThreatModel("Linf", "8/255"), 2, "8/255", "gaussian")
        >>> method = dajat(attack, beta=9.0)
        >>> method.num_views, method.couples_batch
        (2, False)
    """
    return DAJAT(
        attack,
        beta=beta,
        js_weight=js_weight,
        label_smoothing=label_smoothing,
        smooth_direction=smooth_direction,
        num_views=num_views,
    )
