"""The report: one HTML file that needs nothing else."""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dkl.reports.class_figures import class_table_heat_map
from dkl.reports.groups import Group, group_runs
from dkl.reports.masking import masking_checks
from dkl.reports.origin import NOT_SETTINGS
from dkl.reports.paper_tables import paper_table
from dkl.reports.plans import PLANS, Plan
from dkl.reports.records import Run
from dkl.reports.svg import inline_svg
from dkl.reports.tables import compare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_COMMANDS = 3
_MAX_NAMES = 6  # recipes named in the title
Experiments = Mapping[str, Mapping[str, Sequence[Run]]]
"""Name of a paper table -> key of its row -> runs; see ``paper_table``."""


def write_report(
    runs: Iterable[Run], path: Path | str, *, experiments: Experiments | None = None
) -> Path:
    """Write the report on some runs as one self-contained HTML file.

    The file loads nothing from the network or the disk and runs no script. It appears whole or not
    at all.

    Args:
        runs: at least one run, here or in the experiments.
        path: where to write; folders are made.
        experiments: tables of the paper to put first, with the runs attached to their rows; these
            runs are part of the report whether ``runs`` holds them or not.

    Returns:
        The path.

    Raises:
        ValueError: no runs, or a table or row that the paper does not have.
        OSError: the file cannot be written.
    """
    file = Path(path)
    text = render_report(list(runs), experiments=experiments)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def save_figures(runs: Sequence[Run], folder: Path | str) -> list[Path]:
    """Save the report's figures as PNG files, for papers and slides.

    Args:
        runs: at least one run.
        folder: where to write; it is made.

    Returns:
        One path per figure that there is data for.
    """
    directory = Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = ((plan.name, plan.draw(runs)) for plan in PLANS)
    files = []
    for name, figure in (*drawn, ("class-table", class_table_heat_map(runs))):
        if figure is not None:
            file = directory / f"{name}.png"
            figure.savefig(file, dpi=160)
            files.append(file)
    return files


def render_report(runs: Sequence[Run], *, experiments: Experiments | None = None) -> str:
    """Return the report's HTML text; see ``write_report``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dkl.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tables = experiments or {}
    runs = _distinct(
        [*runs, *(run for rows in tables.values() for r in rows.values() for run in r)]
    )
    groups, _ = group_runs(runs)
    planned = (_section(plan, runs) for plan in PLANS)
    sections = [section for section in planned if section is not None]
    sections += _table_sections(groups, runs)
    return environment.get_template("report.html.j2").render(
        title=_title(groups, tables),
        num_runs=sum(len(group.runs) for group in groups),
        num_recipes=len(groups),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        facts=_facts(runs),
        paper_tables=[paper_table(name, rows) for name, rows in tables.items()],
        masking=masking_checks(runs),
        table=compare(runs),
        sections=sections,
        recipes=[_recipe(group) for group in groups],
        measurements=[_measurement(group, run) for group in groups for run in group.runs],
    )


def _title(groups: Sequence[Group], experiments: Experiments) -> str:
    names = [*experiments] or [*dict.fromkeys(group.recipe["name"] for group in groups)]
    rest = len(names) - _MAX_NAMES
    return ", ".join(names if rest < 2 else [*names[:_MAX_NAMES], f"and {rest} more"])


def _distinct(runs: Iterable[Run]) -> list[Run]:
    """Return each run folder once: experiments share runs, and rows of a table may too."""
    return list({run.path.resolve(): run for run in runs}.values())


def _section(plan: Plan, runs: Sequence[Run]) -> dict[str, Any] | None:
    figure = plan.draw(runs)
    if figure is None and plan.is_left_out(runs):
        return None
    lacking = [run for run in runs if not plan.has_data(run)]
    commands = [plan.command.format(recipe=run.name, run=run.path) for run in lacking]
    return {
        "name": plan.name,
        "title": plan.title,
        "caption": plan.caption,
        "svg": _markup(figure, plan.name, plan.title),
        "needs": plan.needs,
        "lacking": list(dict.fromkeys(run.name for run in lacking)) if plan.everywhere else [],
        "commands": list(dict.fromkeys(commands))[:_MAX_COMMANDS],
    }


def _table_sections(groups: Sequence[Group], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a heat map for every recipe with a class table, or a section that says none has."""
    with_table = [group for group in groups if any(run.class_table for run in group.runs)]
    sections = []
    for number, group in enumerate(with_table, start=1):
        name = "class-table" if number == 1 else f"class-table-{number}"
        figure = class_table_heat_map(runs, label=group.label)
        sections.append(
            {
                "name": name,
                "title": f"Class table: {group.label}",
                "caption": "Row y is the mean prediction for training images of class y, at the "
                "temperature of the recipe: the class-wise global weights of the loss.",
                "svg": _markup(figure, name, f"Class table of {group.label}"),
                "needs": "",
                "lacking": [],
                "commands": [],
            }
        )
    return sections or [
        {
            "name": "class-table",
            "title": "Class table",
            "caption": "",
            "svg": None,
            "needs": "class_table.json of a run whose method keeps a class table",
            "lacking": [],
            "commands": ["dkl train digits_ikl_at"],
        }
    ]


def _markup(figure: "Figure | None", name: str, description: str) -> Any:
    from markupsafe import Markup

    return None if figure is None else Markup(inline_svg(figure, name, description))


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    rows = [row for run in runs for row in run.results]
    times = sorted(row.time for row in rows if row.time)
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for package, version in row.versions.items():
            versions.setdefault(package, {})[version] = None
    facts = {
        "Measured": " to ".join(dict.fromkeys((times[0], times[-1]))) if times else "",
        "Machine": "; ".join(dict.fromkeys(row.device for row in rows if row.device)),
        "Versions": ", ".join(
            f"{package} {' and '.join(found)}" for package, found in versions.items()
        ),
        "Commit": ", ".join(dict.fromkeys(row.commit for row in rows if row.commit)),
    }
    return [(name, text or "not recorded") for name, text in facts.items()]


def _recipe(group: Group) -> dict[str, Any]:
    import yaml

    settings = {key: value for key, value in group.recipe.items() if key not in NOT_SETTINGS}
    return {
        "label": group.label,
        "settings_hash": group.runs[0].settings_hash,
        "seeds": ", ".join(str(seed) for seed in sorted(run.seed for run in group.runs)),
        "yaml": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    }


def _measurement(group: Group, run: Run) -> dict[str, Any]:
    hashes = dict.fromkeys(str(row.weights_hash)[:12] for row in run.results if row.weights_hash)
    checkpoints = dict.fromkeys(row.checkpoint for row in run.results)
    return {
        "label": group.label,
        "seed": run.seed,
        "path": str(run.path),
        "epochs": len(run.epochs),
        "rows": len(run.results),
        "checkpoints": ", ".join(checkpoints) or "-",
        "weights": ", ".join(hashes) or "-",
    }
