import json
import math

import pytest
import torch

from dkl.bench import linear, losses, sweep
from dkl.bench.cases import check_agreement, memory_rows
from dkl.bench.floor import CopySpeed, bytes_that_move
from dkl.bench.peers import EXPANDED, KL, KL_COMPILED, PAIRWISE
from dkl.bench.rows import BenchRow
from dkl.bench.settings import LinearSettings, LossSettings, known_backends
from dkl.bench.steps import loss_step, random_logits, step_for_memory, torch_threads
from dkl.bench.sweep import fit_slope, swept_methods, swept_shapes
from dkl.bench.timing import Timing

MIB = 2**20


def small(**changes):
    values = {
        "shapes": ((4, 3), (2, 30)),
        "rounds": 2,
        "warmup": 1,
        "compile": False,
        "sweep_classes": (),
        "copy_bytes": MIB,
        "memory": "none",
        "backends": ("auto", "reference"),
    }
    return LossSettings(**{**values, **changes})


def select(rows, **wanted):
    return [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]


@pytest.fixture
def peaks(monkeypatch):
    """Stand in for fresh processes; notes what was asked."""
    asked = []

    def peak(entry, arguments, *, device, threads):
        asked.append((entry, arguments, threads))
        return 1000 * MIB if "kl, eager" in arguments["method"] else 100 * MIB

    monkeypatch.setattr("dkl.bench.cases.peak_memory", peak)
    monkeypatch.setattr("dkl.bench.linear.peak_memory", peak)
    return asked


def test_each_case_times_every_method_in_one_run():
    said = []
    rows = losses.run(small(), said.append)
    names = {KL, PAIRWISE, EXPANDED, "ikl, auto", "ikl, reference", "two exps", "roofline"}
    for case in ("[4, 3] float32", "[2, 30] float32"):
        timed = select(rows, case=case, metric="time")
        assert {row.method for row in timed} == names
        assert all(row.baseline == KL and row.ratio > 0 and row.value > 0 for row in timed)
        assert all(row.repeats == 2 for row in timed)
        (baseline,) = select(timed, method=KL)
        assert (baseline.ratio, baseline.ratio_low, baseline.ratio_high) == (1.0, 1.0, 1.0)
    assert said == ["time: [4, 3] float32", "time: [2, 30] float32"]
    assert all(row.low <= row.value <= row.high for row in rows if row.low is not None)


def test_rows_say_what_decided_them():
    rows = losses.run(small(shapes=((4, 3),), threads=1, seed=7))
    assert len({json.dumps(row.settings) for row in rows}) == 1
    settings = rows[0].settings
    assert settings["shape"] == [4, 3]
    assert (settings["threads"], settings["seed"], settings["rounds"]) == (1, 7, 2)
    assert set(rows[0].origin) >= {"settings_hash", "versions", "device", "time", "commit"}
    assert all(BenchRow.from_json(row.to_json()) == row for row in rows)


def test_the_roofline_is_the_bytes_over_the_copy_bandwidth():
    rows = losses.run(small(shapes=((8, 16),)))
    (bandwidth,) = select(rows, metric="bandwidth")
    (roofline,) = select(rows, metric="time", method="roofline")
    assert roofline.value == pytest.approx(3 * 8 * 16 * 4 / bandwidth.value)
    for share in select(rows, metric="copy_bandwidth_share"):
        (time,) = select(rows, metric="time", method=share.method)
        assert share.value == pytest.approx(roofline.value / time.value)


def test_copy_speed_counts_reading_and_writing():
    copy = CopySpeed(1000, Timing((1.0, 2.0, 3.0)))
    assert copy.bandwidth == 1000.0
    assert copy.seconds_to_move(500)[0] == pytest.approx(0.5)
    assert bytes_that_move((5, 7), 2, target_grad=True) == 5 * 7 * 2 * 4


def test_pairwise_ratios_stand_beside_those_to_kl():
    rows = losses.run(small(shapes=((4, 30),)))
    compared = select(rows, metric="ratio_to_pairwise")
    assert [row.method for row in compared] == ["ikl, auto", "ikl, reference"]
    assert all(row.value > 0 and row.baseline is None for row in compared)


def test_a_target_with_gradient_is_a_second_set():
    rows = losses.run(small(shapes=((4, 3),), target_grad=True))
    cases = {row.case: row.settings["target_grad"] for row in rows}
    assert cases == {"[4, 3] float32": False, "[4, 3] float32, target gradient": True}
    rooflines = [
        row.value / select(rows, metric="bandwidth", case=row.case)[0].value ** -1
        for row in select(rows, method="roofline")
    ]
    assert rooflines == pytest.approx([3 * 48, 4 * 48])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_run(dtype):
    rows = losses.run(small(shapes=((4, 3),), dtype=dtype))
    assert {row.case for row in rows} == {f"[4, 3] {dtype}"}


def test_threads_are_set_for_the_run_only():
    before = torch.get_num_threads()
    with torch_threads(before + 1) as threads:
        assert threads == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_step_starts_without_gradients_and_leaves_those_needed():
    calls = []

    def loss(n, m):
        calls.append((n.grad, m.grad))
        return (n * m).sum()

    for target_grad in (False, True):
        logits = random_logits((3, 4), "float32", "cpu", target_grad=target_grad, seed=0)
        step = loss_step(loss, *logits)
        first, second = step(), step()
        assert first == second
        torch.testing.assert_close(logits[0].grad, logits[1].detach())
        assert (logits[1].grad is not None) == target_grad
    assert calls == [(None, None)] * 4


def test_logits_depend_on_the_seed_alone():
    first, second, other = (
        random_logits((3, 4), "float32", "cpu", target_grad=False, seed=seed)[0]
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# Memory


def test_memory_is_measured_for_the_methods_asked_for(peaks):
    rows = losses.run(
        small(shapes=((8, 2**18),), backends=("auto",), memory="auto", warmup=0, rounds=1)
    )
    assert [request[1]["method"] for request in peaks] == [KL, "ikl, auto"]
    assert peaks[0][0] == "dkl.bench.steps:step_for_memory"
    beyond_inputs = select(rows, metric="peak_memory")
    assert [row.value / MIB for row in beyond_inputs] == [1000, 100]
    assert beyond_inputs[1].ratio == pytest.approx(0.1)
    # The gradient of the input is 8 * 2**18 * 4 bytes = 8 MiB.
    beyond_gradients = select(rows, metric="peak_memory_beyond_gradients")
    assert [row.value / MIB for row in beyond_gradients] == [992, 92]
    assert beyond_gradients[1].ratio == pytest.approx(92 / 992)


def test_all_methods_are_asked_where_all_are_wanted(peaks):
    losses.run(small(shapes=((4, 3),), memory="all"))
    methods = [request[1]["method"] for request in peaks]
    assert methods == [KL, PAIRWISE, EXPANDED, "ikl, auto", "ikl, reference"]


def test_ratios_of_memory_below_the_resolution_are_not_given():
    def row(**values):
        return BenchRow(table="losses", case="c", **values)

    rows = memory_rows(row, {"a": 1000, "b": 3000}, 500, "a")
    assert [(r.method, r.metric, r.value) for r in rows] == [
        ("a", "peak_memory", 1000),
        ("b", "peak_memory", 3000),
        ("a", "peak_memory_beyond_gradients", 500),
        ("b", "peak_memory_beyond_gradients", 2500),
    ]
    assert all(r.ratio is None for r in rows)


def test_the_step_for_memory_leaves_nothing_behind():
    work = step_for_memory("ikl, reference", [4, 3], "float32", "cpu", True, 0)
    work()
    leaves = [cell.cell_contents for cell in work.__closure__]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == 2
    assert all(tensor.grad is None for tensor in tensors)


# What may not be timed


def test_methods_that_disagree_are_not_timed(monkeypatch):
    def wrong(n, m):
        return (n - m).square().sum()

    monkeypatch.setattr("dkl.bench.peers.expanded_ikl", wrong)
    with pytest.raises(RuntimeError, match="same loss"):
        losses.run(small(shapes=((4, 3),)))


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_agreement_is_relative_and_nan_disagrees(value):
    check_agreement({"a": 1.0, "b": 1.0001}, "float32")
    check_agreement({"a": 1.0, "b": value}, "bfloat16")
    with pytest.raises(RuntimeError, match="same loss"):
        check_agreement({"a": 1.0, "b": value}, "float32")


def test_kl_that_cannot_be_compiled_is_left_out_with_a_message(monkeypatch):
    def no_compiler(function, **options):
        def fail(*args):
            raise RuntimeError("no C++ compiler\nmore")

        return fail

    monkeypatch.setattr("dkl.bench.peers.torch.compile", no_compiler)
    said = []
    rows = losses.run(small(shapes=((4, 3),), compile=True), said.append)
    assert select(rows, method=KL_COMPILED) == []
    assert "left out: kl, compiled, [4, 3]: no C++ compiler" in said


# The sweep


def test_slopes_of_known_laws():
    xs = [1e2, 1e3, 1e4, 1e5, 1e6]
    for power in (-1.0, 0.0, 0.5, 2.0):
        assert fit_slope(xs, [3e-9 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)
    noisy = [x * (1 + 0.1 * (-1) ** place) for place, x in enumerate(xs)]
    assert fit_slope(xs, noisy) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="two different x"):
        fit_slope([5, 5], [1, 2])


def test_the_sweep_keeps_the_number_of_elements():
    settings = small(sweep_classes=(100, 1000, 10**6), sweep_elements=2**16)
    assert swept_shapes(settings) == [(655, 100), (65, 1000), (1, 10**6)]
    assert swept_shapes(small(sweep_classes=(1024,))) == [(2**12, 1024)]


def test_the_sweep_times_what_auto_may_be_or_what_was_asked_for():
    swept = swept_methods(small(backends=None))
    assert swept[:2] == [KL, "ikl, auto"]
    assert "ikl, reference" not in swept
    assert swept_methods(small(backends=("reference",))) == [KL, "ikl, reference"]


def test_sweep_rows_follow_from_the_timings(monkeypatch, peaks):
    def fake(steps, *, warmup, rounds, device):
        # KL costs 2 ns an element, ours sqrt(C) ns, and both thrice that in the second round.
        timings = {}
        for name in steps:
            method, _, text = name.partition(", C = ")
            num = int(text)
            cost = 2e-9 if method == KL else 1e-9 * math.sqrt(num)
            seconds = cost * (1200 // num * num)
            timings[name] = Timing((seconds, 3 * seconds, seconds))
        return timings

    monkeypatch.setattr(sweep, "interleaved", fake)
    settings = small(
        backends=("reference",), sweep_classes=(4, 25, 100), sweep_elements=1200, rounds=3,
        memory="all", shapes=(),
    )  # fmt: skip
    rows = losses.run(settings)
    ours = select(rows, metric="time_per_element", method="ikl, reference")
    assert [row.value for row in ours] == pytest.approx([2e-9, 5e-9, 1e-8])
    assert [row.ratio for row in ours] == pytest.approx([1.0, 2.5, 5.0])
    assert len({row.case for row in ours}) == 3
    slopes = {row.method: row for row in select(rows, metric="slope")}
    assert slopes["ikl, reference"].value == pytest.approx(0.5)
    assert slopes["ikl, reference"].high == pytest.approx(0.5)
    assert slopes[KL].value == pytest.approx(0.0, abs=1e-9)
    assert len(select(rows, metric="peak_memory")) == 6
    assert all(row.settings["sweep"] for row in select(rows, metric="peak_memory"))


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"device": "nowhere"}, "device"),
        ({"device": "meta"}, "cpu and cuda"),
        ({"rounds": 0}, "rounds"),
        ({"threads": 0}, "threads"),
        ({"memory": "some"}, "memory"),
        ({"shapes": ((0, 3),)}, "at least 1"),
        ({"sweep_classes": (0,)}, "at least 1"),
        ({"backends": ("magic",)}, "magic"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="0 GPUs"):
        small(device="cuda")


def test_backends_that_need_a_compiler_or_a_gpu_are_left_out():
    assert "compile" not in small(backends=None).chosen_backends()
    assert "triton" not in small(backends=None, compile=True).chosen_backends()
    assert set(known_backends()) >= {"auto", "reference"}


# The linear head


def test_the_linear_table_compares_with_the_dense_form_of_the_same_loss(peaks):
    said = []
    settings = LinearSettings(num_rows=6, num_hidden=4, num_classes=9, rounds=2, warmup=1)
    rows = linear.run(settings, said.append)
    timed = select(rows, metric="time")
    assert [row.method for row in timed] == [linear.DENSE, linear.DENSE_KL, linear.LINEAR]
    assert all(row.baseline == linear.DENSE for row in timed)
    assert [request[1]["method"] for request in peaks] == list(linear.METHODS)
    assert said[0] == "time: N = 6, H = 4, V = 9, float32"
    beyond = select(rows, metric="peak_memory_beyond_gradients", method=linear.DENSE)
    assert [row.value for row in beyond] == [100 * MIB - (6 + 9) * 4 * 4]


def test_the_dense_and_the_linear_form_give_the_same_gradients():
    results = []
    for method in (linear.DENSE, linear.LINEAR):
        tensors = linear._random_tensors([7, 5, 11], "float64", "cpu", seed=3)
        value = linear._step(linear.find_loss(method), tensors)()
        assert [tensor.grad is not None for tensor in tensors] == [True, True, False, False]
        results.append((value, tensors[0].grad, tensors[1].grad))
    for dense, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, dense, rtol=1e-9, atol=1e-12)


def test_linear_forms_that_disagree_are_not_timed(monkeypatch):
    import dkl.losses.linear as module

    right = module.linear_ikl_loss
    monkeypatch.setattr(module, "linear_ikl_loss", lambda *args: 1.1 * right(*args))
    with pytest.raises(RuntimeError, match="same loss"):
        linear.run(LinearSettings(num_rows=6, num_hidden=4, num_classes=9, memory="none"))


def test_linear_sizes_are_checked():
    with pytest.raises(ValueError, match="vocabulary"):
        LinearSettings(num_classes=0)
