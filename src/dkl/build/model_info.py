"""The description that RobustBench wants beside the weights of a model."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dkl import config
from dkl.reports import ResultRow

TO_BE_FILLED_IN = "to be filled in"
FULL_TEST_SET = 10_000
_FAMILIES = (
    (re.compile(r"wrn_(\d+)_(\d+)(?:_silu)?"), "WideResNet-{}-{}", "WRN-{}-{}"),
    (re.compile(r"preact_resnet(\d+)"), "PreActResNet-{}", "PreActResNet-{}"),
    (re.compile(r"resnet(\d+)_cifar"), "ResNet-{}", "ResNet-{}"),
)
# Dataset -> the threats that have a leaderboard.
_LEADERBOARDS = {
    "cifar10": (("Linf", "8/255"), ("L2", "0.5")),
    "cifar100": (("Linf", "8/255"),),
}


@dataclass(frozen=True)
class Submission:
    """What RobustBench asks and no run can know; None is written as "to be filled in".

    Args:
        name: title of the paper.
        authors: separated by commas, such as "Ada Lovelace, Alan Turing".
        link: of the paper.
        venue: such as "NeurIPS 2024".
        year: of the paper; with first author and title it makes the entry's name.
        additional_data: real images beyond the dataset's own were trained on; generated ones do
            not count.

    Raises:
        ValueError: a text is empty, or the year is not one.
    """

    name: str | None = None
    authors: str | None = None
    link: str | None = None
    venue: str | None = None
    year: int | None = None
    additional_data: bool = False

    def __post_init__(self) -> None:
        for key in ("name", "authors", "link", "venue"):
            value = getattr(self, key)
            if value is not None and not value.strip():
                raise ValueError(
                    f"{key} is empty; leave it out, and it will be marked {TO_BE_FILLED_IN!r}"
                )
        if self.year is not None and not 1000 <= self.year <= 9999:
            raise ValueError(f"year must have four digits, got {self.year}")


@dataclass
class ModelInfo:
    """The description of one entry.

    Args:
        entry: name of the entry and of its files, without suffix.
        fields: what the JSON file holds.
        notes: for people: what is missing and what to watch.
    """

    entry: str
    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def describe_model(
    recipe: config.Recipe,
    rows: Sequence[ResultRow],
    weights_hash: str,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
    submission: Submission,
) -> ModelInfo:
    """Fill RobustBench's model_info with a run's measured numbers.

    Accuracies that were not measured on these very weights with all 10 000 test images are left
    null, and AutoAttack counts only where the whole standard ensemble ran.

    Args:
        recipe: of the run.
        rows: its results.
        weights_hash: SHA-256 of the exported weights.
        normalization: mean and deviation built into the model, or None.
        submission: what people know.

    Returns:
        Name, fields and notes.
    """
    architecture, short = _architecture(recipe.model.name)
    info = ModelInfo(_entry_name(recipe, submission, short), {})
    footnotes: list[str] = []
    own = [row for row in rows if row.weights_hash == weights_hash and row.split == "test"]
    if rows and not own:
        info.notes.append("results.jsonl is about other weights; evaluate this checkpoint first")
    clean = next((row for row in own if row.metric == "clean_accuracy"), None)
    attacked = _auto_attack_row(own, recipe)
    eps = attacked.epsilon if attacked is not None else recipe.evaluation.eps
    norm = attacked.norm if attacked is not None else recipe.evaluation.norm
    if attacked is not None and attacked.num_samples < FULL_TEST_SET:
        footnotes.append(
            f"AutoAttack was run on {attacked.num_samples} test images only: "
            f"{_percent(attacked)} % are robust at {norm} {_eps_text(eps)}."
        )
    footnotes += _about_training(recipe) + _about_normalization(recipe, normalization)
    robust_accuracy = _accuracy(attacked, "AutoAttack accuracy", info.notes)
    info.fields.update(
        link=submission.link or TO_BE_FILLED_IN,
        name=submission.name or TO_BE_FILLED_IN,
        authors=submission.authors or TO_BE_FILLED_IN,
        additional_data=submission.additional_data,
        number_forward_passes=1,
        dataset=recipe.data.name,
        venue=submission.venue or TO_BE_FILLED_IN,
        architecture=architecture,
        eps=_eps_text(eps),
        clean_acc=_accuracy(clean, "clean accuracy", info.notes),
        reported=robust_accuracy,
        autoattack_acc=robust_accuracy,
        unreliable=False,
    )
    if footnotes:
        info.fields["footnote"] = " ".join(footnotes)
    missing = [key for key, value in info.fields.items() if value == TO_BE_FILLED_IN]
    if missing:
        info.notes.append(f"{TO_BE_FILLED_IN}: {', '.join(missing)}")
    if info.entry == recipe.name:
        info.notes.append(
            "RobustBench calls entries <Name><Year><FirstWord>_<architecture>; give authors, year "
            "and name, or rename both files"
        )
    info.notes += _about_leaderboard(recipe.data.name, norm, _eps_text(eps))
    return info


def _architecture(model_name: str) -> tuple[str, str]:
    """Return a model's name as RobustBench writes it, long and in names of entries."""
    for pattern, long, short in _FAMILIES:
        if match := pattern.fullmatch(model_name):
            numbers = match.groups()
            return long.format(*numbers), short.format(*numbers)
    bare = model_name.removeprefix("timm/")
    return bare, bare


def _entry_name(recipe: config.Recipe, submission: Submission, architecture: str) -> str:
    """Return <Name><Year><FirstWord>_<architecture>, or the recipe's name where a part is missing.

    Example:
        >>> from dkl.config import load_recipe
        >>> paper = Submission(authors="Ada Lovelace, Alan Turing", year=1843, name="Notes by A.")
        >>> _entry_name(load_recipe("digits_trades"), paper, "WRN-34-10")
        'Lovelace1843Notes_WRN-34-10'
    """
    first_author = re.split(r",| and | & ", submission.authors or "")[0].split()
    words = re.findall(r"\w+", submission.name or "")
    family_name = _plain(first_author[-1]) if first_author else ""
    first_word = _plain(words[0]) if words else ""
    if not family_name or not first_word or submission.year is None:
        return recipe.name
    return f"{family_name}{submission.year}{first_word[0].upper()}{first_word[1:]}_{architecture}"


def _plain(word: str) -> str:
    """Return the ASCII letters and digits of a word, accents removed."""
    decomposed = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]", "", decomposed)


def _auto_attack_row(rows: Sequence[ResultRow], recipe: config.Recipe) -> ResultRow | None:
    """Return the row of the standard ensemble: the recipe's own threat, else the largest sample."""
    standard = [
        row
        for row in rows
        if row.metric == "auto_attack_accuracy" and row.details.get("standard") is True
    ]
    threat = (recipe.evaluation.norm, recipe.evaluation.eps)
    return max(
        standard, key=lambda row: ((row.norm, row.epsilon) == threat, row.num_samples), default=None
    )


def _accuracy(row: ResultRow | None, what: str, notes: list[str]) -> str | None:
    """Return percent with two decimals, or None and a note that says why."""
    if row is not None and row.num_samples >= FULL_TEST_SET:
        return _percent(row)
    how = "was not measured" if row is None else f"was measured on {row.num_samples} images"
    notes.append(
        f"{what} {how}, and RobustBench wants all {FULL_TEST_SET} test images: left null. "
        "For the number: dkl evaluate RUN evaluation.auto_attack=standard evaluation.num_images="
        "null data.test_limit=null"
    )
    return None


def _percent(row: ResultRow) -> str:
    return f"{100 * row.value:.2f}"


def _eps_text(eps: float | None) -> str | None:
    """Write a radius as RobustBench does.

    Example:
        >>> _eps_text(8 / 255), _eps_text(0.5), _eps_text(0.031), _eps_text(None)
        ('8/255', '0.5', '0.031', None)
    """
    if eps is None:
        return None
    levels = round(255 * eps)
    is_whole = levels > 0 and abs(255 * eps - levels) < 1e-6
    return f"{levels}/255" if is_whole else f"{eps:g}"


def _about_training(recipe: config.Recipe) -> list[str]:
    generated = recipe.data.generated
    if generated is None or generated.held_out:
        return []
    return [f"It uses generated images in training, {100 * generated.fraction:g} % of a batch."]


def _about_normalization(
    recipe: config.Recipe, normalization: tuple[Sequence[float], Sequence[float]] | None
) -> list[str]:
    """Say how the input is normalised, where RobustBench's class of that name does otherwise."""
    name = recipe.model.name
    normalizing_class = name.endswith("_silu")
    if normalization is None:
        lacks = "The model does not normalise its input; RobustBench's DMWideResNet does."
        return [lacks] if normalizing_class else []
    mean, std = (f"({', '.join(f'{v:.4f}' for v in values)})" for values in normalization)
    sentence = f"The model normalises its input with mean {mean} and std {std}"
    if normalizing_class:
        return [sentence + "; give RobustBench's DMWideResNet these."]
    other = "RobustBench's WideResNet has" if name.startswith("wrn") else "the weights alone have"
    return [f"{sentence}; {other} no normalisation."]


def _about_leaderboard(dataset: str, norm: str | None, eps: str | None) -> list[str]:
    threats = _LEADERBOARDS.get(dataset)
    if threats is None:
        return [f"RobustBench has no leaderboard for {dataset}"]
    if eps is None:
        return ["eps is null: the recipe names no threat and AutoAttack was not run"]
    if (norm, eps) in threats:
        return []
    there_are = ", ".join(f"{one} {radius}" for one, radius in threats)
    return [f"RobustBench has no {dataset} leaderboard for {norm} {eps}; it has {there_are}"]
