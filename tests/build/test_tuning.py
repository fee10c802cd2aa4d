"""Tuning searches on validation data, keeps what it did, and goes on where it was stopped."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import few_digits, records, same_weights, small

from dkl.build import TuneOutcome, train_recipe, tune_recipe
from dkl.build.objects import Splits
from dkl.config import load_recipe, override
from dkl.data import ImageData
from dkl.engine.run import TrainingRun

SPACE = "tuning.space={optimizer.lr: {low: 0.01, high: 0.5, log: true}, "
SPACE += "method.label_smoothing: {choices: [0.0, 0.1]}}"
SETTINGS = ("optimizer.lr=0.05", "method.label_smoothing=0.0", "training.best_metric=val_accuracy")


class Untouchable:
    """Test data that fails whoever looks at them."""

    def __getattr__(self, name):
        raise AssertionError(f"tuning looked at the test data: .{name}")


def blind(settings, seed) -> Splits:
    splits = few_digits(settings, seed)
    return Splits(splits.train, splits.validation, Untouchable())


@pytest.fixture(scope="module", autouse=True)
def _small_and_blind():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dkl.build.training.build_data", blind)
        yield


def tunable(*overrides: str):
    return small("digits_natural", SPACE, *SETTINGS, *overrides)


def trials(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, TuneOutcome, int]:
    """Run a search of 3 trials that Ctrl-C cuts short in the middle of the second one."""
    folder = tmp_path_factory.mktemp("tune")
    seen = []
    real = TrainingRun._run_step

    def run_step(self, batches):
        if self.run_dir.name == "trial_0001" and self.step == 2 and not seen:
            self.stop.requested = True
            seen.append(self.run_dir)
        return real(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_run_step", run_step)
        with pytest.raises(KeyboardInterrupt):
            tune_recipe(tunable(), budget=3, out=folder)
        before = len(trials(folder))
        told = []
        outcome = tune_recipe(tunable(), budget=3, out=folder, progress=told.append)
    assert [trial["number"] for trial in told] == [1, 2]
    return folder, outcome, before


def test_trials_are_recorded_and_counted_over_both_calls(interrupted) -> None:
    folder, outcome, before = interrupted
    assert before == 1
    found = trials(folder)
    assert [trial["number"] for trial in found] == [0, 1, 2]
    assert {trial["state"] for trial in found} == {"complete"}
    assert found == outcome.trials
    assert sorted(path.name for path in folder.glob("trial_*")) == [
        "trial_0000",
        "trial_0001",
        "trial_0002",
    ]


def test_the_first_trial_is_the_recipe_itself(interrupted) -> None:
    folder, _, _ = interrupted
    assert trials(folder)[0]["overrides"] == ["method.label_smoothing=0.0", "optimizer.lr=0.05"]
    assert load_recipe(folder / "trial_0000" / "recipe.yaml") == tunable()
    others = {tuple(trial["overrides"]) for trial in trials(folder)}
    assert len(others) == 3


def test_values_are_the_best_of_validation(interrupted) -> None:
    folder, outcome, _ = interrupted
    for trial in trials(folder):
        rows = records(folder / f"trial_{trial['number']:04d}")
        assert trial["value"] == max(row["val_accuracy"] for row in rows if "val_accuracy" in row)
    best = max(trials(folder), key=lambda trial: trial["value"])
    assert outcome.best_value == best["value"]
    assert outcome.best_overrides in [
        trial["overrides"] for trial in trials(folder) if trial["value"] == best["value"]
    ]


def test_the_trial_that_was_cut_short_went_on(interrupted, tmp_path: Path) -> None:
    folder, _, _ = interrupted
    given = trials(folder)[1]["overrides"]
    train_recipe(override(tunable(), given), tmp_path / "straight")
    assert same_weights(tmp_path / "straight", folder / "trial_0001")


def test_a_finished_search_is_not_repeated_and_may_grow(interrupted) -> None:
    folder, outcome, _ = interrupted
    told = []
    again = tune_recipe(tunable(), budget=2, out=folder, progress=told.append)
    assert told == []
    assert again == outcome
    assert len(tune_recipe(tunable(), budget=4, out=folder).trials) == 4


def test_another_recipe_is_refused(interrupted) -> None:
    folder, _, _ = interrupted
    with pytest.raises(ValueError, match="search of another recipe"):
        tune_recipe(tunable("training.epochs=2"), budget=3, out=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tuning=null", "states no ranges"),
        ("training.best_metric=null", "states no ranges"),
        ("optimizer.lr=0.9", r"whose optimizer.lr is 0.9; .* between 0.01 and 0.5"),
        ("method.label_smoothing=0.2", r"one of \[0.0, 0.1\]"),
    ],
)
def test_what_cannot_be_searched_is_refused(change: str, message: str, tmp_path: Path) -> None:
    recipe = override(tunable(), [change])
    with pytest.raises(ValueError, match=message):
        tune_recipe(recipe, budget=3, out=tmp_path / "tune")
    assert not (tmp_path / "tune").exists()


def test_a_section_that_is_off_cannot_be_searched(tmp_path: Path) -> None:
    space = "tuning.space={weight_perturbation.gamma: {low: 0.001, high: 0.01}}"
    recipe = small("digits_natural", space, "weight_perturbation=null")
    with pytest.raises(ValueError, match=r"weight_perturbation\.gamma is null"):
        tune_recipe(recipe, budget=1, out=tmp_path)


def test_a_trial_that_diverges_is_recorded_as_failed(tmp_path: Path, monkeypatch) -> None:
    real = ImageData.mean_std
    calls = []

    def mean_std(self):
        calls.append(self)
        # The second trial's model divides by nothing.
        return ((0.0,), (1e-45,)) if len(calls) == 2 else real(self)

    monkeypatch.setattr(ImageData, "mean_std", mean_std)
    outcome = tune_recipe(tunable(), budget=3, out=tmp_path)
    assert [trial["state"] for trial in outcome.trials] == ["complete", "fail", "complete"]
    assert outcome.trials[1]["value"] is None
    assert list((tmp_path / "trial_0001" / "nonfinite").iterdir())
    assert torch.isfinite(torch.tensor(outcome.best_value))


def test_a_search_in_which_all_diverges_says_so(tmp_path: Path) -> None:
    space = "tuning.space={optimizer.lr: {low: 1e29, high: 1e31}}"
    recipe = override(tunable(), ["optimizer.lr=1e30", space])
    with pytest.raises(ValueError, match="every trial diverged"):
        tune_recipe(recipe, budget=1, out=tmp_path)
    assert trials(tmp_path)[0]["state"] == "fail"
