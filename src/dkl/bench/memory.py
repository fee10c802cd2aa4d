"""Peak memory of one call beyond what was there before it.

On a GPU torch's allocator knows. On the CPU nobody counts, so the call runs in a fresh process and
the kernel's high-water mark of resident memory is read: it includes what libraries allocate. The
call is made once before, so that what stays for good (thread pools, compiled code) is not counted.
"""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESOLUTION = 2**20
"""Bytes below which a peak on the CPU says nothing."""

_CHILD = "from dkl.bench.memory import measure_for_parent; measure_for_parent()"
_STATUS = Path("/proc/self/status")
# glibc keeps freed blocks for later and would hide memory that the call takes from there; with
# these it hands every block of 64 KiB or more back to the kernel.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_ARENA_MAX": "2",
}


class MemoryMeasurementError(RuntimeError):
    """The call whose memory was to be measured failed, or the system does not tell the memory."""


def peak_memory(
    entry: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    warmup: int = 1,
    timeout: float = 600.0,
) -> int:
    """Return the peak bytes that one call holds beyond what was held just before it.

    Args:
        entry: "package.module:function". Called with ``arguments`` it prepares the inputs and
            returns a function without arguments, whose memory is measured. That function should
            leave nothing behind (gradients set to None at its end), as it is called repeatedly.
        arguments: keyword arguments of the entry; JSON values only.
        device: "cpu": a fresh process, resident memory, exact to about 1 MiB on a few cores
            (Linux counts pages by the batch on each core); "cuda": this process, memory from
            torch's allocator, exact.
        threads: torch's threads in the fresh process; None leaves them at torch's default.
        warmup: calls before the one that is measured.
        timeout: seconds until the fresh process is given up.

    Returns:
        Bytes, at least 0.

    Raises:
        ValueError: an entry that is not "package.module:function".
        MemoryMeasurementError: the call failed, ran out of time or memory, or the system cannot
            tell the peak.
    """
    if entry.count(":") != 1 or not all(entry.split(":")):
        raise ValueError(f"entry must be 'package.module:function', got {entry!r}")
    if torch.device(device).type == "cuda":
        return _peak_on_gpu(_work(entry, arguments or {}), device, warmup)
    request = {
        "entry": entry,
        "arguments": dict(arguments or {}),
        "threads": threads,
        "warmup": warmup,
    }
    return _ask_fresh_process(json.dumps(request, allow_nan=False), entry, timeout)


def measure_for_parent() -> None:
    """Answer ``peak_memory`` in the fresh process: request on stdin, bytes on stdout, as JSON."""
    request = json.loads(sys.stdin.read())
    answer, sys.stdout = sys.stdout, sys.stderr  # the entry may print
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    work = _work(request["entry"], request["arguments"])
    peak = _peak_resident(work, request["warmup"])
    answer.write(json.dumps({"peak": peak}))
    answer.flush()


def _work(entry: str, arguments: Mapping[str, Any]) -> Callable[[], object]:
    module, name = entry.split(":")
    prepare: Callable[..., Callable[[], object]] = getattr(importlib.import_module(module), name)
    return prepare(**arguments)


def _ask_fresh_process(request: str, entry: str, timeout: float) -> int:
    paths = [path or os.getcwd() for path in sys.path]  # noqa: PTH109 - as text
    environment = {**os.environ, **_MALLOC, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=request,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        message = f"{entry} took more than {timeout:g} s; measure something smaller"
        raise MemoryMeasurementError(message) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode < 0:
            reason = f"killed by signal {-done.returncode}, probably out of memory"
        raise MemoryMeasurementError(f"memory of {entry} could not be measured: {reason}")
    return int(json.loads(done.stdout)["peak"])


def _peak_on_gpu(work: Callable[[], object], device: str, warmup: int) -> int:
    for _ in range(warmup):
        work()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def _peak_resident(work: Callable[[], object], warmup: int) -> int:
    if not _reset_high_water_mark():
        # The mark is of the whole life of the process: a warm-up would hide the call behind it.
        before = _high_water_mark_of_life()
        work()
        return _high_water_mark_of_life() - before
    for _ in range(warmup):
        work()
    gc.collect()
    _give_back_free_memory()
    _reset_high_water_mark()
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _give_back_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water_mark() -> bool:
    """Set VmHWM back to VmRSS; tell whether the system (Linux, unless it is locked down) did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmHWM") - _status_bytes("VmRSS") < 2**22
    except (OSError, MemoryMeasurementError):
        return False


def _high_water_mark_of_life() -> int:
    try:
        import resource
    except ImportError as error:
        raise MemoryMeasurementError("this system does not tell a process's memory") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise MemoryMeasurementError(f"{_STATUS} has no {key}")
