"""The Triton backend without a GPU: in Triton's interpreter, and compiled for GPUs that are absent.

triton_cases.py says what the interpreter is given; it runs once, in a process of its own.
tests/gpu has what needs a GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.losses.row_kernel import NO_WEIGHTS, RowOptions, RowResult, RowWeights
from tests.losses.triton_cases import (
    CASES,
    CHECKS,
    DTYPES,
    Report,
    wrong_in_case,
    wrong_in_check,
)

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="this PyTorch came without Triton")


def interpret(report: Path) -> None:
    """Run all cases in the interpreter; what goes wrong becomes the report."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.losses.triton_cases", str(report)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        report.write_text(json.dumps({"": {"error": done.stderr}}))


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Return the report of the interpreter, made by the first of the test processes that ask."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "triton.json"
    try:
        (folder / "triton.lock").touch(exist_ok=False)
    except FileExistsError:
        deadline = time.monotonic() + 280
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        interpret(path)
    return json.loads(path.read_text())


def reported(report: Report, name: str) -> Report:
    assert name in report, report.get("", {}).get("error")
    assert "error" not in report[name], report[name]["error"]
    return report[name]


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_equals_the_pairwise_formula(name: str, report: Report) -> None:
    assert not wrong_in_case(CASES[name], reported(report, name))


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, report: Report) -> None:
    assert reported(report, name)
    assert not wrong_in_check(name, report[name])


# Compiled for GPUs that are absent: what the interpreter cannot see.


class AheadOfTime:
    """Stands in for a program: compiles it for what it would be launched with."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.kernels: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile(*arguments: Any, **options: Any) -> None:
            self.kernels.append(self.program.warmup(*arguments, grid=grid, **options))

        return compile


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:
        return f"absent {self.capability}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture(params=[75, 90])
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., list[Any]]:
    """Return a function that calls another and returns the kernels it would have launched."""
    import triton

    from dkl.losses import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = triton.runtime.driver
    place = "_active" if hasattr(driver, "_active") else "active"  # as older ones say
    monkeypatch.setattr(driver, place, AbsentGPU(request.param))

    def compile(function: Callable[[], object]) -> list[Any]:
        programs = []
        for name in ("rows_program", "weight_sums_program", "scale_program"):
            program = getattr(triton_kernels, name)
            program = getattr(program, "program", program)
            programs.append(AheadOfTime(program))
            monkeypatch.setattr(triton_kernels, name, programs[-1])
        function()
        return [kernel for program in programs for kernel in program.kernels]

    return compile


PLAIN = RowOptions()
POWER = RowOptions(temperature=2.0, weight_temperature=3.0, gamma=0.4)


def rows(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    weights: RowWeights = NO_WEIGHTS,
    options: RowOptions = PLAIN,
    *,
    needs: tuple[bool, bool] = (True, True),
    everything: bool = False,
) -> RowResult:
    """Call ``decoupled_rows``, with all optional arguments if asked."""
    from dkl.losses.triton_kernels import decoupled_rows

    logits = torch.zeros(shape, dtype=dtype)
    num_rows = logits.numel() // shape[1]
    counted_N = torch.ones(num_rows, dtype=torch.bool) if everything else None
    upstream_N = torch.ones(num_rows) if everything else None
    scales = (torch.tensor(1.0), torch.tensor(1.0)) if everything else (1.0, 1.0)
    return decoupled_rows(
        logits, logits, weights, counted_N, scales, options, needs, upstream_N=upstream_N
    )


def table(num_classes: int, num_rows: int, dtype: torch.dtype = torch.float32) -> RowWeights:
    labels_N = torch.zeros(num_rows, dtype=torch.long)
    return RowWeights(None, torch.zeros(num_classes, num_classes, dtype=dtype), labels_N)


CALLS: dict[str, Callable[[], object]] = {
    "one tile": lambda: rows((4, 1000)),
    "many tiles": lambda: rows((2, 20_000), torch.bfloat16, NO_WEIGHTS, POWER, everything=True),
    "half, table": lambda: rows((3, 100), torch.float16, table(100, 3), POWER, needs=(False, True)),
    "double": lambda: rows((2, 3000), torch.float64, NO_WEIGHTS, POWER),
    "bfloat16 weights of doubles": lambda: rows((2, 9), torch.float64, table(9, 2, torch.bfloat16)),
    "map": lambda: rows((2, 21, 49), everything=True, needs=(True, False)),
    "no gradients": lambda: rows((4, 33), needs=(False, False)),
}


@needs_triton
@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_gpus(name: str, kernels: Callable[..., list[Any]]) -> None:
    (kernel,) = kernels(CALLS[name])
    assert len(kernel.asm["cubin"]) > 0
    if "double" not in name:  # slow on most GPUs; numbers of the formula come as float64
        assert not {"add.f64", "fma.rn.f64", "div.rn.f64"} & set(kernel.asm["ptx"].split())


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_programs_compile_for_gpus(
    dtype: torch.dtype, kernels: Callable[..., list[Any]]
) -> None:
    from dkl.losses.triton_kernels import scale_gradient_, weight_sums

    logits = torch.zeros(3, 10, dtype=dtype)
    for weights in (NO_WEIGHTS, RowWeights(logits), table(10, 3, dtype)):
        assert kernels(lambda w=weights: weight_sums(logits, w, None, POWER))
    assert kernels(lambda: scale_gradient_(logits, torch.tensor(2.0)))


@needs_triton
def test_one_compilation_serves_every_number_of_rows(kernels: Callable[..., list[Any]]) -> None:
    first, *others = (kernels(lambda n=n: rows((n, 1000)))[0] for n in (2, 16, 4099))
    assert all(kernel is first for kernel in others)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [1000, 1024, 20_000])
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(
    num_classes: int, dtype: torch.dtype, kernels: Callable[..., list[Any]]
) -> None:
    (kernel,) = kernels(lambda: rows((2, num_classes), dtype))
    ptx = kernel.asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == ptx.count("ld.global") > 0
    assert ptx.count("st.global.v4.b32") == ptx.count("st.global") - 2  # one for each term


@needs_triton
def test_tilings_are_powers_of_two_that_hold_the_classes() -> None:
    from dkl.losses.triton_kernels import MAX_BLOCK, choose_tiling

    for dtype, limit in MAX_BLOCK.items():
        for num_classes in (1, 2, 3, 10, 1000, 1271, limit, limit + 1, 128_256):
            for unit_strides in (True, False):
                tiling = choose_tiling(num_classes, 512, dtype, unit_strides=unit_strides)
                assert all(number & (number - 1) == 0 for number in tiling)
                assert tiling.block <= limit
                assert tiling.block < 2 * num_classes
                if unit_strides:
                    assert tiling.block >= min(num_classes, limit)


# Where it cannot run.


@needs_triton
def test_says_why_it_is_not_available() -> None:
    from dkl.losses.triton_kernels import is_available

    available, reason = is_available(torch.device("cpu"))
    assert not available
    assert "the logits are on 'cpu'" in reason
    if not torch.cuda.is_available():
        assert is_available() == (
            False,
            "Triton needs a CUDA or ROCm device, and PyTorch finds none",
        )


def message_of_import(before: str) -> str:
    code = f"""
import sys
import dkl
{before}
try:
    import dkl.losses.triton_kernels
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_without_triton_says_what_to_do() -> None:
    message = message_of_import("sys.modules['triton'] = None")
    assert "needs the package triton" in message
    assert "use backend='auto'" in message


@needs_triton
def test_import_with_an_old_triton_says_what_to_do() -> None:
    message = message_of_import("import triton; triton.__version__ = '3.2.0'")
    assert "needs Triton 3.3 or newer, which comes with PyTorch 2.7; found Triton 3.2.0" in message
    assert "use backend='auto'" in message


def test_logits_of_the_tests_are_what_they_say() -> None:
    from tests.losses.triton_cases import _logits

    def differences(name: str) -> Tensor:
        input, target = _logits(CASES[name], torch.Generator().manual_seed(0))
        return target.double() - input.double()

    assert differences("logits close softmax tiles of None").abs().max() < 1e-2
    assert differences("logits offset softmax tiles of None").min() > 500
