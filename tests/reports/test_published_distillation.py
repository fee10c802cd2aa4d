"""The published numbers on distillation, typed a second time, as the paper's columns."""

from dkl.reports import PUBLISHED_DISTILLATION
from dkl.reports.distillation_layout import DISTILLATION_LAYOUTS
from dkl.reports.published_distillation import (
    CIFAR_OTHER_PAIRS,
    CIFAR_PAIRS,
    DISTILLATION_CONFLICTS,
)

METHODS = ("fitnet", "rkd", "crd", "ofd", "reviewkd", "dkd", "kd", "ikl_kd")
COLUMNS = {
    "resnet56-resnet20": "69.21 69.61 71.16 70.98 71.89 71.97 70.66 71.44",
    "resnet110-resnet32": "71.06 71.82 73.48 73.23 73.89 74.11 73.08 74.26",
    "resnet32x4-resnet8x4": "73.50 71.90 75.51 74.95 75.63 76.32 73.33 76.59",
    "wrn_40_2-wrn_16_2": "73.58 73.35 75.48 75.24 76.12 76.24 74.92 76.45",
    "wrn_40_2-wrn_40_1": "72.24 72.22 74.14 74.33 75.09 74.81 73.54 74.98",
    "vgg13-vgg8": "71.02 71.48 73.94 73.95 74.84 74.68 72.98 74.98",
    "resnet32x4-shufflenet_v1": "73.59 72.28 75.11 75.98 77.45 76.45 74.07 76.64",
    "wrn_40_2-shufflenet_v1": "73.73 72.21 76.05 75.85 77.14 76.70 74.83 77.19",
    "vgg13-mobilenet_v2_half": "64.14 64.52 69.73 69.48 70.37 69.71 67.37 70.40",
    "resnet50_cifar-mobilenet_v2_half": "63.16 64.43 69.11 69.04 69.89 70.35 67.35 70.62",
    "resnet32x4-shufflenet_v2": "73.54 73.21 75.65 76.82 77.78 77.07 74.45 77.16",
}
TEACHERS = {
    "resnet56": 72.34,
    "resnet110": 74.31,
    "resnet32x4": 79.42,
    "wrn_40_2": 75.61,
    "vgg13": 74.64,
    "resnet50_cifar": 79.34,
}
STUDENTS = {
    "resnet20": 69.06,
    "resnet32": 71.14,
    "resnet8x4": 72.50,
    "wrn_16_2": 73.26,
    "wrn_40_1": 71.98,
    "vgg8": 70.36,
    "shufflenet_v1": 70.50,
    "mobilenet_v2_half": 64.60,
    "shufflenet_v2": 71.82,
}


def found(table, key, number=None):
    rows = [r for r in PUBLISHED_DISTILLATION[table] if r.key == key]
    return {
        name: value
        for row in rows
        if number in (None, row.table)
        for name, value in row.others.items()
    }


def test_tables_13_and_14_by_pair():
    for pair, column in COLUMNS.items():
        shown = [f"{found('distillation', key)[pair]:.2f}" for key in METHODS]
        assert " ".join(shown) == column
    assert {*COLUMNS} == {*CIFAR_PAIRS, *CIFAR_OTHER_PAIRS}
    assert {*found("distillation", "kd", 13)} == {*CIFAR_PAIRS}
    assert {*found("distillation", "kd", 14)} == {*CIFAR_OTHER_PAIRS}
    for key in ("at", "dist", "jsd_kd", "gkl_kd", "self_kd"):
        assert found("distillation", key) == {}


def test_networks_by_themselves():
    for pair in COLUMNS:
        teacher, _, student = pair.partition("-")
        assert found("distillation", "teacher")[pair] == TEACHERS[teacher]
        assert found("distillation", "student")[pair] == STUDENTS[student]


def test_tables_4_15_and_1():
    table = {
        key: " ".join(f"{value:.2f}" for value in found("distillation-imagenet", key, 4).values())
        for key in ("teacher", "student", "at", "ofd", "crd", "dkd", "kd")
    }
    assert table == {
        "teacher": "73.31 76.16",
        "student": "69.75 68.87",
        "at": "70.69 69.56",
        "ofd": "70.81 71.25",
        "crd": "71.17 71.37",
        "dkd": "71.70 72.05",
        "kd": "71.03 70.50",
    }
    assert [*found("distillation-imagenet", "reviewkd").values()] == [71.61, 72.56, 0.319, 0.526]
    assert [*found("distillation-imagenet", "ikl_kd", 4).values()] == [71.91, 72.84, 0.197, 0.252]
    strong = {
        key: found("distillation-imagenet", key, 15) for key in ("kd", "dkd", "dist", "ikl_kd")
    }
    assert [value for row in strong.values() for value in row.values()] == [
        *(80.89, 80.77, 80.70, 80.98)
    ]
    ablation = [found("distillation-imagenet", key, 1) for key in ("dkl_kd", "ba_kd")]
    assert [*ablation[0].values(), *ablation[1].values()] == [71.03, 71.80]


def test_tables_5_and_18():
    def row(key, number=5):
        return [*found("long-tailed", key, number).values()]

    assert row("student") == [63.16, 33.47, 5.88, 41.15, 67.25, 38.56, 8.21, 45.47]
    assert row("teacher") == 2 * [68.91, 42.32, 11.24, 48.33]
    assert row("kl") == [64.60, 37.88, 9.53, 44.32, 68.83, 42.31, 11.37, 48.31]
    assert row("ikl") == [66.60, 38.53, 8.19, 45.21, 70.06, 43.47, 10.99, 49.29]
    keys = ("kl", "jsd", "ikl", "self_kl", "self_jsd", "self_ikl")
    assert [row(key, 18) for key in keys] == [[48.31], [47.82], [49.22], [47.04], [46.64], [47.50]]
    notes = " ".join(DISTILLATION_CONFLICTS["long-tailed"])
    assert "49.29" in notes
    assert "49.22" in notes


def test_groups_of_table_5_make_up_their_totals():
    # ImageNet-LT has 385, 479 and 136 classes with many, medium and few training images.
    checked = 0
    for key in ("teacher", "student", "kl", "ikl"):
        numbers = [*found("long-tailed", key, 5).values()]
        for many, medium, few, everything in (numbers[:4], numbers[4:]):
            mean = 0.385 * many + 0.479 * medium + 0.136 * few
            assert abs(mean - everything) < 0.011
            checked += 1
    assert checked == 8


def test_every_number_has_a_column():
    for name, layout in DISTILLATION_LAYOUTS.items():
        rows = PUBLISHED_DISTILLATION[name]
        keys = dict.fromkeys(row.key for row in rows)
        shown = [
            value
            for key in keys
            for column in layout.published
            if (value := column.read([row for row in rows if row.key == key])) is not None
        ]
        numbers = [value for row in rows for value in row.others.values()]
        if name == "distillation-speed":  # rows of table 4, whose accuracies have a table
            numbers = [value for value in numbers if value < 1]
        if name == "distillation-imagenet":  # and whose times have one
            numbers = [value for value in numbers if value > 1]
        assert sorted(shown) == sorted(numbers)
    assert {*DISTILLATION_LAYOUTS} == {*PUBLISHED_DISTILLATION}
