"""How many images each class of a long-tailed split has."""

from pathlib import Path
from typing import Any

from dkl import evaluation
from dkl.data import load_data, long_tailed, shot_groups


def long_tailed_classes(
    name: str, *, folder: Path | None = None, download: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Cut a dataset's training images to a long tail and say what is left of each class.

    Args:
        name: of the dataset; see ``dkl.data.load_data``.
        folder: where its files are; None looks in the usual places.
        download: fetch the files if they are not there.
        options: those of ``dkl.data.long_tailed``.

    Returns:
        For each class ``class_index``, ``class_name``, ``images``, ``group`` ("many", "medium" or
        "few", as published: above 100, 20 to 100, below 20).

    Raises:
        ValueError: unknown or missing data, or options that do not fit them.

    Example:
        >>> long_tailed_classes("digits", imbalance=10)[9]
        {'class_index': 9, 'class_name': '9', 'images': 14, 'group': 'few'}
    """
    train, _ = load_data(name, folder=folder, download=download)
    tail = long_tailed(train, **options)
    counts_C = evaluation.class_counts(tail.labels, tail.num_classes)
    groups = shot_groups(counts_C)
    return [
        {
            "class_index": index,
            "class_name": class_name,
            "images": int(counts_C[index]),
            "group": next(group for group, members_C in groups.items() if members_C[index]),
        }
        for index, class_name in enumerate(tail.class_names)
    ]
