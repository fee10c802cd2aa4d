"""The training command from recipe to results, on a few real digits."""

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from small_runs import (
    few_digits,
    records,
    results,
    same_method_state,
    same_weights,
    small,
    use_few_digits,
    weights,
)
from torch import nn
from torch.utils.data import TensorDataset

import dkl
from dkl.attacks import PGDSettings, ThreatModel
from dkl.build import evaluate_run, train_recipe
from dkl.build.objects import build_data
from dkl.build.runs import load_run_model, read_recipe
from dkl.config import RecipeError, load_recipe
from dkl.engine import find_checkpoint, load_checkpoint
from dkl.models import save_weights
from dkl.reports import read_run

KILLED = Path(__file__).with_name("interrupted_training.py")
IKL = ("training.epochs=2", "training.checkpoint_every_steps=2")
AWP = "weight_perturbation={gamma: 0.01, start_epoch: 1}"


@pytest.fixture
def few(monkeypatch):
    use_few_digits(monkeypatch)


@pytest.fixture(scope="module")
def ikl_run(tmp_path_factory) -> Path:
    """Train IKL-AT with EMA and AWP, and measure it twice."""
    run = tmp_path_factory.mktemp("runs") / "ikl"
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        train_recipe(small("digits_ikl_at", *IKL, AWP), run)
        evaluate_run(run)
        evaluate_run(run, which="last", recipe_overrides=["evaluation.pgd_steps=[3]"])
    return run


@pytest.fixture(scope="module")
def natural_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "natural"
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        train_recipe(small("digits_natural"), run)
    return run


# The run folder


def test_a_run_holds_everything(ikl_run: Path) -> None:
    names = {path.name for path in ikl_run.iterdir()}
    assert names == {
        "recipe.yaml",
        "records.jsonl",
        "results.jsonl",
        "class_table.json",
        "checkpoints",
    }
    assert read_recipe(ikl_run / "checkpoints" / "best")[1] == small("digits_ikl_at", *IKL, AWP)
    run = read_run(ikl_run)
    assert [row["epoch"] for row in run.epochs] == [0, 1]
    assert {"train_loss", "train_robust", "train_accuracy", "val_robust_accuracy"} <= set(
        run.epochs[0]
    )


def test_the_class_table_is_that_of_the_method(ikl_run: Path) -> None:
    saved = json.loads((ikl_run / "class_table.json").read_text())
    table = torch.tensor(saved["table"])
    assert table.shape == (10, 10)
    assert saved["class_names"] == list(map(str, range(10)))
    torch.testing.assert_close(table.sum(1), torch.ones(10))
    assert (table - 0.1).abs().max() > 1e-3, "no epoch was committed"
    state = load_checkpoint(find_checkpoint(ikl_run)).training["method"]
    torch.testing.assert_close(state["term.statistics.table"].float(), table)


def test_result_rows_say_where_they_come_from(ikl_run: Path) -> None:
    rows = results(ikl_run)
    whole = [row for row in rows if row["metric"] == "clean_accuracy"]
    assert [row["checkpoint"] for row in whole] == ["best", "last"]
    for row in rows:
        assert row["run_name"] == "digits_ikl_at"
        assert row["seed"] == 0
        assert row["split"] == "test"
        assert row["settings_hash"] == rows[0]["settings_hash"]
        assert len(row["weights_hash"]) == 64
        assert row["versions"]["torch"] == metadata.version("torch")
        assert row["device"].lower().startswith("cpu")
    by_name = {row["metric"]: row for row in rows if row["checkpoint"] == "best"}
    assert by_name["clean_accuracy"]["num_samples"] == 40
    assert by_name["pgd_2_accuracy"]["num_samples"] == 8
    assert by_name["pgd_2_accuracy"]["epsilon"] == 0.2
    assert "pgd_3_accuracy" in {row["metric"] for row in rows if row["checkpoint"] == "last"}
    sweep = {row["epsilon"]: row["value"] for row in rows if "sweep" in row["metric"]}
    assert sorted(sweep) == [0.0, 0.1, 0.2]
    assert sweep[0.0] >= sweep[0.1] >= sweep[0.2]


def test_best_is_the_best_of_the_validation_values(few, tmp_path: Path) -> None:
    recipe = small(
        "digits_natural", "training.epochs=3", "optimizer.lr=0.5", "schedule.per_epoch=true"
    )
    outcome = train_recipe(recipe, tmp_path)
    rows = [row for row in records(tmp_path) if row["kind"] == "epoch"]
    values = [row["val_accuracy"] for row in rows]
    assert outcome.best_value == max(values)
    best = load_checkpoint(find_checkpoint(tmp_path, "best"))
    assert best.meta["epoch"] == values.index(max(values)) + 1
    data = few_digits(recipe.data, recipe.seed)
    model, _ = load_run_model(tmp_path, recipe, data.train, "best")
    found = dkl.evaluation.accuracy(model, data.validation.images, data.validation.labels)
    assert found == pytest.approx(max(values))


def test_without_a_metric_there_is_no_best(few, tmp_path: Path) -> None:
    outcome = train_recipe(small("digits_natural", "training.best_metric=null"), tmp_path)
    assert outcome.best_metric is None
    assert outcome.best_value is None
    assert "val_accuracy" in records(tmp_path)[-1]
    with pytest.raises(RuntimeError, match="use 'last'"):
        evaluate_run(tmp_path)
    assert evaluate_run(tmp_path, which="last")[0].checkpoint == "last"


def test_a_checkpoint_is_measured_under_its_own_name(natural_run: Path, few) -> None:
    last = find_checkpoint(natural_run, "last")
    names = {
        path: evaluate_run(path)[0].checkpoint
        for path in (natural_run, last, natural_run / "checkpoints" / "last")
    }
    assert names[natural_run] == "best"
    # One epoch: the last checkpoint is the best one.
    assert set(names.values()) == {"best"}


# Refusals


def test_a_run_is_not_overwritten(few, ikl_run: Path) -> None:
    before = (ikl_run / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        train_recipe(small("digits_natural"), ikl_run)
    with pytest.raises(ValueError, match=r"method.mse_weight was .* and is now 0.125"):
        train_recipe(
            small("digits_ikl_at", *IKL, AWP, "method.mse_weight=0.125"), ikl_run, resume=True
        )
    assert (ikl_run / "recipe.yaml").read_text() == before


def test_nothing_is_resumed_where_nothing_is(few, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run to go on with; start it without --resume"):
        train_recipe(small("digits_natural"), tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()


def test_a_model_that_does_not_fit_is_refused_before_the_teacher_is_trained(
    few, tmp_path: Path
) -> None:
    recipe = small("digits_kd", "model.kwargs={depth: 4}")
    with pytest.raises(ValueError, match="has no option depth"):
        train_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_model_are_refused(few, natural_run: Path, tmp_path: Path) -> None:
    wider = small("digits_natural", "model.kwargs={width: 6}")
    data = few_digits(wider.data, 0).train
    with pytest.raises(ValueError, match="do not fit the model convnet_small"):
        load_run_model(natural_run, wider, data, "last")


# Resume


def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(few, ikl_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    recipe = small("digits_ikl_at", *IKL, AWP)
    for number in ("TERM", "KILL"):
        command = [sys.executable, str(KILLED), str(run), number]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        assert done.returncode == (0 if number == "TERM" else -signal.SIGKILL), done.stderr
        steps = load_checkpoint(find_checkpoint(run)).meta["step"]
        assert steps == {"TERM": 3, "KILL": 6}[number]
    outcome = train_recipe(recipe, run, resume=True)
    assert not outcome.stopped_early
    assert same_weights(run, ikl_run)
    assert same_method_state(run, ikl_run)
    assert records(run) == records(ikl_run)
    assert (run / "class_table.json").read_text() == (ikl_run / "class_table.json").read_text()
    assert outcome.best_value == load_checkpoint(find_checkpoint(ikl_run)).meta["best"]["value"]


def test_a_finished_run_is_resumed_without_a_step(few, ikl_run: Path) -> None:
    before, rows = weights(ikl_run), records(ikl_run)
    train_recipe(small("digits_ikl_at", *IKL, AWP), ikl_run, resume=True)
    assert all(torch.equal(before[name], value) for name, value in weights(ikl_run).items())
    assert records(ikl_run) == rows


# Teachers


def test_a_teacher_named_by_recipe_is_trained_first_with_the_same_seed(
    few, tmp_path: Path, monkeypatch
) -> None:
    load = load_recipe

    def load_small(name, given=()):
        return load(name, given) if Path(name).suffix else small(name, *given)

    recipe = small("digits_ikl_kd", "seed=3")
    monkeypatch.setattr("dkl.build.training.config.load_recipe", load_small)
    train_recipe(recipe, tmp_path)
    teacher = read_recipe(tmp_path / "teacher")[1]
    assert teacher.name == "digits_natural"
    assert teacher.seed == 3
    assert json.loads((tmp_path / "class_table.json").read_text())["table"]


def test_a_teacher_from_run_and_from_checkpoint_teach_the_same(
    few, natural_run: Path, tmp_path: Path
) -> None:
    recipe = small("digits_kd", f"method.teacher={{run: {natural_run}}}")
    train_recipe(recipe, tmp_path / "from_run")
    data = few_digits(recipe.data, recipe.seed).train
    model, _ = load_run_model(natural_run, read_recipe(natural_run)[1], data, "best")
    save_weights(model.state_dict(), tmp_path / "teacher.safetensors")
    text = f"{{checkpoint: {tmp_path}/teacher.safetensors, model: {{name: convnet_small, kwargs: "
    recipe = small("digits_kd", "method.teacher=" + text + "{width: 4}}}")
    train_recipe(recipe, tmp_path / "from_checkpoint")
    assert same_weights(tmp_path / "from_run", tmp_path / "from_checkpoint")
    assert not (tmp_path / "from_run" / "teacher").exists()


def test_a_teacher_of_other_data_is_refused(few, natural_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (natural_run / "recipe.yaml").read_text().replace("name: digits\n", "name: cifar10\n")
    (other / "recipe.yaml").write_text(text)
    recipe = small("digits_kd", f"method.teacher={{run: {other}}}")
    with pytest.raises(ValueError, match="trained on cifar10, the student's data is digits"):
        train_recipe(recipe, tmp_path / "student")


def test_a_signal_while_the_teacher_is_trained_stops_the_command(
    few, tmp_path: Path, monkeypatch
) -> None:
    validation = dkl.evaluation.accuracy
    told = []

    def stop(*args, **options):
        if not told:
            told.append(os.kill(os.getpid(), signal.SIGTERM))
        return validation(*args, **options)

    recipe = small("digits_kd", "training.epochs=1")
    teaching = small("digits_natural", "training.epochs=2")
    monkeypatch.setattr("dkl.build.training.config.load_recipe", lambda *given: teaching)
    with monkeypatch.context() as patch:
        patch.setattr("dkl.build.training.evaluation.accuracy", stop)
        assert train_recipe(recipe, tmp_path / "stopped").stopped_early
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    assert not train_recipe(recipe, tmp_path / "stopped", resume=True).stopped_early
    train_recipe(recipe, tmp_path / "straight")
    assert same_weights(tmp_path / "straight", tmp_path / "stopped")


# Learning


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> dict[str, Path]:
    """Train four methods for real, but briefly."""
    folder = tmp_path_factory.mktemp("learnt")
    common = ["training.epochs=3", "trackers=[]", "schedule.warmup_epochs=0.2"]
    wide = [*common, "model.kwargs={width: 16}"]
    robust = [
        *wide,
        "training.epochs=6",
        "method.attack.num_steps=3",
        "method.attack.step_size=0.1",
    ]
    robust += ["evaluation.validation_attack_steps=2", "training.validate_every=3"]
    robust.remove("training.epochs=3")
    # Their learning rates are tuned for 40 epochs and low: three epochs end far from learnt.
    student = [*common[1:], "training.epochs=12", "model.kwargs={width: 8}"]
    runs = {
        "digits_natural": wide,
        "digits_ikl_at": robust,
        "digits_kd": student,
        "digits_ikl_kd": student,
    }
    for name, overrides in runs.items():
        given = list(overrides)
        if name.endswith("kd"):
            given.append(f"method.teacher.run={folder / 'digits_natural'}")
        train_recipe(load_recipe(name, given), folder / name)
    measure = ["evaluation.pgd_steps=[10]", "evaluation.cw_steps=[]", "evaluation.sweep=[]"]
    measure += ["evaluation.auto_attack=null", "evaluation.num_images=100"]
    measure += ["evaluation.eps=0.1", "evaluation.step_size=0.025"]
    for name in runs:
        evaluate_run(folder / name, recipe_overrides=measure)
    return {name: folder / name for name in runs}


def value(run: Path, metric: str) -> float:
    return next(row["value"] for row in results(run) if row["metric"] == metric)


def test_natural_training_learns(learnt) -> None:
    assert value(learnt["digits_natural"], "clean_accuracy") > 0.8


def test_adversarial_training_is_robust_where_natural_training_is_not(learnt) -> None:
    robust = value(learnt["digits_ikl_at"], "pgd_10_accuracy")
    natural = value(learnt["digits_natural"], "pgd_10_accuracy")
    assert robust > natural + 0.2


@pytest.mark.parametrize("name", ["digits_kd", "digits_ikl_kd"])
def test_students_learn(learnt, name: str) -> None:
    assert value(learnt[name], "clean_accuracy") > 0.7


# Evaluation


def test_only_evaluation_and_data_are_changed_by_overrides(few, natural_run: Path) -> None:
    with pytest.raises(RecipeError, match="unknown key"):
        evaluate_run(natural_run, recipe_overrides=["evaluation.pgdsteps=[1]"])
    rows = evaluate_run(natural_run, recipe_overrides=["data.test_limit=30"])
    assert {row.metric for row in rows} >= {"clean_accuracy", "pgd_2_accuracy"}


def test_auto_attack_goes_on_where_it_was_cut_short(few, ikl_run: Path) -> None:
    overrides = ["evaluation.auto_attack=fast", "evaluation.pgd_steps=[]", "evaluation.cw_steps=[]"]
    overrides += ["evaluation.sweep=[]", "evaluation.clean=false", "evaluation.num_images=6"]
    overrides += ["evaluation.batch_size=3", "evaluation.eps=0.05"]
    seconds: dict[str, float] = {}

    def cut_short(what, state):
        if state is not None:
            seconds[state.attack] = state.seconds
            if state.attack_index == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_run(ikl_run, recipe_overrides=overrides, progress=cut_short)
    resumed = evaluate_run(ikl_run, recipe_overrides=overrides)[0]
    assert resumed.metric == "auto_attack_fast_accuracy"
    first = resumed.details["attacks"][0]
    assert first["name"] == "apgd-ce"
    assert first["seconds"] == seconds["apgd-ce"], "the first attack was not run again"
    again = evaluate_run(ikl_run, recipe_overrides=overrides)[0]
    assert again.details == resumed.details
    assert again.seconds >= sum(attack["seconds"] for attack in resumed.details["attacks"])
    # Other batches are another evaluation, with a state of its own.
    overrides[-2] = "evaluation.batch_size=4"
    assert evaluate_run(ikl_run, recipe_overrides=overrides)[0].num_samples == 6


def test_a_diverged_model_is_no_result(few, natural_run: Path, tmp_path: Path, monkeypatch) -> None:
    def with_nan(path, which):
        return {name: values * torch.nan for name, values in load(path, which).items()}

    from dkl.build import runs

    load = runs.load_weights
    monkeypatch.setattr(runs, "load_weights", with_nan)
    before = len(results(natural_run)) if (natural_run / "results.jsonl").exists() else 0
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate_run(natural_run)
    after = len(results(natural_run)) if (natural_run / "results.jsonl").exists() else 0
    assert after == before


def test_float64_runs_are_validated_and_measured(few, tmp_path: Path) -> None:
    recipe = small("digits_ikl_at", "training.dtype=float64")
    train_recipe(recipe, tmp_path)
    assert {value.dtype for value in weights(tmp_path).values()} <= {torch.float64, torch.int64}
    assert evaluate_run(tmp_path)


# dkl.train


class OwnModel(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, images):
        return self.head(self.layers(images))


@pytest.fixture(scope="module")
def digits():
    return build_data(load_recipe("digits_natural").data, 0)


def as_dataset(data) -> TensorDataset:
    return TensorDataset(data.images.float() / 255, data.labels)


@pytest.mark.parametrize("kind", ["ImageData", "Dataset"])
def test_train_takes_own_model_and_data(digits, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = OwnModel()
    data = (digits.train, digits.validation)
    if kind == "Dataset":
        data = tuple(map(as_dataset, data))
    result = dkl.train(
        dkl.methods.NaturalTraining(),
        model,
        *data,
        out=tmp_path,
        epochs=3,
        batch_size=64,
        trackers=(),
    )
    assert result.epochs_done == 3
    assert result.best_value > 0.8
    assert result.best_value == max(
        row["val_accuracy"] for row in records(tmp_path) if "val_accuracy" in row
    )


def test_train_is_the_same_for_both_kinds_of_data(digits, tmp_path: Path) -> None:
    attack = PGDSettings(ThreatModel("Linf", 0.1), 2, 0.05, "uniform", "eval")
    few = digits.train.subset(torch.arange(40))
    for name, data in (("images", few), ("dataset", as_dataset(few))):
        torch.manual_seed(0)
        dkl.train(
            dkl.methods.ikl_at(attack, 10),
            OwnModel(),
            data,
            out=tmp_path / name,
            epochs=1,
            batch_size=16,
            trackers=(),
        )
    assert same_weights(tmp_path / "images", tmp_path / "dataset")
