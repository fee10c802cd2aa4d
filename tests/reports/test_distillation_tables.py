"""Tables on distillation with measured rows beside the published ones."""

import dataclasses
import json
import statistics

import pytest
from scipy import stats

from dkl.reports import paper_table, write_report


def cells(table, key):
    (line,) = (
        dict(zip(table.header, line, strict=True))
        for line, row in zip(table.lines("+-"), table.rows, strict=True)
        if row.key == key
    )
    return line


def percents(runs, metric):
    return [100 * row.value for run in runs for row in run.results if row.metric == metric]


def without(run, *metrics):
    rows = tuple(row for row in run.results if row.metric not in metrics)
    return dataclasses.replace(run, results=rows)


def test_methods_beside_the_published_pairs_compared_with_kd(write_distillation):
    suite = write_distillation()
    table = paper_table("distillation", suite)
    line = cells(table, "ikl_kd")
    assert line["published, CIFAR-100, networks of one family: R56-R20"] == "71.44"
    assert line["published R32x4-ShV2"] == "77.16"
    values = percents(suite["ikl_kd"], "clean_accuracy")
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert line["measured, %: top-1"] == f"{mean:.2f} +- {deviation:.2f}"  # 10000 images
    test = stats.ttest_rel(values, percents(suite["kd"], "clean_accuracy"))
    (difference,) = next(row for row in table.rows if row.key == "ikl_kd").differences
    assert difference.p_value == pytest.approx(test.pvalue)
    assert f"(p {test.pvalue:.2g})" in line["minus KD, points: top-1"]
    assert cells(table, "kd")["minus KD, points: top-1"] == "baseline"
    assert cells(table, "crd")["measured, %: top-1"] == "not run"
    notes = "\n".join(table.notes)
    assert "tables 13 and 14; -" in notes
    assert "AutoAttack" not in notes
    assert "attacked" not in notes


def test_columns_of_predictions_are_there_where_some_run_has_them(write_distillation):
    suite = write_distillation()
    table = paper_table("distillation", suite)
    assert table.measures == ("top-1", "ECE", "NLL", "agreement", "KL to teacher")
    assert table.units == ("%", "%", "nats", "%", "nats")
    line = cells(table, "ikl_kd")
    divergences = [
        row.value for run in suite["ikl_kd"] for row in run.results if row.metric == "teacher_kl"
    ]
    mean, deviation = statistics.mean(divergences), statistics.stdev(divergences)
    assert line["measured, nats: KL to teacher"] == f"{mean:.3f} +- {deviation:.3f}"
    assert cells(table, "student")["measured, nats: KL to teacher"] == "-"
    document = json.loads(table.to_json())
    row = next(row for row in document["rows"] if row["key"] == "ikl_kd")
    assert row["measured"]["KL to teacher"]["mean"] == pytest.approx(mean)
    assert row["measured"]["KL to teacher"]["unit"] == "nats"
    assert row["measured"]["top-1"]["unit"] == document["unit"] == "percent"
    extra = ("expected_calibration_error", "negative_log_likelihood", "teacher_agreement")
    bare = {
        key: [without(run, *extra, "teacher_kl") for run in runs] for key, runs in suite.items()
    }
    assert paper_table("distillation", bare).measures == ("top-1",)


def test_long_tailed_data_by_groups_of_classes(write_distillation):
    suite = write_distillation("student", "kd", "ikl_kd")
    runs = {"student": suite["student"], "kl": suite["kd"], "ikl": suite["ikl_kd"]}
    table = paper_table("long-tailed", runs)
    assert table.measures[:4] == ("many", "medium", "few", "all")
    line = cells(table, "ikl")
    assert line["published, ImageNet-LT, ResNeXt-101 to ResNet-18: many"] == "66.60"
    assert line["published, table 18, all classes: X101-R50"] == "49.22"
    few, everything = (
        statistics.mean(percents(suite["ikl_kd"], f"{name}_accuracy")) for name in ("few", "clean")
    )
    assert line["measured few"].startswith(f"{few:.1f} +-")
    assert line["measured all"].startswith(f"{everything:.2f} +-")
    assert [title for title in table.header if "minus" in title] == [
        *("minus KL, points: many", "minus KL medium", "minus KL few", "minus KL all")
    ]
    assert any("49.29" in note and "49.22" in note for note in table.notes)


def cost_run(suite, **methods):
    """Return a run whose rows are the costs of several methods: seconds and parameters."""
    (first, *_) = suite
    made = [
        dataclasses.replace(
            first.results[0],
            metric=metric,
            value=value,
            details={"measure": "cost", "method": method},
        )
        for method, pair in methods.items()
        for metric, value in zip(("seconds_per_iteration", "extra_parameters"), pair, strict=True)
    ]
    assert len({row.measures for row in made}) == len(made)  # none replaces another
    return dataclasses.replace(first, results=tuple(made))


COSTS = {"kd": (0.05, 0), "ikl_kd": (0.055, 0), "reviewkd": (0.12, 114278)}


def test_costs_relative_to_kd(write_distillation):
    (run,) = write_distillation("kd", seeds=(0,))["kd"]
    together = cost_run([run], **COSTS)
    # One folder for all methods, or one for each, say the same.
    apart = {key: [cost_run([run], **{key: pair})] for key, pair in COSTS.items()}
    for runs in ({key: [together] for key in COSTS}, apart):
        table = paper_table("distillation-speed", runs)
        line = cells(table, "reviewkd")
        assert line["measured s/iteration"] == "0.1200"
        assert line["measured relative to KD"] == "2.40"
        assert line["measured extra parameters"] == "114,278"
        head = "published, s/iteration, ImageNet, batch 512, 4 RTX 3090: R34-R18"
        assert line[head] == "0.319"
        assert cells(table, "kd")["measured relative to KD"] == "1.00"
        assert cells(table, "ikl_kd")["measured extra parameters"] == "0"
        assert cells(table, "crd")["measured s/iteration"] == "not run"
        assert table.baseline is None
        assert any("Some Processor 3000" in note for note in table.notes)
        assert json.loads(table.to_json())["unit"] is None


def test_times_of_other_machines_are_not_divided(write_distillation):
    (run,) = write_distillation("kd", seeds=(0,))["kd"]
    other = cost_run([run], reviewkd=COSTS["reviewkd"])
    rows = tuple(dataclasses.replace(row, device="GPU, another one") for row in other.results)
    runs = {
        "kd": [cost_run([run], kd=COSTS["kd"])],
        "reviewkd": [dataclasses.replace(other, results=rows)],
    }
    table = paper_table("distillation-speed", runs)
    assert cells(table, "reviewkd")["measured relative to KD"] == "-"
    assert cells(table, "reviewkd")["measured s/iteration"] == "0.1200"
    assert any("Only those of one machine are compared" in note for note in table.notes)


def test_the_report_on_distillation(write_distillation, tmp_path):
    suite = write_distillation()
    (run,) = write_distillation("kd", seeds=(7,))["kd"]
    experiments = {
        "distillation": suite,
        "long-tailed": {"kl": suite["kd"], "ikl": suite["ikl_kd"]},
        "distillation-speed": {key: [cost_run([run], **COSTS)] for key in COSTS},
    }
    page = write_report([], tmp_path / "report.html", experiments=experiments)
    text = page.read_text("utf-8")
    for name in experiments:
        assert f'id="paper-{name}"' in text
    for figure in ("reliability", "class-gain", "shot-accuracies"):
        assert f'<figure id="{figure}">' in text
    # Nobody attacks a student: what lacks attacks is not missed.
    for figure in ("clean-versus-robust", "robustness-curve", "class-margins"):
        assert figure not in text
    bare = [without(one, "reliability", "class_accuracy") for one in suite["kd"]]
    text = write_report(bare, tmp_path / "bare.html").read_text("utf-8")
    assert 'id="reliability' not in text
