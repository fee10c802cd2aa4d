"""Figures of predictions: what they plot, and when they are not drawn."""

import dataclasses

import pytest

from dkl.reports import class_gain, reliability_diagram, shot_accuracies


def heights(axes):
    return [patch.get_height() for patch in axes.patches]


def everything(suite):
    return [run for runs in suite.values() for run in runs]


def without(run, *metrics):
    rows = tuple(row for row in run.results if row.metric not in metrics)
    return dataclasses.replace(run, results=rows)


def test_reliability_takes_the_predictions_of_all_seeds_together(write_distillation):
    runs = write_distillation("kd")["kd"]
    figure = reliability_diagram(runs)
    above, below = figure.axes
    details = [row.details for run in runs for row in run.results if row.metric == "reliability"]
    count = [sum(numbers) for numbers in zip(*(d["count"] for d in details), strict=True)]
    shares = [100 * one / sum(count) for one in count]
    assert heights(below) == pytest.approx(shares)
    place = 9
    mean = sum(d["count"][place] * d["accuracy"][place] for d in details) / count[place]
    confidence = details[0]["confidence"][place]
    bars = [patch for patch in above.patches if abs(patch.get_center()[0] - 9.5 / 15) < 1e-6]
    assert [bar.get_height() for bar in bars] == pytest.approx([mean, confidence - mean])
    assert len(above.patches) == 2 * 13  # two bins are empty
    assert "ECE 5." in above.get_title(loc="left")


def test_reliability_has_at_most_six_recipes(write_distillation):
    (run,) = write_distillation("kd", seeds=(0,))["kd"]
    many = [
        dataclasses.replace(
            run, recipe={**run.recipe, "name": f"r{n}"}, path=run.path.with_name(f"r{n}")
        )
        for n in range(8)
    ]
    figure = reliability_diagram(many)
    assert len(figure.axes) == 12
    assert "6 of 8 recipes" in figure.get_suptitle()
    assert len(reliability_diagram(many[:4]).axes) == 8
    assert reliability_diagram([without(run, "reliability")]) is None


def test_gain_is_the_mean_of_differences_by_seed_sorted(write_distillation):
    suite = write_distillation("kd", "ikl_kd")

    def by_class(run):
        return {r.class_index: 100 * r.value for r in run.results if r.metric == "class_accuracy"}

    pairs = list(zip(suite["ikl_kd"], suite["kd"], strict=True))
    expected = [
        sum(by_class(one)[index] - by_class(other)[index] for one, other in pairs) / 3
        for index in range(10)
    ]
    (axes,) = class_gain(everything(suite)).axes
    assert heights(axes) == pytest.approx(sorted(expected, reverse=True))
    best = max(range(10), key=lambda index: expected[index])
    assert axes.get_xticklabels()[0].get_text() == suite["kd"][0].class_names[best]
    assert axes.get_ylabel() == "gain (points)"
    assert any(f"mean {sum(expected) / 10:+.2f}" == text.get_text() for text in axes.texts)
    turned = class_gain(
        everything(suite), method="fashion_mnist_kd_small", reference="fashion_mnist_ikl_kd_small"
    )
    assert heights(turned.axes[0]) == pytest.approx(sorted((-x for x in expected), reverse=True))


def test_without_common_seeds_the_means_are_subtracted(write_distillation):
    kd = write_distillation("kd", seeds=(0, 1))["kd"]
    ikl = write_distillation("ikl_kd", seeds=(2,))["ikl_kd"]
    figure = class_gain([*kd, *ikl])
    assert figure.axes[0].get_ylabel() == "difference of means (points)"
    assert "one seed" in figure.get_suptitle()


def test_no_gain_without_both_or_on_other_data(write_distillation):
    suite = write_distillation("student", "kd", "ikl_kd", seeds=(0,))
    assert class_gain([*suite["student"], *suite["kd"]]) is None
    assert (
        class_gain([*suite["kd"], *(without(r, "class_accuracy") for r in suite["ikl_kd"])]) is None
    )
    elsewhere = [
        dataclasses.replace(run, recipe={**run.recipe, "data": {"name": "digits"}})
        for run in suite["ikl_kd"]
    ]
    assert class_gain([*suite["kd"], *elsewhere]) is None
    with pytest.raises(ValueError, match="no recipe is labelled 'x'"):
        class_gain(suite["kd"], method="x")


def test_groups_of_classes_beside_all(write_distillation):
    suite = write_distillation("kd", "ikl_kd")
    (axes,) = shot_accuracies(everything(suite)).axes
    means = [
        sum(100 * r.value for run in runs for r in run.results if r.metric == f"{name}_accuracy")
        / 3
        for runs in suite.values()
        for name in ("many", "medium", "few", "clean")
    ]
    assert heights(axes) == pytest.approx(means)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["many\n4 classes", "medium\n3 classes", "few\n3 classes", "all"]
    shots = ("many_accuracy", "medium_accuracy", "few_accuracy")
    assert shot_accuracies([without(run, *shots) for run in everything(suite)]) is None
    (axes,) = shot_accuracies([without(run, "few_accuracy") for run in suite["kd"]]).axes
    assert len(axes.patches) == 3
