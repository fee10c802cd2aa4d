import dataclasses
import json
import statistics
import sys
from io import StringIO

import pytest
from rich.console import Console
from scipy import stats

from dkl.reports import paper_table, read_run
from dkl.reports.paired import paired_difference
from dkl.reports.published import PUBLISHED


def percents(runs, metric):
    return [100 * row.value for run in runs for row in run.results if row.metric == metric]


def change(run, metric, /, **changes):
    """Return a run with another value or attack in its rows of a metric."""
    rows = tuple(
        dataclasses.replace(row, **changes) if row.metric == metric else row for row in run.results
    )
    return dataclasses.replace(run, results=rows)


def cells(table, key):
    """Return the lines of a key as title -> cell."""
    found = [dict(zip(table.header, line, strict=True)) for line in table.lines("+-")]
    return [line for line, row in zip(found, table.rows, strict=True) if row.key == key]


def test_paired_difference_is_scipys_test():
    method = {0: 56.2, 1: 57.9, 2: 55.1, 3: 58.4, 7: 99.0}
    reference = {3: 57.0, 2: 55.6, 1: 56.3, 0: 55.4, 9: 11.0}
    found = paired_difference(method, reference)
    ours, theirs = [[values[s] for s in range(4)] for values in (method, reference)]
    assert found.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert found.mean == pytest.approx(statistics.mean(differences))
    assert found.deviation == pytest.approx(statistics.stdev(differences))
    assert found.num_seeds == 4


def test_paired_difference_by_hand():
    # d = 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3), and with two degrees of freedom
    # p = 1 - t / sqrt(2 + t^2).
    found = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert (found.mean, found.deviation) == (2.0, 1.0)
    assert found.p_value == pytest.approx(1 - (12 / 14) ** 0.5)


def test_paired_difference_without_a_test():
    assert paired_difference({0: 1.0}, {0: 2.0}) is None
    assert paired_difference({0: 1.0, 1: 2.0}, {2: 1.0, 3: 2.0}) is None
    same = paired_difference({0: 0.3, 1: 0.4, 2: 0.5}, {0: 0.1, 1: 0.2, 2: 0.3})
    assert (same.deviation, same.p_value) == (0.0, None)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"dkl\[train\]"):
        paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})


def test_ablation_holds_published_measured_and_compared(write_suite):
    suite = write_suite("trades", "ikl_at")
    table = paper_table("robust-ablation", {"kl": suite["trades"], "ikl": suite["ikl_at"]})
    assert [row.key for row in table.rows] == ["kl", "dkl", "ba", "ikl"]
    (line,) = cells(table, "ikl")
    assert line["published, CIFAR-100, WRN-34-10, 200 epochs: clean"] == "65.76"
    assert line["published AA"] == "31.91"
    values = percents(suite["ikl_at"], "auto_attack_accuracy")
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert line["measured AutoAttack"] == f"{mean:.1f} +- {deviation:.1f}"
    assert line["seeds"] == "3"
    test = stats.ttest_rel(values, percents(suite["trades"], "auto_attack_accuracy"))
    (_, difference), row = table.rows[3].differences, table.rows[3]
    assert difference.p_value == pytest.approx(test.pvalue)
    shown = f"{difference.mean:+.2f} +- {difference.deviation:.2f} (p {test.pvalue:.2g})"
    assert line["minus KL (TRADES) AutoAttack"] == shown
    assert row.group.label == "fashion_mnist_ikl_at_small"
    assert cells(table, "kl")[0]["minus KL (TRADES) AutoAttack"] == "baseline"


def test_seeds_are_matched_not_places(write_suite):
    suite = write_suite("trades", "ikl_at", seeds=(0, 1, 2))
    straight = paper_table("robust-methods", suite)
    turned = {"trades": suite["trades"][::-1], "ikl_at": suite["ikl_at"]}
    assert cells(paper_table("robust-methods", turned), "ikl_at") == cells(straight, "ikl_at")
    fewer = {"trades": suite["trades"][1:], "ikl_at": suite["ikl_at"][:2]}
    table = paper_table("robust-methods", fewer)
    assert cells(table, "ikl_at")[0]["minus TRADES AutoAttack"] == "-"  # seed 1 alone is common


def test_what_is_missing_is_said(write_suite, write_run):
    suite = write_suite("trades", "mart")
    bare = read_run(write_run("fashion_mnist_lbgat_small", rows=False))
    runs = {"trades": suite["trades"], "mart": suite["mart"][:1], "lbgat": [bare], "acat": []}
    table = paper_table("robust-methods", runs)
    head = "measured, %: clean"
    shown = {key: cells(table, key)[0][head] for key in ("acat", "natural", "lbgat", "mart")}
    assert shown["acat"] == shown["natural"] == "not run"
    assert shown["lbgat"] == "not evaluated"
    assert shown["mart"].endswith("(n=1)")
    assert cells(table, "mart")[0]["seeds"] == "1 of 3"
    notes = "\n".join(table.notes)
    assert "Fewer seeds than the 3 of other rows: MART (1)." in notes
    for row in (r for r in table.lines() if r[0] == "natural"):
        assert set(row[1:]) == {"-", "not run"}


def test_one_seed_of_several_without_the_attack(write_suite):
    trades = write_suite("trades")["trades"]
    rows = tuple(r for r in trades[0].results if r.metric != "auto_attack_accuracy")
    partial = [dataclasses.replace(trades[0], results=rows), *trades[1:]]
    line = cells(paper_table("robust-ablation", {"kl": partial}), "kl")[0]
    assert line["measured AutoAttack"].endswith("(n=2)")
    assert line["seeds"] == "3"


def test_nothing_measured():
    for name, rows in PUBLISHED.items():
        table = paper_table(name, {})
        assert len(table.rows) == len(dict.fromkeys(row.key for row in rows))
        assert all("not run" in line for line in table.lines())
        assert "No row has been measured." in table.notes
        assert table.baseline is None
        assert json.loads(table.to_json())["rows"][0]["measured"] is None


def test_without_the_baseline_nothing_is_compared(write_suite):
    suite = write_suite("ikl_at", "gkl_at")
    table = paper_table("robust-methods", suite)
    assert "Nothing is compared: TRADES has no results." in table.notes
    assert not any("minus" in title for title in table.header)
    table = paper_table("robust-methods", suite, baseline="ikl_at")
    assert cells(table, "gkl_at")[0]["minus IKL-AT AutoAttack"].startswith(("+", "-"))


def test_origin_of_measured_rows_is_stated(write_suite):
    suite = write_suite("trades", "ikl_at")
    notes = paper_table("robust-methods", {**suite, "ikl_at": suite["ikl_at"][1:]}).notes
    origin = "fashion_mnist (20000 training images), convnet_small (width 16), epochs 6, "
    expected = f"Measured on {origin}500 attacked images, seeds 0 1 2: TRADES, IKL-AT (seeds 1 2)."
    assert expected in notes
    assert "Attacks on the measured rows: Linf 0.1." in notes
    assert not any("differ" in note for note in notes)


def test_differences_between_recipes_are_notes(write_suite):
    suite = write_suite("trades", "ikl_at_autoaugment")
    short = write_suite("ikl_at", training={"epochs": 3})
    notes = "\n".join(paper_table("robust-methods", {**suite, **short}).notes)
    assert "The recipes differ in data (" in notes
    assert "auto_augment" in notes
    assert "The recipes differ in epochs (TRADES, IKL-AT + AutoAugment: 6; IKL-AT: 3)." in notes


def test_other_attacks_are_not_compared(write_suite):
    suite = write_suite("trades", "ikl_at")
    weaker = [change(r, "auto_attack_accuracy", epsilon=0.05) for r in suite["ikl_at"]]
    table = paper_table("robust-methods", {**suite, "ikl_at": weaker})
    line = cells(table, "ikl_at")[0]
    assert line["minus TRADES, points: clean"] != "-"
    assert line["minus TRADES AutoAttack"] == "-"
    assert any("differ in the attack" in note and "Linf 0.05" in note for note in table.notes)


def test_other_numbers_of_images_are_named(write_suite):
    suite = write_suite("trades", "ikl_at")
    fewer = [change(run, "auto_attack_accuracy", num_samples=100) for run in suite["ikl_at"]]
    notes = paper_table("robust-methods", {**suite, "ikl_at": fewer}).notes
    assert "AutoAttack: measured on different numbers of images (100 and 500)." in notes


def test_the_fast_attack_is_named_and_not_compared(write_suite):
    suite = write_suite("trades", "ikl_at")
    fast = [
        change(run, "auto_attack_accuracy", metric="auto_attack_fast_accuracy")
        for run in suite["ikl_at"]
    ]
    table = paper_table("robust-methods", {**suite, "ikl_at": fast})
    assert any("AutoAttack-fast" in note and "IKL-AT" in note for note in table.notes)
    line = cells(table, "ikl_at")[0]
    assert line["measured AutoAttack"] != "-"
    assert line["minus TRADES AutoAttack"] == "-"


def test_runs_on_other_data_get_a_line_and_no_comparison(write_suite):
    suite = write_suite("trades", "ikl_at")
    elsewhere = [
        dataclasses.replace(run, recipe={**run.recipe, "data": {"name": "cifar10"}})
        for run in suite["ikl_at"]
    ]
    runs = {"trades": suite["trades"], "ikl_at": [*suite["ikl_at"], *elsewhere]}
    table = paper_table("robust-methods", runs)
    first, second = cells(table, "ikl_at")
    assert first["method"] != second["method"]
    assert first["minus TRADES AutoAttack"] != "-"
    assert second["minus TRADES AutoAttack"] == "-"
    assert second["published AA"] == "-"  # the published numbers stand once
    assert any(note.startswith("Not compared, TRADES has no runs on their") for note in table.notes)


def test_hyperparameters_show_what_was_measured(write_suite):
    runs = {
        key: write_suite("ikl_at", seeds=(number,), method={"kind": "ikl_at", setting: value})[
            "ikl_at"
        ]
        for number, (key, setting, value) in enumerate(
            [("mse_5", "mse_weight", 20.0), ("ce_3", "ce_weight", 1.3), ("tau_1", "x", 1)]
        )
    }
    table = paper_table("hyperparameters", runs)
    shown = {row.key: line for row, line in zip(table.rows, table.lines(), strict=True)}
    assert shown["mse_5"][:4] == ["table 7: a/4 = 5", "65.76", "31.91", "mse_weight 20"]
    assert shown["ce_3"][3] == "ce_weight 1.3"
    assert shown["tau_1"][3] == "weight_temperature not stated"
    assert shown["tau_2"][3] == "-"
    assert table.breaks == {4, 8}
    assert table.baseline is None
    assert table.to_text().count("\n---") == 3


def test_sweep_columns_are_those_of_the_strongest_attack(write_suite):
    suite = write_suite("trades", "ikl_at")
    table = paper_table("epsilon-sweep", suite)
    (line,) = cells(table, "trades")
    head = "published, CIFAR-100, WRN-34-10, 200 epochs, AutoAttack by epsilon: clean"
    assert [line[head], line["published 2/255"], line["published mean"]] == [
        "62.87",
        "53.88",
        "35.04",
    ]
    measured = [title for title in table.header if title.startswith("measured")]
    budgets = [0.025, 0.05, 0.075, 0.1, 0.125, 0.15]
    assert measured == [
        "measured, %, AutoAttack, Linf: clean",
        *(f"measured {budget}" for budget in budgets),
        "measured mean",
    ]

    def sweep(run):
        return {
            row.epsilon: 100 * row.value
            for row in run.results
            if row.metric == "epsilon_sweep_accuracy" and row.details["attack"] == "auto_attack"
        }

    means = [statistics.mean(sweep(run)[e] for e in budgets) for run in suite["trades"]]
    assert table.rows[0].spread(7).mean == pytest.approx(statistics.mean(means))
    at_eps = statistics.mean(sweep(run)[0.1] for run in suite["trades"])
    assert table.rows[0].spread(4).mean == pytest.approx(at_eps)
    assert [title for title in table.header if "minus" in title] == [
        "minus TRADES, points: clean",
        "minus TRADES mean",
    ]


def test_an_incomplete_sweep_has_no_mean(write_suite):
    suite = write_suite("trades", "ikl_at", seeds=(0,))
    (run,) = suite["ikl_at"]
    rows = tuple(row for row in run.results if row.epsilon != 0.15)
    table = paper_table(
        "epsilon-sweep", {**suite, "ikl_at": [dataclasses.replace(run, results=rows)]}
    )
    (line,) = cells(table, "ikl_at")
    assert line["measured 0.125"] != "-"
    assert line["measured 0.15"] == line["measured mean"] == "-"


def test_other_attacks_have_the_papers_columns(write_suite):
    table = paper_table("other-attacks", write_suite("trades", "ikl_at"))
    names = ["clean", "PGD-10", "PGD-20", "CW-10", "CW-20"]
    published = [title for head, title in table.heads if head == "published, CIFAR-100"]
    assert published == [*names, "AA", "worst", "network"]
    assert list(table.measures) == [*names, "AutoAttack", "worst"]
    assert table.lines()[1][1:9] == [
        *("63.40", "36.78", "36.55", "40.72", "40.47", "31.91", "31.92", "WRN-34-10, 200 epochs"),
    ]
    assert any("31.92" in note for note in table.notes)


def test_all_renderings_show_the_same_cells(write_suite):
    suite = write_suite("trades", "ikl_at")
    for name in ("robust-methods", "epsilon-sweep", "other-attacks"):
        table = paper_table(name, suite)
        stream = StringIO()
        Console(file=stream, width=600).print(table.to_rich())
        for line in table.lines():
            for cell in line:
                assert cell in stream.getvalue()
                assert cell in table.to_markdown()
                assert cell.replace("\N{PLUS-MINUS SIGN}", "+-") in table.to_text()
        assert table.to_text().isascii()
        assert sum(span for _, span in table.head_spans) == len(table.header)
        for note in table.notes:
            assert note in table.to_markdown()


def test_json_holds_settings_and_numbers(write_suite):
    suite = write_suite("trades", "ikl_at")
    content = json.loads(paper_table("robust-methods", suite).to_json())
    row = next(row for row in content["rows"] if row["key"] == "ikl_at")
    assert row["published"]["published, CIFAR-10: AA"] == 57.09
    assert row["dataset"] == "fashion_mnist (20000 training images)"
    assert (row["model"], row["epochs"], row["seeds"]) == ("convnet_small (width 16)", 6, [0, 1, 2])
    attack = row["measured"]["AutoAttack"]
    assert (attack["num_seeds"], attack["num_samples"], attack["epsilons"]) == (3, [500], [0.1])
    assert row["differences"]["AutoAttack"]["num_seeds"] == 3
    assert content["baseline"] == "trades"


def test_failed_checks_are_notes(write_suite):
    suite = write_suite("trades", "ikl_at")
    failed = [change(run, "masking_check", value=0.0) for run in suite["ikl_at"]]
    notes = paper_table("robust-methods", {**suite, "ikl_at": failed}).notes
    assert any("masking" in note and "IKL-AT (zero gradients, large" in note for note in notes)


def test_a_seed_given_twice_is_said(write_suite):
    (run,) = write_suite("trades", seeds=(0,))["trades"]
    again = dataclasses.replace(run, path=run.path.with_name("elsewhere"))
    notes = paper_table("robust-methods", {"trades": [run, again]}).notes
    assert any("given twice" in note for note in notes)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"no table is called 'x'; there are: robust-ablation"):
        paper_table("x", {})
    with pytest.raises(ValueError, match=r"no row 'trades'; its rows are: kl, dkl, ba, ikl"):
        paper_table("robust-ablation", {"trades": []})
    with pytest.raises(ValueError, match="no row 'xx'"):
        paper_table("robust-ablation", {}, baseline="xx")
