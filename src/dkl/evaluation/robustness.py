"""Robust accuracy under projected gradient descent, and under another model's adversarial images.

Shapes: N samples, B samples of a batch, C classes or channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dkl.attacks import (
    PGDSettings,
    RandomStart,
    cross_entropy_objective,
    margin_objective,
)
from dkl.evaluation.accuracy import check_clean_logits, predict_logits
from dkl.evaluation.batch_run import BatchRun, ReportProgress
from dkl.evaluation.inputs import (
    Ball,
    EvaluationNorm,
    check_ball,
    check_batching,
    check_data,
    check_gradient_norm,
    index_batches,
    isolated,
)
from dkl.evaluation.noise import SampleDraw, checked_ids
from dkl.evaluation.processes import Processes
from dkl.evaluation.state import hash_model, hash_tensors, load_or_compute, open_state
from dkl.evaluation.verdict import LogitsModel, judge

ObjectiveName = Literal["ce", "margin"]

OBJECTIVES = {"ce": cross_entropy_objective, "margin": margin_objective}


@dataclass(frozen=True)
class GradientAttack:
    """A checked PGD or CW attack, with noise of their own for the samples.

    Args:
        settings: steps and ball.
        objective: what it maximises.
        seed: of the random starts.
    """

    settings: PGDSettings
    objective: ObjectiveName
    seed: int

    @property
    def name(self) -> str:
        """What the attack is called, such as "pgd-20"."""
        return f"{'pgd' if self.objective == 'ce' else 'cw'}-{self.settings.num_steps}"

    def adversarial(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], ids_B: Tensor, restart: int = 0
    ) -> Tensor:
        """Return the finished images [B, C, H, W] of a batch of images and labels."""
        images_BCHW, labels_B = batch
        objective = OBJECTIVES[self.objective](labels_B)
        draw = SampleDraw(self.seed, ids_B, restart, images_BCHW.device)
        return self.settings.attack(
            model, images_BCHW, lambda logits_BC: objective(logits_BC.float()), draw
        )

    def survivors(
        self, predict: LogitsModel, adversarial_BCHW: Tensor, batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return which finished images the model still classifies correctly: [B] bool.

        Raises:
            ValueError: when images that fool the model are not allowed.
        """
        threat = self.settings.threat
        verdict = judge(predict, adversarial_BCHW, *batch, Ball(threat.norm, threat.eps))
        if verdict.num_rejected:
            # Counting these as robust would flatter the model, as broken would wrong it.
            raise ValueError(
                f"the attack on {verdict.num_rejected} samples gave images outside of the ball or "
                "with NaN pixels. The model's gradients are not finite there: check the weights."
            )
        return ~verdict.broken

    def as_key(self) -> dict[str, object]:
        """Return the settings as JSON-ready data."""
        settings = self.settings
        return {
            "norm": settings.threat.norm,
            "eps": settings.threat.eps,
            "num_steps": settings.num_steps,
            "step_size": settings.step_size,
            "random_start": settings.random_start,
            "objective": self.objective,
            "seed": self.seed,
        }


def gradient_attack(
    image_shape: torch.Size,
    *,
    eps: float | str,
    norm: EvaluationNorm,
    num_steps: int,
    step_size: float | str | None,
    objective: ObjectiveName,
    random_start: RandomStart,
    seed: int,
) -> GradientAttack:
    """Return the checked attack for images [C, H, W]; the default step is a quarter of ``eps``.

    Raises:
        ValueError: for settings that make no sense; the message says what to do.
    """
    threat = check_gradient_norm(check_ball(norm, eps, image_shape))
    settings = PGDSettings(
        threat, num_steps, threat.eps / 4 if step_size is None else step_size, random_start
    )
    if settings.step_size == 0.0:
        raise ValueError("step_size must be positive, got 0: the attack would stand still.")
    if objective not in get_args(ObjectiveName):
        raise ValueError(f'objective must be "ce" (PGD) or "margin" (CW), got {objective!r}.')
    return GradientAttack(settings, objective, seed)


def pgd_robust(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: EvaluationNorm = "Linf",
    num_steps: int = 20,
    step_size: float | str | None = None,
    objective: ObjectiveName = "ce",
    random_start: RandomStart = "uniform",
    num_restarts: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    state_dir: str | Path | None = None,
    progress: ReportProgress | None = None,
    distributed: bool = False,
) -> Tensor:
    """Return which samples are classified correctly before and after a PGD attack.

    Only samples that are classified correctly are attacked. The finished images decide: a sample
    is lost when the last image of any restart is misclassified, lies in the ball and in [0, 1].

    Args:
        model: returns logits [N, C]; modes, parameters, ``.grad`` and generators are left as found.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 class indices.
        eps: radius in pixel units of [0, 1]; text such as "8/255" is accepted.
        norm: "Linf" or "L2".
        num_steps: gradient steps (20: PGD-20, CW-20).
        step_size: of one step; None: a quarter of ``eps`` (2/255 for 8/255).
        objective: "ce" (PGD: maximise the cross entropy) or "margin" (CW: maximise the largest
            other logit minus the label's).
        random_start: "uniform" in the ball, "gaussian" (a little noise) or "none".
        num_restarts: attacks per sample, each with its own random start.
        batch_size: samples per forward pass. Starts do not depend on it.
        seed: of the random starts.
        sample_ids: [N] integers that key each sample's noise; None: 0 to N - 1. Give the positions
            in the whole test set when only a part of it is evaluated here.
        state_dir: folder that keeps finished batches; the same call takes up where it stopped.
        progress: called after every batch; an exception in it stops the evaluation.
        distributed: deal the batches to the processes of torch.distributed, which all call this
            alike; each gets the flags of all samples.

    Returns:
        [N] bool on the device of ``images``.

    Raises:
        ValueError: for wrong inputs or settings; the message says what to do.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]) / 4)
        >>> model[1].bias = nn.Parameter(torch.tensor([0.5, -0.5]))
        >>> images = torch.tensor([0.1, 0.4, 0.9, 0.9]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
        >>> pgd_robust(model, images, torch.tensor([0, 0, 1, 0]), eps=0.2, num_steps=5)
        tensor([ True, False,  True, False])
    """
    data = check_data(model, images, labels)
    check_batching(batch_size, seed)
    attack = gradient_attack(
        images.shape[1:],
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        objective=objective,
        random_start=random_start,
        seed=seed,
    )
    if num_restarts < 1 or (num_restarts > 1 and random_start == "none"):
        raise ValueError(
            f"num_restarts must be at least 1, and above 1 needs a random start: got "
            f"{num_restarts} with random_start={random_start!r}."
        )
    ids_N = checked_ids(sample_ids, len(data))
    processes = Processes.of_this_run(distributed)
    state = open_state(
        state_dir,
        processes,
        lambda: {
            **attack.as_key(),
            "num_restarts": num_restarts,
            "batch_size": batch_size,
            "weights": hash_model(model),
            "data": hash_tensors(data.images, data.labels, ids_N),
        },
    )
    logits_NC = predict_logits(model, images, batch_size=batch_size, distributed=distributed)
    check_clean_logits(logits_NC, data.labels)
    correct_N = (logits_NC.max(dim=1).indices == data.labels).cpu()
    clean: Mapping[str, Tensor] = processes.first(
        lambda: load_or_compute(state, "clean", lambda: {"correct": correct_N})
    )
    run = BatchRun(attack.name, batch_size, processes, state, progress)
    with isolated(model, data.device):
        predict = LogitsModel(model, logits_NC.shape[1])

        def survive(indices_B: Tensor) -> Tensor:
            batch = data.batch(indices_B)
            survived_B = torch.ones_like(batch[1], dtype=torch.bool)
            for restart in range(num_restarts):
                adversarial_BCHW = attack.adversarial(model, batch, ids_N[indices_B], restart)
                survived_B &= attack.survivors(predict, adversarial_BCHW, batch)
            return survived_B

        return run.survivors(clean["correct"], survive).to(images.device)


def pgd_images(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: EvaluationNorm = "Linf",
    num_steps: int = 20,
    step_size: float | str | None = None,
    objective: ObjectiveName = "ce",
    random_start: RandomStart = "uniform",
    batch_size: int = 256,
    seed: int = 0,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Return the adversarial images of a PGD attack, of every sample.

    These are the images by which ``pgd_robust`` judges; here samples that the model misclassifies
    are attacked too.

    Args:
        model: returns logits [N, C]; modes, parameters, ``.grad`` and generators are left as found.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 class indices.
        eps: radius in pixel units of [0, 1]; text such as "8/255" is accepted.
        norm: "Linf" or "L2".
        num_steps: gradient steps.
        step_size: of one step; None: a quarter of ``eps``.
        objective: "ce" or "margin".
        random_start: "uniform", "gaussian" or "none".
        batch_size: samples per forward pass. Starts do not depend on it.
        seed: of the random starts.
        sample_ids: [N] integers that key each sample's noise; None: 0 to N - 1.

    Returns:
        [N, C, H, W] float32 in [0, 1] on the device of ``images``.

    Raises:
        ValueError: for wrong inputs or settings; the message says what to do.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> pgd_images(model, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), eps=0.25)
        tensor([[[[0.7500]]]])
    """
    data = check_data(model, images, labels)
    check_batching(batch_size, seed)
    attack = gradient_attack(
        images.shape[1:],
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        objective=objective,
        random_start=random_start,
        seed=seed,
    )
    ids_N = checked_ids(sample_ids, len(data))
    with isolated(model, data.device):
        finished = [
            attack.adversarial(model, data.batch(indices_B), ids_N[indices_B]).to(images.device)
            for indices_B in index_batches(torch.arange(len(data)), batch_size)
        ]
    return torch.cat(finished)
