"""What the measured columns of the paper's tables read from a run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dkl.reports.groups import find_row, format_epsilon
from dkl.reports.recipe_facts import setting
from dkl.reports.records import ResultRow, Run
from dkl.reports.tables import describe_metric

Threat = tuple[str | None, float | None]


@dataclass(frozen=True)
class Reading:
    """A number of one run in the unit of its column, and the rows that it comes from."""

    value: float
    rows: tuple[ResultRow, ...]

    @property
    def measurement(self) -> frozenset[tuple[object, ...]]:
        """Metric and threat of the rows: readings that differ in it measure different things."""
        return frozenset((row.metric, row.norm, row.epsilon) for row in self.rows)


@dataclass(frozen=True)
class Measure:
    """A measured column.

    Args:
        title: of the column.
        read: what it reads; None where a run lacks it.
        unit: of the readings; "" says nothing.
        decimals: how many are shown; None: as many as the number of images allows.
    """

    title: str
    read: Callable[[Run], Reading | None]
    unit: str = "%"
    decimals: int | None = None


def accuracy(title: str, *metrics: str) -> Measure:
    """Return a column of an accuracy; of several metrics the first one that a run has counts."""

    def read(run: Run) -> Reading | None:
        found = (_row(run, metric) for metric in metrics)
        row = next((row for row in found if row is not None), None)
        return None if row is None else Reading(100 * row.value, (row,))

    return Measure(title, read)


def sweep(runs: Sequence[Run]) -> tuple[str, list[Measure]]:
    """Return the columns of a sweep over epsilon: one per budget above zero, and their mean.

    All come from one attack and norm: those that most runs were swept with, and the strongest
    attack among these. Only runs with every budget have a mean.

    Args:
        runs: of the whole table.

    Returns:
        The attack in words, and the columns; none where there are no sweeps.
    """
    votes: dict[tuple[str, str], int] = {}
    for run in runs:
        for threat in {(sweep_attack(row), row.norm or "") for row in _sweep_rows(run)}:
            votes[threat] = votes.get(threat, 0) + 1
    if not votes:
        return "", []
    attack, norm = max(votes, key=lambda key: (votes[key], attack_strength(key[0]), key))
    budgets = sorted(
        {float(row.epsilon or 0) for run in runs for row in _swept(run, attack, norm)} - {0.0}
    )

    def at(*wanted: float) -> Callable[[Run], Reading | None]:
        def read(run: Run) -> Reading | None:
            found = {row.epsilon: row for row in _swept(run, attack, norm)}
            if not found.keys() >= {*wanted}:
                return None
            rows = tuple(found[budget] for budget in wanted)
            return Reading(100 * sum(row.value for row in rows) / len(rows), rows)

        return read

    columns = [Measure(format_epsilon(budget), at(budget)) for budget in budgets]
    return f"{attack_title(attack)}, {norm}", [*columns, Measure("mean", at(*budgets))]


def sweep_attack(row: ResultRow) -> str:
    """Return the name of the attack behind a row of a sweep, "" where it was not recorded."""
    return str(row.details.get("attack") or "")


def attack_title(attack: str) -> str:
    """Write an attack's name as the tables do.

    Example:
        >>> attack_title("pgd_20"), attack_title("auto_attack"), attack_title("")
        ('PGD-20', 'AutoAttack', 'an attack that was not recorded')
    """
    described = describe_metric(f"{attack}_accuracy")
    return described[2] if described else attack or "an attack that was not recorded"


def attack_strength(attack: str) -> tuple[int, int]:
    """Return a key that sorts attacks by strength, unknown ones first."""
    described = describe_metric(f"{attack}_accuracy")
    return described[:2] if described else (-1, 0)


def _row(run: Run, metric: str) -> ResultRow | None:
    """Return a run's row: under the threat of its recipe's evaluation, else the largest budget."""
    threats: set[Threat] = {
        (row.norm, row.epsilon)
        for row in run.results
        if row.metric == metric and row.split == "test"
    }
    if not threats:
        return None
    wanted = (setting(run.recipe, "evaluation.norm"), setting(run.recipe, "evaluation.eps"))
    norm, epsilon = max(
        threats, key=lambda threat: (threat == wanted, threat[1] or 0.0, threat[0] or "")
    )
    return find_row(run, metric, norm=norm, epsilon=epsilon)


def _sweep_rows(run: Run) -> Iterable[ResultRow]:
    return (
        row for row in run.results if row.metric == "epsilon_sweep_accuracy" and row.split == "test"
    )


def _swept(run: Run, attack: str, norm: str) -> list[ResultRow]:
    """Return a run's rows of one sweep; those of the best checkpoint come last and count."""
    rows = [r for r in _sweep_rows(run) if (sweep_attack(r), r.norm or "") == (attack, norm)]
    return sorted(rows, key=lambda row: row.checkpoint == "best")
