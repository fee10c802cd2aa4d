import gc
import random
from collections import Counter

import numpy as np
import pytest

from dkl.bench import Timing, interleaved, percentile, ratios, time_rows


class Machine:
    """A clock that only work moves, and the work; ``pace`` is how slow the machine is now."""

    def __init__(self):
        self.now = 0.0
        self.pace = lambda: 1.0
        self.calls = []

    def work(self, name, seconds):
        def function():
            self.calls.append(name)
            self.now += self.pace() * seconds

        return function


@pytest.fixture
def machine(monkeypatch):
    one = Machine()
    monkeypatch.setattr("dkl.bench.timing.perf_counter", lambda: one.now)
    return one


def test_functions_take_turns_and_the_order_rotates(machine):
    functions = {name: machine.work(name, 1.0) for name in "abc"}
    timings = interleaved(functions, warmup=2, rounds=4)
    warm = len("abc") * 2 + len("abc")  # and one call each to see how long it takes
    assert "".join(machine.calls[:6]) == "abcabc"
    assert "".join(machine.calls[warm:]) == "abc" + "bca" + "cab" + "abc"
    assert list(timings) == ["a", "b", "c"]
    assert all(timing.seconds == (1.0,) * 4 for timing in timings.values())


def test_short_functions_are_repeated_as_often_in_every_round(machine):
    functions = {"short": machine.work("short", 3e-6), "long": machine.work("long", 0.5)}
    first = interleaved(functions, warmup=0, rounds=1)
    one = Counter(machine.calls)
    machine.calls.clear()
    timings = interleaved(functions, warmup=0, rounds=3)
    three = Counter(machine.calls)
    per_round = (three["short"] - one["short"]) / 2
    assert per_round * 3e-6 >= 1e-3
    assert per_round == int(per_round)
    assert three["long"] - one["long"] == 2
    for timing in (first["short"], timings["short"]):
        assert timing.seconds == pytest.approx([3e-6] * len(timing.seconds))


def test_min_seconds_makes_timings_longer(machine):
    interleaved({"a": machine.work("a", 0.01)}, warmup=0, rounds=1, min_seconds=0.2)
    last = machine.calls[-20:]
    assert last == ["a"] * 20


def test_a_machine_that_slows_down_between_rounds_does_not_change_ratios(machine):
    functions = {"slow": machine.work("slow", 4.0), "fast": machine.work("fast", 1.0)}
    # Two calls a round, after two calls that tell how long they take.
    machine.pace = lambda: [1.0, 10.0, 3.0][(len(machine.calls) - 3) // 2 % 3]
    timings = interleaved(functions, warmup=0, rounds=5)
    assert timings["fast"].seconds == pytest.approx((1.0, 10.0, 3.0, 1.0, 10.0))
    assert ratios(timings, "slow")["fast"] == pytest.approx((0.25, 0.25, 0.25))


def test_ratios_are_within_rounds():
    timings = {"a": Timing((1.0, 20.0, 3.0)), "b": Timing((2.0, 10.0, 3.0))}
    median, low, high = ratios(timings, "b")["a"]
    assert median == 1.0  # of 0.5, 2 and 1; a ratio of medians would be 1 too, of means not
    assert low == pytest.approx(np.percentile([0.5, 2, 1], 20))
    assert high == pytest.approx(np.percentile([0.5, 2, 1], 80))
    assert ratios(timings, "b")["b"] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("num", [1, 2, 5, 15])
@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
def test_percentiles_are_numpys(num, percent):
    values = [random.Random(num).gauss(0, 1) for _ in range(num)]
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_timing_summarises_its_rounds():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert timing.median == 3.0
    assert (timing.low, timing.high) == pytest.approx((1.8, 4.2))


def test_garbage_is_not_collected_in_a_round_and_is_afterwards(machine):
    seen = []

    def look():
        seen.append(gc.isenabled())
        machine.now += 1

    assert gc.isenabled()
    interleaved({"look": look}, warmup=0, rounds=2)
    assert seen[-2:] == [False, False]
    assert gc.isenabled()

    def fail():
        machine.now += 1
        if not gc.isenabled():
            raise RuntimeError("in a round")

    with pytest.raises(RuntimeError, match="in a round"):
        interleaved({"fail": fail}, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "bad", [{"rounds": 0}, {"warmup": -1}, {"functions": {}}], ids=["rounds", "warmup", "none"]
)
def test_nothing_to_time_is_an_error(bad):
    functions = bad.pop("functions", {"a": lambda: None})
    with pytest.raises(ValueError, match="needs a function"):
        interleaved(functions, **bad)


def test_ratios_need_the_baseline_and_one_run():
    with pytest.raises(ValueError, match="'c' was not timed"):
        ratios({"a": Timing((1.0,))}, "c")
    with pytest.raises(ValueError, match="one run"):
        ratios({"a": Timing((1.0,)), "b": Timing((1.0, 2.0))}, "a")


def test_time_rows_hold_medians_spreads_and_ratios():
    timings = {"slow": Timing((2.0, 4.0, 8.0)), "fast": Timing((1.0, 1.0, 4.0))}
    rows = time_rows(
        timings, table="t", case="c", baseline="slow", settings={"seed": 0}, origin={"commit": "x"}
    )
    slow, fast = rows
    assert (slow.method, slow.value, slow.ratio) == ("slow", 4.0, 1.0)
    assert (fast.value, fast.ratio, fast.repeats) == (1.0, 0.5, 3)
    assert (fast.low, fast.high) == pytest.approx((1.0, 2.8))
    assert (fast.ratio_low, fast.ratio_high) == pytest.approx((0.35, 0.5))
    assert fast.settings == {"seed": 0}
    assert fast.origin == {"commit": "x"}
