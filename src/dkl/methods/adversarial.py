"""Adversarial training: an inner objective finds the images, an outer loss learns from them.

PGD-AT, TRADES, IKL-AT and GKL-AT are settings of one method. Shapes: B samples, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkl.attacks import PGDSettings, attack_mode
from dkl.losses import ikl_loss, kl_loss
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import DecoupledTerm, TrainingMethod, hard_cross_entropy, step_output

InnerObjective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(adversarial_BC, clean_BC, labels_B) -> [B], to be maximised by the attack."""

OuterLoss = Callable[[Tensor, Tensor, Batch, StepContext], Mapping[str, Tensor]]
"""(clean_BC, adversarial_BC, batch, context) -> named terms whose sum is the loss."""

AttackSchedule = Callable[[int, int], PGDSettings]
"""(epoch, num_epochs) -> the attack of that 0-based epoch."""


def cross_entropy_inner(adversarial_BC: Tensor, clean_BC: Tensor, labels_B: Tensor) -> Tensor:  # noqa: ARG001
    """Objective of PGD-AT: cross-entropy of the adversarial image."""
    return F.cross_entropy(adversarial_BC, labels_B, reduction="none")


def kl_inner(adversarial_BC: Tensor, clean_BC: Tensor, labels_B: Tensor) -> Tensor:  # noqa: ARG001
    """Objective of TRADES: KL divergence of adversarial from clean prediction."""
    return kl_loss(adversarial_BC, clean_BC, reduction="none")


class AdversarialTraining(TrainingMethod):
    """Train on images that an attack finds anew at every step.

    Args:
        attack: PGD settings, or a schedule of them over epochs.
        inner: what the attack maximises.
        outer: the loss of clean and adversarial logits.
        term: the decoupled loss inside ``outer`` when there is one; its class table is fed with the
            clean logits of the update pass and committed at the end of every epoch.
        uses_clean: False when neither objective needs the clean image (PGD-AT): it is then not
            forwarded, and training accuracy is that of adversarial images.
        clean_first: order of the two forward passes, which batch-norm's running statistics see.
            The published TRADES-AWP and IKL code forwards the adversarial images first.
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
    ) -> None:
        super().__init__(term)
        self.attack = attack
        self.inner = inner
        self.outer = outer
        self.uses_clean = uses_clean
        self.clean_first = clean_first

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Find the adversarial images; clean logits are computed once for the whole attack."""
        attack = self.attack
        settings = (
            attack if isinstance(attack, PGDSettings) else attack(context.epoch, context.num_epochs)
        )
        with attack_mode(model, settings.batch_norm):
            with torch.no_grad():
                clean_BC = model(batch.images) if self.uses_clean else batch.images.new_empty(0)

            def objective(adversarial_BC: Tensor) -> Tensor:
                return self.inner(adversarial_BC, clean_BC, batch.labels)

            adversarial = settings.attack(model, batch.images, objective, draw=context.draw)
        return replace(batch, extras={**batch.extras, "adversarial": adversarial})

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the outer loss, and feed the class statistics on the update pass."""
        adversarial = batch.extras["adversarial"]
        if not self.uses_clean:
            clean_BC = adversarial_BC = model(adversarial)
        elif self.clean_first:
            clean_BC, adversarial_BC = model(batch.images), model(adversarial)
        else:
            adversarial_BC = model(adversarial)
            clean_BC = model(batch.images)
        terms = self.outer(clean_BC, adversarial_BC, batch, context)
        if self.term is not None:
            self.term.observe(clean_BC, batch, context)
        return step_output(terms, clean_BC, batch, context)


def pgd_at(
    attack: PGDSettings | AttackSchedule, *, label_smoothing: float = 0.0
) -> AdversarialTraining:
    """Build PGD adversarial training: cross-entropy on PGD images (Madry et al. 2018).

    Args:
        attack: PGD settings or a schedule of them; it maximises the cross-entropy.
        label_smoothing: in [0, 1).

    Returns:
        The method.
    """

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
    attack: PGDSettings | AttackSchedule, *, beta: float = 6.0, clean_first: bool = False
) -> AdversarialTraining:
    """Build TRADES: CE(clean) + beta KL(clean, adversarial), gradients through both (Zhang 2019).

    Args:
        attack: PGD settings or a schedule of them; it maximises the KL divergence.
        beta: >= 0, the weight of robustness.
        clean_first: order of the forward passes.

    Returns:
        The method.
    """

    def outer(
        clean_BC: Tensor, adversarial_BC: Tensor, batch: Batch, context: StepContext
    ) -> dict[str, Tensor]:
        divergence = kl_loss(adversarial_BC, clean_BC, mask=batch.mask, reduction="sum")
        return {
            "clean_ce": hard_cross_entropy(clean_BC, batch, context),
            "robust": beta * divergence / context.num_items,
        }

    return AdversarialTraining(attack, kl_inner, outer, clean_first=clean_first)


def ikl_at(
    attack: PGDSettings | AttackSchedule,
    num_classes: int,
    *,
    inner: str = "loss",
    class_weights: bool = True,
    weight_temperature: float = 4.0,
    gamma: float | None = None,
    clean_first: bool = False,
    **options: Any,
) -> AdversarialTraining:
    """Build IKL-AT: CE(clean) + IKL(target = clean, input = adversarial); GKL-AT with gamma.

    Args:
        attack: PGD settings or a schedule of them.
        num_classes: C.
        inner: "loss" maximises the loss itself with both weights 1 and gamma 1 (published for
            CIFAR-100), "kl" the KL divergence (published for CIFAR-10).
        class_weights: class-wise global information (GI); False: weights softmax(clean).
        weight_temperature: tau of the class table.
        gamma: power of the weights (GKL); None for IKL.
        clean_first: order of the forward passes.
        options: ``mse_weight``, ``ce_weight``, ``temperature``, ``break_asymmetry`` of the loss.

    Returns:
        The method; its class table is ``method.term.statistics``.

    Raises:
        ValueError: an unknown inner objective.
    """
    if inner not in ("loss", "kl"):
        raise ValueError(f"inner must be 'loss' or 'kl', got {inner!r}")
    term = DecoupledTerm(
        num_classes,
        class_weights=class_weights,
        weight_temperature=weight_temperature,
        gamma=gamma,
        **options,
    )

    def loss_inner(adversarial_BC: Tensor, clean_BC: Tensor, labels_B: Tensor) -> Tensor:
        source = term.weight_source(labels_B)
        values_B: Tensor = ikl_loss(adversarial_BC, clean_BC, reduction="none", **source)
        return values_B

    def outer(
        clean_BC: Tensor, adversarial_BC: Tensor, batch: Batch, context: StepContext
    ) -> dict[str, Tensor]:
        return {
            "clean_ce": hard_cross_entropy(clean_BC, batch, context),
            "robust": term(adversarial_BC, clean_BC, batch, context),
        }

    objective = loss_inner if inner == "loss" else kl_inner
    return AdversarialTraining(attack, objective, outer, term=term, clean_first=clean_first)
