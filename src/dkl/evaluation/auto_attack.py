"""AutoAttack: the package's attack objects, driven by a loop that can be resumed and trusted.

Shapes: N samples, B samples of a batch, C classes or channels.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dkl.evaluation.accuracy import check_clean_logits
from dkl.evaluation.auto_attack_phases import (
    Attack,
    PhaseSettings,
    Plan,
    Version,
    WarningCounter,
    build_attack,
    check_square_size,
    load_package,
    plan_phases,
)
from dkl.evaluation.auto_attack_result import AttackProgress, AttackRecord, AutoAttackResult
from dkl.evaluation.inputs import (
    Ball,
    EvaluationData,
    EvaluationNorm,
    arithmetic,
    check_ball,
    check_batching,
    check_data,
    checked_logits,
    index_batches,
    isolated,
)
from dkl.evaluation.processes import Processes
from dkl.evaluation.sanity import check_differentiable, clean_output_notes, phase_notes
from dkl.evaluation.state import (
    StateMismatchError,
    hash_model,
    hash_tensors,
    load_or_compute,
    open_state,
)
from dkl.evaluation.verdict import LogitsModel, judge

logger = logging.getLogger(__name__)


def auto_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: EvaluationNorm = "Linf",
    version: Version = "standard",
    batch_size: int = 256,
    seed: int = 0,
    state_dir: str | Path | None = None,
    progress: Callable[[AttackProgress], None] | None = None,
    return_adversarial: bool = False,
    distributed: bool = False,
) -> AutoAttackResult:
    """Evaluate robustness with AutoAttack (Croce and Hein, 2020).

    Attacks run one after the other, each on what is still robust, in batches fixed when the attack
    begins. A sample is broken when its finished image is misclassified, in the ball and in [0, 1],
    which is checked here again. Flags equal the package's own evaluation with the same seed and
    batch size.

    Args:
        model: returns logits [N, C], with any normalisation inside. It is put in evaluation mode,
            float32 and without parameter gradients, and left as it was found.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        labels: [N] int64 class indices.
        eps: radius in pixel units of [0, 1]; text such as "8/255" is accepted.
        norm: "Linf", "L2" or "L1".
        version: "standard" (APGD-CE, APGD-T, FAB-T, Square), "fast" (the first two) or "square"
            (Square alone, which asks for logits only: a check of the gradient attacks).
        batch_size: samples per batch. Every batch draws the same noise, so that results depend on
            it slightly, as the package's do.
        seed: of the attacks.
        state_dir: folder that keeps finished batches; the same call takes up where it stopped.
        progress: called after every batch; an exception in it stops the evaluation.
        return_adversarial: also return the adversarial images.
        distributed: deal the batches of each attack to the processes of torch.distributed, which
            all call this alike. Each gets the whole result, the one that a single process gets on
            the same hardware; ``progress`` sees the process's own batches.

    Returns:
        Flags per sample and a record per attack.

    Raises:
        ValueError: for wrong inputs, a ``state_dir`` of another evaluation, ``distributed``
            without a process group or with processes that evaluate different things.
        ImportError: when pyautoattack is not installed.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> images = torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1)
        >>> result = auto_attack(
        ...     model, images, torch.tensor([0, 0]), eps="8/255", version="fast"
        ... )
        >>> result.robust, result.standard
        (tensor([True, True]), False)
    """
    data = check_data(model, images, labels)
    check_batching(batch_size, seed)
    ball = check_ball(norm, eps, images.shape[1:])
    check_square_size(version, ball.norm, images.shape[1:])
    with isolated(model, data.device), torch.no_grad():
        evaluation = _Evaluation(
            model,
            data,
            ball,
            version,
            batch_size,
            seed,
            state_dir,
            return_adversarial,
            Processes.of_this_run(distributed),
        )
        records = tuple(
            evaluation.run_phase(index, progress) for index in range(evaluation.num_phases)
        )
    return evaluation.result(records)


class _Evaluation:
    """One evaluation: the flags so far, and how to run its next attack."""

    def __init__(
        self,
        model: nn.Module,
        data: EvaluationData,
        ball: Ball,
        version: Version,
        batch_size: int,
        seed: int,
        state_dir: str | Path | None,
        keep_adversarial: bool,
        processes: Processes,
    ) -> None:
        self.data, self.ball, self.processes = data, ball, processes
        self.version, self.batch_size, self.seed = version, batch_size, seed
        self.keep_adversarial = keep_adversarial
        self.package, version_notes = load_package()
        self.notes = list(version_notes)
        first_BCHW, _ = data.batch(torch.arange(min(batch_size, len(data))))
        first_BC = checked_logits(model(first_BCHW), len(first_BCHW))
        self.predict = LogitsModel(model, first_BC.shape[1])
        if version != "square":
            check_differentiable(model, first_BCHW[:1])
        self.plan: Plan = plan_phases(version, first_BC.shape[1], ball.norm)
        self.notes += self.plan.notes
        self.notes += clean_output_notes(first_BC, self.predict(first_BCHW))
        self.state = open_state(state_dir, processes, lambda: self._key(model))
        clean = processes.first(lambda: load_or_compute(self.state, "clean", self._clean_pass))
        self.clean_correct = clean["correct"]
        self.predictions = clean["predictions"]
        self.robust = self.clean_correct.clone()
        self.adversarial = data.float_copy() if keep_adversarial else None
        for note in self.notes:
            logger.warning("%s", note)

    @property
    def num_phases(self) -> int:
        """Attacks of this evaluation."""
        return len(self.plan.phases)

    def run_phase(
        self, index: int, progress: Callable[[AttackProgress], None] | None
    ) -> AttackRecord:
        """Run one attack on what is still robust; with several processes, this one's batches."""
        phase = self.plan.phases[index]
        # Fixed here: the batches of an attack depend on the flags before it alone, so that a run
        # that was stopped meets the same batches again.
        attacked = self.robust.nonzero().squeeze(1)
        totals = {"seconds": 0.0, "num_rejected": 0.0, "num_non_finite": 0.0, "num_warnings": 0.0}
        before, num_done = int(self.robust.sum()), 0
        broken = torch.zeros_like(self.robust)
        warnings = WarningCounter()
        attack = build_attack(
            self.package,
            phase,
            self.predict,
            ball=self.ball,
            device=self.data.device,
            seed=self.seed,
            warnings=warnings,
        )
        batches = index_batches(attacked, self.batch_size)
        own: dict[int, Mapping[str, Tensor]] = {}
        dealt = self.processes.share(range(len(batches)))
        num_own = sum(len(batches[number]) for number in dealt)
        for number in dealt:
            indices_B = batches[number]
            own[number] = load_or_compute(
                self.state,
                f"{index}-{phase.name}-{number:05d}",
                partial(self._attack_batch, attack, indices_B, warnings),
            )
            self._apply(indices_B, own[number], broken)
            num_done += len(indices_B)
            if progress is not None:
                seconds = sum(float(outcome["seconds"]) for outcome in own.values())
                progress(self._progress(phase, index, num_done, num_own, seconds))
        for outcomes in self.processes.gather(own):  # own batches are entered again: no change
            for number, outcome in outcomes.items():
                self._apply(batches[number], outcome, broken)
                for name in totals:
                    totals[name] += float(outcome[name])
        after = int(self.robust.sum())
        logger.info("%s: %d of %d samples robust", phase.name, after, len(self.data))
        # What Square breaks alone says nothing about gradient attacks that did not run.
        gained = before - after if index else 0
        for note in phase_notes(phase.name, totals, gained, len(self.data)):
            logger.warning("%s", note)
            self.notes.append(note)
        return AttackRecord(
            name=phase.name,
            num_attacked=before,
            broken=self._home(broken),
            robust_accuracy=after / len(self.data),
            seconds=totals["seconds"],
            n_restarts=phase.n_restarts,
            n_targets=phase.n_targets,
        )

    def result(self, records: tuple[AttackRecord, ...]) -> AutoAttackResult:
        """Put the result together."""
        return AutoAttackResult(
            robust=self._home(self.robust),
            clean_correct=self._home(self.clean_correct),
            predictions=self._home(self.predictions),
            attacks=records,
            standard=self.version == "standard" and not self.plan.changed,
            version=self.version,
            norm=self.ball.norm,
            eps=self.ball.eps,
            seed=self.seed,
            batch_size=self.batch_size,
            num_classes=self.predict.num_classes,
            package_version=str(getattr(self.package, "__version__", "unknown")),
            arithmetic=arithmetic(self.data.device),
            notes=tuple(self.notes),
            adversarial=self.adversarial,
        )

    def _clean_pass(self) -> dict[str, Tensor]:
        """Classify the unperturbed images; the outcome is on the CPU."""
        logits_NC = torch.cat(
            [
                self.predict(self.data.batch(indices_B)[0]).cpu()
                for indices_B in index_batches(torch.arange(len(self.data)), self.batch_size)
            ]
        )
        labels_N = self.data.labels.cpu()
        check_clean_logits(logits_NC, labels_N)
        predictions_N = logits_NC.max(dim=1).indices
        return {"correct": predictions_N == labels_N, "predictions": predictions_N}

    def _attack_batch(
        self, attack: Attack, indices_B: Tensor, warnings: WarningCounter
    ) -> dict[str, Tensor]:
        """Attack one batch and judge the finished images; the outcome is on the CPU."""
        images_BCHW, labels_B = self.data.batch(indices_B)
        warnings.num_warnings = 0
        start = time.perf_counter()
        adversarial_BCHW = attack(images_BCHW, labels_B)
        verdict = judge(self.predict, adversarial_BCHW, images_BCHW, labels_B, self.ball)
        outcome = {
            "indices": indices_B,
            "broken": verdict.broken.cpu(),
            "predictions": verdict.predictions.cpu(),
            "seconds": torch.tensor(time.perf_counter() - start, dtype=torch.float64),
            "num_rejected": torch.tensor(verdict.num_rejected),
            "num_non_finite": torch.tensor(verdict.num_non_finite),
            "num_warnings": torch.tensor(warnings.num_warnings),
        }
        if self.keep_adversarial:
            outcome["adversarial"] = adversarial_BCHW[verdict.broken].cpu()
        return outcome

    def _apply(self, indices_B: Tensor, outcome: Mapping[str, Tensor], broken: Tensor) -> None:
        """Enter a batch's outcome into the flags."""
        if not torch.equal(outcome["indices"], indices_B):
            raise StateMismatchError(
                "a saved batch does not fit the batches before it: files of state_dir are missing "
                "or were changed. Delete the folder to start afresh."
            )
        lost = indices_B[outcome["broken"]]
        self.robust[lost] = False
        broken[lost] = True
        self.predictions[lost] = outcome["predictions"][outcome["broken"]]
        if self.adversarial is not None:
            home = self.adversarial.device
            self.adversarial[lost.to(home)] = outcome["adversarial"].to(home)

    def _progress(
        self, phase: PhaseSettings, index: int, num_done: int, num_attacked: int, seconds: float
    ) -> AttackProgress:
        """Describe where the evaluation stands."""
        return AttackProgress(
            attack=phase.name,
            attack_index=index,
            num_attacks=self.num_phases,
            num_done=num_done,
            num_attacked=num_attacked,
            num_robust=int(self.robust.sum()),
            num_samples=len(self.data),
            seconds=seconds,
        )

    def _key(self, model: nn.Module) -> dict[str, object]:
        """Return the facts that decide the result, for the state folder."""
        return {
            "eps": self.ball.eps,
            "norm": self.ball.norm,
            "version": self.version,
            "attacks": self.plan.as_key(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "return_adversarial": self.keep_adversarial,
            "package_version": str(getattr(self.package, "__version__", "unknown")),
            "weights": hash_model(model),
            "data": hash_tensors(self.data.images, self.data.labels),
        }

    def _home(self, tensor: Tensor) -> Tensor:
        """Move a result to the device of the images."""
        return tensor.to(self.data.images.device)
