"""Figures of the robustness suite: 2, 3a to 3c, classes, sweeps, and the checks for masking."""

import dataclasses
import itertools

import numpy as np
import pytest

from dkl.reports import (
    class_accuracies,
    class_margin_differences,
    clean_versus_robust,
    compare,
    feature_map,
    masking_checks,
    read_run,
    robustness_curve,
)
from dkl.reports.feature_figures import read_features
from dkl.reports.groups import group_runs
from dkl.reports.published import ROBUST_METHODS
from dkl.reports.recipe_facts import augmentation_class, dataset, network, num_epochs, setting
from dkl.reports.records import RunError

BASIC, AUTO = {"auto_augment": False, "padding": 4}, {"auto_augment": True, "padding": 4}


def flat(suite):
    return [run for runs in suite.values() for run in runs]


def change(run, metric, /, **changes):
    rows = tuple(
        dataclasses.replace(row, **changes) if row.metric == metric else row for row in run.results
    )
    return dataclasses.replace(run, results=rows)


def on_cifar(run, name):
    """Return a run as if its data and attack were the paper's."""
    recipe = {**run.recipe, "data": {"name": name}}
    rows = tuple(
        row if row.epsilon is None else dataclasses.replace(row, epsilon=8 / 255)
        for row in run.results
    )
    return dataclasses.replace(run, recipe=recipe, results=rows)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({}, "basic"),
        ({"augment": None, "views": [], "generated": None}, "basic"),
        ({"augment": BASIC, "views": (BASIC,)}, "basic"),
        ({"augment": AUTO}, "autoaugment"),
        ({"augment": BASIC, "views": [BASIC, AUTO]}, "autoaugment"),
        ({"augment": AUTO, "generated": {"parts": ["a.npz"]}}, "generated"),
    ],
)
def test_augmentation_class(data, kind):
    assert augmentation_class({"data": data}) == kind


def test_facts_of_recipes_that_say_little():
    assert augmentation_class({}) == "basic"
    assert (dataset({}), network({}), num_epochs({})) == (
        *("data not stated", "model not stated"),
        None,
    )
    assert setting({"data": "digits"}, "data.name") is None


def test_scatter_marks_augmentation_and_keeps_published_rows_apart(write_suite):
    suite = write_suite("trades", "ikl_at", "ikl_at_autoaugment", "dm_at")
    ours, published = clean_versus_robust(flat(suite)).axes
    markers = [line.get_marker() for line in ours.lines]
    assert markers == ["o", "o", "^", "s"]  # the means of the recipes
    assert "CIFAR-100" in published.get_title(loc="left")
    drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in published.lines}
    rows = {(row.clean, row.auto_attack) for row in ROBUST_METHODS if row.dataset == "CIFAR-100"}
    assert drawn == {*rows, (62.87, 30.29), (62.99, 31.20), (68.75, 31.85)}
    assert not drawn & {(line.get_xdata()[0], line.get_ydata()[0]) for line in ours.lines}


def test_published_rows_share_the_axes_with_runs_like_the_papers(write_suite):
    runs = flat(write_suite("trades", "ikl_at"))
    for name, row in (("cifar100", (65.76, 31.91)), ("cifar10", (84.80, 57.09))):
        (axes,) = clean_versus_robust([on_cifar(run, name) for run in runs]).axes
        assert row in {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
    # Another budget, another attack or another norm: a panel of their own.
    cifar = [
        dataclasses.replace(run, recipe={"name": "x", "data": {"name": "cifar10"}}) for run in runs
    ]
    assert len(clean_versus_robust(cifar).axes) == 2


def test_scatter_without_robust_runs_has_no_published_rows(write_suite):
    (axes,) = clean_versus_robust(flat(write_suite("natural"))).axes
    assert len(axes.lines) == 1


def test_labels_are_readable(write_suite):
    figure = clean_versus_robust(flat(write_suite()))
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert len(boxes) > 10
        overlapping = [
            pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])
        ]
        assert overlapping == []
        frame = axes.get_window_extent()
        for box in boxes:
            assert frame.x0 <= box.x0 + 1
            assert box.x1 <= figure.bbox.x1


def test_sweeps_under_two_attacks_get_a_panel_each(write_suite):
    suite = write_suite("trades", "ikl_at")
    strongest, other = robustness_curve(flat(suite)).axes
    assert strongest.get_title(loc="left") == "AutoAttack, Linf"
    assert other.get_title(loc="left") == "PGD-20, Linf"
    sweeps = [
        [
            100 * row.value
            for row in run.results
            if row.metric == "epsilon_sweep_accuracy" and row.details["attack"] == "auto_attack"
        ]
        for run in suite["trades"]
    ]
    np.testing.assert_allclose(strongest.lines[0].get_ydata(), np.mean(sweeps, axis=0))


def test_one_attack_is_named_on_the_axis(write_suite):
    runs = [
        dataclasses.replace(
            run, results=tuple(r for r in run.results if r.details.get("attack") != "auto_attack")
        )
        for run in flat(write_suite("trades"))
    ]
    (axes,) = robustness_curve(runs).axes
    assert axes.get_ylabel() == "test accuracy under PGD-20 (%)"


def test_class_accuracies_are_means_over_seeds(write_suite):
    suite = write_suite("trades", "ikl_at")
    figure = class_accuracies(flat(suite))
    clean, robust = figure.axes
    for axes, metric in ((clean, "class_accuracy"), (robust, "class_robust_accuracy")):
        values = [
            [100 * row.value for row in run.results if row.metric == metric]
            for run in suite["ikl_at"]
        ]
        drawn = np.asarray(axes.containers[1][0].get_ydata(), dtype=float)
        np.testing.assert_allclose(drawn, np.mean(values, axis=0))
    assert robust.get_title(loc="left") == "Under AutoAttack (Linf, epsilon 0.1)"
    assert robust.get_xticklabels()[0].get_text() == "zero"


def test_class_accuracies_of_many_recipes_keep_the_two_that_matter(write_suite):
    figure = class_accuracies(flat(write_suite(seeds=(0,))))
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(shown) == 6
    assert {"fashion_mnist_trades_small", "fashion_mnist_ikl_at_small"} <= {*shown}
    assert "6 of 15 recipes" in figure._suptitle.get_text().replace("\n", " ")


def test_class_accuracies_of_many_classes_are_sorted(write_suite):
    (run,) = write_suite("trades", seeds=(0,))["trades"]
    row = next(row for row in run.results if row.metric == "class_accuracy")
    rows = [
        dataclasses.replace(row, class_index=index, value=(37 * index % 100) / 100)
        for index in range(100)
    ]
    figure = class_accuracies([dataclasses.replace(run, results=tuple(rows), class_names=())])
    (axes,) = figure.axes
    drawn = axes.lines[0].get_ydata()
    assert list(drawn) == sorted(drawn, reverse=True)
    assert len(drawn) == 100


def test_class_accuracies_need_rows(write_run):
    assert class_accuracies([read_run(write_run("digits_trades"))]) is None


def test_margins_show_ikl_against_trades(write_suite):
    suite = write_suite("trades", "trades_awp", "ikl_at", "gkl_at", "ikl_at_generated")
    title = class_margin_differences(flat(suite))._suptitle.get_text().replace("\n", " ")
    assert "fashion_mnist_ikl_at_small minus fashion_mnist_trades_small" in title


def test_feature_map_shows_ikl_beside_trades(write_suite):
    suite = write_suite("natural", "trades", "ikl_at", "gkl_at", seeds=(0, 1), features=True)
    (suite["trades"][0].path / "features.npz").unlink()  # seed 1 is what both have
    figure = feature_map(flat(suite))
    left, right = figure.axes
    assert left.get_title(loc="left").startswith("fashion_mnist_ikl_at_small, seed 1\n")
    assert right.get_title(loc="left").startswith("fashion_mnist_trades_small, seed 1\n")
    ratio = next(
        row.value
        for row in suite["ikl_at"][1].results
        if row.details.get("measure") == "intra_inter_ratio" and row.details["images"] == "both"
    )
    assert f"both {ratio:.2f}" in left.get_title(loc="left").splitlines()[1]
    adversarial, clean = left.collections
    assert len(adversarial.get_offsets()) == len(clean.get_offsets()) == 80
    assert len(adversarial.get_facecolors()) == 0  # open
    assert len(clean.get_facecolors()) == 80
    positions = clean.get_offsets()
    again = feature_map(flat(suite)).axes[0].collections[1].get_offsets()
    np.testing.assert_array_equal(positions, again)  # fixed seed
    # Blobs far apart in the feature space stay apart in the plane.
    centres = np.array([positions[index * 8 : index * 8 + 8].mean(0) for index in range(10)])
    own = np.linalg.norm(positions - centres.repeat(8, axis=0), axis=1).mean()
    assert own < 0.3 * np.linalg.norm(centres[:, None] - centres, axis=2).mean()


def test_feature_map_of_one_run_and_of_none(write_suite):
    suite = write_suite("gkl_at", seeds=(0,), features=True)
    assert len(feature_map(flat(suite)).axes) == 1
    (suite["gkl_at"][0].path / "features.npz").unlink()
    assert feature_map(flat(suite)) is None
    with pytest.raises(ValueError, match="no recipe is labelled 'xx'"):
        feature_map(flat(suite), method="xx")


def test_features_show_at_most_twenty_classes(write_suite):
    (run,) = write_suite("ikl_at", seeds=(0,))["ikl_at"]
    noise = np.random.default_rng(0)
    features = noise.normal(size=(100, 3))
    labels = np.arange(100) % 25
    np.savez(run.path / "features.npz", clean=features, adversarial=features, labels=labels)
    (axes,) = feature_map([run]).axes
    assert len(axes.collections[1].get_offsets()) == 80


@pytest.mark.parametrize("width", [1, 5])
def test_features_without_a_plane_are_drawn(write_suite, width):
    (run,) = write_suite("ikl_at", seeds=(0,))["ikl_at"]
    same = np.full((6, width), 0.5)
    arrays = {"clean": same, "adversarial": same, "labels": np.arange(6) % 2}
    np.savez(run.path / "features.npz", **arrays)
    (axes,) = feature_map([run]).axes
    assert np.isfinite(np.asarray(axes.collections[1].get_offsets())).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"clean": np.ones((9, 2))}, "not readable"),
        (
            {"clean": np.ones((9, 2)), "adversarial": np.ones((8, 2)), "labels": np.ones(9)},
            r"\(8, 2\)",
        ),
        (
            {
                "clean": np.full((9, 2), np.nan),
                "adversarial": np.ones((9, 2)),
                "labels": np.ones(9),
            },
            "not finite",
        ),
    ],
)
def test_features_that_are_none(write_suite, arrays, message):
    (run,) = write_suite("ikl_at", seeds=(0,))["ikl_at"]
    np.savez(run.path / "features.npz", **arrays)
    with pytest.raises(RunError, match=message):
        read_features(run)


def test_features_that_are_no_archive(write_suite):
    (run,) = write_suite("ikl_at", seeds=(0,))["ikl_at"]
    for content in (b"", b"PK\x03\x04 cut short", b"anything else"):
        (run.path / "features.npz").write_bytes(content)
        with pytest.raises(RunError, match="evaluate the run again"):
            read_features(run)


def test_masking_checks_name_what_failed(write_suite):
    suite = write_suite("trades", "ikl_at")
    table = masking_checks(flat(suite))
    assert table.failures == ()
    assert table.lines()[0] == [
        *("fashion_mnist_trades_small", "zero gradients", "0.004; 0.004; 0.004", "< 0.1"),
        "passed (3 of 3 seeds)",
    ]
    assert any("attack made on natural" in line[1] for line in table.lines())
    runs = [*suite["trades"], change(suite["ikl_at"][1], "masking_check", value=0.0)]
    table = masking_checks(runs)
    assert len(table.failures) == 3
    assert "fashion_mnist_ikl_at_small, seed 1: large epsilon: no image" in table.failures[1]
    assert table.summary == "9 of 12 checks passed, 3 failed"
    assert [line[-1] for line in table.lines()].count("FAILED (1 of 1 seeds)") == 3
    assert any("masking is suspected: fashion_mnist_ikl" in note for note in compare(runs).notes)
    assert not any("masking" in note for note in compare(suite["trades"]).notes)


def test_no_masking_checks(write_run):
    assert masking_checks([read_run(write_run("digits_trades"))]) is None


def test_differences_of_many_recipes_are_brief(write_suite):
    _, notes = group_runs(flat(write_suite(seeds=(0,))))
    note = next(note for note in notes if "differ in model" in note)
    assert note == (
        "The recipes differ in model (the other 14: not stated; "
        "fashion_mnist_dajat_small: dual_batch_norm true)."
    )
