"""What the doctor finds before a run, and that what it finds is so."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import small
from typer.testing import CliRunner

from dkl.build import doctor, doctor_checks, train_recipe
from dkl.build.doctor import examine
from dkl.build.reproduce.measure import StepCost, measure_step
from dkl.cli import app
from dkl.config import Recipe
from dkl.data import Decoding, load_image_files
from dkl.models import create_model
from tests.data.image_trees import write_tree

COST = StepCost(0.5, 0.001, 0.003, 10**6, 8, False, "cpu")
CLI = CliRunner()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", train=8, val=4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_step", lambda recipe: COST)


def in_files(tree: Path, *more: str) -> Recipe:
    return small(
        "digits_natural",
        "data.name=image_folder",
        f"data.folder={tree}",
        "data.decoding={image_size: 16, resize: 20, workers: 1}",
        "training.batch_size=6",
        *more,
        *([] if any("data.augment" in word for word in more) else ["data.augment=null"]),
    )


def found(diagnosis, state: str) -> dict[str, str]:
    return {one.subject: one.message for one in diagnosis.findings if one.state == state}


def test_a_recipe_that_runs_is_ready_and_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    diagnosis = examine(in_files(tree), tmp_path / "run")
    assert diagnosis.is_ready, diagnosis.findings
    assert {"packages", "device", "data", "steps", "memory", "disk"} <= {
        one.subject for one in diagnosis.findings
    }
    assert "workers decode" in " ".join(one.message for one in diagnosis.findings)
    estimate = diagnosis.estimate
    assert estimate is not None
    assert estimate.total_seconds > estimate.step_seconds > 0
    assert estimate.teacher_seconds == 0
    assert not (tmp_path / "run").exists()


def test_the_estimate_is_made_of_steps_and_counts_the_teacher(quick, tmp_path: Path) -> None:
    kd = small("digits_kd", "training.epochs=7", "training.batch_size=128")
    estimate = examine(kd, tmp_path / "run").estimate
    assert estimate is not None
    # 1154 images are ten steps of 128; 288 are validated.
    assert estimate.training_seconds == pytest.approx(7 * (10 * 0.5 + 288 * 0.001))
    assert estimate.teacher_seconds > estimate.training_seconds, "it trains longer"
    run = tmp_path / "teacher"
    train_recipe(small("digits_natural"), run)
    taught = examine(small("digits_kd", f"method.teacher.run={run}"), tmp_path / "run")
    assert taught.estimate is not None
    assert taught.estimate.teacher_seconds == 0
    assert "digits_natural, seed 0" in found(taught, "ok")["teacher"]


def test_a_broken_image_is_found_among_all(tree: Path, tmp_path: Path) -> None:
    for name in ("n01/train_0_1.JPEG", "n02/train_1_2.JPEG"):
        (tree / "train" / name).write_bytes(b"\xff\xd8 no image")
    diagnosis = examine(in_files(tree), tmp_path / "run", all_images=True)
    assert not diagnosis.is_ready
    assert diagnosis.estimate is None, "no steps without data"
    message = " ".join(one.message for one in diagnosis.findings if one.state == "problem")
    assert "train_0_1.JPEG cannot be decoded" in message
    assert "train_1_2.JPEG cannot be decoded" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_listed_by_the_workers(tree: Path, workers: int) -> None:
    (tree / "train" / "n02" / "train_1_2.JPEG").write_bytes(b"")
    data = load_image_files("image_folder", folder=tree, decoding=Decoding(workers=workers)).train
    (message,) = data.find_broken(torch.arange(len(data)))
    assert "train_1_2.JPEG cannot be decoded" in message


def test_only_some_files_are_decoded_unless_all_are_wanted(tree, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor_checks, "_SAMPLED_FILES", 3)
    for all_images, expected in ((False, "3 of 12 test files"), (True, "12 of 12 test files")):
        diagnosis = examine(
            in_files(tree), tmp_path / "run", take_steps=False, all_images=all_images
        )
        assert any(expected in one.message for one in diagnosis.findings)


@pytest.mark.parametrize(
    ("words", "subject", "message"),
    [
        (["training.mixed_precision=fp16"], "precision", "needs a GPU"),
        (["model.name=convnet_smal"], "steps", "did you mean convnet_small"),
        (["data.train_limit=1", "training.drop_last=true"], "steps", "leaves no step"),
    ],
)
def test_settings_that_would_fail_are_problems(words, subject, message, tmp_path: Path) -> None:
    diagnosis = examine(small("digits_natural", *words), tmp_path / "run")
    assert message in found(diagnosis, "problem")[subject]


def test_missing_packages_name_their_extra(tree: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: None)
    policy = "data.decoding={image_size: 16, resize: 20, rand_augment: rand-m9-inc1}"
    recipe = small(
        "digits_natural",
        "data.name=image_folder",
        f"data.folder={tree}",
        policy,
        "trackers=[wandb]",
    )
    problems = [one.message for one in examine(recipe, tmp_path).findings if one.state != "ok"]
    assert "timm is missing, which data.decoding.rand_augment needs: pip install 'dkl[timm]'" in (
        problems
    )
    assert any("pip install 'dkl[wandb]'" in message for message in problems)


def test_a_teacher_of_other_classes_is_a_problem(tree: Path, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.pt"
    torch.save(create_model("convnet_small", 5, in_channels=3, width=4).state_dict(), weights)
    teacher = f"{{checkpoint: {weights}, model: {{name: convnet_small, kwargs: {{width: 4}}}}}}"
    recipe = small("digits_kd", f"method.teacher={teacher}")
    problem = found(examine(recipe, tmp_path / "run"), "problem")["teacher"]
    assert "shape" in problem or "classes" in problem


def test_too_little_memory_and_disk_are_problems(quick, tmp_path: Path, monkeypatch) -> None:
    def too_much(recipe):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    recipe = small("digits_natural")
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10})())
    assert "make room" in found(examine(recipe, tmp_path / "run"), "problem")["disk"]
    monkeypatch.setattr(doctor, "measure_step", too_much)
    message = found(examine(recipe, tmp_path / "run"), "problem")["memory"]
    assert "CUDA out of memory" in message
    assert "training.accumulation=2" in message


def test_whatever_a_step_raises_is_told(quick, tmp_path: Path, monkeypatch) -> None:
    def broken(recipe):
        raise RuntimeError("kernel image is not available")

    monkeypatch.setattr(doctor, "measure_step", broken)
    message = found(examine(small("digits_natural"), tmp_path / "run"), "problem")["steps"]
    assert message == "RuntimeError: kernel image is not available"


def test_slow_workers_are_told(tree: Path, tmp_path: Path, monkeypatch) -> None:
    slow = StepCost(0.5, 0.001, 0.003, 10**6, 8, False, "cpu", 0.01, True, None)
    monkeypatch.setattr(doctor, "measure_step", lambda recipe: slow)
    diagnosis = examine(in_files(tree), tmp_path / "run")
    assert "workers decode 100 images a second, and steps wait" in found(diagnosis, "note")["steps"]


def test_decoding_adds_to_a_step(tree: Path) -> None:
    cost = measure_step(in_files(tree))
    assert cost.decode_seconds > 0
    assert cost.step_seconds > 6 * cost.decode_seconds
    mixed = measure_step(in_files(tree, "data.augment={mixup: 1.0, padding: 0, flip: false}"))
    assert mixed.decode_seconds > 0


def test_the_command_prints_one_document_and_its_exit_code(tree: Path, tmp_path: Path) -> None:
    words = ["doctor", "digits_natural", "--no-steps", "--json"]
    result = CLI.invoke(app, [*words, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ready"]
    assert document["estimate"] is None
    bad = CLI.invoke(app, [*words, "data.name=image_folder", f"data.folder={tmp_path / 'no'}"])
    assert bad.exit_code == 1
    (problem,) = (one for one in json.loads(bad.stdout)["findings"] if one["state"] == "problem")
    assert "does not exist" in problem["message"]
    shown = CLI.invoke(app, ["doctor", "digits_natural", "--no-steps"])
    assert "Ready." in shown.output
    assert "1,154 training" in shown.output
