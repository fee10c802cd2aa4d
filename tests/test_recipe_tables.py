"""Recipes made from tables: the numbers typed there against the same numbers typed elsewhere."""

import json
from importlib import resources

import pytest
import yaml

from dkl import from_authors
from dkl.config import RecipeError, describe_recipes, load_recipe, recipe_text, resolved
from dkl.config.inheritance import inherit
from dkl.config.loading import check_values
from dkl.config.recipe_tables import TableRecipe, expand, read_table, table_recipes
from dkl.reports import PUBLISHED_DISTILLATION

FOLDER = resources.files("dkl").joinpath("recipes").joinpath("tables")
TABLES = {
    file.name.strip("_").removesuffix(".yaml"): read_table(file.name, file.read_text("utf-8"))
    for file in FOLDER.iterdir()
    if file.name.endswith(".yaml")
}
RECIPES = {one.name: one for name, table in TABLES.items() for one in expand(name, table)}
PAIRS = list(TABLES["cifar100_distillation"].columns)


def values_of(recipe: TableRecipe) -> dict:
    own = yaml.safe_load(recipe.text)
    return inherit(own, lambda base: (yaml.safe_load(recipe_text(base)), []))[0]


def cells(table: str, method: str) -> dict[str, TableRecipe]:
    found = {
        one.column: one for one in RECIPES.values() if (one.table, one.method) == (table, method)
    }
    assert found
    return found


def published(experiment: str, key: str, *numbers: int) -> dict[str, float]:
    """Return the accuracies that ``dkl.reports`` has for a method in tables of the paper."""
    return {
        pair.replace("-", "_"): value
        for row in PUBLISHED_DISTILLATION[experiment]
        if row.key == key and row.table in numbers
        for pair, value in row.others.items()
        if not pair.startswith("seconds")
    }


@pytest.mark.parametrize(
    "method", ["fitnet", "rkd", "crd", "ofd", "reviewkd", "dkd", "kd", "ikl_kd", "ikl_kd_official"]
)
def test_cells_of_tables_13_and_14(method):
    wanted = published("distillation", method.removesuffix("_official"), 13, 14)
    got = {pair: one.published for pair, one in cells("cifar100_distillation", method).items()}
    assert len(wanted) == 11
    assert list(got.items()) == list(wanted.items())  # in the paper's order, too


def test_networks_of_tables_13_and_14():
    alone = {name: one.published for name, one in cells("cifar100_natural", "natural").items()}
    teachers, students = (published("distillation", key, 13, 14) for key in ("teacher", "student"))
    for pair, recipe in cells("cifar100_distillation", "kd").items():
        values = values_of(recipe)
        teacher, student = values["method"]["teacher"]["model"]["name"], values["model"]["name"]
        assert f"{teacher}_{student}" == pair
        assert (alone[teacher], alone[student]) == (teachers[pair], students[pair])
        stated = f"teacher {teachers[pair]:.2f}, student alone {students[pair]:.2f}"
        assert stated in recipe.text
        is_small = student.startswith(("shufflenet", "mobilenet"))
        assert values["optimizer"]["lr"] == (0.01 if is_small else 0.05)
        assert values["model"]["mean"] == values["method"]["teacher"]["model"]["mean"]
    assert len(alone) == 15


# The authors' configurations: pair -> ALPHA, BETA of IKL; ALPHA, BETA, GAMMA, GI of GKL.
AUTHORS = {
    "resnet56_resnet20": ((1, 4), (1, 4, 0.2, True)),
    "resnet110_resnet32": ((1, 12), (1, 4, 0.1, False)),
    "resnet32x4_resnet8x4": ((1, 8), (1, 16, 0.05, True)),
    "wrn_40_2_wrn_16_2": ((3, 12), (3, 20, 0.3, False)),
    "wrn_40_2_wrn_40_1": ((1, 8), (1, 12, 0.3, False)),
    "vgg13_vgg8": ((1, 12), (1, 8, 0.2, True)),
    "resnet32x4_shufflenet_v1": ((1, 8), (1, 8, 0.0, True)),
    "resnet32x4_shufflenet_v2": ((3, 12), (3, 12, 0.1, True)),
    "wrn_40_2_shufflenet_v1": ((1, 4), (1, 8, 0.0, False)),
    "vgg13_mobilenet_v2_half": ((4, 12), (4, 12, 0.1, True)),
    "resnet50_cifar_mobilenet_v2_half": ((1, 12), (1, 8, 0.05, True)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_ikl_and_gkl_on_cifar_as_the_authors_configured_them(pair):
    (alpha, beta), (gkl_alpha, gkl_beta, gamma, gi) = AUTHORS[pair]
    plain, official, gkl = (
        load_recipe(cells("cifar100_distillation", method)[pair].name).method
        for method in ("ikl_kd", "ikl_kd_official", "gkl_kd")
    )
    options = from_authors(alpha=alpha, beta=beta, T=4, T2=100)
    assert {key: getattr(official, key) for key in options} == options
    assert not official.class_weights
    # The paper's text differs in the weights alone.
    changed = {"class_weights": True, "weight_temperature": 4.0}
    assert plain == official.model_copy(update=changed)
    options = from_authors(alpha=gkl_alpha, beta=gkl_beta, T=4, T2=4, gamma=gamma)
    assert {key: getattr(gkl, key) for key in options} == options
    assert gkl.class_weights == gi
    assert {one.warmup_epochs for one in (plain, official, gkl)} == {20}


def test_ikl_and_gkl_on_imagenet_as_the_authors_configured_them():
    authors = {"resnet34_resnet18": (1, 0.5, 0.6), "resnet50_mobilenet_v1": (4, 1, 0.5)}
    for pair, (alpha, beta, gamma) in authors.items():
        for method, power, warmup in (("ikl_kd", None, 1), ("gkl_kd", gamma, 5)):
            settings = values_of(cells("imagenet_distillation", method)[pair])["method"]
            options = from_authors(alpha=alpha, beta=beta, T=1, T2=1, gamma=power)
            assert {key: settings[key] for key in options} == options
            assert settings["class_weights"]
            assert settings["warmup_epochs"] == warmup


def test_ikl_on_a_long_tail_as_the_authors_ran_it():
    authors = {
        "resnext101_resnet18": (4, 4),
        "resnext101_resnet50": (3, 4),
        "resnet50_resnet50": (1, 1),
        "resnet18_resnet18": (1, 0.5),
    }
    for pair, (alpha, beta) in authors.items():
        settings = values_of(cells("imagenet_lt", "ikl_kd_official")[pair])["method"]
        options = from_authors(alpha=alpha, beta=beta, T=1, T2=100)
        assert {key: settings[key] for key in options} == options
        assert not settings["class_weights"]
        distilled = values_of(cells("imagenet_lt", "kd")[pair])["method"]
        # Their weight of KL is the ALPHA of IKL but for two students of themselves.
        weights = {"resnet50_resnet50": 1, "resnet18_resnet18": 4}
        assert distilled["kd_weight"] == weights.get(pair, alpha)
        assert settings["temperature"] == distilled["temperature"] == 1


@pytest.mark.parametrize("method", ["at", "ofd", "crd", "reviewkd", "dkd", "kd", "ikl_kd"])
def test_cells_of_table_4(method):
    got = {pair: one.published for pair, one in cells("imagenet_distillation", method).items()}
    assert got == published("distillation-imagenet", method, 4)
    assert len(got) == 2


def test_cells_of_tables_1_and_15():
    for method in ("dkl_kd", "ba_kd"):
        got = {pair: one.published for pair, one in cells("imagenet_distillation", method).items()}
        assert got == published("distillation-imagenet", method, 1)
    for method in ("kd", "dkd", "dist", "ikl_kd"):
        got = {pair: one.published for pair, one in cells("imagenet_strong", method).items()}
        assert got == published("distillation-imagenet", method, 15)


@pytest.mark.parametrize(("method", "key"), [("kd", "kl"), ("ikl_kd", "ikl"), ("jsd_kd", "jsd")])
def test_cells_of_tables_5_and_18(method, key):
    found = cells("imagenet_lt", method)
    for number in (5, 18):
        for name, value in published("long-tailed", key, number).items():
            pair, _, shot = name.partition(" ")
            text = found[pair].text
            assert f"{value:.2f}" in text, (name, value)
            if number == 5 and shot == "all":
                assert found[pair].published == value
    (value,) = published("long-tailed", f"self_{key}", 18).values()
    assert found["resnet50_resnet50"].published == value


def test_what_is_published_nowhere_is_labelled():
    texts = {name: " ".join(one.text.replace("\n#", "").split()) for name, one in RECIPES.items()}
    choices = {
        name.removeprefix("cifar100_reviewkd_")
        for name, text in texts.items()
        if "weight not published for this pair; our choice" in text
    }
    assert choices == {"vgg13_vgg8", "vgg13_mobilenet_v2_half", "resnet50_cifar_mobilenet_v2_half"}
    for name, one in RECIPES.items():
        if one.method == "ikl_kd" and one.table in ("cifar100_distillation", "imagenet_lt"):
            assert f"{name}_official" in RECIPES
            assert "the recipe that ends in _official" in texts[name]
        if one.published is None:
            assert "Expected: not known" in texts[name]


def test_no_two_recipes_are_the_same():
    seen: dict[str, str] = {}
    for name, recipe in RECIPES.items():
        values = values_of(recipe)
        assert values.pop("name") == name
        values.pop("description")
        key = json.dumps(values, sort_keys=True)
        assert key not in seen, f"{name} is {seen.get(key)}"
        seen[key] = name


def test_a_teacher_that_is_trained_first_is_a_recipe_of_the_same_data():
    for recipe in RECIPES.values():
        values = values_of(recipe)
        wanted = values["method"].get("teacher", {}).get("recipe")
        if wanted is not None:
            assert values_of(RECIPES[wanted])["data"]["name"] == values["data"]["name"]


def test_recipes_of_tables_are_listed_and_found():
    found = describe_recipes("cifar100_ikl_kd_*_official")
    assert len(found) == 11
    assert set(describe_recipes("vgg13_vgg8")) >= {"cifar100_kd_vgg13_vgg8"}
    with pytest.raises(RecipeError, match="did you mean 'cifar100_kd_vgg13_vgg8'"):
        load_recipe("cifar100_kd_vgg13_vgg9")
    with pytest.raises(RecipeError, match="`dkl recipes list` shows what there is"):
        describe_recipes("nothing like it")
    recipe = table_recipes()["cifar100_kd_vgg13_vgg8"]
    assert recipe_text(recipe.name) == recipe.text
    assert resolved(load_recipe(recipe.name))["description"] == recipe.description


TABLE = """
title: t
row: Table 0
name: x_{method}_{column}{suffix}
base: digits_kd
hardware: none
columns: {a: {title: A}}
methods: {m: {title: M, claim: c, settings: {method: {temperature: 3.0}}, columns: {a: 1.5}}}
"""


def test_a_table_in_small():
    (recipe,) = expand("small", read_table("small", TABLE))
    assert (recipe.name, recipe.published) == ("x_m_a", 1.5)
    assert "# Paper row: Table 0; M, A\n" in recipe.text
    assert values_of(recipe)["method"]["temperature"] == 3.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("columns: {a: 1.5}", "columns: {b: 1.5}", "unknown column; there are a"),
        ("settings: {method", "settings: {methods", "is no section of a recipe"),
        ("title: t\n", "title: t\ntitle: u\n", "given twice"),
        ("row: Table 0\n", "", "Field required"),
        ("{title: A}", "{title: A, rows: 3}", "Extra inputs"),
        ("columns: {a: 1.5}", "columns: {a: [1]}", "is wrong"),
        ("title: t\n", "title: [\n", "cannot be read"),
    ],
)
def test_a_wrong_table_is_explained(old, new, message):
    assert old in TABLE
    with pytest.raises(ValueError, match=message):
        read_table("small", TABLE.replace(old, new, 1))


@pytest.mark.parametrize("table", TABLES)
def test_every_recipe_of_a_table_is_valid(table):
    for name, one in RECIPES.items():
        if one.table != table:
            continue
        values = values_of(one)
        if name not in table_recipes():
            # Its data has no loader yet; all the rest can be checked.
            values["data"]["name"] = "cifar100"
        recipe, problems = check_values(values)
        assert not problems, name
        assert recipe is not None
        assert set(values) <= set(type(recipe).model_fields)
        for section in ("data", "training", "optimizer", "schedule", "evaluation"):
            wanted = set(type(getattr(recipe, section)).model_fields)
            assert wanted == set(values[section]), (name, section)
