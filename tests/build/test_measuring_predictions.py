"""Calibration and fidelity of a finished run: what `dkl evaluate` writes for distillation."""

import shutil
from pathlib import Path

import pytest
import torch
from small_runs import few_digits, results, small, use_few_digits
from typer.testing import CliRunner

import dkl.evaluation
from dkl.build import evaluate_run, train_recipe
from dkl.build.evaluating import evaluate_weights
from dkl.build.runs import load_run_model, read_recipe
from dkl.build.teachers import load_teacher
from dkl.cli import app
from dkl.config import RecipeError, load_recipe
from dkl.evaluation import predict_logits
from dkl.models import create_model
from dkl.reports import compare, read_run

BOTH = ["evaluation.calibration=true", "evaluation.fidelity=true"]
NEW = [
    *("expected_calibration_error", "negative_log_likelihood", "reliability"),
    *("teacher_agreement", "teacher_kl"),
]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    use_few_digits(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a student whose teacher, named by recipe, lies in its folder."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        teacher = small("digits_natural", "training.epochs=12", "model.kwargs={width: 8}")
        train_recipe(teacher, folder / "teacher")
        named = f"method.teacher={{recipe: digits_natural, run: {folder / 'teacher'}}}"
        train_recipe(small("digits_kd", named, "training.epochs=12"), folder / "student")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "student", tmp_path / "run", symlinks=True))


def logits_of(run: Path):
    _, recipe = read_recipe(run)
    splits = few_digits(recipe.data, recipe.seed)
    model, _ = load_run_model(run, recipe, splits.train, "best")
    return predict_logits(model, splits.test.images), splits.test.labels


def test_rows_hold_what_the_models_predict(run: Path, trained: Path) -> None:
    rows = {row.metric: row for row in evaluate_run(run, recipe_overrides=BOTH)}
    assert [metric for metric in rows if metric in NEW] == NEW
    logits, labels = logits_of(run)
    teacher, _ = logits_of(trained / "teacher")
    bins = dkl.evaluation.reliability(logits, labels)
    found = dkl.evaluation.fidelity(logits, teacher)
    assert 0 < found.agreement < 1
    assert found.kl > 0.01
    assert rows["teacher_agreement"].value == found.agreement
    assert rows["teacher_kl"].value == pytest.approx(found.kl, rel=1e-4)
    assert rows["expected_calibration_error"].value == pytest.approx(
        bins.expected_calibration_error, rel=1e-4
    )
    assert rows["reliability"].details["count"] == bins.count.tolist()
    assert rows["reliability"].details["accuracy"] == bins.accuracy.tolist()
    assert rows["negative_log_likelihood"].value > 0.3  # trained on a hundred images
    assert {rows[metric].num_samples for metric in NEW} == {40}
    assert rows["teacher_kl"].details["teacher"].startswith("digits_natural, seed 0, best")
    assert {row.metric for row in read_run(run).results} >= {*NEW}


def test_what_was_measured_is_not_measured_again(run: Path, monkeypatch) -> None:
    first = evaluate_run(run, recipe_overrides=BOTH)
    count = len(results(run))
    monkeypatch.setattr(dkl.evaluation, "reliability", None)
    monkeypatch.setattr(dkl.evaluation, "fidelity", None)
    assert evaluate_run(run, recipe_overrides=BOTH) == first
    assert len(results(run)) == count


def test_the_model_sees_the_images_once(run: Path, monkeypatch) -> None:
    calls = []
    inner = dkl.evaluation.predict_logits
    monkeypatch.setattr(
        dkl.evaluation, "predict_logits", lambda *a, **k: calls.append(1) or inner(*a, **k)
    )
    evaluate_run(run, recipe_overrides=BOTH)
    # The teacher is shown one image to count its classes; then both are shown all of them.
    assert len(calls) == 3


def test_another_teacher_is_measured_anew(run: Path, trained: Path, tmp_path: Path) -> None:
    old = {row.metric: row.value for row in evaluate_run(run, recipe_overrides=BOTH)}
    own = [*BOTH, f"method.teacher.run={trained / 'student'}"]
    new = {row.metric: row.value for row in evaluate_run(run, recipe_overrides=own)}
    assert (new["teacher_agreement"], new["teacher_kl"]) == (1.0, 0.0)
    assert new["expected_calibration_error"] == old["expected_calibration_error"]


def test_a_teacher_beside_the_run_and_one_that_is_gone(run: Path, trained: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    assert f"run: {trained / 'teacher'}" in text
    (run / "recipe.yaml").write_text(text.replace(f"run: {trained / 'teacher'}", "run: null"))
    with pytest.raises(ValueError, match=r"teacher is not there.*trains none.*teacher\.run=DIR"):
        evaluate_run(run, recipe_overrides=BOTH)
    assert not (run / "teacher").exists()
    shutil.copytree(trained / "teacher", run / "teacher", symlinks=True)
    rows = {row.metric: row for row in evaluate_run(run, recipe_overrides=BOTH)}
    assert rows["teacher_agreement"].value < 1


def test_weights_of_a_file_and_a_teacher_of_a_file(tmp_path: Path) -> None:
    student, teacher = (create_model("convnet_small", 10, in_channels=1, width=4) for _ in range(2))
    for name, model in (("student", student), ("teacher", teacher)):
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    where = f"{{checkpoint: {tmp_path / 'teacher.pt'}, model: {{name: convnet_small, "
    recipe = small("digits_kd", f"method.teacher={where}kwargs: {{width: 4}}}}}}")
    rows = evaluate_weights(tmp_path / "student.pt", recipe, recipe_overrides=BOTH)
    found = {row.metric: row for row in rows}
    assert found["teacher_kl"].details["teacher"] == "checkpoint teacher.pt"
    splits = few_digits(recipe.data, 0)
    loaded = load_teacher(recipe, tmp_path, splits.train)
    assert all(
        torch.equal(loaded.model.state_dict()[name], value)
        for name, value in teacher.state_dict().items()
    )
    assert found["teacher_agreement"].num_samples == len(splits.test)


def test_fidelity_needs_a_teacher() -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.fidelity.*method natural has none"):
        load_recipe("digits_natural", ["evaluation.fidelity=true"])
    assert load_recipe("digits_kd", ["evaluation.fidelity=true"]).evaluation.fidelity
    assert not load_recipe("digits_kd").evaluation.calibration


def test_the_command_prints_them(run: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(run), *BOTH])
    assert done.exit_code == 0, done.output
    for words in ("expected calibration error", "nats", "agreement with the teacher"):
        assert words in done.output
    titles = [column.title for column in compare([read_run(run)]).columns]
    assert titles == ["clean", "ECE", "NLL", "agreement", "KL to teacher"]
