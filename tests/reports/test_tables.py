import dataclasses
import json
import statistics
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dkl.cli import app
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
        ({"data__name": "fashion_mnist"}, "dataset"),
        ({"data__train_limit": 500}, "training images"),
        ({"data__long_tailed": {"imbalance": 50}}, "training images"),
        ({"train__epochs": 20}, "epochs"),
        ({"model__name": "preact_resnet10"}, "model"),
    ],
)
def test_rows_that_are_not_like_for_like_are_named_above(runs, write_run, changes, word):
    table = compare(runs)
    assert (table.warnings, table.differences) == ((), ())
    assert "arning" not in table.to_text() + table.to_markdown()
    other = read_run(write_run("digits_kd", 0, **changes))
    table = compare([*runs, other])
    (difference,) = table.differences
    assert difference.aspect == word
    value = next(iter(changes.values()))
    assert str(50 if isinstance(value, dict) else value) in difference.values["digits_kd"]
    assert [*difference.values] == [row.label for row in table.rows]
    first = table.to_text().splitlines()[0]
    assert first.startswith(f"warning: The rows differ in {word}: ")
    assert difference.values["digits_kd"] + " (digits_kd)" in first
    stream = StringIO()
    Console(file=stream, width=300).print(table.to_rich())
    assert table.warnings[0] in table.to_markdown().splitlines()[0]
    assert table.warnings[0] in " ".join(stream.getvalue().split())
    assert json.loads(table.to_json())["differences"] == [
        {"aspect": word, "values": dict(difference.values)}
    ]
    assert not any(f"differ in {word}" in note for note in table.notes)


def test_the_command_refuses_other_data_and_warns_of_other_models(write_run):
    one, other = write_run("digits_trades"), write_run("digits_kd", data__name="fashion_mnist")
    wide = write_run("digits_natural", model__name="preact_resnet10")
    command = CliRunner().invoke
    refused = command(app, ["compare", str(one), str(other)])
    assert refused.exit_code == 2
    assert "--anyway" in refused.output
    assert "differ in dataset" in " ".join(refused.output.replace("\u2502", " ").split())
    assert "clean" not in refused.output
    assert command(app, ["compare", str(one), str(other), "--json"]).exit_code == 2
    allowed = command(app, ["compare", str(one), str(other), "--anyway", "--json"])
    assert [one["aspect"] for one in json.loads(allowed.stdout)["differences"]] == ["dataset"]
    warned = command(app, ["compare", str(one), str(wide)])
    assert warned.exit_code == 0
    assert warned.stdout.index("differ in model") < warned.stdout.index("AutoAttack")


def test_other_teachers_are_named(write_run):
    def of(folder, **teacher):
        method = {"kind": "kd", "teacher": {"recipe": "wide", "run": None, **teacher}}
        return read_run(write_run("digits_kd", folder=folder, method=method))

    plain = read_run(write_run("digits_natural"))
    first, moved, other = of("a"), of("b", run="elsewhere"), of("c", recipe="deep")
    notes = compare([plain, first, moved]).notes
    assert not any("differ in teacher" in note for note in notes)
    notes = [note for note in compare([plain, first, other]).notes if "differ in teacher" in note]
    assert len(notes) == 1
    assert "wide" in notes[0]
    assert "deep" in notes[0]
    assert "digits_natural" not in notes[0]


def test_data_of_one_name_are_told_apart_by_their_classes(write_run):
    first, second = (read_run(write_run(name)) for name in ("digits_trades", "digits_natural"))
    assert compare([first, second]).differences == ()
    second = dataclasses.replace(second, class_names=("cat", "dog"))
    (difference,) = compare([first, second]).differences
    assert difference.aspect == "dataset"
    assert difference.values["digits_natural"] == "digits with 2 classes cat, dog"
    unknown = dataclasses.replace(second, class_names=())
    assert compare([first, unknown]).differences == ()


def test_where_data_lie_makes_no_difference(runs, write_run):
    moved = read_run(write_run("digits_kd", 0, data__folder="/elsewhere"))
    assert not any("differ in" in note for note in compare([*runs, moved]).notes)


def test_different_numbers_of_images_are_named(runs):
    fewer = [replace_rows(run, num_samples=100) for run in runs[:3]]
    (difference,) = compare([*fewer, *runs[3:]]).differences
    assert difference.aspect == "test images"
    assert "AutoAttack 100" in difference.values["digits_natural"]
    assert "AutoAttack 200" in difference.values["digits_ikl_at"]
    assert "test images" not in " ".join(compare(runs).warnings)
    (difference,) = compare([fewer[0], *runs[1:3]]).differences  # seeds of one recipe
    assert "AutoAttack 100 and 200" in difference.sentence


def test_predictions_have_columns_of_their_own_units(runs):
    values = {
        "expected_calibration_error": 0.031,
        "negative_log_likelihood": 1.25,
        "teacher_agreement": 0.9,
        "teacher_kl": 0.125,
    }
    first = runs[0].results[0]
    rows = [dataclasses.replace(first, metric=name, value=value) for name, value in values.items()]
    table = compare([dataclasses.replace(runs[0], results=(first, *rows))])
    assert table.header[2:6] == ["ECE (%)", "NLL (nats)", "agreement (%)", "KL to teacher (nats)"]
    shown = [cell.removesuffix(" (n=1)") for cell in table.lines()[0][2:6]]
    assert shown == ["3.1", "1.250", "90.0", "0.125"]
    units = [one["unit"] for one in json.loads(table.to_json())["rows"][0]["metrics"]]
    assert units == ["percent", "percent", "nats", "percent", "nats"]


def test_groups_of_classes_stand_beside_the_clean_accuracy(runs):
    first = runs[0].results[0]
    names = ("few_accuracy", "clean_accuracy", "many_accuracy", "medium_accuracy")
    rows = tuple(dataclasses.replace(first, metric=name) for name in names)
    titles = [one.title for one in compare([dataclasses.replace(runs[0], results=rows)]).columns]
    assert titles == ["clean", "many", "medium", "few"]


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
