"""One attack, batch by batch: shared among processes, saved as it goes, and told about.

Shapes: N samples, B samples of a batch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dkl.evaluation.auto_attack_result import AttackProgress
from dkl.evaluation.inputs import index_batches
from dkl.evaluation.processes import Processes
from dkl.evaluation.state import EvaluationState, StateMismatchError, load_or_compute

ReportProgress = Callable[[AttackProgress], None]


@dataclass(frozen=True)
class BatchRun:
    """How the batches of one attack are run.

    Args:
        name: of the attack, for the progress.
        batch_size: samples per batch.
        processes: who shares the batches.
        state: keeps finished batches; None keeps nothing.
        progress: called after every batch of this process.
    """

    name: str
    batch_size: int
    processes: Processes = field(default_factory=Processes)
    state: EvaluationState | None = None
    progress: ReportProgress | None = None

    def survivors(self, left_N: Tensor, survive: Callable[[Tensor], Tensor]) -> Tensor:
        """Attack the samples that are left, and return which of them survive.

        Args:
            left_N: [N] bool on the CPU; the samples to attack.
            survive: from the indices [B] of a batch to its flags [B].

        Returns:
            [N] bool on the CPU, the same in every process.

        Raises:
            StateMismatchError: a saved batch is not one of these.

        Example:
            >>> run = BatchRun("even", batch_size=2)
            >>> run.survivors(torch.tensor([True, True, False, True]), lambda i: i % 2 == 0)
            tensor([ True, False, False, False])
        """
        flags_N = left_N.clone()
        batches = index_batches(left_N.nonzero().squeeze(1), self.batch_size)
        dealt = self.processes.share(range(len(batches)))
        num_own = sum(len(batches[number]) for number in dealt)
        own: dict[int, Tensor] = {}
        num_done, seconds = 0, 0.0
        for number in dealt:
            outcome = self._outcome(number, batches[number], survive)
            own[number] = outcome["survived"]
            flags_N[batches[number]] = own[number]
            num_done, seconds = num_done + len(own[number]), seconds + float(outcome["seconds"])
            if self.progress is not None:
                robust = int(flags_N.sum())
                self.progress(
                    AttackProgress(
                        self.name, 0, 1, num_done, num_own, robust, len(flags_N), seconds
                    )
                )
        for part in self.processes.gather(own):
            for number, survived_B in part.items():
                flags_N[batches[number]] = survived_B
        return flags_N

    def _outcome(
        self, number: int, indices_B: Tensor, survive: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return a batch's outcome from the state, or attack it."""

        def attack() -> dict[str, Tensor]:
            start = time.perf_counter()
            survived_B = survive(indices_B).cpu()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            return {"indices": indices_B, "survived": survived_B, "seconds": seconds}

        outcome = dict(load_or_compute(self.state, f"batch-{number:05d}", attack))
        if not torch.equal(outcome["indices"], indices_B):
            raise StateMismatchError(
                "a saved batch does not fit these samples: files of state_dir were changed. Delete "
                "the folder to start afresh."
            )
        return outcome
