"""Adversarial training: an inner objective finds the images, an outer loss learns from them.

PGD-AT, TRADES (and with it ACAT and DM-AT), MART, IKL-AT and GKL-AT are settings of one method.
Shapes: B samples, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dkl.attacks import PGDSettings, attack_mode
from dkl.losses import ikl_loss, kl_loss
from dkl.losses.robust import boosted_cross_entropy, misclassification_weighted_kl
from dkl.losses.rows import check_number
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import (
    DecoupledTerm,
    TrainingMethod,
    check_label_smoothing,
    hard_cross_entropy,
    label_cross_entropy,
    labels_of,
    smoothing_in,
    step_output,
)
from dkl.methods.two_views import SECOND_VIEW, combine_views, joined, views_of

InnerObjective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(adversarial_BC, clean_BC, labels) -> [B], to be maximised by the attack.

``labels`` are [B], or [B, C] distributions where augmentation mixes images.
"""

OuterLoss = Callable[[Tensor, Tensor, Batch, StepContext], Mapping[str, Tensor]]
"""(clean_BC, adversarial_BC, batch, context) -> named terms whose sum is the loss."""

AttackSchedule = Callable[[int, int], PGDSettings]
"""(epoch, num_epochs) -> the attack of that 0-based epoch."""


def cross_entropy_inner(adversarial_BC: Tensor, clean_BC: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
    """Objective of PGD-AT and MART: cross-entropy of the adversarial image."""
    return label_cross_entropy(adversarial_BC, labels)


def kl_inner(adversarial_BC: Tensor, clean_BC: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
    """Objective of TRADES: KL divergence of adversarial from clean prediction."""
    return kl_loss(adversarial_BC, clean_BC, reduction="none")


def adversarial_images(
    model: nn.Module,
    views: Sequence[Batch],
    inner: InnerObjective,
    attack: PGDSettings | AttackSchedule,
    context: StepContext,
) -> list[Tensor]:
    """Attack all views in one batch; every sample draws its own noise for each view.

    Args:
        model: the bare network.
        views: batches of the same samples.
        inner: what the attack maximises; the cross-entropy needs no clean logits, and for any other
            they are computed once, as constants.
        attack: PGD settings, or a schedule of them over epochs.
        context: of the step.

    Returns:
        The adversarial images of each view, detached.
    """
    settings = (
        attack if isinstance(attack, PGDSettings) else attack(context.epoch, context.num_epochs)
    )
    images, num_views = joined([view.images for view in views]), len(views)

    def draw(num_columns: int) -> Tensor:
        return joined([context.draw(num_columns) for _ in views])

    with attack_mode(model, settings.batch_norm):
        clean_of_views = [images.new_empty(0)] * num_views
        if inner is not cross_entropy_inner:
            with torch.no_grad():
                clean_of_views = list(model(images).chunk(num_views))

        def objective(adversarial: Tensor) -> Tensor:
            pieces = zip(adversarial.chunk(num_views), clean_of_views, views, strict=True)
            return joined([inner(a_BC, c_BC, labels_of(view)) for a_BC, c_BC, view in pieces])

        adversarial = settings.attack(model, images, objective, draw=draw)
    return list(adversarial.chunk(num_views))


class AdversarialTraining(TrainingMethod):
    """Train on images that an attack finds anew at every step.

    Args:
        attack: PGD settings, or a schedule of them over epochs.
        inner: what the attack maximises.
        outer: the loss of clean and adversarial logits of one view.
        term: the decoupled loss inside ``outer`` when there is one; its class table is fed with the
            clean logits of the update pass and committed at the end of every epoch.
        uses_clean: False when neither objective needs the clean image (PGD-AT): it is then not
            forwarded, and training accuracy is that of adversarial images.
        clean_first: order of the two forward passes, which batch-norm's running statistics see.
            The published TRADES-AWP and IKL code forwards the adversarial images first.
        second_view_weight: g >= 0: train on ``extras["view_1"]`` as well, with this weight of its
            robust loss (see ``two_views``), and terms of ``outer`` named "clean_ce" and "robust";
            attack and forward passes take both views in one batch, the class table and training
            accuracy the basic one alone. None: one view.

    Raises:
        ValueError: a negative weight.
    """

    def __init__(
        self,
        attack: PGDSettings | AttackSchedule,
        inner: InnerObjective,
        outer: OuterLoss,
        *,
        term: DecoupledTerm | None = None,
        uses_clean: bool = True,
        clean_first: bool = False,
        second_view_weight: float | None = None,
    ) -> None:
        super().__init__(term)
        if second_view_weight is not None:
            check_number("second_view_weight", second_view_weight)
        self.attack = attack
        self.inner = inner
        self.outer = outer
        self.uses_clean = uses_clean
        self.clean_first = clean_first
        self.second_view_weight = second_view_weight

    def _views(self, batch: Batch) -> list[Batch]:
        return views_of(batch, with_second=self.second_view_weight is not None)

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Find the adversarial images of every view."""
        views = self._views(batch)
        found = adversarial_images(model, views, self.inner, self.attack, context)
        names = ("adversarial", f"adversarial_{SECOND_VIEW}")
        extras = {**batch.extras, **dict(zip(names, found, strict=False))}
        return replace(batch, extras=extras)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the outer loss, and feed the class statistics on the update pass."""
        views = self._views(batch)
        names = ("adversarial", f"adversarial_{SECOND_VIEW}")[: len(views)]
        adversarial = joined([batch.extras[name] for name in names])
        images = joined([view.images for view in views])
        if not self.uses_clean:
            clean = attacked = model(adversarial)
        elif self.clean_first:
            clean, attacked = model(images), model(adversarial)
        else:
            attacked = model(adversarial)
            clean = model(images)
        clean_of_views = clean.chunk(len(views))
        pieces = zip(clean_of_views, attacked.chunk(len(views)), views, strict=True)
        terms = combine_views(
            [
                self.outer(clean_BC, attacked_BC, view, context)
                for clean_BC, attacked_BC, view in pieces
            ],
            self.second_view_weight,
        )
        if self.term is not None:
            self.term.observe(clean_of_views[0], batch, context)
        return step_output(terms, clean_of_views[0], batch, context)


def pgd_at(
    attack: PGDSettings | AttackSchedule, *, label_smoothing: float = 0.0
) -> AdversarialTraining:
    """Build PGD adversarial training: cross-entropy on PGD images (Madry et al. 2018).

    Args:
        attack: PGD settings or a schedule of them; it maximises the cross-entropy.
        label_smoothing: in [0, 1).

    Returns:
        The method.

    Raises:
        ValueError: label smoothing out of range.
    """
    check_label_smoothing(label_smoothing)

    def outer(
        clean_BC: Tensor,  # noqa: ARG001
        adversarial_BC: Tensor,
        batch: Batch,
        context: StepContext,
    ) -> dict[str, Tensor]:
        ce = hard_cross_entropy(adversarial_BC, batch, context, label_smoothing)
        return {"adversarial_ce": ce}

    return AdversarialTraining(attack, cross_entropy_inner, outer, uses_clean=False)


def trades(
    attack: PGDSettings | AttackSchedule,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
    smooth_direction: bool = True,
    clean_first: bool = False,
    second_view_weight: float | None = None,
) -> AdversarialTraining:
    """Build TRADES: CE(clean) + beta KL(clean, adversarial), gradients through both (Zhang 2019).

    ACAT (Addepalli et al. 2022) is this with weight perturbation, an eps ramp and few attack steps;
    its smoothing of CIFAR-100 labels, 0.9 for the label and 0.1 / 99 for each other class, is
    ``label_smoothing=0.1 * 100 / 99``, and ``smooth_direction=False``. DM-AT (Wang et al. 2023) is
    this on real and generated images, with ``clean_first``, ``label_smoothing=0.1`` and beta 5.

    Args:
        attack: PGD settings or a schedule of them; it maximises the KL divergence.
        beta: >= 0, the weight of robustness.
        label_smoothing: of the clean cross-entropy, in [0, 1), over all classes as in torch.
        smooth_direction: smooth labels in AWP's direction pass too.
        clean_first: order of the forward passes.
        second_view_weight: weight of the second view's KL term; None: one view.

    Returns:
        The method.

    Raises:
        ValueError: options out of range.
    """
    check_number("beta", beta)
    check_label_smoothing(label_smoothing)

    def outer(
        clean_BC: Tensor, adversarial_BC: Tensor, batch: Batch, context: StepContext
    ) -> dict[str, Tensor]:
        smoothing = smoothing_in(context, label_smoothing, smooth_direction)
        divergence = kl_loss(adversarial_BC, clean_BC, mask=batch.mask, reduction="sum")
        return {
            "clean_ce": hard_cross_entropy(clean_BC, batch, context, smoothing),
            "robust": beta * divergence / context.num_items,
        }

    return AdversarialTraining(
        attack, kl_inner, outer, clean_first=clean_first, second_view_weight=second_view_weight
    )


def mart(attack: PGDSettings | AttackSchedule, *, beta: float = 5.0) -> AdversarialTraining:
    """Build MART: boosted CE(adversarial) + beta (1 - p_y) KL(clean, adversarial) (Wang 2020).

    ``dkl.losses.robust.mart_loss`` has the formula; gradients go through every part of it. Clean
    images are forwarded first, as published.

    Args:
        attack: PGD settings or a schedule of them; it maximises the cross-entropy.
        beta: >= 0, the paper's lambda (published: 5 and 6).

    Returns:
        The method.

    Raises:
        ValueError: a negative beta; from the loss, labels that are mixed.
    """
    check_number("beta", beta)

    def outer(
        clean_BC: Tensor, adversarial_BC: Tensor, batch: Batch, context: StepContext
    ) -> dict[str, Tensor]:
        if batch.targets is not None:
            raise ValueError(
                "MART compares one right class with the best wrong one, and mixed labels (CutMix) "
                "have several right ones: leave CutMix out, or train with another method"
            )
        counted: dict[str, Any] = {"mask": batch.mask, "reduction": "sum"}
        boosted = boosted_cross_entropy(adversarial_BC, batch.labels, **counted)
        weighted = misclassification_weighted_kl(adversarial_BC, clean_BC, batch.labels, **counted)
        return {
            "adversarial_ce": boosted / context.num_items,
            "robust": beta * weighted / context.num_items,
        }

    return AdversarialTraining(attack, cross_entropy_inner, outer, clean_first=True)


def ikl_at(
    attack: PGDSettings | AttackSchedule,
    num_classes: int,
    *,
    inner: str = "loss",
    class_weights: bool = True,
    weight_temperature: float = 4.0,
    gamma: float | None = None,
    label_smoothing: float = 0.0,
    smooth_direction: bool = True,
    clean_first: bool = False,
    second_view_weight: float | None = None,
    **options: Any,
) -> AdversarialTraining:
    """Build IKL-AT: CE(clean) + IKL(target = clean, input = adversarial); GKL-AT with gamma.

    The steps of the paper's ablation are ``break_asymmetry`` (BA) and ``class_weights`` (GI), each
    on or off by itself; with both off this is the decoupled KL loss, which at weights and
    temperature 1 trains exactly as TRADES with beta 1.

    Args:
        attack: PGD settings or a schedule of them.
        num_classes: C.
        inner: "loss" maximises the loss itself with both weights 1 and gamma 1 (published for
            CIFAR-100), "kl" the KL divergence (published for CIFAR-10).
        class_weights: class-wise global information (GI); False: weights softmax(clean).
        weight_temperature: tau of the class table.
        gamma: power of the weights (GKL); None for IKL.
        label_smoothing: of the clean cross-entropy, in [0, 1), over all classes as in torch.
        smooth_direction: smooth labels in AWP's direction pass too.
        clean_first: order of the forward passes.
        second_view_weight: weight of the second view's robust loss; None: one view. Both views use
            the table's rows, which are means over the basic one.
        options: ``mse_weight``, ``ce_weight``, ``temperature``, ``break_asymmetry`` of the loss.

    Returns:
        The method; its class table is ``method.term.statistics``.

    Raises:
        ValueError: an unknown inner objective, or options out of range.
    """
    if inner not in ("loss", "kl"):
        raise ValueError(f"inner must be 'loss' or 'kl', got {inner!r}")
    check_label_smoothing(label_smoothing)
    term = DecoupledTerm(
        num_classes,
        class_weights=class_weights,
        weight_temperature=weight_temperature,
        gamma=gamma,
        **options,
    )

    def loss_inner(adversarial_BC: Tensor, clean_BC: Tensor, labels: Tensor) -> Tensor:
        source = term.weight_source(labels)
        values_B: Tensor = ikl_loss(adversarial_BC, clean_BC, reduction="none", **source)
        return values_B

    def outer(
        clean_BC: Tensor, adversarial_BC: Tensor, batch: Batch, context: StepContext
    ) -> dict[str, Tensor]:
        smoothing = smoothing_in(context, label_smoothing, smooth_direction)
        return {
            "clean_ce": hard_cross_entropy(clean_BC, batch, context, smoothing),
            "robust": term(adversarial_BC, clean_BC, batch, context),
        }

    objective = loss_inner if inner == "loss" else kl_inner
    return AdversarialTraining(
        attack,
        objective,
        outer,
        term=term,
        clean_first=clean_first,
        second_view_weight=second_view_weight,
    )
