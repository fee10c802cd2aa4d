"""LAS-AT: adversarial training whose attacks a strategy network chooses (Jia et al., 2022).

Shapes: B samples, C classes, H decisions of a strategy.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dkl.attacks import PGDSettings, ThreatModel, attack_mode, per_sample_pgd
from dkl.losses import kl_loss
from dkl.methods.look_ahead import LookAhead, sum_over_processes
from dkl.methods.protocol import Batch, StepContext, StepOutput
from dkl.methods.strategy_policy import StrategyPolicy
from dkl.methods.terms import (
    TrainingMethod,
    check_label_smoothing,
    hard_cross_entropy,
    label_cross_entropy,
    labels_of,
    step_output,
)

Variant = Literal["pgd", "trades", "awp"]

LARGEST_CROSS_ENTROPY = 10.0

# As published for variant "pgd".
EPS_CHOICES = tuple(n / 255 for n in range(3, 16))
STEPS_CHOICES = tuple(range(3, 15))
STEP_SIZE_CHOICES = tuple(n / 255 for n in range(1, 6))


class LASAdversarialTraining(TrainingMethod):
    r"""Train on attacks that a strategy network chooses for every image, and train that network.

    Every image gets a strategy, sampled by inverse CDF from ``context.draw``: radius, steps and
    step size of an attack on the cross-entropy (in every variant, with the model in eval mode), and
    for "trades" the weight of its KL term. The model minimises, over attacked images x',

    .. math:: \text{pgd, awp: } CE_s(z(x'), y) \qquad
        \text{trades: } CE_s(z(x), y) + \beta_i KL(p(x) \| p(x'))

    with 1 - s of the label's mass on y and s / (C - 1) on each other class.

    Every ``update_every`` steps the strategy network learns by REINFORCE from the strategies of
    that step (one attack serves both networks), with the reward

    .. math:: r = \operatorname{clip}(CE(z(x'), y), 0, 10) + w_2\, robust(\hat z) + w_3\,
        clean(\hat z)

    where the look-ahead model z-hat is a copy of the model after one step of SGD (learning rate of
    the step, weight decay 5e-4) on the loss above, and its accuracies are those on the same batch.
    As published there is no baseline and the policy gradient is scaled to a norm of at most 1, so
    that the size of the reward is lost wherever the gradient is longer than that.

    Attack, cross-entropy and accuracies are of eval mode, the step on the copy of train mode. The
    model itself, its buffers and gradients, and the global random generators stay untouched.
    A copy of a compiled model runs uncompiled. Under float16 autocast small gradients of the
    look-ahead step underflow; prefer bfloat16.

    The reward is one number for a batch, so the batch is coupled. Over processes, counts, rewards,
    look-ahead gradients and policy gradients are summed, so that every process keeps the same
    strategy network, and the same one as a single process would where no network has batch-norm.
    When a step has several micro-batches, the strategy network learns from the first one alone,
    before strategies are sampled for the others.

    Use ``las_at`` for settings by number.

    Args:
        policy: the strategy network; its decisions are "eps", "steps", "step_size", and "beta" for
            "trades".
        lookahead: how the look-ahead model is judged.
        variant: "pgd", "trades" or "awp".
        start_eps: radius of the random start.
        project_eps: radius of the projection after the attack; None for none.
        label_smoothing: s in [0, 1).
        strategy_lr: learning rate of the strategy network, times ``context.rate_factor``.
        update_every: steps between its updates, the first of which is at step 0.
    """

    reward: Tensor

    def __init__(
        self,
        policy: StrategyPolicy,
        lookahead: LookAhead,
        *,
        variant: Variant,
        start_eps: float,
        project_eps: float | None,
        label_smoothing: float,
        strategy_lr: float,
        update_every: int,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.lookahead = lookahead
        self.variant = variant
        self.start_eps = start_eps
        self.project_eps = project_eps
        self.label_smoothing = label_smoothing
        self.strategy_lr = strategy_lr
        self.update_every = update_every
        self.register_buffer("reward", torch.zeros(()))
        self._prepared_step: int | None = None

    @property
    def couples_batch(self) -> bool:
        """The reward is one number for all samples of a batch."""
        return True

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Sample strategies and attack; when it is due, train the strategy network."""
        actions_BH = self.policy.sample(batch.images, context.draw)
        strategy = self.policy.values(actions_BH, batch.images)
        labels = labels_of(batch)
        adversarial = per_sample_pgd(
            model,
            batch.images,
            lambda logits_BC: label_cross_entropy(logits_BC, labels),
            start_eps=self.start_eps,
            eps_B=strategy["eps"],
            num_steps_B=strategy["steps"].long(),
            step_size_B=strategy["step_size"],
            project_eps=self.project_eps,
            draw=context.draw,
        )
        named = {f"strategy_{name}": values_B for name, values_B in strategy.items()}
        prepared = replace(batch, extras={**batch.extras, "adversarial": adversarial, **named})
        is_first = context.step != self._prepared_step
        if is_first and context.step % self.update_every == 0 and context.phase == "update":
            self._update_policy(model, prepared, actions_BH, context)
        self._prepared_step = context.step
        return prepared

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Return the variant's loss of the attacked images."""
        self._prepared_step = None
        terms, logits_BC = self._terms(model, batch, context)
        output = step_output(terms, logits_BC, batch, context)
        parts = {
            name: batch.extras[name].masked_fill(~batch.mask, 0.0).sum()
            for name in (f"strategy_{choice}" for choice in self.policy.choices)
        }
        parts["reward"] = self.reward * output.counts
        return replace(output, parts={**output.parts, **parts})

    def _terms(
        self, model: nn.Module, batch: Batch, context: StepContext
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the named terms of the loss, and the logits that training accuracy is of."""
        adversarial_BC = model(batch.extras["adversarial"])
        if self.variant != "trades":
            smoothing = self._torch_smoothing(adversarial_BC.shape[1])
            ce = hard_cross_entropy(adversarial_BC, batch, context, smoothing)
            return {"adversarial_ce": ce}, adversarial_BC
        clean_BC = model(batch.images)
        smoothing = self._torch_smoothing(clean_BC.shape[1])
        divergence_B = kl_loss(adversarial_BC, clean_BC, mask=batch.mask, reduction="none")
        weighted_B = batch.extras["strategy_beta"] * divergence_B
        terms = {
            "clean_ce": hard_cross_entropy(clean_BC, batch, context, smoothing),
            "robust": weighted_B.sum() / context.num_items,
        }
        return terms, clean_BC

    def _torch_smoothing(self, num_classes: int) -> float:
        """Return the smoothing of torch, which gives the true class a part of its share too."""
        if self.label_smoothing == 0:
            return 0.0
        smoothing = self.label_smoothing * num_classes / max(num_classes - 1, 1)
        if smoothing > 1:
            raise ValueError(
                f"label_smoothing {self.label_smoothing:g} leaves less for the true one of "
                f"{num_classes} classes than for the others; use at most "
                f"{(num_classes - 1) / num_classes:g}"
            )
        return smoothing

    def _update_policy(
        self, model: nn.Module, batch: Batch, actions_BH: Tensor, context: StepContext
    ) -> None:
        """Look ahead, and reinforce the strategies of a batch by what it shows; collective."""
        count = sum_over_processes(batch.mask.sum())[0].clamp(min=1)
        over_batch = replace(context, num_items=count)
        with attack_mode(model), torch.no_grad():
            ce_B = label_cross_entropy(model(batch.extras["adversarial"]), labels_of(batch))

        def loss_of(network: nn.Module) -> Tensor:
            terms, _ = self._terms(network, batch, over_batch)
            return torch.stack([*terms.values()]).sum()

        ahead = self.lookahead.step(model, loss_of, context.learning_rate)
        is_robust_B, is_clean_B = self.lookahead.judge(ahead, batch, context.draw)
        rows = torch.stack([ce_B, is_robust_B.to(ce_B), is_clean_B.to(ce_B)])
        sums = sum_over_processes(rows.masked_fill(~batch.mask, 0.0).sum(1))
        ce, robust, clean = (sums / count).unbind()
        weights = self.lookahead.reward_robust, self.lookahead.reward_clean
        reward = ce.clamp(0.0, LARGEST_CROSS_ENTROPY) + weights[0] * robust + weights[1] * clean
        self.reward.copy_(torch.where(reward.isfinite(), reward, self.reward))
        self.policy.reinforce(
            batch.images,
            actions_BH,
            reward,
            mask=batch.mask,
            num_items=count,
            lr=self.strategy_lr * context.rate_factor,
        )


def las_at(
    strategy: nn.Module,
    *,
    variant: Variant = "pgd",
    norm: str = "Linf",
    eps: float | str = 8 / 255,
    project: bool = False,
    eps_choices: Sequence[float | str] = EPS_CHOICES,
    steps_choices: Sequence[int] = STEPS_CHOICES,
    step_size_choices: Sequence[float | str] = STEP_SIZE_CHOICES,
    beta_choices: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    strategy_lr: float = 1e-4,
    strategy_momentum: float = 0.0,
    strategy_weight_decay: float = 0.0,
    update_every: int = 20,
    reward_robust: float = 4.0,
    reward_clean: float = 2.0,
    lookahead_steps: int = 10,
    lookahead_step_size: float | str = 2 / 255,
    lookahead_restarts: int = 2,
) -> LASAdversarialTraining:
    """Build LAS-AT in its three variants (Jia et al., CVPR 2022).

    Args:
        strategy: clean images to one logit for every option of every decision, in the order eps,
            steps, step size, beta; it is trained here, not by the loop's optimiser.
        variant: "pgd": (smoothed) cross-entropy; "trades": CE + beta KL with a chosen beta; "awp":
            as "pgd" with ``project``, for a loop that perturbs the weights.
        norm: "Linf".
        eps: radius of the random start, of ``project`` and of the look-ahead attack.
        project: bring attacked images back into the ball of ``eps``; "awp" always does.
        eps_choices: radii, in [0, 1]; "8/255" is understood.
        steps_choices: numbers of steps, at least 1.
        step_size_choices: step sizes, in [0, 1].
        beta_choices: weights of the KL term, >= 0; for "trades" alone.
        label_smoothing: s in [0, 1): 1 - s on the label, s / (C - 1) on each other class. torch's
            ``label_smoothing`` is s C / (C - 1).
        strategy_lr: learning rate of the strategy network; follows the schedule of the model's.
        strategy_momentum: its momentum, in [0, 1).
        strategy_weight_decay: its weight decay, >= 0.
        update_every: steps between its updates.
        reward_robust: weight of the look-ahead model's robust accuracy in the reward.
        reward_clean: weight of its clean accuracy.
        lookahead_steps: steps of the PGD attack that measures robust accuracy.
        lookahead_step_size: their size.
        lookahead_restarts: its restarts, at least 1.

    Returns:
        The method.

    Raises:
        ValueError: settings that make no sense or do not go together.

    Example:
        >>> strategy = nn.Sequential(nn.Flatten(), nn.Linear(16, 13 + 12 + 5))
        >>> method = las_at(strategy, label_smoothing=0.3)
        >>> any(parameter.requires_grad for parameter in method.parameters())
        False
    """
    _check(variant, norm, beta_choices, label_smoothing, update_every, lookahead_restarts)
    threat = ThreatModel("Linf", eps)
    choices: dict[str, Sequence[float]] = {
        "eps": [threat.check_length("eps_choices", value) for value in eps_choices],
        "steps": [_whole("steps_choices", value) for value in steps_choices],
        "step_size": [
            threat.check_length("step_size_choices", value) for value in step_size_choices
        ],
    }
    if beta_choices is not None:
        choices["beta"] = [float(value) for value in beta_choices]
    policy = StrategyPolicy(
        strategy, choices, momentum=strategy_momentum, weight_decay=strategy_weight_decay
    )
    attack = PGDSettings(threat, lookahead_steps, lookahead_step_size, "uniform", "eval")
    return LASAdversarialTraining(
        policy,
        LookAhead(attack, lookahead_restarts, reward_robust, reward_clean),
        variant=variant,
        start_eps=threat.eps,
        project_eps=threat.eps if project or variant == "awp" else None,
        label_smoothing=label_smoothing,
        strategy_lr=strategy_lr,
        update_every=update_every,
    )


def _check(
    variant: str,
    norm: str,
    beta_choices: Sequence[float] | None,
    label_smoothing: float,
    update_every: int,
    restarts: int,
) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f'variant must be "pgd", "trades" or "awp", got {variant!r}')
    if norm != "Linf":
        raise ValueError(f'LAS-AT is defined for norm "Linf", got {norm!r}')
    if variant == "trades" and not beta_choices:
        raise ValueError('variant "trades" needs beta_choices, such as (5, 6, 7, 8, 9)')
    if variant != "trades" and beta_choices is not None:
        raise ValueError(f'beta_choices would be ignored by variant "{variant}"; leave it out')
    if beta_choices is not None and not all(value >= 0 for value in beta_choices):
        raise ValueError(f"beta_choices must be >= 0, got {tuple(beta_choices)}")
    check_label_smoothing(label_smoothing)
    _whole("update_every", update_every)
    _whole("lookahead_restarts", restarts)


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} takes whole numbers of at least 1, got {value!r}")
    return value
