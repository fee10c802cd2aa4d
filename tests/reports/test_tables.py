import dataclasses
import json
import statistics
from io import StringIO

import pytest
from rich.console import Console

from dkl.reports import compare, read_run
from dkl.reports.groups import group_runs


def replace_rows(run, **changes):
    rows = tuple(dataclasses.replace(row, **changes) for row in run.results)
    return dataclasses.replace(run, results=rows)


@pytest.fixture
def runs(write_run):
    names = ("digits_natural", "digits_trades", "digits_ikl_at")
    return [read_run(write_run(name, seed)) for name in names for seed in range(3)]


def test_cells_are_mean_and_sample_deviation_in_percent(runs):
    table = compare(runs)
    values = [
        100 * row.value
        for run in runs[3:6]
        for row in run.results
        if row.metric == "auto_attack_accuracy"
    ]
    titles = [column.title for column in table.columns]
    assert titles == ["clean", "PGD-20", "CW-20", "AutoAttack"]
    cell = table.rows[1].cells[3]
    assert cell.mean == pytest.approx(statistics.mean(values))
    assert cell.deviation == pytest.approx(statistics.stdev(values))
    assert table.rows[1].seeds == (0, 1, 2)
    assert table.rows[1].num_samples == ((360,), (200,), (200,), (200,))
    seconds = [sum(epoch["seconds"] for epoch in run.epochs) for run in runs[3:6]]
    assert table.rows[1].train_seconds.mean == pytest.approx(statistics.mean(seconds))


def test_order_of_seeds_does_not_matter_order_of_recipes_is_kept(runs):
    table = compare(runs)
    turned = compare([*runs[6:][::-1], *runs[:6]])
    assert [row.label for row in turned.rows] == [
        "digits_ikl_at", "digits_natural", "digits_trades",
    ]  # fmt: skip
    for row in table.rows:
        other = next(r for r in turned.rows if r.label == row.label)
        assert [c.mean for c in other.cells] == pytest.approx([c.mean for c in row.cells])


def test_one_seed_has_no_spread_and_says_so(runs):
    table = compare([runs[0], *runs[3:]])
    text = table.to_text()
    line = next(line for line in text.splitlines() if line.startswith("digits_natural"))
    assert line.count("(n=1)") == 4
    assert "+-" not in line
    assert "n=1" in next(note for note in table.notes if "digits_natural" in note)
    assert "(n=1)" not in next(x for x in text.splitlines() if x.startswith("digits_trades"))


def test_a_metric_that_some_seeds_lack_says_how_many_there_are(runs):
    lacking = tuple(row for row in runs[3].results if row.metric != "auto_attack_accuracy")
    table = compare([dataclasses.replace(runs[3], results=lacking), *runs[4:6]])
    *_, attack = table.lines()[0][1:5]
    assert attack.endswith("(n=2)")
    assert table.rows[0].cells[0].num_seeds == 3


def test_different_settings_under_one_name_are_told_apart(write_run):
    runs = [
        read_run(write_run("digits_ikl_at", 0)),
        read_run(write_run("digits_ikl_at", 1)),
        read_run(write_run("digits_ikl_at", 0, folder="b", method__mse_weight=20.0)),
    ]
    table = compare(runs)
    assert [row.label for row in table.rows] == [
        "digits_ikl_at (mse_weight=5.0)",
        "digits_ikl_at (mse_weight=20.0)",
    ]
    assert any("2 different settings" in note for note in table.notes)
    many = {"method__ce_weight": 4.0, "train__batch_size": 64}
    runs.append(read_run(write_run("digits_ikl_at", 0, folder="c", **many)))
    labels = [row.label for row in compare(runs).rows]
    assert len(set(labels)) == 3


def test_a_seed_given_twice_counts_once(write_run):
    first = read_run(write_run("digits_trades", 0))
    second = read_run(write_run("digits_trades", 0, folder="again"))
    groups, notes = group_runs([first, second])
    assert groups[0].runs == (second,)
    assert "given twice" in notes[0]
    groups, notes = group_runs([first, first])
    assert (len(groups[0].runs), notes) == (1, [])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"data__name": "fashion_mnist"}, "data"),
        ({"train__epochs": 20}, "epochs"),
        ({"model__name": "preact_resnet10"}, "model"),
    ],
)
def test_groups_that_cannot_be_compared_are_named(runs, write_run, changes, word):
    assert not any("differ in" in note for note in compare(runs).notes)
    other = read_run(write_run("digits_kd", 0, **changes))
    notes = [note for note in compare([*runs, other]).notes if "differ in" in note]
    assert len(notes) == 1
    assert f"differ in {word}" in notes[0]
    assert str(next(iter(changes.values()))) in notes[0]


def test_where_data_lie_makes_no_difference(runs, write_run):
    moved = read_run(write_run("digits_kd", 0, data__folder="/elsewhere"))
    assert not any("differ in" in note for note in compare([*runs, moved]).notes)


def test_different_numbers_of_images_are_named(runs):
    fewer = [replace_rows(run, num_samples=100) for run in runs[:3]]
    notes = " ".join(compare([*fewer, *runs[3:]]).notes)
    assert "AutoAttack: runs were measured on different numbers of images (100 and 200)" in notes
    assert "different numbers" not in " ".join(compare(runs).notes)


def test_the_best_checkpoint_comes_first_and_others_are_named(runs):
    last = replace_rows(runs[3], checkpoint="last", value=0.0)
    both = dataclasses.replace(runs[3], results=runs[3].results + last.results)
    assert compare([both]).rows == compare([runs[3]]).rows
    table = compare([last, runs[0]])
    assert table.rows[0].cells[0].mean == 0.0
    assert any("another checkpoint" in n and "digits_trades" in n for n in table.notes)


def test_rows_of_different_weights_are_named(runs):
    rows = list(runs[3].results)
    rows[0] = dataclasses.replace(rows[0], weights_hash="other")
    table = compare([dataclasses.replace(runs[3], results=tuple(rows))])
    assert any("different weights" in note for note in table.notes)


def test_several_threats_get_a_column_each(runs):
    weaker = [row for row in replace_rows(runs[3], epsilon=8 / 255).results if row.norm]
    run = dataclasses.replace(runs[3], results=runs[3].results + tuple(weaker))
    titles = [column.title for column in compare([run]).columns]
    assert titles[-2:] == ["AutoAttack Linf 8/255", "AutoAttack Linf 0.2"]
    assert compare([runs[3]]).notes[0] == "Attacks: Linf, epsilon 0.2."


def test_validation_rows_are_not_test_results(runs):
    table = compare([replace_rows(runs[3], split="val")])
    assert table.columns == ()
    assert any("dkl evaluate" in note for note in table.notes)


def test_all_renderings_show_the_same_cells(runs):
    table = compare(runs)
    stream = StringIO()
    Console(file=stream, width=200).print(table.to_rich())
    markdown, rich = table.to_markdown(), stream.getvalue()
    for line in table.lines():
        for cell in line:
            assert cell in markdown
            assert cell in rich
            assert cell.replace("\N{PLUS-MINUS SIGN}", "+-") in table.to_text()
    assert table.to_text().isascii()
    content = json.loads(table.to_json())
    assert content["unit"] == "percent"
    attack = content["rows"][2]["metrics"][-1]
    assert attack["metric"] == "auto_attack_accuracy"
    assert attack["mean"] == pytest.approx(table.rows[2].cells[-1].mean)
    assert attack["num_samples"] == [200]


def test_labels_are_no_markup(write_run):
    table = compare([read_run(write_run("a|b [red]x", folder="odd"))])
    stream = StringIO()
    Console(file=stream, width=200).print(table.to_rich())
    assert "[red]x" in stream.getvalue()
    assert "a\\|b [red]x" in table.to_markdown()


def test_no_runs():
    with pytest.raises(ValueError, match="at least one run"):
        compare([])
