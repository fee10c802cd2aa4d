"""What is checked and estimated before an experiment at full scale."""

from pathlib import Path

import pytest
import torch
from small_runs import small

from dkl import config
from dkl.build.reproduce import (
    Row,
    check_data,
    check_device,
    check_disk,
    estimate_jobs,
    measure,
    plan_jobs,
    recipes_of,
)
from dkl.build.reproduce.estimate import evaluation_seconds, training_seconds
from dkl.build.reproduce.measure import StepCost, cost_key, measure_step
from dkl.build.reproduce.preflight import DataFacts, data_key, steps_per_epoch
from dkl.config import EvaluationSettings, load_recipe
from dkl.models import create_model

COST = StepCost(
    step_seconds=0.5,
    forward_seconds=0.001,
    gradient_seconds=0.003,
    checkpoint_bytes=1000,
    num_features=64,
    is_extrapolated=False,
    device="cpu",
)
FACTS = DataFacts(num_epoch=1280, num_validation=100, num_test=1000)


def plan(rows, *overrides, seeds=(0,), out=Path("out")):
    return plan_jobs(rows, seeds=seeds, out=out, overrides=overrides)


def test_data_that_are_missing_are_told_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parts = f"generated={{parts: [{tmp_path}/1.npz, {tmp_path}/2.npz]}}"
    recipes = [
        load_recipe("digits_trades"),
        load_recipe("digits_natural", [f"data.{parts}"]),
        load_recipe("digits_trades", ["name=cifar", "data.name=cifar100"]),
        load_recipe("digits_trades", ["name=other", "data.name=cifar100", "data.folder=nowhere"]),
        load_recipe("digits_natural", ["name=twin", "data.name=cifar100"]),
    ]
    facts, problems = check_data(recipes)
    assert data_key(recipes[0]) in facts
    text = "\n".join(problems)
    assert len(problems) == 4
    assert "1.npz were not found" in text
    assert "2.npz were not found" in text
    assert "needed by digits_natural" in text
    assert "CIFAR-100 was not found" in text
    assert "Three ways to get it" in text
    assert "the data folder nowhere does not exist" in text


def test_facts_of_the_data():
    recipe = load_recipe("digits_trades", ["data.train_limit=300", "data.test_limit=300"])
    facts, problems = check_data([recipe])
    assert problems == []
    (found,) = facts.values()
    assert (found.num_epoch, found.num_test) == (300, 300)
    assert found.num_validation > 0
    assert steps_per_epoch(recipe, found) == -(-300 // recipe.training.batch_size)


def test_device_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--on-cpu" in check_device(on_cpu=False)[0]
    assert check_device(on_cpu=True) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_device(on_cpu=False) == []
    assert check_disk(tmp_path / "not" / "there", 0) == []
    assert "make room" in check_disk(tmp_path / "not" / "there", 2**70)[0]


def test_training_time_counts_steps_and_validation():
    recipe = load_recipe(
        "digits_trades",
        [
            "training.epochs=10",
            "training.batch_size=128",
            "training.validate_every=2",
            "evaluation.validation_attack_steps=5",
        ],
    )
    steps = 10 * 10 * COST.step_seconds
    validation = 5 * FACTS.num_validation * (0.001 + 5 * 0.003)
    assert training_seconds(recipe, FACTS, COST) == pytest.approx(steps + validation)


def seconds(data="cifar100", **settings):
    settings = {"clean": False, "eps": 0.1, "step_size": 0.025} | settings
    return evaluation_seconds(EvaluationSettings(**settings), FACTS.num_test, data, COST)


def test_evaluation_time_follows_the_attacks_passes():
    clean, robust = 0.66, 0.32
    forward, gradient = COST.forward_seconds, COST.gradient_seconds
    assert seconds() == 0
    assert seconds(clean=True) == pytest.approx(1000 * forward)
    assert seconds(pgd_steps=(10, 20), cw_steps=(7,)) == pytest.approx(37 * 1000 * gradient)
    fast = 1000 * (clean * 101 * gradient + robust * 9 * (101 * gradient + forward))
    rest = 1000 * robust * (9 * 100 * (gradient + forward) + 5000 * forward)
    assert seconds(auto_attack="fast") == pytest.approx(fast)
    assert seconds(auto_attack="standard") == pytest.approx(fast + rest)
    assert seconds(auto_attack="standard", num_images=100) == pytest.approx((fast + rest) / 10)
    pgd = seconds(pgd_steps=(20,), sweep=(0.0, 0.05, 0.1, 0.2))
    assert pgd == pytest.approx((20 + 2 * 20) * 1000 * gradient)
    square = 1000 * 5000 * forward
    assert seconds(square=True) == pytest.approx(clean * square)
    checks = 1000 * clean * 310 * gradient
    assert seconds(masking_checks=True) == pytest.approx(checks + robust * square)
    assert seconds(masking_checks=True, square=True) == pytest.approx(checks + clean * square)
    swept = {"auto_attack": "standard", "sweep": (0.05, 0.2)}
    assert seconds(sweep_attack="auto_attack", **swept) == pytest.approx(3 * (fast + rest))
    assert seconds(sweep_attack="auto_attack_fast", **swept) == pytest.approx(3 * fast + rest)
    cw = seconds(cw_steps=(7,), sweep=(0.2,), sweep_attack="cw")
    assert cw == pytest.approx(14 * 1000 * gradient)
    kept = seconds(features=3, pgd_steps=(10,)) - seconds(pgd_steps=(10,))
    assert kept == pytest.approx(3 * 20 * 10 * gradient)
    # More accurate data cost more: more images are left to attack.
    assert seconds("cifar10", auto_attack="fast") > seconds(auto_attack="fast")


def test_recipes_that_cost_the_same_are_measured_once(tmp_path):
    weights = ("method.mse_weight=3", "method.ce_weight=2", "method.weight_temperature=1")
    rows = {
        "own": Row("digits_ikl_at"),
        "other": Row("digits_ikl_at", weights),
        "trades": Row("digits_trades"),
        "wide": Row("digits_trades", ("training.batch_size=32",)),
        "perturbed": Row("digits_trades", ("weight_perturbation={gamma: 0.01}",)),
    }
    jobs = plan(rows, seeds=(0, 1, 2), out=tmp_path)
    assert len(recipes_of(jobs)) == 5
    measured, said = [], []

    def note(recipe):
        measured.append(recipe)
        return COST

    facts, _ = check_data(recipes_of(jobs))
    found = estimate_jobs(jobs, facts, measure=note, progress=said.append)
    assert said == [recipe.name for recipe in measured]
    assert len(measured) == 4
    assert [one.num_runs for one in found] == [3] * 5
    for one, job in zip(found, jobs, strict=False):
        assert one.name == job.name
        assert one.training_seconds == pytest.approx(
            training_seconds(job.wanted, facts[data_key(job.wanted)], COST)
        )
        assert one.total_seconds == 3 * (one.training_seconds + one.evaluation_seconds)
        assert one.disk_bytes > 3 * COST.checkpoint_bytes
        assert one.total_bytes == 3 * one.disk_bytes


def test_what_is_trained_is_estimated_for_its_evaluation_alone(tmp_path, monkeypatch):
    jobs = plan({"a": Row("digits_trades")}, seeds=(0, 1, 2), out=tmp_path)
    module = "dkl.build.reproduce.estimate"
    monkeypatch.setattr(f"{module}.is_done", lambda job: job.seed == 0)
    monkeypatch.setattr(f"{module}.seems_trained", lambda job: job.seed == 1)
    facts, _ = check_data(recipes_of(jobs))
    found = {one.name: one for one in estimate_jobs(jobs, facts, measure=lambda _: COST)}
    assert {name: one.num_runs for name, one in found.items()} == {
        "digits_trades": 1,
        "digits_trades (trained)": 1,
    }
    half = found["digits_trades (trained)"]
    assert half.training_seconds == 0
    assert half.evaluation_seconds == found["digits_trades"].evaluation_seconds > 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("digits_natural", ("schedule={kind: step, milestones: [3, 5]}",)),
        (
            "digits_ikl_at",
            (
                "method.attack.epsilon_ramp_epochs=6",
                "weight_perturbation={gamma: 0.01, start_epoch: 4}",
                "data.generated={held_out: true, samples_per_epoch: 640}",
                "data.train_limit=200",
            ),
        ),
    ],
)
def test_a_step_is_measured_on_the_device_at_hand(name, overrides, monkeypatch):
    trained = []
    real = measure.train_recipe

    def note(recipe, out, **options):
        trained.append((recipe, out))
        return real(recipe, out, **options)

    monkeypatch.setattr(measure, "train_recipe", note)
    averaging = "averaging={decay: 0.9, start_epoch: 3.0}"
    recipe = small(name, "training.epochs=7", averaging, *overrides)
    cost = measure_step(recipe, patience=0)
    assert cost.step_seconds > 0
    assert cost.forward_seconds > 0
    assert cost.gradient_seconds > 0
    assert (cost.device, cost.is_extrapolated) == ("cpu", True)
    assert cost.num_features > 0
    # What is on for most of training is on in the steps that are timed.
    (short, folder) = trained[0]
    assert len(trained) == 1
    assert not folder.exists()
    assert short.training.epochs == 2
    assert short.averaging.start_epoch == 0
    if short.weight_perturbation is not None:
        assert short.weight_perturbation.start_epoch == 0
        assert short.method.attack.epsilon_ramp_epochs is None
    # Weights, their average and momentum are in a checkpoint.
    with torch.device("meta"):
        model = create_model("convnet_small", 10, in_channels=1, **recipe.model.kwargs)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert cost.checkpoint_bytes > 3 * 4 * num_parameters
    # Steps that do not take long are timed as they are.
    trained.clear()
    assert not measure_step(recipe).is_extrapolated
    assert [short.training.batch_size for short, _ in trained] == [4, recipe.training.batch_size]


def test_steps_that_come_now_and_then_count_by_their_share(monkeypatch):
    plain, asked = small("digits_natural"), []
    shorten, time_steps = measure.shortened, measure.seconds_per_step

    def short(recipe, batch, num_steps, method):
        cut = shorten(plain, batch, num_steps, {})
        return cut.model_copy(update={"method": config.LASAT(kind="las_at", **method)})

    def seconds_per_step(recipe, run, num_steps):
        asked.append(recipe.method.update_every)
        time_steps(recipe.model_copy(update={"method": plain.method}), run, num_steps)
        return 1.0 if recipe.method.update_every == 1 else 0.2

    monkeypatch.setattr(measure, "shortened", short)
    monkeypatch.setattr(measure, "seconds_per_step", seconds_per_step)
    method = config.LASAT(kind="las_at", update_every=20)
    cost = measure_step(plain.model_copy(update={"method": method}), patience=0)
    assert asked == [1, 10**6]
    scale = plain.training.batch_size / measure.CPU_BATCH
    assert cost.step_seconds == pytest.approx((0.2 + 0.8 / 20) * scale)


def test_budgets_that_grow_are_measured_at_their_mean():
    recipe = load_recipe(
        "digits_ikl_at",
        [
            "method.attack.budget=high_intended",
            "method.attack.num_steps=null",
            "method.attack.step_size=null",
        ],
    )
    attack = measure.shortened(recipe, 4, 1, {}).method.attack
    assert (attack.budget, attack.num_steps) == (None, 4)
    assert cost_key(recipe) != cost_key(load_recipe("digits_ikl_at"))
