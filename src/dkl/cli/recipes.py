"""Commands about shipped recipes: list, show, copy."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from dkl.cli.output import print_json, print_table
from dkl.cli.training import AsJson

RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")]


def list_recipes(
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="[PATTERN]", help='Part of the names; "*" stands for any text.'),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes; without a pattern, those of one table in one line."""
    from dkl import config

    try:
        found = config.describe_recipes(pattern or "*")
    except config.RecipeError as error:
        raise typer.BadParameter(error.problems[0][1], param_hint="PATTERN") from None
    if as_json:
        print_json([{"name": name, "description": text} for name, text in found.items()])
        return
    lines = found if pattern is not None else _with_tables_in_short(found)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains")
    for name, description in lines.items():
        table.add_row(Text(name, style="cyan"), Text(description))
    print_table(table)
    if pattern is None:
        typer.echo("A line with * stands for several; see them by: dkl recipes list 'NAME*'")


def _with_tables_in_short(found: dict[str, str]) -> dict[str, str]:
    """Put one line for each method of a table in the place of its recipes."""
    from dkl import config

    tables, recipes = config.recipe_tables(), config.table_recipes()
    lines = {}
    for name, description in found.items():
        if name not in recipes:
            lines[name] = description
            continue
        table = tables[recipes[name].table]
        method = recipes[name].method.removesuffix("_official")
        same = [
            one for key, one in table.methods.items() if key.removesuffix("_official") == method
        ]
        count = sum(len(one.columns) for one in same)
        short = table.name.format(method=method, column="*", suffix="")
        lines[short] = f"{count} recipes: {same[0].title}, {table.title}"
    return lines


def show_recipe(
    name: RecipeName,
    full: Annotated[
        bool, typer.Option("--full", help="With all that its bases say, without comments.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a shipped recipe, comments included."""
    from dkl import config

    if as_json:
        print_json(config.resolved(config.load_recipe(name)))
    elif full:
        typer.echo(config.to_yaml(config.load_recipe(name)), nl=False)
    else:
        typer.echo(config.recipe_text(name), nl=False)


def copy_recipe(
    name: RecipeName,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DEST", help="File or folder, instead of NAME.yaml right here."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a shipped recipe to a file of your own, to change it."""
    from dkl import config

    text = config.recipe_text(name)
    file = Path(f"{name}.yaml") if destination is None else destination
    if file.is_dir():
        file = file / f"{name}.yaml"
    if file.exists() and not force:
        raise typer.BadParameter(f"{file} exists; --force replaces it", param_hint="DEST")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    typer.echo(str(file))
