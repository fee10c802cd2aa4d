"""Every mistake is a ValueError that says what is needed, what came and what to do."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dkl.losses import (
    decoupled_kl_loss,
    dkl_loss,
    gkl_loss,
    ikl_loss,
    jsd_loss,
    kl_loss,
    reverse_kl_loss,
)

LOGITS = torch.zeros(4, 3)
TABLE = torch.full((3, 3), 1 / 3)
LABELS = torch.tensor([0, 1, 2, 2])
EVERY: list[Callable[..., Any]] = [ikl_loss, dkl_loss, gkl_loss, kl_loss, reverse_kl_loss, jsd_loss]


def check_message(
    words: list[str], function: Callable[..., Any], *args: Any, **options: Any
) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        function(*args, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


BAD_LOGITS: list[tuple[str, Any, Any, list[str]]] = [
    ("two-shapes", LOGITS, torch.zeros(4, 5), ["one shape", "[4, 3]", "[4, 5]"]),
    ("no-broadcasting", LOGITS, torch.zeros(1, 3), ["one shape", "[1, 3]"]),
    (
        "labels-as-target",
        LOGITS,
        LABELS,
        ["floating-point logits", "neither labels", "torch.int64"],
    ),
    ("integers", LABELS[:, None], LABELS[:, None], ["floating-point logits", "torch.int64"]),
    ("vectors", torch.zeros(4), torch.zeros(4), ["[N, C]", "dim 1", "sequence_loss"]),
    ("no-classes", torch.zeros(4, 0), torch.zeros(4, 0), ["at least one class", "[4, 0]"]),
    ("list", LOGITS, [[0.0, 1.0]], ["target must be a tensor of logits", "list"]),
    ("array", LOGITS.numpy(), LOGITS, ["input must be a tensor of logits", "ndarray"]),
    ("none", LOGITS, None, ["target must be a tensor", "NoneType"]),
]


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize(
    ("input", "target", "words"),
    [case[1:] for case in BAD_LOGITS],
    ids=[case[0] for case in BAD_LOGITS],
)
def test_logits(function: Callable[..., Any], input: Any, target: Any, words: list[str]) -> None:
    check_message(words, function, input, target)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("reduction", "batchmean", ["reduction must be", "'batchmean' is 'mean' here"]),
        ("reduction", "avg", ["'mean', 'sum' or 'none'", "'avg'"]),
        ("temperature", 0, ["temperature must be finite and > 0", "got 0"]),
        ("temperature", -2.0, ["temperature must be finite and > 0", "-2.0"]),
        ("temperature", float("nan"), ["temperature must be finite", "nan"]),
        ("temperature", float("inf"), ["temperature must be finite", "inf"]),
        ("mask", torch.ones(4), ["mask must be bool", "True = counts", "[4]", "torch.float32"]),
        ("mask", torch.ones(4, 3).bool(), ["without dim 1", "[4]", "[4, 3]"]),
    ],
)
def test_options_of_every_loss(
    function: Callable[..., Any], option: str, value: Any, words: list[str]
) -> None:
    check_message(words, function, LOGITS, LOGITS, **{option: value})


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"mse_weight": -1}, ["mse_weight must be finite and >= 0", "-1"]),
    ({"ce_weight": float("inf")}, ["ce_weight must be finite and >= 0", "inf"]),
    ({"gamma": -0.1}, ["gamma must be finite and >= 0", "-0.1"]),
    ({"weight_temperature": 0.0}, ["weight_temperature must be finite and > 0", "0.0"]),
    ({"normalization": "batch"}, ["normalization must be 'rows' or 'weights'", "'batch'"]),
    ({"num_items": -3}, ["num_items must be finite and >= 0", "-3"]),
    ({"num_items": torch.ones(4)}, ["num_items", "without dimensions", ".sum()", "[4]"]),
    (
        {"normalization": "weights", "denominator": float("nan")},
        ["denominator must be finite", "nan"],
    ),
    (
        {"normalization": "weights", "denominator": torch.ones(1)},
        ["denominator", "without dimensions", "[1]"],
    ),
    ({"class_table": TABLE}, ["class_table needs labels"]),
    ({"class_table": TABLE[:2], "labels": LABELS}, ["[C, C] = [3, 3]", "got [2, 3]"]),
    ({"class_probs": TABLE}, ["class_probs must have input's shape [4, 3]", "class_table"]),
    (
        {"class_probs": LOGITS, "class_table": TABLE, "labels": LABELS},
        ["class_probs or class_table", "not both"],
    ),
    ({"labels": LABELS[:3]}, ["labels must be integers", "[4]", "[3]"]),
    ({"labels": LABELS.float()}, ["labels must be integers", "torch.float32"]),
    ({"labels": LABELS.bool()}, ["labels must be integers", "torch.bool"]),
    ({"labels": TABLE[LABELS]}, ["labels must be integers", "without dim 1", "[4, 3]"]),
    (
        {"class_table": TABLE, "labels": LABELS + 1},
        ["labels must be in [0, 3)", "ignore_index", "got 1 to 3"],
    ),
    (
        {"class_table": TABLE, "labels": LABELS - 1},
        ["labels must be in [0, 3)", "ignore_index", "got -1 to 1"],
    ),
    ({"backend": "cuda"}, ["backend must be one of", "'auto', 'reference'", "'cuda'"]),
]
# Options that would have no effect are errors too: they show a misunderstanding.
WITHOUT_EFFECT: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"weight_temperature": 4, "class_probs": LOGITS},
        ["weight_temperature", "would be ignored", "ClassStatistics(temperature=...)"],
    ),
    (
        {"weight_temperature": 4, "class_table": TABLE, "labels": LABELS},
        ["weight_temperature", "would be ignored", "ClassStatistics(temperature=...)"],
    ),
    ({"ignore_index": 255}, ["ignore_index would be ignored", "labels"]),
    ({"denominator": 3.0}, ["denominator belongs to normalization='weights'", "num_items"]),
    ({"num_items": 3, "reduction": "sum"}, ["num_items", "reduction='mean'"]),
    ({"num_items": 3, "reduction": "none"}, ["num_items", "reduction='mean'"]),
]


@pytest.mark.parametrize(
    ("options", "words"), WRONG + WITHOUT_EFFECT, ids=lambda value: str(value)[:40]
)
def test_options(options: dict[str, Any], words: list[str]) -> None:
    check_message(words, decoupled_kl_loss, LOGITS, LOGITS, **options)


@pytest.mark.parametrize(
    ("function", "option", "words"),
    [
        (dkl_loss, {"break_asymmetry": True}, ["dkl_loss", "ikl_loss"]),
        (gkl_loss, {"normalization": "rows"}, ["gkl_loss", "ikl_loss for 'rows'"]),
    ],
)
def test_options_that_a_name_already_fixes(
    function: Callable[..., Any], option: dict[str, Any], words: list[str]
) -> None:
    check_message(words, function, LOGITS, LOGITS, **option)


def test_shapes_of_maps() -> None:
    maps = torch.zeros(2, 3, 4, 5)
    check_message(["[2, 4, 5]", "[2, 5, 4]"], ikl_loss, maps, maps, mask=torch.ones(2, 5, 4).bool())
    check_message(["[2, 4, 5]", "[40]"], ikl_loss, maps, maps, labels=torch.zeros(40).long())


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="log_target"):
        ikl_loss(LOGITS, LOGITS, log_target=True)
