"""LBGAT: a natural network, trained along, shows the robust one where its logits belong.

Source: Cui, Liu, Wang and Jia, "Learnable Boundary Guided Adversarial Training", ICCV 2021.
Shapes: B samples, C classes.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dkl.attacks import PGDSettings, attack_mode
from dkl.losses import kl_loss
from dkl.losses.rows import check_number, compute_dtype
from dkl.methods.adversarial import AttackSchedule, adversarial_images, kl_inner
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.terms import TrainingMethod, hard_cross_entropy, step_output


class LBGAT(TrainingMethod):
    """Train a model f on adversarial images against a guide g, which learns from clean images.

        mean_{ij} (f(x')_j - g(x)_j)^2  +  CE(g(x), y)  +  beta KL(p_f(x), p_f(x'))

    The squared error is the mean over samples and classes and reaches both networks; f learns the
    labels from the guide alone. The attack sees f only. The guide is a submodule: its weights are
    saved with the method and trained by the optimiser that trains the model, and it is in train
    mode throughout. A direction pass of weight perturbation, which perturbs f alone, takes the
    guide as a constant and leaves its batch-norm statistics as they are.

    Training accuracy is that of f on clean images, which are forwarded after the adversarial ones
    even where beta is 0, so that batch-norm's running statistics know both.

    Args:
        attack: PGD settings or a schedule of them; it maximises KL(p_f(x), p_f(x')).
        guide: the natural network, with the classes of the model.
        beta: >= 0, weight of the KL term (published: 0, 6 and 9).

    Raises:
        ValueError: a negative beta.
    """

    def __init__(
        self, attack: PGDSettings | AttackSchedule, guide: nn.Module, *, beta: float = 0.0
    ) -> None:
        super().__init__()
        check_number("beta", beta)
        self.attack = attack
        self.guide = guide
        self.beta = beta

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Attack the model."""
        (adversarial,) = adversarial_images(model, [batch], kl_inner, self.attack, context)
        return replace(batch, extras={**batch.extras, "adversarial": adversarial})

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return squared error, the guide's cross-entropy and, where beta > 0, the KL term."""
        adversarial_BC = model(batch.extras["adversarial"])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.beta > 0):
            clean_BC = model(batch.images)
        guide_BC = self._guide_logits(batch, context)
        error_B = _mean_squares(adversarial_BC, guide_BC, batch.mask)
        terms = {
            "guide_mse": error_B.sum() / context.num_items,
            "guide_ce": hard_cross_entropy(guide_BC, batch, context),
        }
        if self.beta > 0:
            divergence = kl_loss(adversarial_BC, clean_BC, mask=batch.mask, reduction="sum")
            terms["robust"] = self.beta * divergence / context.num_items
        return step_output(terms, clean_BC, batch, context)

    def _guide_logits(self, batch: Batch, context: StepContext) -> Tensor:
        # The loop puts the model into train mode, and knows nothing of the guide.
        self.guide.train()
        if context.phase == "direction":
            with attack_mode(self.guide, "batch-stats"), torch.no_grad():
                constant_BC: Tensor = self.guide(batch.images)
            return constant_BC
        guide_BC: Tensor = self.guide(batch.images)
        return guide_BC


def _mean_squares(first_BC: Tensor, second_BC: Tensor, mask_B: Tensor) -> Tensor:
    """Return the mean over classes of the squared difference of each row that counts, else 0."""
    if first_BC.shape != second_BC.shape:
        raise ValueError(
            "model and guide must give logits of one shape; got "
            f"{list(first_BC.shape)} and {list(second_BC.shape)}: build both for the same classes"
        )
    dtype = compute_dtype(first_BC, second_BC)
    difference_BC = first_BC.to(dtype) - second_BC.to(dtype)
    return difference_BC.masked_fill(~mask_B[:, None], 0.0).square().mean(1)


def lbgat(attack: PGDSettings | AttackSchedule, guide: nn.Module, *, beta: float = 0.0) -> LBGAT:
    """Build LBGAT: MSE(f(x'), g(x)) + CE(g(x), y) + beta KL, with a guide g trained along.

    Args:
        attack: PGD settings or a schedule of them; it maximises the KL divergence of the model.
        guide: the natural network g, with the classes of the model; trained from where it stands.
        beta: >= 0, weight of the KL term.

    Returns:
        The method; ``method.guide`` is trained together with the model.

    Raises:
        ValueError: a negative beta.
    """
    return LBGAT(attack, guide, beta=beta)
