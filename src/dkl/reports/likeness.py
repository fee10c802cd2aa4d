"""What keeps the rows of one table from being like for like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dkl.reports.groups import Group, flatten
from dkl.reports.recipe_facts import network, num_epochs, setting
from dkl.reports.records import ResultRow

DATASET, TEST_IMAGES = "dataset", "test images"
_MAX_CLASSES = 4  # names of classes that tell one dataset from another in a warning


@dataclass(frozen=True)
class Difference:
    """Something that is not the same for all rows.

    Args:
        aspect: "dataset", "training images", "epochs", "model" or "test images".
        values: label of a row -> what it has there, in words.
    """

    aspect: str
    values: Mapping[str, str]

    @property
    def sentence(self) -> str:
        """The difference for a reader."""
        labels: dict[str, list[str]] = {}
        for label, value in self.values.items():
            if value:
                labels.setdefault(value, []).append(label)
        most = max(labels.values(), key=len)
        parts = []
        for value, who in labels.items():
            is_rest = who is most and len(who) > 4
            parts.append(f"{value} ({f'the other {len(who)}' if is_rest else ', '.join(who)})")
        return f"The rows differ in {self.aspect}: {'; '.join(parts)}."


def row_differences(
    groups: Sequence[Group],
    chosen: Mapping[str, Sequence[Sequence[ResultRow]]],
    titles: Sequence[str],
) -> tuple[Difference, ...]:
    """Find what a reader must know before comparing rows: other data, lengths, models or images.

    Args:
        groups: a group per row.
        chosen: label of a row -> the result rows behind each of its cells.
        titles: of the columns of cells.

    Returns:
        A difference for each aspect that is not the same everywhere.
    """
    facts: dict[str, Callable[[Group], str]] = {
        DATASET: _dataset_facts(groups),
        "training images": lambda group: _training_images(group.recipe),
        "epochs": lambda group: str(num_epochs(group.recipe) or "not stated"),
        "model": lambda group: network(group.recipe),
        TEST_IMAGES: _image_facts(chosen, titles),
    }
    found = (
        Difference(aspect, {group.label: fact(group) for group in groups})
        for aspect, fact in facts.items()
    )
    return tuple(one for one in found if _is_apart(one))


def _is_apart(difference: Difference) -> bool:
    values = {*difference.values.values()} - {""}  # "": a row without results
    # Seeds of one row may differ in their images, too; only columns that do are named.
    return len(values) > 1 or (difference.aspect == TEST_IMAGES and bool(values))


def _dataset_facts(groups: Sequence[Group]) -> Callable[[Group], str]:
    """Name the data; with their classes where one name stands for several datasets."""
    classes: dict[str, set[tuple[str, ...]]] = {}
    for group in groups:
        for run in group.runs:
            if run.class_names:
                classes.setdefault(_data_name(group.recipe), set()).add(run.class_names)

    def fact(group: Group) -> str:
        name = _data_name(group.recipe)
        names = next((run.class_names for run in group.runs if run.class_names), ())
        if len(classes.get(name, ())) < 2 or not names:
            return name
        shown = ", ".join(names[:_MAX_CLASSES]) + (", ..." if len(names) > _MAX_CLASSES else "")
        return f"{name} with {len(names)} classes {shown}"

    return fact


def _data_name(recipe: Mapping[str, Any]) -> str:
    return str(setting(recipe, "data.name") or "not stated")


def _training_images(recipe: Mapping[str, Any]) -> str:
    """Say how many training images there are, and how classes share them."""
    limit, tail = setting(recipe, "data.train_limit"), setting(recipe, "data.long_tailed")
    parts = ["all" if limit is None else str(limit)]
    if isinstance(tail, Mapping):
        parts.append("long-tailed")
        parts += [f"{key} {value}" for key, value in flatten(tail).items() if value is not None]
    return ", ".join(parts)


def _image_facts(
    chosen: Mapping[str, Sequence[Sequence[ResultRow]]], titles: Sequence[str]
) -> Callable[[Group], str]:
    """Tell the numbers of images of those columns in which they are not the same."""
    numbers = {
        label: [sorted({row.num_samples for row in rows}) for rows in columns]
        for label, columns in chosen.items()
    }
    uneven = [
        place
        for place in range(len(titles))
        if len({number for columns in numbers.values() for number in columns[place]}) > 1
    ]

    def fact(group: Group) -> str:
        counted = (
            (titles[place], " and ".join(map(str, numbers[group.label][place]))) for place in uneven
        )
        return ", ".join(f"{title} {count}" for title, count in counted if count)

    return fact
