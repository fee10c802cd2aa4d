"""Robustness against adversarial images that were made on another model.

Shapes: N samples, B samples of a batch, C classes or channels.
"""

from pathlib import Path

from torch import Tensor, nn

from dkl.attacks import RandomStart
from dkl.evaluation.accuracy import check_clean_logits, predict_logits
from dkl.evaluation.batch_run import BatchRun, ReportProgress
from dkl.evaluation.inputs import EvaluationNorm, check_batching, check_data, isolated
from dkl.evaluation.noise import checked_ids
from dkl.evaluation.processes import Processes
from dkl.evaluation.robustness import ObjectiveName, gradient_attack
from dkl.evaluation.state import hash_model, hash_tensors, open_state
from dkl.evaluation.verdict import LogitsModel


def transfer_robust(
    model: nn.Module,
    surrogate: nn.Module,
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
    state_dir: str | Path | None = None,
    progress: ReportProgress | None = None,
    distributed: bool = False,
) -> Tensor:
    """Return which samples are classified correctly, also as attacked on a surrogate model.

    PGD on the surrogate, which sees the true labels, makes the images; the model judges them. A
    model whose own gradients mislead an attacker is often weaker here than under its own PGD.

    Args:
        model: is judged; returns logits [N, C].
        surrogate: is attacked; another network for the same classes, on the same device.
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
        state_dir: folder that keeps finished batches; the same call takes up where it stopped.
        progress: called after every batch; an exception in it stops the evaluation.
        distributed: deal the batches to the processes of torch.distributed, which all call this
            alike; each gets the flags of all samples.

    Returns:
        [N] bool on the device of ``images``; True where the model classifies both the clean image
        and the one made on the surrogate correctly.

    Raises:
        ValueError: for wrong inputs or settings, or models for different numbers of classes.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[0.1], [1.0]]))
        >>> images, labels = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1])
        >>> transfer_robust(model, model, images, labels, eps=0.25)
        tensor([True])
    """
    data = check_data(model, images, labels)
    check_data(surrogate, images, labels)
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
    processes = Processes.of_this_run(distributed)
    state = open_state(
        state_dir,
        processes,
        lambda: {
            **attack.as_key(),
            "batch_size": batch_size,
            "weights": hash_model(model),
            "surrogate": hash_model(surrogate),
            "data": hash_tensors(data.images, data.labels, ids_N),
        },
    )
    logits_NC = predict_logits(model, images, batch_size=batch_size, distributed=distributed)
    check_clean_logits(logits_NC, data.labels)
    _check_surrogate(surrogate, images[:1], logits_NC.shape[1])
    correct_N = (logits_NC.max(dim=1).indices == data.labels).cpu()
    with isolated(model, data.device), isolated(surrogate, data.device):
        predict = LogitsModel(model, logits_NC.shape[1])

        def survive(indices_B: Tensor) -> Tensor:
            batch = data.batch(indices_B)
            return attack.survivors(
                predict, attack.adversarial(surrogate, batch, ids_N[indices_B]), batch
            )

        name = f"transfer-{attack.name}"
        run = BatchRun(name, batch_size, processes, state, progress)
        return run.survivors(correct_N, survive).to(images.device)


def _check_surrogate(surrogate: nn.Module, image: Tensor, num_classes: int) -> None:
    """Refuse a surrogate that cannot take the images or tells other classes apart."""
    try:
        found = predict_logits(surrogate, image, batch_size=1).shape[1]
    except RuntimeError as error:
        raise ValueError(
            f"the surrogate cannot take images of shape {list(image.shape[1:])}: {error}"
        ) from error
    if found != num_classes:
        raise ValueError(
            f"the surrogate must tell the same {num_classes} classes apart as the model, it has "
            f"{found} logits."
        )
