"""What no implementation can beat: the bytes that must move, at the speed of copying.

Reading input and target and writing each gradient that is needed once is the least that a loss
moves, and the bandwidth of copying a large tensor is what the machine moves in practice.
"""

from dataclasses import dataclass

import torch

from dkl.bench.timing import Timing, interleaved

ROOFLINE = "roofline"
TWO_EXPS = "two exps"
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Size of the copied tensor: far beyond the caches."""


@dataclass(frozen=True)
class CopySpeed:
    """Timings of copying a tensor; a copy reads and writes each of its bytes.

    Args:
        num_bytes: size of the tensor.
        timing: seconds of a copy.
    """

    num_bytes: int
    timing: Timing

    @property
    def bandwidth(self) -> float:
        """Bytes that are read or written per second."""
        return 2 * self.num_bytes / self.timing.median

    def seconds_to_move(self, num_bytes: int) -> tuple[float, float, float]:
        """Return the time to move bytes at this speed: median, 20th and 80th percentile."""
        share = num_bytes / (2 * self.num_bytes)
        return share * self.timing.median, share * self.timing.low, share * self.timing.high


def measure_copy(device: str, num_bytes: int, rounds: int) -> CopySpeed:
    """Time ``tensor.copy_`` of a large tensor.

    Args:
        device: "cpu" or "cuda".
        num_bytes: size of the tensor, at least 1.
        rounds: number of timings.
    """
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    destination = torch.zeros_like(source)
    timings = interleaved({"copy": lambda: destination.copy_(source)}, rounds=rounds, device=device)
    return CopySpeed(num_bytes, timings["copy"])


def bytes_that_move(shape: tuple[int, int], item_size: int, *, target_grad: bool) -> int:
    """Return the bytes of input and target, read, and of the gradients, written.

    Example:
        >>> bytes_that_move((2, 10), 4, target_grad=False)
        240
    """
    num_tensors = 4 if target_grad else 3
    return num_tensors * shape[0] * shape[1] * item_size
