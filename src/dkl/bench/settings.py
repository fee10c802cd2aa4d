"""What the loss and the linear benchmarks are to measure, checked before anything is measured."""

from dataclasses import dataclass
from typing import Any

import torch

from dkl.bench.steps import DTYPES

SHAPES = ((128, 10), (128, 100), (64, 1000), (512, 1000), (8192, 1000), (1024, 32000))
QUICK_SHAPES = ((128, 10), (512, 1000))
SWEEP_CLASSES = (100, 1_000, 10_000, 100_000, 1_000_000)
SWEEP_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
QUICK_SWEEP_CLASSES = (100, 1_000, 10_000)
QUICK_SWEEP_ELEMENTS = 2**14
QUICK_COPY_BYTES = 2**26
LINEAR = (2048, 512, 32000)
QUICK_LINEAR = (64, 32, 1000)
MEMORY = ("all", "auto", "none")


@dataclass(frozen=True, kw_only=True)
class Common:
    """Settings that every benchmark of losses shares.

    Args:
        dtype: of the logits, a key of ``DTYPES``.
        device: "cpu" or "cuda".
        rounds: timings of each method.
        warmup: untimed calls of each method.
        threads: torch's threads on the CPU; None leaves torch's own number.
        seed: of the random logits.
        memory: whose peak memory to measure: of "all" methods; with "auto" of the baseline and
            backend "auto", without the sweep; or "none".

    Raises:
        ValueError: a value that cannot be measured here.
    """

    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 15
    warmup: int = 2
    threads: int | None = None
    seed: int = 0
    memory: str = "all"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.rounds < 1 or self.warmup < 0:
            raise ValueError(
                f"needs rounds >= 1 and warmup >= 0, got {self.rounds} and {self.warmup}"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}; got {self.memory!r}")
        check_device(self.device)

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    def describe(self, **more: Any) -> dict[str, Any]:
        """Return what decides a number, as JSON values; to be called with the threads set."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "rounds": self.rounds,
            "warmup": self.warmup,
            "seed": self.seed,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            **more,
        }


@dataclass(frozen=True, kw_only=True)
class LossSettings(Common):
    """What ``dkl.bench.losses`` measures.

    Args:
        shapes: (N, C) of the cases.
        backends: of ``dkl.ikl_loss``; None means all that can run on the device.
        target_grad: measure each case a second time with a target that needs a gradient.
        compile: include what has to be compiled first: compiled KL, and the backend "compile"
            where ``backends`` is None.
        sweep_classes: C of the sweep; empty for none.
        sweep_elements: N * C of the sweep; None means 2**22 on the CPU, 2**28 on a GPU.
        copy_bytes: size of the tensor that is copied to measure the bandwidth; None means
            256 MiB on the CPU, 2 GiB on a GPU.

    Raises:
        ValueError: a value that cannot be measured here.
    """

    shapes: tuple[tuple[int, int], ...] = SHAPES
    backends: tuple[str, ...] | None = None
    target_grad: bool = False
    compile: bool = True
    sweep_classes: tuple[int, ...] = SWEEP_CLASSES
    sweep_elements: int | None = None
    copy_bytes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for numbers in (*self.shapes, self.sweep_classes):
            if min(numbers, default=1) < 1:
                raise ValueError(f"shapes and class counts must be at least 1, got {numbers}")
        known = known_backends()
        for backend in self.backends or ():
            if backend not in known:
                raise ValueError(f"backend must be one of {', '.join(known)}; got {backend!r}")
            if backend == "triton" and not self.on_gpu:
                raise ValueError("backend 'triton' needs a GPU: add --device cuda")

    @property
    def on_gpu(self) -> bool:
        """Whether the work is done by a GPU."""
        return torch.device(self.device).type == "cuda"

    def chosen_backends(self) -> tuple[str, ...]:
        """Return the backends to measure."""
        if self.backends is not None:
            return self.backends
        left_out = set() if self.on_gpu else {"triton"}
        if not self.compile:
            left_out.add("compile")
        return tuple(backend for backend in known_backends() if backend not in left_out)


@dataclass(frozen=True, kw_only=True)
class LinearSettings(Common):
    """What ``dkl.bench.linear`` measures.

    Args:
        num_rows: N, tokens.
        num_hidden: H, width of the hidden states of student and teacher.
        num_classes: V, size of the vocabulary.

    Raises:
        ValueError: a value that cannot be measured here.
    """

    num_rows: int = LINEAR[0]
    num_hidden: int = LINEAR[1]
    num_classes: int = LINEAR[2]

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_rows, self.num_hidden, self.num_classes) < 1:
            raise ValueError(
                "rows, hidden and vocabulary must be at least 1, got "
                f"{self.num_rows}, {self.num_hidden} and {self.num_classes}"
            )


def known_backends() -> tuple[str, ...]:
    """Return the backends of ``dkl.ikl_loss`` in this version."""
    from dkl.losses.backends import BACKENDS

    return tuple(BACKENDS)


def check_device(device: str) -> None:
    """Refuse a device that is not there, or that the clock and the memory meter do not know.

    Raises:
        ValueError: what is wrong, and what to give instead.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {device!r}") from error
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"benchmarks run on cpu and cuda; got device {device!r}")
    if wanted.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= found:
            raise ValueError(f"torch sees {found} GPUs here, so not {device!r}; use --device cpu")
