import dataclasses
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from dkl.reports import (
    class_margin_differences,
    class_table_heat_map,
    clean_versus_robust,
    read_run,
    robustness_curve,
    training_curves,
)
from dkl.reports.style import look
from dkl.reports.svg import inline_svg

FUNCTIONS = (
    training_curves,
    clean_versus_robust,
    robustness_curve,
    class_margin_differences,
    class_table_heat_map,
)


@pytest.fixture
def runs(write_run):
    names = ("digits_natural", "digits_trades", "digits_ikl_at")
    return [read_run(write_run(name, seed)) for name in names for seed in range(3)]


def keep(run, *metrics):
    rows = tuple(row for row in run.results if row.metric in metrics)
    return dataclasses.replace(run, results=rows)


def values(run, metric):
    return np.array([row.value for row in run.results if row.metric == metric])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_data_no_figure(function, write_run):
    assert function([read_run(write_run("digits_trades", rows=False, epochs=False))]) is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_axes_are_labelled_and_nothing_is_cut_off(function, runs):
    figure = function(runs)
    figure.draw_without_rendering()
    canvas = figure.bbox
    for axes in figure.axes:
        assert axes.get_ylabel() or axes.get_xlabel()
        box = axes.get_tightbbox()
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= canvas.x1 + 1
        assert box.y1 <= canvas.y1 + 1
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(box)
        assert not figure._suptitle.get_window_extent().overlaps(box)
    assert figure._suptitle.get_window_extent().x1 <= canvas.x1


def test_global_settings_of_matplotlib_stay(runs):
    before = dict(matplotlib.rcParams)
    for function in FUNCTIONS:
        inline_svg(function(runs), "name", "text")
    assert dict(matplotlib.rcParams) == before


def test_pyplot_stays_out():
    code = (
        "import sys, dkl.reports.figures, dkl.reports.html\n"
        "assert 'matplotlib' not in sys.modules, 'heavy import'\n"
        "from dkl.reports.style import new_figure, figure_style\n"
        "with figure_style(): new_figure(1.0, 'title')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_curves_are_means_over_seeds(runs):
    figure = training_curves(runs)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == 4
    assert "attack" in titles[3]
    mean = np.mean([[100 * e["val_accuracy"] for e in run.epochs] for run in runs[6:]], axis=0)
    line = figure.axes[2].lines[2]
    np.testing.assert_allclose(line.get_ydata(), mean)
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 41))
    assert len(figure.axes[2].collections) == 3  # bands
    assert len(figure.axes[3].lines) == 2  # natural training has no robust validation


def test_training_curves_without_attack_have_three_panels(runs):
    assert len(training_curves(runs[:1]).axes) == 3
    assert not training_curves(runs[:1]).axes[0].collections  # one seed: no band


def test_scatter_has_a_marker_for_every_run(runs):
    figure = clean_versus_robust(runs)
    drawn = [collection.get_offsets() for collection in figure.axes[0].collections]
    assert [len(points) for points in drawn] == [3, 3, 3]
    robust = values(runs[4], "auto_attack_accuracy")[0]
    assert tuple(drawn[1][1]) == pytest.approx(
        (100 * values(runs[4], "clean_accuracy")[0], 100 * robust)
    )
    assert "AutoAttack" in figure.axes[0].get_ylabel()
    assert "epsilon 0.2" in figure._suptitle.get_text().replace("\n", " ")
    written = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in written if text] == ["trades", "ikl_at"]  # without what all begin with
    # Natural training withstands nothing: named, but it does not squeeze the others.
    assert "natural" in figure.axes[0].get_title(loc="left")
    assert figure.axes[0].get_ylim()[0] > 30


def test_scatter_takes_the_attack_that_most_runs_have(runs):
    some = [keep(run, "clean_accuracy", "pgd_20_accuracy") for run in runs[:6]]
    figure = clean_versus_robust([*some, *runs[6:]])
    assert "PGD-20" in figure.axes[0].get_ylabel()
    assert len(figure.axes[0].collections) == 3


def test_robustness_curve_is_the_mean_of_the_sweep(runs):
    figure = robustness_curve(runs)
    line = figure.axes[0].lines[1]
    sweeps = [100 * values(run, "epsilon_sweep_accuracy") for run in runs[3:6]]
    np.testing.assert_allclose(line.get_ydata(), np.mean(sweeps, axis=0))
    np.testing.assert_allclose(line.get_xdata(), 0.05 * np.arange(7))
    assert "(Linf)" in figure.axes[0].get_xlabel()


def test_epsilons_of_eight_bit_images_are_counted_in_steps(runs):
    rows = tuple(
        dataclasses.replace(row, epsilon=round(row.epsilon * 20) * 2 / 255)
        for row in runs[3].results
        if row.metric == "epsilon_sweep_accuracy"
    )
    figure = robustness_curve([dataclasses.replace(runs[3], results=rows)])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), 2 * np.arange(7))
    assert "1/255" in figure.axes[0].get_xlabel()


def test_margin_bars_are_the_difference_of_two_recipes(runs):
    def mean(some):
        return np.mean([values(run, "class_margin") for run in some], axis=0)

    natural, trades, ikl = runs[:3], runs[3:6], runs[6:]
    heights = [bar.get_height() for bar in class_margin_differences(runs).axes[0].patches]
    np.testing.assert_allclose(heights, mean(ikl) - mean(trades))
    figure = class_margin_differences(runs, method="digits_natural", reference="digits_ikl_at")
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, mean(natural) - mean(ikl))
    assert "digits_natural minus digits_ikl_at" in figure._suptitle.get_text().replace("\n", " ")
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks[0] == "zero"


def test_margin_prefers_methods_that_were_attacked(runs, write_run):
    student = keep(read_run(write_run("digits_kd")), "class_margin", "clean_accuracy")
    title = class_margin_differences([*runs, student])._suptitle.get_text().replace("\n", " ")
    assert "digits_ikl_at minus digits_trades" in title
    title = class_margin_differences([runs[3], student])._suptitle.get_text().replace("\n", " ")
    assert "digits_kd minus digits_trades" in title


def test_margin_needs_two_recipes_and_known_labels(runs):
    assert class_margin_differences(runs[3:6]) is None
    assert class_margin_differences(runs[:3] + runs[6:]) is None
    with pytest.raises(ValueError, match=r"digits_xx.*there are: digits_natural"):
        class_margin_differences(runs, method="digits_xx")


@pytest.mark.parametrize("num_classes", [2, 25, 100])
def test_per_class_figures_hold_any_number_of_classes(runs, num_classes):
    names = tuple(f"$class_{index} & more$" for index in range(num_classes))
    table = tuple(
        tuple(0.5 if row == column else 0.5 / (num_classes - 1) for column in range(num_classes))
        for row in range(num_classes)
    )
    row = next(row for row in runs[3].results if row.metric == "class_margin")

    def widen(run, value):
        rows = tuple(
            dataclasses.replace(row, value=value * index / num_classes, class_index=index)
            for index in range(num_classes)
        )
        return dataclasses.replace(run, results=rows, class_table=table, class_names=names)

    many = [widen(runs[3], -0.5), widen(runs[6], 0.5)]
    assert len(class_margin_differences(many).axes[0].patches) == num_classes
    (image,) = class_table_heat_map(many).axes[0].images
    np.testing.assert_allclose(image.get_array(), table)


def test_heat_map_is_the_mean_table(runs):
    (image,) = class_table_heat_map(runs).axes[0].images
    mean = np.mean([run.class_table for run in runs[6:]], axis=0)
    np.testing.assert_allclose(image.get_array(), mean)
    assert class_table_heat_map(runs, label="digits_trades") is None


def test_looks_differ():
    looks = [look(place) for place in range(12)]
    assert len({(one.colour, one.line) for one in looks}) == 12
    assert len({(one.colour, one.marker) for one in looks}) == 12


def test_svg_of_two_figures_share_no_identifier(runs):
    first = inline_svg(robustness_curve(runs), "first", 'a "title" <b>')
    again = inline_svg(robustness_curve(runs), "first", 'a "title" <b>')
    second = inline_svg(robustness_curve(runs), "second", "title")
    assert first == again
    ids = [re.findall(r'id="([^"]+)"', text) for text in (first, second)]
    assert not set(ids[0]) & set(ids[1])
    for text, known in zip((first, second), ids, strict=True):
        assert len(known) == len(set(known))
        used = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
        assert used
        assert set(used) <= set(known)
    assert 'aria-label="a &quot;title&quot; &lt;b>"' in first
    assert "var(--ink)" in first
    with pytest.raises(ValueError, match="starts with a letter"):
        inline_svg(robustness_curve(runs), "1 2", "title")
