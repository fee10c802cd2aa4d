"""What may end a run between two steps: a signal, or a loss that is not finite.

Both must be decided by all processes at the same step, or the others would wait for ever in a
collective. The flags of a step are therefore added up over processes. On a GPU they are read one
step later, when they are there already, so that no step waits for the device.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from dkl.methods.protocol import Batch

logger = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Whether a signal has asked the run to stop."""

    requested: bool = False


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request to stop after the current step.

    A second SIGINT interrupts at once. Handlers are put back on exit. Outside the main thread,
    where Python cannot install handlers, signals keep the meaning they had.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        logger.debug("training outside the main thread: signals are not handled")
        yield stop
        return

    def request(number: int, _: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    previous = {
        number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class StepTrace:
    """What is needed to report a step whose loss turns out not to be finite."""

    epoch: int
    step: int
    batches: list[Batch]


@dataclass(frozen=True)
class Verdict:
    """What all processes agreed on after a step."""

    trace: StepTrace
    is_finite: bool
    stop: bool


class StepWatch:
    """Collects the flags of every step and hands out the verdict when it costs nothing to know.

    Args:
        accelerator: its processes take part.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._pending: tuple[StepTrace, Tensor, torch.cuda.Event | None] | None = None

    def push(self, trace: StepTrace, is_finite: Tensor, stop: bool) -> Verdict | None:
        """Add a step.

        Args:
            trace: the step.
            is_finite: 0-dim bool on the device.
            stop: whether this process was asked to stop.

        Returns:
            A verdict: on a GPU that of the step before, elsewhere that of this step.
        """
        earlier = self.flush()
        flags = torch.stack([~is_finite, torch.full_like(is_finite, stop)]).to(torch.int32)
        flags = self._accelerator.reduce(flags, "sum")
        if flags.device.type != "cuda":
            self._pending = (trace, flags, None)
            return self.flush()
        on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        on_host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending = (trace, on_host, event)
        return earlier

    def flush(self) -> Verdict | None:
        """Return the verdict that is still out, waiting for it if need be."""
        if self._pending is None:
            return None
        trace, flags, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        num_bad, num_stop = flags.tolist()
        return Verdict(trace, is_finite=num_bad == 0, stop=num_stop > 0)

    def agree(self, stop: bool) -> bool:
        """Return whether any process was asked to stop."""
        flag = torch.tensor(int(stop), dtype=torch.int32, device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum").item() > 0)
