"""A network that chooses an attack strategy for every image, trained by policy gradients.

Shapes: B images, H decisions, K_h options of decision h. One categorical distribution per decision;
their logits are columns of one output, which is the same as a linear head for each on one backbone.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dkl.attacks import Draw, attack_mode
from dkl.methods.look_ahead import sum_over_processes

GRADIENT_NORM = 1.0


class StrategyPolicy(nn.Module):
    """Categorical choices made by a network that sees the image, and their REINFORCE update.

    The network is always in train mode: its batch-norm layers use the statistics of the batch,
    when a choice is sampled and when the policy learns from it, so that both are one policy. Its
    running statistics follow the batches of the updates. It computes without autocast.

    The parameters do not require gradients, so that no other optimiser takes them; the momentum of
    the update is a buffer, so that a checkpoint holds it.

    Args:
        network: images [B, ...] to logits [B, K_1 + ... + K_H]; its parameters share one dtype.
        choices: the options of each decision, in the order of the logits.
        momentum: of the update, in [0, 1).
        weight_decay: of the update, >= 0.

    Raises:
        ValueError: if a decision has no options, the network no parameters, or a setting is out of
            range.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
        >>> policy = StrategyPolicy(network, {"eps": (0.1, 0.2), "steps": (1, 2, 3)})
        >>> policy.sample(torch.rand(6, 1, 2, 2)).shape
        torch.Size([6, 2])
    """

    momentum: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        choices: Mapping[str, Sequence[float]],
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        for name, options in choices.items():
            if not options:
                raise ValueError(f"{name}_choices needs at least one option")
        if not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(
                "the strategy network's optimiser needs momentum in [0, 1) and weight decay >= 0, "
                f"got {momentum} and {weight_decay}"
            )
        parameters = [parameter.detach().flatten() for parameter in network.parameters()]
        if not parameters:
            raise ValueError("the strategy network has no parameters, so it could not learn")
        self.network = network.requires_grad_(False)
        self.choices = {name: tuple(options) for name, options in choices.items()}
        self.momentum_factor = momentum
        self.weight_decay = weight_decay
        state = torch.zeros_like(torch.cat(parameters)) if momentum > 0 else None
        self.register_buffer("momentum", state)

    @torch.no_grad()
    def sample(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """Return the index of one option for every decision and image; changes nothing.

        Args:
            images: [B, ...] clean images.
            draw: uniform numbers per image; None takes torch's generator.

        Returns:
            [B, H] int64.

        Raises:
            ValueError: if the network does not return one logit per option.
        """
        with attack_mode(self.network, "batch-stats"):
            logits_BK = self._logits(self.network, images)
        num_heads = len(self.choices)
        if draw is None:
            uniform_BH = torch.rand(
                len(images), num_heads, device=images.device, dtype=logits_BK.dtype
            )
        else:
            uniform_BH = draw(num_heads).to(logits_BK)
        heads = zip(self._split(logits_BK), uniform_BH.unbind(1), strict=True)
        return torch.stack([_inverse_cdf(head_BK, row_B) for head_BK, row_B in heads], dim=1)

    def values(self, actions_BH: Tensor, like: Tensor) -> dict[str, Tensor]:
        """Return the chosen options of every decision, [B] each, with a tensor's dtype and device.

        Example:
            >>> policy = StrategyPolicy(nn.Linear(2, 2), {"eps": (0.5, 0.25)})
            >>> policy.values(torch.tensor([[1], [0]]), torch.zeros(()))
            {'eps': tensor([0.2500, 0.5000])}
        """
        return {
            name: torch.tensor(options, dtype=like.dtype, device=like.device)[index_B]
            for (name, options), index_B in zip(
                self.choices.items(), actions_BH.unbind(1), strict=True
            )
        }

    def log_probability(self, logits_BK: Tensor, actions_BH: Tensor) -> Tensor:
        """Return the sum over decisions of log pi(action | image), [B].

        Example:
            >>> policy = StrategyPolicy(nn.Linear(2, 2), {"eps": (0.5, 0.25)})
            >>> policy.log_probability(torch.zeros(1, 2), torch.tensor([[1]])).exp()
            tensor([0.5000])
        """
        rows = [
            F.cross_entropy(head_BK, index_B, reduction="none")
            for head_BK, index_B in zip(self._split(logits_BK), actions_BH.unbind(1), strict=True)
        ]
        return -torch.stack(rows).sum(0)

    def reinforce(
        self,
        images: Tensor,
        actions_BH: Tensor,
        reward: Tensor,
        *,
        mask: Tensor,
        num_items: Tensor,
        lr: float,
    ) -> None:
        r"""Take one step of REINFORCE (Williams, 1992) without a baseline; collective.

        .. math:: g = \nabla\, \big( -r \sum_h \operatorname{mean}_i \log \pi_h(a_{ih} | x_i) \big)

        summed over processes, scaled to a norm of at most 1, then SGD with weight decay and
        momentum. If reward or gradient are not finite, parameters and momentum stay as they are.

        Args:
            images: [B, ...] clean images that the actions were sampled for.
            actions_BH: [B, H] what ``sample`` returned.
            reward: 0-dim; r, the same in every process.
            mask: [B] bool; rows that count.
            num_items: 0-dim; rows that count in all processes.
            lr: learning rate.
        """
        named = dict(self.network.named_parameters())
        self.network.train()
        with torch.enable_grad():
            # Other views of the same memory, so that the parameters themselves need no gradients.
            views = {name: p.detach().requires_grad_() for name, p in named.items()}
            logits_BK = self._logits(self.network, images, views)
            rows_B = self.log_probability(logits_BK, actions_BH).masked_fill(~mask, 0.0)
            loss = -(reward.detach().to(rows_B) * rows_B.sum() / num_items)
            gradients = torch.autograd.grad(loss, list(views.values()), allow_unused=True)
        filled = [
            torch.zeros_like(p) if gradient is None else gradient
            for p, gradient in zip(named.values(), gradients, strict=True)
        ]
        self._descend(list(named.values()), sum_over_processes(*filled), reward, lr)

    @torch.no_grad()
    def _descend(
        self, parameters: list[nn.Parameter], gradient: Tensor, reward: Tensor, lr: float
    ) -> None:
        """Clip, add weight decay, update the momentum, move the parameters; all of it or none."""
        norm = gradient.norm()
        is_finite = torch.isfinite(norm) & torch.isfinite(reward)
        weights = torch.cat([parameter.flatten() for parameter in parameters])
        step = gradient * (GRADIENT_NORM / (norm + 1e-6)).clamp(max=1.0)
        step = step + self.weight_decay * weights
        if self.momentum is not None:
            step = self.momentum_factor * self.momentum + step
            self.momentum.copy_(torch.where(is_finite, step, self.momentum))
        moved = torch.where(is_finite, weights - lr * step, weights)
        pieces = torch.split(moved, [parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))

    def _logits(
        self, network: nn.Module, images: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            if parameters is None:
                logits_BK: Tensor = network(images)
            else:
                logits_BK = functional_call(network, dict(parameters), (images,))
        expected = (len(images), sum(map(len, self.choices.values())))
        if tuple(logits_BK.shape) != expected:
            sizes = " + ".join(f"{len(options)} ({n})" for n, options in self.choices.items())
            raise ValueError(
                f"the strategy network has to return one logit for every option, {sizes}: shape "
                f"{expected}; it returned {tuple(logits_BK.shape)}. Build it with "
                f"num_classes={expected[1]}."
            )
        return logits_BK

    def _split(self, logits_BK: Tensor) -> tuple[Tensor, ...]:
        return torch.split(logits_BK, [len(options) for options in self.choices.values()], dim=1)


def _inverse_cdf(logits_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the first index whose cumulative probability exceeds the uniform number."""
    probs_BK = logits_BK.softmax(dim=1)
    # Sums over all earlier options; cumsum has no deterministic implementation on GPUs.
    earlier_KK = torch.ones_like(probs_BK[:1]).expand(probs_BK.shape[1], -1).triu()
    cumulative_BK = (probs_BK.unsqueeze(2) * earlier_KK).sum(dim=1)
    index_B = (cumulative_BK <= uniform_B.unsqueeze(1)).sum(dim=1)
    # The sum of all probabilities may round to less than the number.
    return index_B.clamp(max=logits_BK.shape[1] - 1)
