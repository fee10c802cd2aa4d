"""Section ``method``, the adversarial ones: attack, objective and weights of each."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from dkl.config.base import (
    Count,
    NonNegativeNumber,
    Norm,
    Number,
    PositiveNumber,
    Problem,
    Section,
    epsilon_problems,
)
from dkl.config.data import ModelSettings


def _check_ramp(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is None or value == "all" or is_count:
        return value
    raise PydanticCustomError("ramp", 'must be a number of epochs >= 1, "all" or null')


Ramp = Annotated[int | Literal["all"] | None, BeforeValidator(_check_ramp)]
LabelSmoothing = Annotated[Number, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Numbers = Annotated[tuple[PositiveNumber, ...], Field(strict=False, min_length=1)]


class AttackSettings(Section):
    """The attack that training images go through.

    Args:
        norm: the norm that bounds the perturbation.
        eps: its bound, for pixels in [0, 1]; "8/255" is understood.
        num_steps: ascent steps; null when ``budget`` decides.
        step_size: length of a step, in the units of ``eps``; null when ``budget`` decides.
        random_start: "uniform" in the ball, "gaussian" of deviation 0.001, or "none".
        batch_norm: batch-norm mode while attacking: running statistics ("eval"), statistics of the
            batch ("batch-stats"), or those with the running ones updated as well ("train").
        epsilon_ramp_epochs: eps grows linearly over this many first epochs, or over "all".
        budget: published step schedules, relative to the eps of the epoch: "low" 2 steps of eps,
            "high" 5 steps of eps/2, "high_intended" 2, 3, 4, 5 steps in the quarters of training.
    """

    norm: Norm = "Linf"
    eps: NonNegativeNumber
    num_steps: Count | None = None
    step_size: PositiveNumber | None = None
    random_start: Literal["none", "uniform", "gaussian"] = "gaussian"
    batch_norm: Literal["eval", "train", "batch-stats"] = "eval"
    epsilon_ramp_epochs: Ramp = None
    budget: Literal["low", "high", "high_intended"] | None = None

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        yield from epsilon_problems("eps", self.norm, self.eps)
        for key in ("num_steps", "step_size"):
            given = getattr(self, key) is not None
            if given and self.budget is not None:
                yield key, f'budget "{self.budget}" decides it; set one of the two to null'
            if not given and self.budget is None:
                yield key, 'needed when there is no budget (or set budget: "low" or "high")'


class PGDAT(Section):
    """Adversarial training on cross-entropy: CE(z(x'), y)."""

    kind: Literal["pgd_at"]
    attack: AttackSettings
    label_smoothing: LabelSmoothing = 0.0


class TRADES(Section):
    """CE(z(x), y) + beta KL(p(x) || p(x')); with AWP, ramp and budget also ACAT; DM-AT.

    Args:
        attack: the attack of training images.
        beta: weight of the KL term.
        label_smoothing: of the clean cross-entropy.
        smooth_direction: the direction pass of AWP smooths labels too; ACAT does not.
        clean_first: forward the clean images before the adversarial ones.
        second_view_weight: weight of the KL term on ``data.views``' one view; null without views.
    """

    kind: Literal["trades"]
    attack: AttackSettings
    beta: NonNegativeNumber = 6.0
    label_smoothing: LabelSmoothing = 0.0
    smooth_direction: bool = True
    clean_first: bool = False
    second_view_weight: NonNegativeNumber | None = None


class MART(Section):
    """Boosted CE(x') + beta (1 - p_y(x)) KL(p(x) || p(x')): weighs misclassified images more.

    Args:
        attack: the attack of training images; it maximises the cross-entropy.
        beta: weight of the KL term (the paper's lambda).
    """

    kind: Literal["mart"]
    attack: AttackSettings
    beta: NonNegativeNumber = 5.0


class LBGAT(Section):
    """MSE(z(x'), g(x)) + CE(g(x), y) + beta KL(p(x) || p(x')), with a second network g.

    Args:
        attack: the attack of training images; it maximises the KL divergence.
        beta: weight of the KL term; 0 is published as well.
        guide: the natural network g, trained from scratch together with the model.
    """

    kind: Literal["lbgat"]
    attack: AttackSettings
    beta: NonNegativeNumber = 0.0
    guide: ModelSettings = ModelSettings(name="resnet18_cifar", normalize=False)


class LASAT(Section):
    """A strategy network chooses the attack of every image and is trained by REINFORCE.

    Args:
        variant: what the model minimises on the attacked images: "pgd" (smoothed cross-entropy),
            "trades" (CE + beta KL, beta chosen as well) or "awp" (plain cross-entropy).
        norm: of the attacks; Linf only.
        eps: radius of the random start, and of ``project``.
        project: bring attacked images back into the ball of ``eps``; variant "awp" does.
        eps_choices: radii to choose from.
        steps_choices: numbers of steps to choose from.
        step_size_choices: step sizes to choose from.
        beta_choices: weights of the KL term to choose from; variant "trades" only.
        label_smoothing: share of the label's mass that goes to the other classes.
        strategy: the strategy network.
        strategy_lr: its learning rate; it follows the schedule of the model's.
        strategy_momentum: its momentum.
        strategy_weight_decay: its weight decay.
        update_every: steps between its updates.
        reward_robust: weight of the look-ahead model's robust accuracy in the reward.
        reward_clean: weight of its clean accuracy.
        lookahead_steps: steps of the PGD attack that measures robust accuracy.
        lookahead_step_size: their size.
        lookahead_restarts: restarts of that attack.
    """

    kind: Literal["las_at"]
    variant: Literal["pgd", "trades", "awp"] = "pgd"
    norm: Literal["Linf"] = "Linf"
    eps: PositiveNumber = 8 / 255
    project: bool = False
    eps_choices: Numbers = tuple(n / 255 for n in range(3, 16))
    steps_choices: Counts = tuple(range(3, 15))
    step_size_choices: Numbers = tuple(n / 255 for n in range(1, 6))
    beta_choices: Numbers | None = None
    label_smoothing: LabelSmoothing = 0.0
    strategy: ModelSettings = ModelSettings(name="resnet18_cifar", normalize=False)
    strategy_lr: PositiveNumber = 1e-4
    strategy_momentum: NonNegativeNumber = 0.0
    strategy_weight_decay: NonNegativeNumber = 0.0
    update_every: Count = 20
    reward_robust: NonNegativeNumber = 4.0
    reward_clean: NonNegativeNumber = 2.0
    lookahead_steps: Count = 10
    lookahead_step_size: PositiveNumber = 2 / 255
    lookahead_restarts: Count = 2

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        for epsilon in (self.eps, *self.eps_choices):
            yield from epsilon_problems("eps", self.norm, epsilon)
        if self.variant == "trades" and self.beta_choices is None:
            yield "beta_choices", 'needed by variant "trades", such as [5, 6, 7, 8, 9]'
        if self.variant != "trades" and self.beta_choices is not None:
            yield "beta_choices", f'would be ignored by variant "{self.variant}"; set it to null'


class DAJAT(Section):
    """TRADES on the basic and on AutoAugment views, with a batch-norm for each, and their JS term.

    Args:
        attack: the attack of every view; it maximises the KL divergence.
        beta: weight of the KL term.
        js_weight: weight of the Jensen-Shannon divergence of the views' clean predictions.
        label_smoothing: of the clean cross-entropy.
        smooth_direction: the direction pass of AWP smooths labels too.
    """

    kind: Literal["dajat"]
    attack: AttackSettings
    beta: NonNegativeNumber = 9.0
    js_weight: NonNegativeNumber = 2.0
    label_smoothing: LabelSmoothing = 0.0
    smooth_direction: bool = True


class _DecoupledAT(Section):
    """What IKL-AT and GKL-AT share.

    Args:
        attack: the attack of training images.
        mse_weight: weight of the weighted mean squared error on logits (paper's a).
        ce_weight: weight of the soft cross-entropy (paper's b).
        weight_temperature: temperature of the softmax that the weights are made from.
        class_weights: weights are class means of the last epoch (GI), not the sample's own.
        break_asymmetry: the squared error moves both predictions (BA), not the clean one alone.
        inner: what the attack maximises: the loss itself with both weights 1, or KL.
        label_smoothing: of the clean cross-entropy.
        smooth_direction: the direction pass of AWP smooths labels too.
        clean_first: forward the clean images before the adversarial ones.
        second_view_weight: weight of the loss on ``data.views``' one view; null without views.
    """

    attack: AttackSettings
    mse_weight: NonNegativeNumber = 20.0
    ce_weight: NonNegativeNumber = 4.0
    weight_temperature: PositiveNumber = 4.0
    class_weights: bool = True
    break_asymmetry: bool = True
    inner: Literal["loss", "kl"] = "loss"
    label_smoothing: LabelSmoothing = 0.0
    smooth_direction: bool = True
    clean_first: bool = False
    second_view_weight: NonNegativeNumber | None = None

    def problems(self) -> Iterator[Problem]:
        if self.mse_weight == 0 and self.ce_weight == 0:
            yield "mse_weight", "0 beside ce_weight 0 leaves no robust loss; use kind: natural"


class IKLAT(_DecoupledAT):
    """CE(z(x), y) + IKL(z(x'), z(x)); arguments as in ``_DecoupledAT``."""

    kind: Literal["ikl_at"]
    hints: ClassVar = {"gamma": "is the exponent of GKL's weights; use method.kind gkl_at"}


class GKLAT(_DecoupledAT):
    """CE(z(x), y) + GKL(z(x'), z(x)); ``gamma`` is the exponent of the weights."""

    kind: Literal["gkl_at"]
    gamma: NonNegativeNumber = 1.0
