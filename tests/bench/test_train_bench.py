"""The benchmark of training steps times two ways to one result: what proves that they are."""

import random
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

import dkl
from dkl.bench import BenchRow, train
from dkl.bench.step_profile import KINDS, PHASES
from dkl.bench.straightforward import AdversarialScript, StepNumbers, pairwise_ikl
from dkl.bench.train_agreement import (
    Differences,
    StepMismatchError,
    check_agreement,
    compare_float32,
    compare_float64,
    differences,
)
from dkl.bench.train_sides import (
    BASELINE,
    CASES,
    IMAGE_GRADIENTS,
    OURS,
    PLAIN_KD,
    Case,
    OurStep,
    ScriptStep,
    StepState,
    make_case,
    make_problem,
)
from dkl.engine import LoopSettings


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str) -> Case:
    return replace(make_case(name, quick=True), image_size=8, num_classes=5)


def loop(case: Case, **options) -> LoopSettings:
    return LoopSettings(epochs=1, batch_size=case.batch_size, seed=3, **options)


def our_step(name: str) -> OurStep:
    case = tiny(name)
    return OurStep(make_problem(case, 0), case.numbers, case.kind, loop(case))


# ------------------------------------------------------------------------------ the pairwise loss


def test_pairwise_loss_is_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    weights_BC = torch.rand(6, 7, generator=generator, dtype=torch.float64)
    weighting = {"mse_weight": 3.0, "ce_weight": 2.0, "temperature": 4.0}

    def value_and_gradients(loss) -> list[Tensor]:
        pair = [x.clone().requires_grad_() for x in logits]
        value = loss(*pair, weights_BC, **weighting)
        return [value.detach(), *torch.autograd.grad(value, pair)]

    both = zip(value_and_gradients(pairwise_ikl), value_and_gradients(dkl.ikl_loss), strict=True)
    for found, expected in both:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------ the agreement


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_whole_steps_agree_in_float64(name: str, channels_last: bool):
    case = tiny(name)
    found = compare_float64(
        case, loop(case, channels_last=channels_last), ["contiguous"], script=case.numbers
    )
    scripts = set() if name == "ikl_kd" else {IMAGE_GRADIENTS}
    assert set(found) == {OURS, f"{OURS}, contiguous"} | scripts
    for values in found.values():
        # Far below the limit: what separates the sides is the order of additions. An average that
        # moves by 4e-4 of every update shows its own rounding.
        assert values.parameters < 1e-13
        assert values.update < 1e-11
        assert values.average < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_updates_agree_in_float32(name: str):
    case = tiny(name)
    found = compare_float32(case, loop(case, channels_last=True), script=case.numbers)
    assert found.parameters <= 1e-4
    # One activation that turns moves the update of so few samples by half a percent.
    assert found.update <= 0.05
    assert found.adversarial <= 0.05


ALTERED = [
    ("ikl_at", {"step_size": 3 / 255}),
    ("ikl_at", {"num_steps": 3}),
    ("ikl_at", {"eps": 2 / 255}),
    ("ikl_at", {"start_std": 0.002}),
    ("ikl_at", {"mse_weight": 20.1}),
    ("ikl_at", {"ce_weight": 4.1}),
    ("ikl_at", {"weight_temperature": 3.9}),
    ("ikl_at", {"learning_rate": 0.201}),
    ("ikl_at", {"momentum": 0.89}),
    ("ikl_at", {"weight_decay": 4e-4}),
    ("ikl_at", {"average_decay": 0.999}),
    ("ikl_at", {"awp_gamma": 0.005}),
    ("ikl_at_awp", {"awp_gamma": 0.0051}),
    ("ikl_kd", {"temperature": 3.9}),
    ("ikl_kd", {"mse_weight": 12.1}),
    ("ikl_kd", {"momentum": 0.89}),
]


@pytest.mark.parametrize(("name", "change"), ALTERED, ids=str)
def test_a_side_that_does_something_else_is_found_out(name: str, change: dict[str, float]):
    case = tiny(name)
    with pytest.raises(StepMismatchError, match="do not end in the same place"):
        compare_float64(case, loop(case), script=replace(case.numbers, **change))


def test_float32_notices_another_learning_rate():
    case = tiny("ikl_at_awp")
    script = replace(case.numbers, learning_rate=0.25)
    with pytest.raises(StepMismatchError, match=r"parameters .*at most 1e-04"):
        compare_float32(case, loop(case), script=script)


def test_order_of_the_forward_passes_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Running statistics see the images in another order; the parameters do not."""
    case = tiny("ikl_at")
    original = AdversarialScript._loss

    def clean_first(self, model, images, adversarial, labels_B, weights_BC):
        logits = {}

        def remembered(batch: Tensor) -> Tensor:
            return logits[id(batch)]

        logits[id(images)] = model(images)
        logits[id(adversarial)] = model(adversarial)
        return original(self, remembered, images, adversarial, labels_B, weights_BC)

    monkeypatch.setattr(AdversarialScript, "_loss", clean_first)
    with pytest.raises(StepMismatchError, match="buffers"):
        compare_float64(case, loop(case), script=case.numbers)


def test_an_attack_in_train_mode_is_noticed(monkeypatch: pytest.MonkeyPatch):
    case = tiny("ikl_at")
    monkeypatch.setattr(nn.Module, "eval", lambda self: self)
    problem = make_problem(case, 0, torch.float64)
    script = ScriptStep(problem, case.numbers, device=torch.device("cpu"), seed=3)
    script()
    monkeypatch.undo()
    settings = loop(case, dtype="float64")
    ours = OurStep(problem, case.numbers, "ikl_at", settings)
    ours()
    found = differences(ours.state(), script.state(), StepState.of(problem.model))
    with pytest.raises(StepMismatchError, match="buffers"):
        check_agreement(found, what="train mode", is_float64=True)


def test_not_a_number_is_no_agreement():
    good = Differences(parameters=0.0, update=0.0, buffers=0.0, class_sums=0.0, average=0.0)
    check_agreement(good, what="same", is_float64=True)
    for is_float64 in (True, False):
        with pytest.raises(StepMismatchError, match="parameters nan"):
            check_agreement(
                replace(good, parameters=float("nan")), what="broken", is_float64=is_float64
            )


def test_states_with_other_tensors_are_no_agreement():
    model = nn.Linear(2, 2)
    state = StepState.of(model)
    assert asdict(differences(state, state, state)) == dict.fromkeys(
        asdict(Differences(*[0.0] * 5)), 0.0
    )
    with pytest.raises(StepMismatchError, match="class_sums"):
        differences(state, StepState.of(model, torch.zeros(2, 2)), state)


def test_sides_leave_the_problem_alone():
    case = tiny("ikl_at_awp")
    problem = make_problem(case, 0)
    before = StepState.of(problem.model)
    images, table = problem.images.clone(), problem.table.clone()
    OurStep(problem, case.numbers, "ikl_at", loop(case))()
    ScriptStep(problem, case.numbers, device=torch.device("cpu"))()
    same = differences(StepState.of(problem.model), before, before)
    assert same.parameters == same.buffers == 0.0
    assert torch.equal(problem.images, images)
    assert torch.equal(problem.table, table)


# ------------------------------------------------------------------------------------- the profile


@pytest.mark.parametrize("name", CASES)
def test_shares_of_a_step(name: str):
    step = our_step(name)
    objective = getattr(step.method, "inner", None)
    hooks = [len(network._forward_hooks) for network in step.networks]
    pre_hooks = [len(network._forward_pre_hooks) for network in step.networks]
    shares = step.profile()
    assert set(shares) == {(phase, kind) for phase in PHASES for kind in KINDS}
    assert sum(shares.values()) == pytest.approx(1.0)
    kinds = {kind: sum(shares[phase, kind] for phase in PHASES) for kind in KINDS}
    for kind in ("convolution forward", "convolution backward", "batch norm", "loss", "optimiser"):
        assert kinds[kind] > 0, kind
    perturbs = name == "ikl_at_awp"
    assert (kinds["awp"] > 0) == perturbs
    assert (shares["direction", "convolution backward"] > 0) == perturbs
    assert (shares["prepare", "convolution backward"] > 0) == (name != "ikl_kd")
    assert shares["prepare", "convolution forward"] > 0
    assert shares["update", "optimiser"] > 0
    # Nothing of the recording stays behind.
    assert getattr(step.method, "inner", None) is objective
    assert [len(network._forward_hooks) for network in step.networks] == hooks
    assert [len(network._forward_pre_hooks) for network in step.networks] == pre_hooks


@pytest.mark.parametrize("name", CASES)
def test_a_profiled_step_is_an_ordinary_one(name: str):
    plain, profiled = our_step(name), our_step(name)
    start = plain.state()
    plain()
    profiled.profile()
    found = differences(profiled.state(), plain.state(), start)
    assert set(asdict(found).values()) == {0.0}


# ------------------------------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def rows() -> list[BenchRow]:
    return train.run(quick=True, rounds=2, threads=1, options=["contiguous"])


def by_case(rows: list[BenchRow], name: str, dtype: str) -> dict[tuple[str, str], BenchRow]:
    found = [r for r in rows if r.case.startswith(f"{name}: ") and r.case.endswith(f", {dtype}")]
    keyed = {(row.metric, row.method): row for row in found}
    assert len(keyed) == len(found)
    return keyed


@pytest.mark.parametrize("name", CASES)
def test_rows_are_complete(rows: list[BenchRow], name: str):
    single, exact = by_case(rows, name, "float32"), by_case(rows, name, "float64")
    other = PLAIN_KD if name == "ikl_kd" else IMAGE_GRADIENTS
    timed = {method for metric, method in single if metric == "time"}
    assert timed == {OURS, f"{OURS}, contiguous", BASELINE, other}
    for method in timed:
        row = single["time", method]
        assert (row.unit, row.baseline) == ("s", BASELINE)
        assert row.repeats == (6 if name == "ikl_kd" else 2)
        assert row.low <= row.value <= row.high
    assert single["time", BASELINE].ratio == 1.0
    assert (("ratio_to_kd", OURS) in single) == (name == "ikl_kd")
    compared = {OURS, f"{OURS}, contiguous"} | ({other} - {PLAIN_KD})
    for metric in ("parameter_difference", "update_difference"):
        assert {method for found, method in exact if found == metric} == compared
        assert all(exact[metric, method].value <= 1e-6 for method in compared)
    assert single["parameter_difference", f"{OURS}, contiguous"].value <= 1e-4
    attacked = {method for metric, method in exact if metric == "adversarial_difference"}
    assert attacked == (set() if name == "ikl_kd" else compared)
    for metric, parts in (("share", KINDS), ("phase_share", PHASES)):
        values = [single[metric, f"{OURS}: {part}"].value for part in parts]
        assert sum(values) == pytest.approx(1.0)


def test_rows_say_where_they_come_from(rows: list[BenchRow]):
    assert {row.table for row in rows} == {"train"}
    for row in rows:
        assert BenchRow.from_json(row.to_json()) == row
        assert row.settings["threads"] == 1
        assert row.settings["dtype"] in row.case
        uses = row.method == OURS or row.method.startswith(f"{OURS}:") or row.method == PLAIN_KD
        assert row.settings["channels_last"] == uses
        assert row.settings["numbers"]["num_steps"] == 2 or row.settings["teacher"]
        assert row.origin["settings_hash"]


def test_table_of_shares(rows: list[BenchRow]):
    text = train.share_table(rows)
    assert text.count("convolution backward") == len(CASES)
    assert text.count("phase direction") == len(CASES)
    assert train.share_table([row for row in rows if row.metric == "time"]) == ""


def test_run_leaves_threads_and_generators_alone():
    torch.set_num_threads(2)
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.get_rng_state(), random.getstate()
    messages: list[str] = []
    train.run(cases=["ikl_kd"], quick=True, rounds=1, threads=1, progress=messages.append)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert torch.get_num_threads() == 2
    assert [text.rpartition(": ")[2] for text in messages] == ["comparing", "timing"]


def test_timed_sides_hardly_move():
    case = tiny("ikl_at")
    sides = train.make_sides(case, loop(case))
    start = StepState.of(make_problem(case, 3).model)
    for side in sides.values():
        for _ in range(3):
            side()
        moved = differences(side.state(), side.state(), start)
        assert moved.update == 0.0
        for name, value in side.state().parameters.items():
            assert (value - start.parameters[name]).abs().max() < 1e-5


def test_bad_settings():
    with pytest.raises(ValueError, match="a case is one of ikl_at"):
        train.run(cases=["ikl"], quick=True)
    with pytest.raises(ValueError, match="an option is one of contiguous"):
        train.run(cases=["ikl_kd"], quick=True, options=["fast"])
    with pytest.raises(ValueError, match="batch_size of at least 2"):
        train.run(cases=["ikl_kd"], quick=True, batch_size=1)


def test_numbers_are_the_published_ones():
    """IKL-AT on CIFAR-100 and wrn_40_2 to wrn_16_2, as the scripts call them."""
    adversarial = make_case("ikl_at_awp", quick=False)
    assert adversarial.numbers == StepNumbers(
        mse_weight=20, ce_weight=4, weight_temperature=4, eps=8 / 255, step_size=2 / 255,
        num_steps=5, start_std=0.001, awp_gamma=0.005, learning_rate=0.2, momentum=0.9,
        weight_decay=5e-4,
    )  # fmt: skip
    distilled = make_case("ikl_kd", quick=False).numbers
    assert (distilled.mse_weight, distilled.ce_weight, distilled.temperature) == (12, 3, 4)
    assert (distilled.learning_rate, distilled.weight_decay) == (0.05, 5e-4)
