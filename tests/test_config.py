import copy
from pathlib import Path

import pytest
import yaml

from dkl.config import (
    SGD,
    Cosine,
    Recipe,
    RecipeError,
    list_recipes,
    load_recipe,
    override,
    recipe_text,
    resolved,
    to_yaml,
)
from dkl.config.inheritance import inherit

NAMES = list_recipes()


def problems(name, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    assert str(caught.value).count("\n") >= len(caught.value.problems)
    return dict(caught.value.problems)


def only_problem(name, *overrides):
    found = problems(name, *overrides)
    assert len(found) == 1, found
    return next(iter(found.items()))


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


# Shipped recipes


def test_the_promised_recipes_are_shipped():
    digits = {"natural", "trades", "ikl_at", "gkl_at", "pgd_at", "kd", "ikl_kd", "gkl_kd"}
    fashion = {"natural", "trades", "ikl_at", "trades_small", "ikl_at_small"}
    cifar = {"kl_at", "dkl_at", "ba_at", "ikl_at", "pgd_at_awp", "lbgat", "las_at", "acat", "dajat"}
    cifar |= {"acat_autoaugment", "ikl_at_autoaugment", "dm_at", "ikl_at_generated", "gkl_at"}
    wanted = {f"digits_{name}" for name in digits} | {f"fashion_mnist_{name}" for name in fashion}
    wanted |= {f"cifar100_{name}" for name in cifar}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_complete_and_states_its_claim(name):
    recipe = load_recipe(name)
    text = recipe_text(name)
    own = yaml.safe_load(text)
    values, wrong = inherit(own, lambda base: (yaml.safe_load(recipe_text(base)), []))
    assert not wrong
    assert recipe.name == own["name"] == name
    assert recipe.description == own["description"]
    # Complete: what the file and its bases say is what the run uses, so nothing hides in a default.
    assert set(Recipe.model_fields) - set(values) <= {"tuning"}
    complete = ["data", "training", "optimizer", "schedule", "evaluation"]
    if "base" not in own:
        complete += ["method", "model"]
        assert set(values) == set(Recipe.model_fields)
    for section in complete:
        assert set(values[section]) == set(type(getattr(recipe, section)).model_fields), section
    header = text.split("name:")[0]
    for word in ("Claim", "Paper row", f"dkl train {name}\n", "Hardware", "Expected", "Measured"):
        assert word in header


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_reads_back_equal(name, write):
    recipe = load_recipe(name, ["seed=3"])
    assert Recipe.model_validate(resolved(recipe)) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert load_recipe(write(to_yaml(recipe))) == recipe


def test_a_recipe_with_a_base_states_only_how_it_differs():
    based = [name for name in NAMES if "base" in yaml.safe_load(recipe_text(name))]
    assert len(based) > 50
    for name in based:
        own = yaml.safe_load(recipe_text(name))
        below = load_recipe_values(own["base"])
        for section in set(own) & set(below) - {"name", "description"}:
            assert own[section] != below[section], f"{name} repeats {section} of {own['base']}"


def load_recipe_values(name):
    own = yaml.safe_load(recipe_text(name))
    return inherit(own, lambda base: (yaml.safe_load(recipe_text(base)), []))[0]


def test_bases_merge_by_key_and_are_read_from_the_recipes_own_folder(write):
    write(recipe_text("digits_trades").replace("name: digits_trades", "name: mine"), "below.yaml")
    above = write("base: below.yaml\nname: above\nmethod: {beta: 3}\n", "above.yaml")
    recipe, below = load_recipe(above), load_recipe(above.with_name("below.yaml"))
    assert recipe.method.beta == 3
    assert recipe.method.attack == below.method.attack
    assert recipe.training == below.training
    other = "base: digits_trades\nname: x\nmethod: {kind: natural}\ntuning: null\n"
    assert load_recipe(write(other, "other.yaml")).method.kind == "natural"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: a.yaml\nname: x\n", "leads in a circle"),
        ("base: [digits_trades]\nname: x\n", "must be the name of a recipe"),
        ("base: digits_tradez\nname: x\n", "did you mean 'digits_trades'"),
        ("base: nowhere.yaml\nname: x\n", "no such file"),
    ],
)
def test_a_wrong_base_is_one_clear_problem(write, text, message):
    found = problems(write(text, "a.yaml"))
    assert message in found["base"]


def test_trades_and_ikl_differ_in_the_method_alone():
    one, other = resolved(load_recipe("digits_trades")), resolved(load_recipe("digits_ikl_at"))
    assert one["method"].pop("attack") == other["method"].pop("attack")
    # Each side is tuned on its own, the learning rate included.
    del one["optimizer"]["lr"], other["optimizer"]["lr"]
    differing = {key for key in one if one[key] != other[key]}
    assert differing == {"name", "description", "method", "tuning"}


# Overrides and numbers


def test_fractions_stay_exact(write):
    recipe = load_recipe(
        "digits_trades", ["method.attack.eps=8/255", "evaluation.sweep=[1/3, 2e-4]"]
    )
    assert recipe.method.attack.eps == 8 / 255
    assert recipe.evaluation.sweep == (1 / 3, 2e-4)
    assert load_recipe(write(to_yaml(recipe))).method.attack.eps == 8 / 255


def test_overrides_reach_null_sections_and_replace_whole_ones():
    recipe = load_recipe(
        "digits_trades",
        ["weight_perturbation.gamma=0.01", "optimizer={kind: adamw, lr: 1e-3}", "averaging="],
    )
    assert recipe.weight_perturbation.gamma == 0.01
    assert recipe.optimizer.kind == "adamw"
    assert recipe.optimizer.lr == 1e-3
    assert recipe.averaging is None


def test_one_key_makes_the_data_long_tailed():
    data = load_recipe("digits_natural", ["data.long_tailed.imbalance=10"]).data
    assert (data.long_tailed.kind, data.long_tailed.seed, data.is_long_tailed) == (
        "exponential",
        0,
        True,
    )
    assert not load_recipe("digits_natural").data.is_long_tailed
    fewer = ["data.long_tailed={}", "evaluation.shot_thresholds=[5, 50]"]
    assert load_recipe("digits_natural", fewer).evaluation.shot_thresholds == (5, 50)


def test_yaml_reads_no_as_false_but_mixed_precision_means_the_word():
    assert (
        load_recipe("digits_trades", ["training.mixed_precision=no"]).training.mixed_precision
        == "no"
    )


def test_values_keep_an_equals_sign_and_text_with_spaces():
    assert load_recipe("digits_kd", ["description=a = b c"]).description == "a = b c"


def test_loading_does_not_change_the_file_or_share_state():
    before = recipe_text("digits_trades")
    first = load_recipe("digits_trades", ["model.kwargs.width=3"])
    assert load_recipe("digits_trades").model.kwargs == {"width": 32}
    assert first.model.kwargs == {"width": 3}
    assert recipe_text("digits_trades") == before


def test_recipes_are_frozen():
    recipe = load_recipe("digits_trades")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_override_changes_a_checked_recipe():
    recipe = load_recipe("digits_trades")
    changed = override(recipe, ["evaluation.num_images=7"])
    assert changed.evaluation.num_images == 7
    assert changed.method == recipe.method
    with pytest.raises(RecipeError, match=r"training.epohcs: .* 'epochs'"):
        override(recipe, ["training.epohcs=1"])


# Messages


def test_all_errors_are_reported_at_once():
    found = problems(
        "digits_trades",
        "method.betta=1",
        "method.attack.eps=8",
        "training.epochs=two",
        "data.validation_fraction=0",
        "evaluation.pgd_steps=20",
        "nonsense",
        "seed=-1",
    )
    assert set(found) == {
        "",
        "method.betta",
        "method.attack.eps",
        'training.epochs = "two"',
        "evaluation.pgd_steps = 20",
        "seed = -1",
    }
    assert "did you mean 'beta'?" in found["method.betta"]
    assert "8/255" in found["method.attack.eps"]
    assert "integer" in found['training.epochs = "two"']
    assert "list" in found["evaluation.pgd_steps = 20"]
    assert "greater than or equal to 0" in found["seed = -1"]


def test_checks_between_valid_sections_run_beside_errors_in_others():
    found = problems(
        "digits_trades", "optimizer.lr=-1", "training.epochs=3", "averaging.start_epoch=9"
    )
    assert set(found) == {"optimizer.lr = -1", "averaging.start_epoch"}


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["training.epcohs=1"], "training.epcohs", "did you mean 'epochs'?"),
        (["trainig.epochs=1"], "trainig", "did you mean 'training'?"),
        (["method.gamma=1"], "method.gamma", "gkl_at"),
        (["method.attack.epss=1"], "method.attack.epss", "did you mean 'eps'?"),
        (["method.kind=ikl-at"], 'method.kind = "ikl-at"', "did you mean 'ikl_at'?"),
        (["method={beta: 1}"], "method.kind", "missing; one of natural"),
        (["method=trades"], 'method = "trades"', "section"),
        (["method.attack.eps=a/b"], 'method.attack.eps = "a/b"', "8/255"),
        (["method.attack.eps=.nan"], "method.attack.eps = NaN", "finite"),
        (["method.attack.eps=true"], "method.attack.eps = true", "number"),
        (["seed=true"], "seed = true", "integer"),
        (
            ["training.best_metric=val_acuracy"],
            'training.best_metric = "val_acuracy"',
            "val_accuracy",
        ),
        (["training.epochs.x=1"], "training.epochs.x", "has no keys"),
        (["seed=1", "seed=2"], "seed", "overridden twice"),
        (["seed=[1"], "seed", "not valid YAML"),
        (["data.name=cifar"], 'data.name = "cifar"', "did you mean 'cifar10'?"),
        (["method.attack.epsilon_ramp_epochs=0"], "method.attack.epsilon_ramp_epochs = 0", '"all"'),
        (["schedule={kind: cosine, milestones: [1]}"], "schedule.milestones", "step"),
        (["schedule={kind: one_cycle, warmup_epochs: 1}"], "schedule.warmup_epochs", "pct_start"),
        (["optimizer={kind: adamw, lr: 1, momentum: 0}"], "optimizer.momentum", "betas"),
        (["model.kwargs.num_classes=3"], "model.kwargs.num_classes", "remove it"),
        (["name=a/b"], 'name = "a/b"', "letters"),
    ],
)
def test_wrong_values_get_a_message_that_helps(overrides, key, message):
    found_key, found_message = only_problem("digits_ikl_at", *overrides)
    assert found_key == key
    assert message in found_message


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["evaluation.validation_attack_steps=0"], "training.best_metric"),
        (["method.attack.budget=low", "method.attack.num_steps=null"], "method.attack.step_size"),
        (["method.attack.num_steps=null"], "method.attack.num_steps"),
        (["method.mse_weight=0", "method.ce_weight=0"], "method.mse_weight"),
        (["training.accumulation=3"], "training.accumulation"),
        (["training.dtype=float64", "training.mixed_precision=bf16"], "training.mixed_precision"),
        (["training.validate_every=41"], "training.validate_every"),
        (["optimizer.momentum=0"], "optimizer.nesterov"),
        (["schedule={kind: step, milestones: [50]}"], "schedule.milestones"),
        (["schedule={kind: step, milestones: [5, 5]}"], "schedule.milestones"),
        (["schedule.warmup_epochs=40"], "schedule.warmup_epochs"),
        (["weight_perturbation.start_epoch=40"], "weight_perturbation.start_epoch"),
        (["averaging.start_epoch=40"], "averaging.start_epoch"),
        (["method.attack.epsilon_ramp_epochs=41"], "method.attack.epsilon_ramp_epochs"),
        (["data.test_limit=100"], "evaluation.num_images"),
        (["data.folder=x"], "data.folder"),
        (["data.download=true"], "data.download"),
        (["data.augment.padding=0", "data.augment.flip=false"], "data.augment.padding"),
        (["data.long_tailed={power: 2}"], "data.long_tailed.power"),
        (["data.long_tailed={max_per_class: 50}"], "data.long_tailed.imbalance"),
        (["data.long_tailed={imbalance: 0.5}"], "data.long_tailed.imbalance = 0.5"),
        (["data.class_balanced={power: 1.5}"], "data.class_balanced.power = 1.5"),
        (["data.class_balanced={}", "data.generated={parts: [a]}"], "data.class_balanced"),
        (["evaluation.shot_thresholds=[20, 50]"], "evaluation.shot_thresholds"),
        (
            ["data.long_tailed={}", "evaluation.shot_thresholds=[50, 20]"],
            "evaluation.shot_thresholds",
        ),
        (["evaluation.pgd_steps=[]"], "evaluation.sweep"),
        (["evaluation.step_size=null"], "evaluation.step_size"),
        (["evaluation.eps=8"], "evaluation.eps"),
        (["evaluation.sweep=[8]"], "evaluation.sweep"),
        (["tuning.space={method.bata: {choices: [1, 1]}}"], "tuning.space.method.bata"),
        (["tuning.space={seed: {low: 2, high: 1}}"], "tuning.space.seed.low"),
    ],
)
def test_impossible_combinations_are_refused(overrides, key):
    assert only_problem("digits_ikl_at", *overrides)[0] == key


def test_a_validation_metric_needs_a_validation_split():
    found = problems("digits_ikl_at", "data.validation_fraction=0")
    assert set(found) == {"data.validation_fraction", "evaluation.validation_attack_steps"}


def test_attacks_need_an_epsilon():
    found = problems("digits_kd", "evaluation.auto_attack=standard")
    assert "auto_attack" in found["evaluation.eps"]


@pytest.mark.parametrize(
    ("teacher", "key"),
    [
        ("{}", "recipe"),
        ("{checkpoint: a}", "model"),
        ("{checkpoint: a, run: b, model: {name: c}}", "run"),
        ("{run: a, model: {name: c}}", "model"),
        ("{recipe: digits_natrual}", "recipe"),
        ("{recipe: fashion_mnist_natural}", "recipe"),
    ],
)
def test_a_teacher_comes_from_one_place(teacher, key):
    assert only_problem("digits_kd", f"method.teacher={teacher}")[0] == f"method.teacher.{key}"


def test_a_run_stands_in_for_the_teachers_recipe():
    recipe = load_recipe("digits_kd", ["method.teacher.run=runs/a"])
    assert recipe.method.teacher.recipe == "digits_natural"


# Names and files


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'digits_trades'"):
        load_recipe("digits_tradse")
    with pytest.raises(RecipeError, match=r"no such file.*'digits_kd'"):
        load_recipe("elsewhere/digits_kd.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: [1\n", "line 3"),
        ("- 1", "must hold keys and values"),
        ("", "is empty"),
        ("a: !!python/object/apply:os.system [ls]", "line 1"),
        ("\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


def test_binary_files_and_folders_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "a.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path)


def test_repeated_keys_are_errors_at_any_depth(write):
    text = recipe_text("digits_trades").replace("  beta: ", "  beta: 7.0\n  beta: ", 1)
    with pytest.raises(RecipeError, match="given twice, in lines") as caught:
        load_recipe(write(text + "seed: 1\n"))
    assert {key for key, _ in caught.value.problems} == {"beta", "seed"}


def test_a_file_beats_nothing_but_needs_a_suffix_or_folder(write, monkeypatch):
    path = write(recipe_text("digits_kd"))
    monkeypatch.chdir(path.parent)
    assert load_recipe("mine.yaml") == load_recipe(Path("mine.yaml")) == load_recipe("digits_kd")


def test_missing_keys_are_all_named(write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("name: a"))
    missing = {key for key, message in caught.value.problems if message.startswith("missing")}
    assert missing == {"data", "model", "method", "training", "optimizer", "schedule"}


def test_sections_can_be_made_in_python():
    values = copy.deepcopy(resolved(load_recipe("digits_natural")))
    values["optimizer"] = SGD(kind="sgd", lr=0.2)
    values["schedule"] = Cosine(kind="cosine")
    assert Recipe.model_validate(values).optimizer.lr == 0.2
    with pytest.raises(ValueError, match="momentum > 0"):
        SGD(kind="sgd", lr=0.2, momentum=0, nesterov=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_can_be_tried_for_one_epoch(name):
    full = load_recipe(name)
    overrides = ["training.epochs=1"]
    # What begins in a later epoch is refused in so many words, and given up by an override each.
    if full.training.validate_every > 1:
        overrides.append("training.validate_every=1")
    if full.schedule.kind == "step":
        overrides.append("schedule={kind: constant}")
    if full.schedule.kind == "one_cycle" and full.schedule.per_epoch:
        overrides.append("schedule.per_epoch=false")
    if getattr(full.method, "warmup_epochs", 0) > 1:
        overrides.append("method.warmup_epochs=1")
    if full.schedule.kind != "step" and getattr(full.schedule, "warmup_epochs", 0) >= 1:
        overrides.append("schedule.warmup_epochs=0.5")
    for section in ("weight_perturbation", "averaging"):
        if getattr(full, section) is not None and getattr(full, section).start_epoch >= 1:
            overrides.append(f"{section}.start_epoch=0")
    assert load_recipe(name, overrides).training.epochs == 1
    for dropped in overrides[1:]:
        key = dropped.partition("=")[0]
        others = [override for override in overrides if override != dropped]
        if key != "training.validate_every" or full.training.best_metric is not None:
            assert any(found.startswith(key) for found in problems(name, *others))
