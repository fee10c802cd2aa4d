"""What every command shares: options, logging, and errors told in one message."""

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dkl.cli.output import is_main_process, say

TRACEBACK = "--traceback"
_META_KEY = "dkl.cli.traceback"
_HOW_TO_GO_ON = {
    "train": " The same command with --resume goes on from the last checkpoint.",
    "tune": " The same command goes on after the last finished trial.",
    "cache-teacher": " The same command goes on with what is missing.",
    "evaluate": " The same command goes on with what is not measured yet.",
    "reproduce": " The same command goes on where it stopped.",
}


class Commands(TyperGroup):
    """Turns errors that a user can mend into one red message and an exit code."""

    # Contexts are Any: their class is typer's own or click's, depending on the version.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take ``--traceback`` from wherever it stands in the command line."""
        ctx.meta[_META_KEY] = TRACEBACK in args
        return super().parse_args(ctx, [word for word in args if word != TRACEBACK])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit 2 for a bad recipe, 1 for other failures, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("Interrupted." + _HOW_TO_GO_ON.get(ctx.invoked_subcommand or "", ""), "yellow")
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.meta[_META_KEY] or not _is_for_users(error):
                raise
            say(f"Error: {error}", "red")
            if _is_recipe_error(error):
                raise typer.Exit(2) from None
            say(f"(add {TRACEBACK} to see where it happened)", "dim")
            raise typer.Exit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from dkl import __version__

        typer.echo(f"dkl {__version__}")
        raise typer.Exit


def common_options(
    version: Annotated[  # noqa: ARG001 - acts through its callback
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
    traceback: Annotated[  # noqa: ARG001 - read in Commands.parse_args
        bool,
        typer.Option(TRACEBACK, help="Show the Python traceback of an error (stands anywhere)."),
    ] = False,
) -> None:
    """Train, attack and compare networks with the decoupled KL losses (DKL, IKL, GKL)."""
    # Built anew for each call, because sys.stderr may have been replaced since the last one.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dkl")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)


def _is_for_users(error: Exception) -> bool:
    """Tell errors that a user can mend from mistakes in the code."""
    is_ours = type(error).__module__.split(".")[0] == "dkl"
    can_be_mended = isinstance(error, ValueError | OSError | ImportError)
    return is_ours or (can_be_mended and not isinstance(error, BrokenPipeError))


def _is_recipe_error(error: Exception) -> bool:
    from dkl.config import RecipeError

    return isinstance(error, RecipeError)
