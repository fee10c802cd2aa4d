"""Long-tailed data and class-balanced sampling in runs: splits, order, resumption, result rows."""

import os
import signal
from pathlib import Path

import pytest
import torch
from small_runs import records, results, same_weights, small
from torch import Tensor

from dkl.build import evaluate_run, train_recipe
from dkl.build.objects import Splits, build_data, build_source
from dkl.config import DataSettings, RecipeError, load_recipe
from dkl.data import ClassBalancedSource, class_sizes, load_data
from dkl.reports import compare, read_run, shot_accuracies

TAIL = "data.long_tailed={imbalance: 20}"
BALANCED = "data.class_balanced={samples_per_epoch: 96}"
SHOTS = ["many_accuracy", "medium_accuracy", "few_accuracy"]


def digits(*overrides: str) -> DataSettings:
    return load_recipe("digits_natural", overrides).data


def counts(data) -> Tensor:
    return data.labels.bincount(minlength=data.num_classes)


def same(first, second) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


# Splits


@pytest.mark.parametrize("kind", ["exponential", "pareto"])
def test_only_the_training_images_become_long_tailed(kind: str) -> None:
    whole = build_data(digits(), 0)
    splits = build_data(digits(f"data.long_tailed={{imbalance: 20, kind: {kind}}}"), 0)
    largest = int(counts(whole.train).min())
    assert tuple(counts(splits.train).tolist()) == class_sizes(largest, 10, 20, kind)
    assert same(splits.validation, whole.validation)
    held_out = counts(splits.validation)
    assert int(held_out.max() - held_out.min()) <= 1, "as balanced as the digits are"
    assert same(splits.test, whole.test)


def test_every_option_reaches_the_split() -> None:
    text = "{imbalance: 5, kind: pareto, power: 2, max_per_class: 60, shuffle_classes: true}"
    sizes = counts(build_data(digits(f"data.long_tailed={text}"), 0).train).tolist()
    expected = class_sizes(60, 10, 5, "pareto", power=2)
    assert tuple(sorted(sizes, reverse=True)) == expected
    assert tuple(sizes) != expected


def test_all_seeds_of_a_recipe_share_the_split_unless_they_are_told_not_to() -> None:
    first, second = (build_data(digits(TAIL), seed) for seed in (0, 1))
    assert same(first.train, second.train)
    assert same(first.validation, second.validation)
    own = build_data(digits("data.long_tailed={imbalance: 20, seed: null}"), 1)
    assert torch.equal(counts(own.train), counts(first.train))
    assert not same(own.train, first.train)
    assert same(own.validation, build_data(digits(), 1).validation)


def test_the_limit_comes_first_so_that_sizes_stay_those_of_the_tail() -> None:
    limited = build_data(digits("data.train_limit=400"), 0).train
    tail = build_data(digits(TAIL, "data.train_limit=400"), 0).train
    assert tuple(counts(tail).tolist()) == class_sizes(int(counts(limited).min()), 10, 20)
    rows = {tuple(image.flatten().tolist()) for image in limited.images}
    assert all(tuple(image.flatten().tolist()) in rows for image in tail.images)


def test_a_tail_that_the_data_cannot_have_is_explained() -> None:
    with pytest.raises(ValueError, match="imbalance must lie in 1 to"):
        build_data(digits("data.long_tailed.imbalance=1000"), 0)


# Class-balanced sampling


def source_of(*overrides: str) -> ClassBalancedSource:
    settings = digits(*overrides)
    source = build_source(settings, build_data(settings, 0), 32, Path())
    assert isinstance(source, ClassBalancedSource)
    return source


def test_the_source_has_the_settings_of_its_section() -> None:
    source = source_of(TAIL, "data.class_balanced.power=1/2")
    assert (source.power, len(source)) == (0.5, len(build_data(digits(TAIL), 0).train))
    assert len(source_of(TAIL, BALANCED)) == 96


@pytest.fixture
def seen(monkeypatch) -> list[Tensor]:
    """Return a list that grows by the labels of every training batch."""
    labels: list[Tensor] = []
    batches = ClassBalancedSource.batches

    def recorded(self, index_batches, device):
        for images, labels_B in batches(self, index_batches, device):
            labels.append(labels_B)
            yield images, labels_B

    monkeypatch.setattr(ClassBalancedSource, "batches", recorded)
    return labels


RUN = (TAIL, BALANCED, "training.epochs=3", "training.checkpoint_every_steps=1")


def test_the_loop_draws_all_classes_alike_and_two_runs_are_equal(seen, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_recipe(small("digits_natural", *RUN), tmp_path / name)
    assert len(seen) == 2 * 3 * 3
    for epoch in range(6):
        drawn = torch.cat(seen[3 * epoch : 3 * epoch + 3]).bincount(minlength=10)
        assert set(drawn.tolist()) == {9, 10}
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert records(tmp_path / "one") == records(tmp_path / "two")


def test_a_stopped_run_goes_on_with_the_draws_that_are_left(
    seen, monkeypatch, tmp_path: Path
) -> None:
    recipe = small("digits_natural", *RUN)
    train_recipe(recipe, tmp_path / "straight")
    straight = list(seen)
    seen.clear()
    batches = ClassBalancedSource.batches

    def stopping(self, index_batches, device):
        for batch in batches(self, index_batches, device):
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(ClassBalancedSource, "batches", stopping)
        assert train_recipe(recipe, tmp_path / "stopped").stopped_early
    kept = len(seen)
    assert 5 <= kept < 9
    train_recipe(recipe, tmp_path / "stopped", resume=True)
    assert same_weights(tmp_path / "straight", tmp_path / "stopped")
    assert records(tmp_path / "straight") == records(tmp_path / "stopped")
    assert torch.equal(torch.cat(seen[-1:]), straight[-1])


# Evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Train on long-tailed digits until classes differ in accuracy."""
    folder = tmp_path_factory.mktemp("runs") / "tail"
    train_recipe(small("digits_natural", TAIL, "training.epochs=4", "optimizer.lr=0.2"), folder)
    evaluate_run(folder)
    return folder


def by_hand(run: Path, few: int, many: int) -> dict[str, tuple[float, int, int, int, int]]:
    """Return value, test images, classes, smallest and largest class of each group."""
    sizes = counts(build_data(load_recipe(run / "recipe.yaml").data, 0).train).tolist()
    classes = [row for row in results(run) if row["metric"] == "class_accuracy"]
    found = {}
    groups = {
        "many_accuracy": [index for index, size in enumerate(sizes) if size > many],
        "medium_accuracy": [index for index, size in enumerate(sizes) if few <= size <= many],
        "few_accuracy": [index for index, size in enumerate(sizes) if size < few],
    }
    for metric, members in groups.items():
        rows = [row for row in classes if row["class_index"] in members]
        if rows:
            images = sum(row["num_samples"] for row in rows)
            right = sum(round(row["value"] * row["num_samples"]) for row in rows)
            own = [sizes[index] for index in members]
            found[metric] = (right / images, images, len(members), min(own), max(own))
    return found


def as_tuple(row) -> tuple[float, int, int, int, int]:
    return (row.value, row.num_samples, *(row.details[key] for key in ("classes", "least", "most")))


def test_rows_of_the_groups_follow_from_those_of_the_classes(run: Path) -> None:
    rows = {row.metric: row for row in evaluate_run(run)}
    assert [metric for metric in rows if metric in SHOTS] == SHOTS
    expected = by_hand(run, 20, 100)
    assert {metric: as_tuple(rows[metric]) for metric in SHOTS} == expected
    assert len({value[0] for value in expected.values()}) == 3, "groups differ, or nothing is shown"
    weighted = sum(rows[metric].value * rows[metric].num_samples for metric in SHOTS)
    assert weighted / rows["clean_accuracy"].num_samples == pytest.approx(
        rows["clean_accuracy"].value
    )


def test_groups_are_measured_once_and_again_for_other_thresholds(run: Path) -> None:
    told: list[str] = []
    before = len(results(run))
    evaluate_run(run, progress=lambda what, state: told.append(what))
    assert (told, len(results(run))) == ([], before)
    other = evaluate_run(
        run,
        recipe_overrides=["evaluation.shot_thresholds=[10, 500]"],
        progress=lambda what, state: told.append(what),
    )
    assert told == ["accuracy on classes with many, medium and few training images"]
    rows = {row.metric: row for row in other if row.metric in SHOTS}
    # No class has more than 500 training images: there is no such group, and no row.
    assert {metric: as_tuple(row) for metric, row in rows.items()} == by_hand(run, 10, 500)
    assert [*rows] == ["medium_accuracy", "few_accuracy"]
    assert rows["few_accuracy"].details["thresholds"] == [10, 500]


def test_the_report_has_the_groups(run: Path) -> None:
    evaluate_run(run, again=True)
    text = compare([read_run(run)]).to_text()
    assert all(f"{name} (%)" in text for name in ("clean", "many", "medium", "few"))
    assert shot_accuracies([read_run(run)]) is not None


def test_balanced_data_have_no_groups(tmp_path: Path) -> None:
    train_recipe(small("digits_natural", "data.train_limit=100"), tmp_path)
    assert not {row.metric for row in evaluate_run(tmp_path)} & {*SHOTS}
    with pytest.raises(RecipeError, match=r"would be ignored: data\.long_tailed is null"):
        evaluate_run(tmp_path, recipe_overrides=["evaluation.shot_thresholds=[5, 9]"])


def test_without_clean_accuracy_there_are_no_groups(run: Path) -> None:
    rows = evaluate_run(run, recipe_overrides=["evaluation.clean=false"])
    assert not {row.metric for row in rows} & {*SHOTS}


# Teachers


def test_a_teacher_of_other_class_sizes_teaches_and_is_named(
    run: Path, tmp_path: Path, caplog, monkeypatch
) -> None:
    def few_tests(settings: DataSettings, seed: int) -> Splits:
        splits = build_data(settings, seed)
        return Splits(splits.train, None, splits.test.subset(torch.arange(20)))

    monkeypatch.setattr("dkl.build.training.build_data", few_tests)
    teacher = f"method.teacher.run={run}"
    common = ("training.best_metric=null", "data.train_limit=200", teacher)
    train_recipe(small("digits_kd", *common), tmp_path / "balanced")
    told = [record.getMessage() for record in caplog.records if "was trained on" in record.message]
    sizes = counts(build_data(load_recipe(run / "recipe.yaml").data, 0).train)
    assert len(told) == 1
    assert f"{int(sizes.min())} to {int(sizes.max())} images of each class" in told[0]
    caplog.clear()
    train_recipe(small("digits_kd", *common[::2], TAIL), tmp_path / "tail")
    assert not any("was trained on" in record.message for record in caplog.records)


def test_published_sizes_need_all_training_images() -> None:
    train, _ = load_data("digits")
    splits = build_data(digits(TAIL, "data.validation_fraction=0", "training.best_metric=null"), 0)
    assert splits.validation is None
    assert tuple(counts(splits.train).tolist()) == class_sizes(int(counts(train).min()), 10, 20)
