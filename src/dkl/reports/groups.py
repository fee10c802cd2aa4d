"""Runs that differ in their seed alone, taken together; and what to know before comparing them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from dkl.reports.origin import NOT_SETTINGS, PLACES
from dkl.reports.records import ResultRow, Run

_PLACES = ("folder", "download", "num_workers")  # where data lie, not what they are
_EPOCH_KEYS = ("epochs", "num_epochs")
# What an attack is allowed to do; how it goes about it belongs to the method.
_TRAINING_ATTACK = ("method.attack.norm", "method.attack.eps", "method.attack.num_steps")
# Not where it lies: the same teacher may be found as a run or a file.
_TEACHER = ("method.teacher.recipe", "method.teacher.model")
_OF_SOME = ("training attack", "teacher")
_EVALUATION = tuple(
    f"evaluation.{key}" for key in ("norm", "eps", "step_size", "auto_attack", "num_images")
)
_MAX_SHOWN = 60  # characters of a setting in a note
_MAX_LABEL_PART = 32  # characters; longer differences are named by their hash


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, with the sample standard deviation (None for one seed)."""

    mean: float
    deviation: float | None
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one value per seed.

        Example:
            >>> Spread.of([1.0, 3.0])
            Spread(mean=2.0, deviation=1.414..., num_seeds=2)
        """
        deviation = stdev(values) if len(values) > 1 else None
        return cls(fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Group:
    """The runs of one recipe with one set of settings, one run per seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe of the first run; the others differ from it in their seed."""
        return self.runs[0].recipe


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Group runs by recipe name and settings, in the order in which they come.

    Settings that differ under one name become part of the label. Of two runs with one seed and the
    same settings the one given last counts.

    Args:
        runs: any runs.

    Returns:
        The groups, whose labels are unique, and notes for the reader.

    Raises:
        ValueError: no runs.
    """
    collected: dict[tuple[str, str], dict[int, Run]] = {}
    notes = []
    for run in runs:
        seeds = collected.setdefault((run.name, run.settings_hash), {})
        earlier = seeds.pop(run.seed, None)
        if earlier is not None and earlier.path.resolve() != run.path.resolve():
            notes.append(
                f"{run.name}: seed {run.seed} was given twice ({earlier.path} and {run.path}); "
                "the second counts."
            )
        seeds[run.seed] = run
    if not collected:
        raise ValueError("a comparison needs at least one run, got none")
    labels = _labels(collected)
    groups = [Group(labels[key], tuple(seeds.values())) for key, seeds in collected.items()]
    notes += [
        f"{name}: runs under this name have {len(same)} different settings; "
        "the labels say what differs."
        for name in dict.fromkeys(name for name, _ in collected)
        if len(same := [key for key in collected if key[0] == name]) > 1
    ]
    return groups, notes + differences(groups)


def find_row(
    run: Run,
    metric: str,
    *,
    norm: str | None = None,
    epsilon: float | None = None,
    split: str = "test",
) -> ResultRow | None:
    """Return a run's row for a metric: of the best checkpoint, else of the last one."""
    found = [
        row
        for row in run.results
        if (row.metric, row.norm, row.epsilon, row.split) == (metric, norm, epsilon, split)
    ]
    return _preferred(found)


def find_rows_by(
    run: Run, metric: str, key: Callable[[ResultRow], Any], *, split: str = "test"
) -> dict[Any, ResultRow]:
    """Return a run's rows of a metric under ``key(row)``, one each, sorted by the key."""
    rows: dict[Any, list[ResultRow]] = {}
    for row in run.results:
        if row.metric == metric and row.split == split:
            rows.setdefault(key(row), []).append(row)
    chosen = {value: _preferred(same) for value, same in sorted(rows.items())}
    return {value: row for value, row in chosen.items() if row is not None}


def _preferred(rows: Sequence[ResultRow]) -> ResultRow | None:
    # Later rows are newer; sorting is stable and puts the preferred checkpoint last.
    order = sorted(rows, key=lambda row: row.checkpoint == "best")
    return order[-1] if order else None


def format_epsilon(epsilon: float) -> str:
    """Write a budget as people do: n/255 where it is one.

    Example:
        >>> format_epsilon(8 / 255), format_epsilon(0.2), format_epsilon(0.5)
        ('8/255', '0.2', '0.5')
    """
    steps = epsilon * 255
    # 0.2 is 51/255 too: only what has no short decimal form is a fraction.
    if len(f"{epsilon:.6g}") > 5 and abs(steps - round(steps)) < 1e-4:
        return f"{round(steps)}/255"
    return f"{epsilon:.6g}"


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys.

    Example:
        >>> flatten({"model": {"name": "wrn_34_10"}, "seed": 0})
        {'model.name': 'wrn_34_10', 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _labels(collected: Mapping[tuple[str, str], Mapping[int, Run]]) -> dict[Any, str]:
    labels: dict[tuple[str, str], str] = {}
    for name in dict.fromkeys(name for name, _ in collected):
        same = [key for key in collected if key[0] == name]
        flat = [flatten(next(iter(collected[key].values())).recipe) for key in same]
        keys = _differing_keys(flat)
        for key, settings in zip(same, flat, strict=True):
            parts = [f"{short}={_show(settings.get(full))}" for full, short in keys.items()]
            if len(same) == 1:
                labels[key] = name
            elif 1 <= len(parts) <= 2 and all(len(part) <= _MAX_LABEL_PART for part in parts):
                labels[key] = f"{name} ({', '.join(parts)})"
            else:
                labels[key] = f"{name} ({key[1][:8]})"
    return labels


def _differing_keys(flat: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the keys in which settings differ, each with the shortest unambiguous name."""
    everything = dict.fromkeys(key for settings in flat for key in settings)
    keys = [
        key
        for key in everything
        if key.partition(".")[0] not in NOT_SETTINGS
        and key not in PLACES
        and len({_show(settings.get(key)) for settings in flat}) > 1
    ]
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)
    }


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def differences(groups: Sequence[Group]) -> list[str]:
    """Say in what the groups differ that makes their numbers hard to compare.

    Args:
        groups: from ``group_runs``; labels may repeat.

    Returns:
        A sentence per aspect (data, epochs, model, training attack, teacher, evaluation) with the
        settings that are not the same everywhere.
    """
    notes = []
    for aspect, belongs in _ASPECTS.items():
        chosen = [
            {key: _show(value) for key, value in flatten(group.recipe).items() if belongs(key)}
            for group in groups
        ]
        involved = [
            (group.label, settings)
            for group, settings in zip(groups, chosen, strict=True)
            if settings or aspect not in _OF_SOME  # natural training has neither to compare
        ]
        keys = [
            key
            for key in dict.fromkeys(key for _, settings in involved for key in settings)
            if len({settings.get(key) for _, settings in involved}) > 1
        ]
        seen: dict[tuple[str | None, ...], list[str]] = {}
        for label, settings in involved if keys else ():
            labels = seen.setdefault(tuple(settings.get(key) for key in keys), [])
            labels += [label] if label not in labels else []
        if keys:
            most = max(seen.values(), key=len)
            parts = "; ".join(
                f"{_who(who, is_rest=who is most)}: "
                + _show_settings(dict(zip(keys, what, strict=True)), aspect)
                for what, who in seen.items()
            )
            notes.append(f"The recipes differ in {aspect} ({parts}).")
    return notes


def _who(labels: Sequence[str], *, is_rest: bool) -> str:
    """Name recipes; where the rest is long, by their number."""
    return f"the other {len(labels)}" if is_rest and len(labels) > 4 else ", ".join(labels)


def _is_data(key: str) -> bool:
    return key.partition(".")[0] == "data" and key.rpartition(".")[2] not in _PLACES


_ASPECTS: Mapping[str, Callable[[str], bool]] = {
    "data": _is_data,
    "epochs": lambda key: key.rpartition(".")[2] in _EPOCH_KEYS,
    "model": lambda key: key.partition(".")[0] == "model",
    "training attack": lambda key: key in _TRAINING_ATTACK,
    "teacher": lambda key: key.startswith(_TEACHER),
    "evaluation": lambda key: key in _EVALUATION,
}


def _show_settings(settings: Mapping[str, str | None], aspect: str) -> str:
    stated = {key: _brief(value) for key, value in settings.items() if value is not None}
    if not stated:
        return "not stated"
    # "epochs: epochs 20" says it twice; so does "model: name wrn_34_10".
    if len(stated) == 1 and next(iter(stated)).rpartition(".")[2] in ("name", aspect):
        return next(iter(stated.values()))
    last = [key.rpartition(".")[2] for key in settings]
    return ", ".join(
        f"{short if last.count(short) == 1 else key.partition('.')[2]} {stated[key]}"
        for key, short in zip(settings, last, strict=True)
        if key in stated
    )


def _brief(value: str) -> str:
    return value if len(value) <= _MAX_SHOWN else value[: _MAX_SHOWN - 3] + "..."
