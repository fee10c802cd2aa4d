"""Recipes made from tables: one file for methods x columns, one recipe for each of its cells.

A file of ``dkl/recipes/tables`` states what a table of the paper compares. Each cell becomes a
recipe with a name, a header and a text of its own, like those that are shipped as files.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import Field, ValidationError

from dkl.config.base import Number, Problem, Section
from dkl.config.inheritance import merge
from dkl.config.recipe import Recipe
from dkl.config.yaml_text import parse_yaml

_WIDTH = 100
_INDENT = 13  # of what a header says


class TableCell(Section):
    """What one recipe has of its own.

    Args:
        published: the published accuracy in percent; null: none is.
        detail: what else was published for it.
        note: what of its settings is published nowhere, or differs.
        settings: sections of the recipe.
    """

    published: Number | None = None
    detail: str = ""
    note: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)


class TableColumn(Section):
    """What the recipes of a column share.

    Args:
        title: of the column, such as "resnet56 to resnet20".
        row: where the paper has it; empty: as the table says.
        reference: what the published accuracy is to be compared with.
        settings: sections of the recipe.
    """

    title: str
    row: str = ""
    reference: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)


class TableMethod(Section):
    """What the recipes of a method share.

    Args:
        title: of the method, such as "IKL-KD".
        claim: what its recipes are to show.
        row: where its numbers come from instead of the table of the paper.
        hardware: instead of the table's.
        note: what of its settings is published nowhere, or differs.
        settings: sections of the recipe.
        columns: the cells by column, each a published number, null, or more.
    """

    title: str
    claim: str
    row: str = ""
    hardware: str = ""
    note: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    columns: dict[str, Number | TableCell | None]


class RecipeTable(Section):
    """A file of ``dkl/recipes/tables``.

    Args:
        title: for ``dkl recipes list``.
        row: the table of the paper.
        name: of a recipe, with {method}, {column} and {suffix}. Of the key of a method "_official"
            is the suffix, and the rest the method.
        base: recipe that states what all have in common.
        hardware: for the headers.
        shared: values that the file repeats by YAML's anchors; read by nothing else.
        columns: in the paper's order.
        methods: in the paper's order.
    """

    title: str
    row: str
    name: str
    base: str
    hardware: str
    shared: dict[str, Any] = Field(default_factory=dict)
    columns: dict[str, TableColumn]
    methods: dict[str, TableMethod]

    def problems(self) -> Iterator[Problem]:  # noqa: D102
        settings = {key: column.settings for key, column in self.columns.items()}
        settings |= {key: method.settings for key, method in self.methods.items()}
        for key, sections in settings.items():
            for section in set(sections) - set(Recipe.model_fields):
                yield f"{key}.settings.{section}", "is no section of a recipe"
        for key, method in self.methods.items():
            for column in method.columns:
                if column not in self.columns:
                    known = ", ".join(self.columns)
                    yield f"methods.{key}.columns.{column}", f"unknown column; there are {known}"


@dataclass(frozen=True)
class TableRecipe:
    """A recipe of a table.

    Args:
        name: of the recipe.
        table: name of the table.
        method: key of the method.
        column: key of the column.
        description: one sentence.
        published: accuracy in percent, or None.
        text: of the recipe, with its header.
    """

    name: str
    table: str
    method: str
    column: str
    description: str
    published: float | None
    text: str


@cache
def recipe_tables() -> Mapping[str, RecipeTable]:
    """Read all tables, by name.

    Raises:
        ValueError: a file that comes with dkl is damaged.
    """
    folder = resources.files("dkl").joinpath("recipes").joinpath("tables")
    # As among the recipes themselves, what begins with "_" is not listed.
    files = (
        entry
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml") and not entry.name.startswith("_")
    )
    tables = {}
    for file in sorted(files, key=lambda entry: entry.name):
        name = file.name.removesuffix(".yaml")
        tables[name] = read_table(name, file.read_text("utf-8"))
    return tables


def read_table(name: str, text: str) -> RecipeTable:
    """Check the text of a table.

    Raises:
        ValueError: it is no table; the message says why.
    """
    values, problems = parse_yaml(text)
    if problems:
        raise ValueError(f"the table {name} cannot be read: {': '.join(filter(None, problems[0]))}")
    try:
        return RecipeTable.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"the table {name} is wrong: {error}") from error


@cache
def table_recipes() -> Mapping[str, TableRecipe]:
    """Make the recipes of all tables, by name, in the order of the tables.

    Raises:
        ValueError: two cells make recipes of one name.

    Example:
        >>> table_recipes()["cifar100_ikl_kd_resnet56_resnet20"].published
        71.44
    """
    recipes: dict[str, TableRecipe] = {}
    for name, table in recipe_tables().items():
        for recipe in expand(name, table):
            if recipe.name in recipes:
                raise ValueError(f"two recipes of the tables are called {recipe.name}")
            recipes[recipe.name] = recipe
    return recipes


def expand(table_name: str, table: RecipeTable) -> Iterator[TableRecipe]:
    """Yield the recipes of a table, method by method."""
    for key, method in table.methods.items():
        for column_key, value in method.columns.items():
            cell = value if isinstance(value, TableCell) else TableCell(published=value)
            column = table.columns[column_key]
            plain = key.removesuffix("_official")
            name = table.name.format(
                method=plain, column=column_key, suffix=key.removeprefix(plain)
            )
            top = {
                "base": table.base,
                "name": name,
                "description": f"{column.title}: {method.title}",
            }
            settings: dict[str, Any] = {}
            for patch in (method.settings, column.settings, cell.settings):
                settings = merge(settings, patch)
            header = _header(name, table, method, column, cell)
            header["Made from"] = f"recipes/tables/{table_name}.yaml"
            text = "\n".join([*(_wrapped(*line) for line in header.items()), _body(top, settings)])
            yield TableRecipe(
                name, table_name, key, column_key, top["description"], cell.published, text
            )


def _header(
    name: str, table: RecipeTable, method: TableMethod, column: TableColumn, cell: TableCell
) -> dict[str, str]:
    expected = "not known" if cell.published is None else f"{cell.published:.2f} % top-1"
    lines = {
        "Claim": method.claim,
        "Paper row": f"{method.row or column.row or table.row}; {method.title}, {column.title}",
        "Command": f"dkl train {name}",
        "Hardware": method.hardware or table.hardware,
        "Expected": "; ".join(filter(None, (expected, cell.detail, column.reference))),
        "Measured": "not measured here",
        "Note": "; ".join(filter(None, (method.note, cell.note))),
    }
    return {word: text for word, text in lines.items() if text}


def _wrapped(word: str, text: str) -> str:
    first = f"# {word}:".ljust(_INDENT)
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent="#".ljust(_INDENT))


def _body(top: Mapping[str, str], sections: Mapping[str, Any]) -> str:
    parts = [_dump(top, flow=False)]
    for name in Recipe.model_fields:
        if name in sections:
            parts += ["", _dump({name: sections[name]})]
    return "\n".join(parts) + "\n"


def _dump(values: Mapping[str, Any], flow: bool | None = None) -> str:
    # Through JSON, because YAML would write values that tables share as references.
    plain = json.loads(json.dumps(values))
    text: str = yaml.safe_dump(plain, sort_keys=False, width=_WIDTH, default_flow_style=flow)
    return text.rstrip()
