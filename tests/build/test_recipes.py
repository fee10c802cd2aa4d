"""Every shipped recipe states its claim, builds at full size, and takes steps on tiny data."""

from pathlib import Path

import pytest
import torch

from dkl.build import evaluate_run, train_recipe, training
from dkl.build.objects import (
    Splits,
    build_average,
    build_method,
    build_model,
    build_optimizer,
    build_perturbation,
    build_schedule,
)
from dkl.config import DataSettings, Recipe, list_recipes, load_recipe, recipe_text
from dkl.data import ImageData, split_validation
from dkl.engine import find_checkpoint

SHAPES = {
    "digits": (1, 8, 8, 10),
    "fashion_mnist": (1, 28, 28, 10),
    "cifar10": (3, 32, 32, 10),
    "cifar100": (3, 32, 32, 100),
}
NUM_TRAIN, BATCH = 24, 8


def tiny_images(name: str, num_images: int) -> ImageData:
    channels, height, width, num_classes = SHAPES[name]
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randint(0, 256, (num_images, channels, height, width), generator=generator)
    labels = torch.arange(num_images) % num_classes
    names = tuple(map(str, range(num_classes)))
    return ImageData(images.to(torch.uint8), labels, num_classes, names)


def tiny_data(settings: DataSettings, seed: int) -> Splits:
    train = tiny_images(settings.name, NUM_TRAIN)
    validation = None
    if settings.validation_fraction > 0:
        train, validation = split_validation(train, 1 / 3, seed)
    return Splits(train, validation, tiny_images(settings.name, 6))


def shorten(recipe: Recipe, num_steps: int = 2) -> Recipe:
    """Keep everything but how long the recipe runs and how much it measures."""
    steps = {"validation_attack_steps": min(recipe.evaluation.validation_attack_steps, 1)}
    evaluation = {"auto_attack": None, "pgd_steps": recipe.evaluation.pgd_steps and (num_steps,)}
    evaluation |= {"cw_steps": recipe.evaluation.cw_steps and (num_steps,), "num_images": 4} | steps
    return recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update={"epochs": 1, "batch_size": BATCH}),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
        }
    )


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_recipe
    for module in ("training", "evaluating"):
        monkeypatch.setattr(f"dkl.build.{module}.build_data", tiny_data)
    # The recipe of a teacher is found by name, inside the training command.
    monkeypatch.setattr(
        training.config,
        "load_recipe",
        lambda name, overrides=(): shorten(load(name, overrides)),
    )


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_states_its_claim(name: str) -> None:
    header = [line for line in recipe_text(name).splitlines() if line.startswith("# ")]
    stated = {}
    for line in header:
        word, _, text = line.removeprefix("# ").partition(":")
        stated[word] = text.strip()
    words = ("Claim", "Paper row", "Command", "Hardware", "Expected", "Measured")
    assert all(stated.get(word) for word in words)
    assert stated["Command"] == f"dkl train {name}"


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_builds_at_full_size(name: str) -> None:
    recipe = load_recipe(name)
    data = tiny_images(recipe.data.name, NUM_TRAIN)
    model = build_model(recipe.model, data, recipe.seed)
    again = build_model(recipe.model, data, recipe.seed)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    method = build_method(recipe.method, data.num_classes, recipe.training.epochs, model)
    optimizer = build_optimizer(recipe.optimizer)(model.parameters())
    assert optimizer.param_groups[0]["lr"] == recipe.optimizer.lr
    schedule = build_schedule(recipe.schedule, recipe.training.epochs)
    epochs = [recipe.training.epochs * part / 20 for part in range(21)]
    factors = [schedule(epoch) for epoch in epochs]
    assert max(factors) == pytest.approx(1, abs=0.05)
    assert 0 <= min(factors) < 0.1
    attack = getattr(method, "attack", None)
    if attack is not None:
        last = attack(recipe.training.epochs - 1, recipe.training.epochs)
        assert last.threat.eps == pytest.approx(recipe.method.attack.eps)
    assert (build_average(recipe.averaging) is None) == (recipe.averaging is None)
    assert (build_perturbation(recipe.weight_perturbation) is None) == (
        recipe.weight_perturbation is None
    )


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_takes_two_steps_and_is_measured(name: str, tmp_path: Path) -> None:
    recipe = training.config.load_recipe(name)
    run = tmp_path / "run"
    data = tiny_data(recipe.data, recipe.seed)
    before = build_model(recipe.model, data.train, recipe.seed)
    outcome = train_recipe(recipe, run)
    assert not outcome.stopped_early
    assert find_checkpoint(run).name.startswith("step_00000002")
    after, _ = training.load_run_model(run, recipe, data.train, "last")
    for first, second in zip(before.parameters(), after.parameters(), strict=True):
        assert not torch.equal(first, second)
    which = "last" if recipe.training.best_metric is None else "best"
    results = evaluate_run(run, which=which)
    metrics = {row.metric for row in results}
    assert "clean_accuracy" in metrics
    assert ("pgd_2_accuracy" in metrics) == bool(recipe.evaluation.pgd_steps)
    assert ("cw_2_accuracy" in metrics) == bool(recipe.evaluation.cw_steps)
    assert ("epsilon_sweep_accuracy" in metrics) == bool(recipe.evaluation.sweep)
    teacher = getattr(recipe.method, "teacher", None)
    assert (run / "teacher" / "recipe.yaml").exists() == (teacher is not None)
    assert (run / "class_table.json").exists() == getattr(recipe.method, "class_weights", False)
