"""One training step on a copy of a model, and how well the copy does: what a strategy is worth.

Shapes: B samples, C classes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dkl.attacks import Draw, PGDSettings, attack_mode
from dkl.methods.protocol import Batch
from dkl.methods.terms import label_cross_entropy, labels_of


@dataclass(frozen=True)
class LookAhead:
    """How a model is tried out one step ahead.

    Args:
        attack: PGD on cross-entropy; an image that it flips at any step counts as broken.
        restarts: of the attack, at least 1; the worst one counts.
        reward_robust: weight of the robust accuracy in the reward.
        reward_clean: weight of the clean accuracy.
        weight_decay: of the step.

    Example:
        >>> from dkl.attacks import ThreatModel
        >>> LookAhead(PGDSettings(ThreatModel("Linf", 0.1), 10, 0.025, "uniform")).restarts
        2
    """

    attack: PGDSettings
    restarts: int = 2
    reward_robust: float = 4.0
    reward_clean: float = 2.0
    weight_decay: float = 5e-4

    def step(
        self, model: nn.Module, loss_of: Callable[[nn.Module], Tensor], learning_rate: float
    ) -> nn.Module:
        """Return a copy of a model after one step of SGD; collective.

        A fresh optimiser's first step, whatever its momentum: ``w <- w - lr (g + wd w)``, with the
        gradients summed over processes. Parameters that get no gradient stay. The model itself is
        untouched. The copy of a compiled model runs uncompiled.

        Args:
            model: the bare network, in the mode that the step is to be in.
            loss_of: the loss of a network; this process's share of it.
            learning_rate: lr.
        """
        ahead = copy.deepcopy(model)
        weights = [parameter for parameter in ahead.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_of(ahead), weights, allow_unused=True)
        used = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
        total = sum_over_processes(*(gradient for _, gradient in used))
        pieces = torch.split(total, [weight.numel() for weight, _ in used])
        with torch.no_grad():
            for (weight, _), piece in zip(used, pieces, strict=True):
                decayed = piece.view_as(weight) + self.weight_decay * weight
                weight.sub_(learning_rate * decayed)
        # Autocast would go on with low-precision copies of the weights from before the step.
        torch.clear_autocast_cache()
        return ahead

    def judge(self, ahead: nn.Module, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return which images a model gets right in eval mode, under attack and without, [B] each.

        Logits that are not finite count as wrong.

        Args:
            ahead: the bare network.
            batch: images and labels.
            draw: noise for its samples.
        """
        is_robust_B = torch.ones_like(batch.mask)

        def watched_objective(logits_BC: Tensor) -> Tensor:
            # Once flipped is broken, whatever later steps do: the early stop of an attack.
            is_robust_B.logical_and_(_is_right(logits_BC.detach(), batch.labels))
            return label_cross_entropy(logits_BC, labels_of(batch))

        with attack_mode(ahead):
            for _ in range(self.restarts):
                found = self.attack.attack(ahead, batch.images, watched_objective, draw)
                with torch.no_grad():
                    is_robust_B.logical_and_(_is_right(ahead(found), batch.labels))
            with torch.no_grad():
                is_clean_B = _is_right(ahead(batch.images), batch.labels)
        return is_robust_B, is_clean_B


def sum_over_processes(*tensors: Tensor) -> Tensor:
    """Return all numbers of some tensors in one vector, summed over processes; collective.

    Example:
        >>> sum_over_processes(torch.ones(2), torch.zeros(1, 1))
        tensor([1., 1., 0.])
    """
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    return flat


def _is_right(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    return (logits_BC.argmax(dim=1) == labels_B) & logits_BC.isfinite().all(dim=1)
