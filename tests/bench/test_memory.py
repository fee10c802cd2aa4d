import sys

import pytest

from dkl.bench import MemoryMeasurementError, peak_memory

ENTRIES = """
import os
import signal
import time

import torch


def allocate(mib, times=1, inputs_mib=0):
    inputs = torch.ones(2**18 * inputs_mib)

    def work():
        for _ in range(times):
            torch.ones(2**18 * mib).add_(1)

    return work


def threads():
    print("noise on stdout")
    found = torch.get_num_threads()
    return lambda: torch.ones(2**18 * 16 * found)


def fail():
    raise KeyError("nothing to prepare")


def killed():
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def sleeper():
    return lambda: time.sleep(60)
"""
MIB = 2**20


@pytest.fixture
def entries(tmp_path, monkeypatch):
    (tmp_path / "entries_for_memory.py").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    return "entries_for_memory"


linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems give a rougher number")


@linux
def test_memory_that_one_call_takes_is_seen(entries):
    peak = peak_memory(f"{entries}:allocate", {"mib": 64})
    assert abs(peak - 64 * MIB) < 2 * MIB


@linux
def test_inputs_and_what_was_freed_do_not_count(entries):
    peak = peak_memory(f"{entries}:allocate", {"mib": 16, "times": 3, "inputs_mib": 128})
    assert abs(peak - 16 * MIB) < 2 * MIB


@linux
def test_the_fresh_process_has_the_threads_and_may_print(entries):
    peak = peak_memory(f"{entries}:threads", threads=2)
    assert abs(peak - 32 * MIB) < 2 * MIB


@pytest.mark.parametrize(
    ("name", "message"),
    [("fail", "nothing to prepare"), ("killed", "signal 9"), ("absent", "absent")],
)
def test_what_went_wrong_in_the_process_is_told(entries, name, message):
    with pytest.raises(MemoryMeasurementError, match=message):
        peak_memory(f"{entries}:{name}")


def test_a_call_without_end_is_given_up(entries):
    with pytest.raises(MemoryMeasurementError, match="more than 2 s"):
        peak_memory(f"{entries}:sleeper", timeout=2)


def test_a_system_that_does_not_reset_its_mark_still_answers(entries, monkeypatch):
    from dkl.bench import memory

    readings = iter([100 * MIB, 140 * MIB])
    calls = []
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    monkeypatch.setattr(memory, "_high_water_mark_of_life", lambda: next(readings))
    assert memory._peak_resident(lambda: calls.append(1), warmup=3) == 40 * MIB
    assert len(calls) == 1  # a warm-up would have hidden the call


@pytest.mark.parametrize("entry", ["dkl.bench.steps", "a:b:c", ":f", "module:"])
def test_entries_are_module_and_function(entry):
    with pytest.raises(ValueError, match=r"package\.module:function"):
        peak_memory(entry)
