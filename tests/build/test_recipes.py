"""Every shipped recipe states its claim and builds at full size; each kind takes a few steps.

Full-size networks are built on the meta device, without memory; those that take steps are shrunk.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dkl.build import evaluate_run, train_recipe, training
from dkl.build.methods import build_method, build_second_model
from dkl.build.objects import (
    Splits,
    build_average,
    build_data,
    build_mix,
    build_model,
    build_momentum_schedule,
    build_optimizer,
    build_perturbation,
    build_schedule,
    build_views,
)
from dkl.build.runs import load_run_model
from dkl.config import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    Recipe,
    list_recipes,
    load_recipe,
    recipe_text,
)
from dkl.data import ImageData, load_data, split_validation, write_npz
from dkl.engine import find_checkpoint
from dkl.models import save_weights
from tests.data.image_trees import jpeg

SHAPES = {
    "digits": (1, 8, 8, 10),
    "fashion_mnist": (1, 28, 28, 10),
    "cifar10": (3, 32, 32, 10),
    "cifar100": (3, 32, 32, 100),
    "imagenet": (3, 224, 224, 1000),
    "imagenet_lt": (3, 224, 224, 1000),
}
SIDE = 32  # of images that are decoded from files
NUM_TRAIN, BATCH = 24, 8
SMALL_TIMM = {
    "timm/beitv2_large_patch16_224": {
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "img_size": SIDE,
    },
    **{
        f"timm/{name}": {"layers": (1, 1, 1, 1), "channels": channels}
        for name, channels in {
            "resnet18": (8, 8, 16, 16),
            "resnet34": (8, 8, 16, 16),
            "resnet50": (4, 4, 8, 8),
            "resnext101_32x4d": (32, 32, 32, 32),
        }.items()
    },
}
CIFAR_FILES = {
    "cifar10": ("batches.meta", "label_names", "labels"),
    "cifar100": ("meta", "fine_label_names", "fine_labels"),
}


def tiny_images(name: str, num_images: int) -> ImageData:
    channels, height, width, num_classes = SHAPES[name]
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randint(0, 256, (num_images, channels, height, width), generator=generator)
    labels = torch.arange(num_images) % min(num_classes, 10)
    names = tuple(map(str, range(num_classes)))
    return ImageData(images.to(torch.uint8), labels, num_classes, names)


def write_cifar(folder: Path, name: str) -> None:
    """Write a few images as the pickles that CIFAR is published as."""
    meta, names_key, labels_key = CIFAR_FILES[name]
    train, test = tiny_images(name, NUM_TRAIN), tiny_images(name, 6)
    files = {"train": train, "test": test}
    if name == "cifar10":
        parts = torch.arange(NUM_TRAIN).tensor_split(5)
        files = {f"data_batch_{n}": train.subset(part) for n, part in enumerate(parts, start=1)}
        files["test_batch"] = test
    folder.mkdir(parents=True)
    for file, data in files.items():
        content = {
            "data": np.ascontiguousarray(data.images.flatten(1).numpy()),
            labels_key: data.labels.tolist(),
        }
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    names = {names_key: list(train.class_names)}
    (folder / meta).write_bytes(pickle.dumps(names, protocol=2))


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ImageNet's tree and the lists of ImageNet-LT, with one image in each class."""
    root = tmp_path_factory.mktemp("imagenet")
    classes = [f"n{label:08d}" for label in range(1000)]
    files = [f"train/{name}/{name}_1.JPEG {label}" for label, name in enumerate(classes)]
    files += [f"val/{name}/val_{label}.JPEG {label}" for label, name in enumerate(classes[:8])]
    for number, file in enumerate(files):
        path = root / file.split()[0]
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(number % 10, (36, 44)))
    for part, lines in (("train", files[:1000]), ("val", files[:8]), ("test", files[1000:])):
        (root / f"ImageNet_LT_{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def tiny_data(settings: DataSettings, seed: int) -> Splits:
    if settings.in_files:
        return build_data(settings, seed)
    if settings.name in CIFAR_FILES:
        # From the real format, by the real reader.
        folder = Path(settings.folder or "") / settings.name
        if not folder.exists():
            write_cifar(folder, settings.name)
        train, test = load_data(settings.name, folder=folder)
    else:
        train, test = tiny_images(settings.name, NUM_TRAIN), tiny_images(settings.name, 6)
    validation = None
    if settings.validation_fraction > 0:
        train, validation = split_validation(train, 1 / 3, seed)
    return Splits(train, validation, test, tiny_images(settings.name, NUM_TRAIN + 3))


def small_model(settings: ModelSettings) -> ModelSettings:
    """Return the smallest network of the same family."""
    changes: dict[str, Any] = {}
    if settings.name.startswith("wrn_"):
        changes["name"] = "wrn_10_1_silu" if settings.name.endswith("_silu") else "wrn_10_1"
    elif settings.name.startswith("timm/"):
        changes["kwargs"] = {**settings.kwargs, **SMALL_TIMM[settings.name]}
    elif settings.name in ("resnet18_cifar", "resnet50_cifar", "mobilenet_v1"):
        # Not 4, beyond which a strided AVX2 kernel of oneDNN writes in channels-last (torch 2.14).
        changes["kwargs"] = {**settings.kwargs, "width": 8}
    elif settings.name.startswith("vgg"):
        changes |= {"name": "vgg8", "kwargs": {**settings.kwargs, "width": 4}}
    elif settings.name.startswith("resnet"):
        changes["name"] = "resnet8x4" if settings.name.endswith("x4") else "resnet8"
    return settings.model_copy(update=changes)


def small_method(method: Any) -> Any:
    """Shrink the second network, and attack in two steps."""
    changes: dict[str, Any] = {}
    for key in ("guide", "strategy"):
        if hasattr(method, key):
            changes[key] = small_model(getattr(method, key))
    if method.kind == "las_at":
        changes |= {"update_every": 1, "lookahead_steps": 2, "steps_choices": (1, 2)}
    elif getattr(method, "attack", None) is not None and method.attack.num_steps is not None:
        changes["attack"] = method.attack.model_copy(update={"num_steps": 2})
    if (model := teacher_model(method)) is not None:
        changes["teacher"] = method.teacher.model_copy(update={"model": small_model(model)})
    if method.kind == "crd":
        changes["num_negatives"] = 16
    if getattr(method, "warmup_epochs", 0) > 1:
        changes["warmup_epochs"] = 1
    return method.model_copy(update=changes)


def teacher_model(method: MethodSettings) -> ModelSettings | None:
    """Return the network of a teacher that is a file of weights, None without one."""
    teacher = getattr(method, "teacher", None)
    return None if teacher is None else teacher.model


def write_teacher(method: MethodSettings, data: ImageData, folder: Path) -> None:
    """Write the weights of the teacher, if they are a file, in the format they are published in."""
    model = teacher_model(method)
    if model is None:
        return
    file = folder / method.teacher.checkpoint
    file.parent.mkdir(parents=True)
    weights = build_model(model, data, 5).state_dict()
    if file.suffix == ".safetensors":
        save_weights(weights, file)
    elif file.name.startswith("ckpt_epoch"):
        torch.save({"epoch": 240, "model": weights, "accuracy": 70.0, "optimizer": {}}, file)
    else:
        torch.save(weights, file)


def shorten(recipe: Recipe, num_steps: int = 2) -> Recipe:
    """Keep everything but how large the recipe is, how long it runs, how much it measures."""
    steps = {"validation_attack_steps": min(recipe.evaluation.validation_attack_steps, 1)}
    evaluation = {"auto_attack": None, "pgd_steps": recipe.evaluation.pgd_steps and (num_steps,)}
    evaluation |= {"cw_steps": recipe.evaluation.cw_steps and (num_steps,), "num_images": 4} | steps
    training = {"epochs": 1, "batch_size": BATCH, "validate_every": 1}
    changes: dict[str, Any] = {}
    for section in ("weight_perturbation", "averaging"):
        if getattr(recipe, section) is not None:
            # So that they act in the one epoch there is.
            changes[section] = getattr(recipe, section).model_copy(update={"start_epoch": 0})
    if recipe.schedule.kind == "step":
        milestones = tuple(epoch / recipe.training.epochs for epoch in recipe.schedule.milestones)
        changes["schedule"] = recipe.schedule.model_copy(update={"milestones": milestones})
    elif recipe.schedule.kind == "one_cycle":
        changes["schedule"] = recipe.schedule.model_copy(update={"per_epoch": False})
    elif recipe.schedule.warmup_epochs >= 1:
        changes["schedule"] = recipe.schedule.model_copy(update={"warmup_epochs": 0.5})
    if recipe.data.generated is not None:
        pool = {"samples_per_epoch": NUM_TRAIN - NUM_TRAIN // 3}
        generated = recipe.data.generated.model_copy(update=pool)
        changes["data"] = recipe.data.model_copy(update={"generated": generated})
    if recipe.data.in_files:
        small = {"image_size": SIDE, "resize": SIDE + 4, "workers": 0}
        few: dict[str, Any] = {"train_limit": NUM_TRAIN, "test_limit": 6}
        few["decoding"] = recipe.data.decoding.model_copy(update=small)
        changes["data"] = recipe.data.model_copy(update=few)
    return recipe.model_copy(
        update=changes
        | {
            "model": small_model(recipe.model),
            "method": small_method(recipe.method),
            "training": recipe.training.model_copy(update=training),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
        }
    )


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_recipe
    for module in ("training", "evaluating", "teachers"):
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
    taught_by = teacher_model(recipe.method)
    with torch.device("meta"):
        model = build_model(recipe.model, data, recipe.seed)
        second = build_second_model(recipe.method, data, recipe.seed)
        teacher = model if taught_by is None else build_model(taught_by, data, recipe.seed)
    assert all(parameter.is_meta for parameter in model.parameters())
    method = build_method(
        recipe.method,
        data.num_classes,
        recipe.training.epochs,
        teacher,
        second,
        num_views=len(recipe.data.views),
        student=model,
        data=data,
    )
    needs_second = recipe.method.kind in ("lbgat", "las_at")
    assert (second is not None) == needs_second
    optimizer = build_optimizer(recipe.optimizer)(model.parameters())
    assert optimizer.param_groups[0]["lr"] == recipe.optimizer.lr
    schedule = build_schedule(recipe.schedule, recipe.training.epochs)
    epochs = [recipe.training.epochs * part / 20 for part in range(21)]
    factors = [schedule(epoch) for epoch in epochs]
    assert max(factors) == pytest.approx(1, abs=0.05)
    assert 0 <= min(factors) <= 0.1 + 1e-9
    momentum = build_momentum_schedule(recipe.schedule, recipe.training.epochs)
    if momentum is not None:
        assert all(0.85 - 1e-9 <= momentum(epoch) <= 0.95 + 1e-9 for epoch in epochs)
    attack = getattr(method, "attack", None)
    if attack is not None:
        last = attack(recipe.training.epochs - 1, recipe.training.epochs)
        assert last.threat.eps == pytest.approx(recipe.method.attack.eps)
    assert len(build_views(recipe.data)) == len(recipe.data.views)
    augment = recipe.data.augment
    mixes = augment is not None and (augment.cutmix > 0 or augment.mixup > 0)
    assert (build_mix(augment) is not None) == mixes
    assert (build_average(recipe.averaging) is None) == (recipe.averaging is None)
    assert (build_perturbation(recipe.weight_perturbation) is None) == (
        recipe.weight_perturbation is None
    )


def kind_of(name: str) -> tuple[Any, ...]:
    """Return what makes a recipe a kind of its own: method, data and family of the network."""
    recipe = load_recipe(name)
    method = recipe.method
    switches = ("variant", "inner", "class_weights", "break_asymmetry", "smooth_direction")
    return (
        method.kind,
        *(getattr(method, switch, None) for switch in switches),
        recipe.data.name,
        len(recipe.data.views),
        recipe.data.generated is not None,
        small_model(recipe.model).name,
        recipe.weight_perturbation is not None,
        recipe.averaging is not None,
        name if recipe.data.name in ("digits", "fashion_mnist") else None,
    )


DISTINCT = list({kind_of(name): name for name in reversed(list_recipes())}.values())


def test_each_method_is_walked() -> None:
    kinds = {load_recipe(name).method.kind for name in DISTINCT}
    assert kinds == {load_recipe(name).method.kind for name in list_recipes()}
    assert kinds >= {"natural", "pgd_at", "trades", "mart", "lbgat", "las_at", "dajat", "ikl_at"}
    assert kinds >= {"kd", "dkd", "dist", "ikl_kd", "gkl_kd", "jsd_kd"}
    assert kinds >= {"at", "fitnet", "rkd", "crd", "ofd", "reviewkd"}
    assert len(DISTINCT) >= 160


@pytest.mark.parametrize("name", DISTINCT)
def test_recipe_takes_two_steps_and_is_measured(
    name: str, tmp_path: Path, imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = training.config.load_recipe(name)
    if recipe.data.in_files:  # the only recipes that must be told, and their teachers by them
        there = recipe.data.model_copy(update={"folder": str(imagenet)})
        recipe = recipe.model_copy(update={"data": there})
    monkeypatch.chdir(tmp_path)
    if recipe.data.generated is not None:
        for part in recipe.data.generated.parts:
            write_npz(tiny_images(recipe.data.name, 10), tmp_path / part)
    run = tmp_path / "run"
    data = tiny_data(recipe.data, recipe.seed)
    write_teacher(recipe.method, data.train, tmp_path)
    before = build_model(recipe.model, data.train, recipe.seed)
    again = build_model(recipe.model, data.train, recipe.seed)
    assert all(map(torch.equal, before.state_dict().values(), again.state_dict().values()))
    outcome = train_recipe(recipe, run)
    assert not outcome.stopped_early
    steps = -(-len(data.train) // BATCH)
    assert find_checkpoint(run).name.startswith(f"step_{steps:08d}")
    after, _ = load_run_model(run, recipe, data.train, "last")
    for (key, first), second in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(first, second), key
    which = "last" if recipe.training.best_metric is None else "best"
    results = evaluate_run(run, which=which)
    metrics = {row.metric for row in results}
    assert "clean_accuracy" in metrics
    assert ("pgd_2_accuracy" in metrics) == bool(recipe.evaluation.pgd_steps)
    assert ("cw_2_accuracy" in metrics) == bool(recipe.evaluation.cw_steps)
    assert ("epsilon_sweep_accuracy" in metrics) == bool(recipe.evaluation.sweep)
    teacher = getattr(recipe.method, "teacher", None)
    trained_first = teacher is not None and teacher.recipe is not None
    assert (run / "teacher" / "recipe.yaml").exists() == trained_first
    assert (run / "class_table.json").exists() == getattr(recipe.method, "class_weights", False)
