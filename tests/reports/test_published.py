"""The published numbers, typed a second time."""

import pytest

from dkl.reports import PUBLISHED
from dkl.reports.published import CONFLICTS, PREVIOUS_BEST, SOURCE

KEYS = {
    "robust-ablation": "kl dkl ba ikl",
    "robust-methods": "natural pgd_at pgd_at_awp trades trades_awp mart lbgat las_at acat "
    "acat_autoaugment dajat ikl_at gkl_at ikl_at_autoaugment dm_at ikl_at_generated",
    "hyperparameters": "mse_3 mse_4 mse_5 mse_6 ce_2 ce_3 ce_4 ce_5 tau_1 tau_2 tau_3 tau_4",
    "epsilon-sweep": "trades ikl_at",
    "other-attacks": "trades ikl_at ikl_at_autoaugment ikl_at_generated",
}


def numbers(name, *, table=None):
    return {
        row.key: f"{row.clean:.2f}/{row.auto_attack:.2f}"
        for row in PUBLISHED[name]
        if row.clean is not None and table in (None, row.table)
    }


def test_the_keys():
    assert {name: " ".join(dict.fromkeys(r.key for r in PUBLISHED[name])) for name in KEYS} == KEYS
    assert set(PUBLISHED) == set(KEYS)
    assert "NeurIPS 2024" in SOURCE


def test_table_1():
    assert numbers("robust-ablation") == {
        "kl": "62.87/30.29",
        "dkl": "62.54/30.20",
        "ba": "62.69/30.42",
        "ikl": "65.76/31.91",
    }
    top1 = [row.others["imagenet_top1"] for row in PUBLISHED["robust-ablation"]]
    assert top1 == [71.03, 71.03, 71.80, 71.91]


def test_tables_2_and_3():
    assert numbers("robust-methods", table=2) == {
        "pgd_at_awp": "60.38/28.86",
        "lbgat": "60.64/29.33",
        "las_at": "64.89/30.77",
        "acat": "65.75/30.23",
        "ikl_at": "65.76/31.91",
        "acat_autoaugment": "68.74/31.30",
        "ikl_at_autoaugment": "66.08/32.53",
        "dm_at": "72.58/38.83",
        "ikl_at_generated": "73.85/39.18",
    }
    assert numbers("robust-methods", table=3) == {
        "pgd_at": "85.34/53.42",
        "lbgat": "88.70/53.57",
        "pgd_at_awp": "85.36/56.17",
        "las_at": "87.74/55.52",
        "acat": "82.41/55.36",
        "ikl_at": "84.80/57.09",
        "acat_autoaugment": "88.64/57.05",
        "ikl_at_autoaugment": "85.20/57.62",
        "dm_at": "92.44/67.31",
        "ikl_at_generated": "92.16/67.75",
    }
    network = {(row.key, row.table): row.network for row in PUBLISHED["robust-methods"]}
    assert network["lbgat", 3] == network["pgd_at", 3] == "WRN-34-20"
    assert network["lbgat", 2] == "WRN-34-10"
    assert network["dm_at", 2] == "WRN-28-10, 50M generated"
    assert network["ikl_at_generated", 3] == "WRN-28-10, 20M generated"
    assert network["ikl_at", 2] == "WRN-34-10, 200 epochs"


def test_tables_7_to_9():
    assert list(numbers("hyperparameters").values()) == [
        *("67.52/31.29", "66.26/31.33", "65.76/31.91", "65.14/31.64"),
        *("66.13/30.95", "66.31/31.33", "66.00/31.57", "65.76/31.91"),
        *("59.99/31.35", "63.77/31.88", "65.28/31.69", "65.76/31.91"),
    ]
    assert [row.table for row in PUBLISHED["hyperparameters"]] == [7] * 4 + [8] * 4 + [9] * 4


def test_table_10_and_its_means():
    trades, ikl = PUBLISHED["epsilon-sweep"]
    assert list(trades.by_epsilon.values()) == [53.88, 45.31, 37.28, 30.29, 24.28, 19.17]
    assert list(ikl.by_epsilon.values()) == [55.31, 46.76, 38.98, 31.91, 25.33, 19.98]
    assert [trades.clean, ikl.clean] == [62.87, 63.40]
    for row, mean in ((trades, 35.04), (ikl, 36.38)):
        assert list(row.by_epsilon) == [2, 4, 6, 8, 10, 12]
        assert (
            row.others["mean"] == mean == pytest.approx(sum(row.by_epsilon.values()) / 6, abs=0.006)
        )
        assert row.by_epsilon[8] == row.auto_attack


def test_table_11():
    names = ("pgd_10", "pgd_20", "cw_10", "cw_20")
    found = [
        [
            row.clean,
            *(row.others[name] for name in names),
            row.auto_attack,
            row.others["worst_case"],
        ]
        for row in PUBLISHED["other-attacks"]
    ]
    assert found == [
        [62.87, 36.01, 35.84, 40.03, 39.86, 30.29, 30.29],
        [63.40, 36.78, 36.55, 40.72, 40.47, 31.91, 31.92],
        [65.93, 38.15, 37.75, 41.10, 40.86, 32.53, 32.52],
        [73.85, 44.43, 44.12, 47.59, 47.53, 39.18, 39.18],
    ]


def test_table_12():
    found = [(row.augmentation, row.clean, row.auto_attack) for row in PREVIOUS_BEST]
    assert found == [
        ("basic", 62.99, 31.20),
        ("autoaugment", 68.75, 31.85),
        ("generated", 72.58, 38.83),
    ]


def test_conflicts_name_the_numbers_that_disagree():
    texts = " ".join(text for _, text in CONFLICTS)
    for number in ("65.76", "63.40", "66.08", "65.93", "31.92"):
        assert number in texts
