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


def list_recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from dkl import config

    recipes = [config.load_recipe(name) for name in config.list_recipes()]
    if as_json:
        print_json([{"name": one.name, "description": one.description} for one in recipes])
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains")
    for one in recipes:
        table.add_row(Text(one.name, style="cyan"), Text(one.description))
    print_table(table)


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
