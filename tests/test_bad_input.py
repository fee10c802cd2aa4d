"""What goes wrong for a user: one message that teaches, an exit code, and nothing lost."""

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import dkl
from dkl.cli import app
from dkl.data import ImageData, load_data
from dkl.engine import find_checkpoint, load_checkpoint
from dkl.evaluation import accuracy, auto_attack, pgd_robust
from dkl.models import create_model
from dkl.models import load_checkpoint as load_weights_file

SHORT = (
    "training.epochs=1",
    "training.batch_size=256",
    "trackers=[]",
    "model.kwargs={width: 4}",
    "averaging=null",
    "evaluation.pgd_steps=[]",
    "evaluation.cw_steps=[]",
    "evaluation.sweep=[]",
    "evaluation.auto_attack=null",
    "evaluation.validation_attack_steps=0",
)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    """Keep runs out of the source tree, and the logger of the command line out of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    logger = logging.getLogger("dkl")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers, logger.level = before


def command(*words, code):
    """Run the ``dkl`` command and return what it said, on one line."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit | None)
    return " ".join(result.output.replace("\u2502", " ").split())


def train(*words, out="run", code=1):
    return command("train", "digits_natural", *SHORT, *words, "--out", out, code=code)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a run of natural training."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train("--no-evaluate", out=run, code=0)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


# Recipes


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["digits_ikl_ta"], ["did you mean 'digits_ikl_at'?"]),
        (["missing.yaml"], ["no such file"]),
        (["digits_trades", "method.betta=3"], ["unknown key", "did you mean 'beta'?"]),
        (["digits_trades", "evaluation.eps=8"], ["evaluation.eps", "did you mean 8/255?"]),
        (["digits_trades", "method.attack.eps=8"], ["method.attack.eps", "did you mean 8/255?"]),
        (["digits_trades", 'method.attack.eps="8"'], ["at most 1", "did you mean 8/255?"]),
        (["digits_trades", "method.attack.eps=8/0"], ["a number such as 0.03 or 8/255"]),
        (["digits_natural", "data.name=fashion_mist"], ["did you mean 'fashion_mnist'?"]),
        (["digits_natural", "data.name=imagenette"], ["'digits'", "'cifar100'"]),
        (["digits_natural", "method.kind=ikl"], ["must be one of", "ikl_at"]),
        (["digits_natural", "seed=4294967295"], ["seed", "less than 2147483648"]),
    ],
)
def test_bad_recipes_are_bad_usage(words, messages) -> None:
    said = command("train", *words, code=2)
    for message in messages:
        assert message in said
    assert not Path("runs").exists()


def test_all_problems_are_told_at_once() -> None:
    said = command(
        "train", "digits_ikl_at", "method.mse_wieght=1", "training.epochs=0", "sed=1", code=2
    )
    assert "3 problems" in said
    for message in ("'mse_weight'", "training.epochs = 0", "'seed'"):
        assert message in said


def test_unknown_model() -> None:
    said = train("model.name=convnet_smal")
    assert "unknown model 'convnet_smal'; did you mean convnet_small" in said
    words = [word for word in SHORT if "kwargs" not in word]
    said = command("train", "digits_natural", *words, "model.kwargs={widths: 4}", code=1)
    assert "convnet_small has no option widths; it takes width" in said


# Data


def test_missing_data_folder() -> None:
    folder = Path("nowhere").resolve()
    said = command(
        "train", "fashion_mnist_natural", f"data.folder={folder}", "data.download=false", code=1
    )
    assert str(folder) in said
    assert "download" in said


def digits_data(**changes) -> ImageData:
    data = load_data("digits")[0].subset(torch.arange(32))
    values = {name: getattr(data, name) for name in ("images", "labels", "num_classes")}
    return ImageData(**values | {"class_names": data.class_names} | changes)


def small_model(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def fit(data, model=None, method=None, **options):
    method = method or dkl.methods.NaturalTraining()
    model = model or small_model()
    given = {"out": "own", "epochs": 1, "batch_size": 8, "trackers": ()} | options
    return dkl.train(method, model, data, **given)


def test_labels_out_of_range() -> None:
    with pytest.raises(ValueError, match="labels must lie in 0 to 9 for 10 classes; got 0 to 12"):
        digits_data(labels=torch.arange(32) % 13)
    with pytest.raises(ValueError, match=r"has 7 logits, so labels must be in \[0, 7\); got 9"):
        fit(digits_data(), small_model(num_classes=7))
    for wrong, extremes in ((12, "0 to 12"), (-1, "-1 to 9")):
        labels = torch.arange(32) % 10
        labels[20] = wrong
        dataset = TensorDataset(torch.rand(32, 1, 8, 8), labels)
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 10\).* gave {extremes}"):
            fit(dataset, batch_size=32, out=f"wrong_{wrong}")


def test_labels_out_of_range_in_validation_data_and_evaluation() -> None:
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) + 5
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\)"):
        fit(digits_data(), val_data=TensorDataset(images, labels))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\).* got 12"):
        accuracy(small_model(), images, labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\)"):
        pgd_robust(
            small_model(), images, labels, eps=0.1, norm="Linf", num_steps=1, step_size=0.1,
            objective="ce", batch_size=4, seed=0,
        )  # fmt: skip


def test_wrong_shapes() -> None:
    labels = torch.arange(8)
    for images in (torch.rand(8, 8, 8), torch.rand(8, 1, 8, 8, 1)):
        with pytest.raises(ValueError, match=r"of shape \[C, H, W\]"):
            fit(TensorDataset(images, labels))
    with pytest.raises(ValueError, match=r"cannot take images of shape \[3, 8, 8\]"):
        fit(TensorDataset(torch.rand(8, 3, 8, 8), labels))
    with pytest.raises(ValueError, match=r"must return floating-point logits \[N, C\]"):
        fit(digits_data(), nn.Conv2d(1, 10, 3))
    with pytest.raises(ValueError, match=r"labels must be \[N\]"):
        accuracy(small_model(), torch.rand(8, 1, 8, 8), torch.eye(8))
    assert not Path("own").exists()


def test_images_of_another_range() -> None:
    dataset = TensorDataset(255 * torch.rand(8, 1, 8, 8), torch.arange(8))
    with pytest.raises(ValueError, match="must lie in"):
        fit(dataset)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        accuracy(small_model(), *dataset.tensors)


def test_a_student_whose_teacher_has_other_classes() -> None:
    method = dkl.methods.kd(small_model(num_classes=7))
    with pytest.raises(
        ValueError, match=r"\[8, 10\].*\[8, 7\]|\[8, 7\].*\[8, 10\]|\(8, 10\).*\(8, 7\)"
    ):
        fit(digits_data(), method=method)


# Numbers that are not finite


def test_nan_logits_are_not_measured() -> None:
    model = small_model()
    nn.init.constant_(model[1].bias, torch.nan)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    with pytest.raises(ValueError, match="NaN or infinite"):
        accuracy(model, images, labels)
    with pytest.raises(ValueError, match="NaN or infinite"):
        auto_attack(model, images, labels, eps=0.1, batch_size=8, seed=0)


def test_a_loss_that_is_not_finite_ends_training_with_the_batch_saved() -> None:
    said = train("optimizer.lr=1e30", "--no-evaluate")
    assert "not finite at step" in said
    assert "Try a lower learning rate" in said
    (saved,) = Path("run/nonfinite").iterdir()
    from safetensors.torch import load_file

    batch = load_file(saved)
    assert batch["images"].shape[1:] == (1, 8, 8)
    assert len(batch["labels"]) == len(batch["indices"]) > 0
    weights = load_checkpoint(find_checkpoint("run")).model.values()
    assert all(value.isfinite().all() for value in weights), "the last checkpoint is from before"


# Runs and checkpoints


def test_resume_of_nothing() -> None:
    said = train("--resume")
    assert "no run to go on with; start it without --resume" in said
    assert not Path("run").exists()


def test_a_run_is_not_overwritten(finished: Path) -> None:
    assert "already holds a run; add --resume" in train(out=finished)


def test_a_run_that_was_started_differently(finished: Path) -> None:
    said = train("optimizer.weight_decay=0.125", "--resume", out=finished)
    assert "recipe.optimizer.weight_decay was" in said
    assert "is now 0.125" in said


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_corrupt_checkpoint(run: Path, name: str, damage: str) -> None:
    path = find_checkpoint(run) / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :])
    if (name, damage) == ("meta.json", "flipped"):
        path.write_bytes(b"\x00" + content)
    said = train("--resume", "--no-evaluate", out=run)
    assert ("damaged or incomplete" in said) or ("is no checkpoint" in said)
    assert find_checkpoint(run).name in said
    if name != "training_state.pt":
        said = command("evaluate", run, code=1)
        assert find_checkpoint(run).name in said


def test_foreign_checkpoints(run: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run)
    meta = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps(meta | {"format": "other"}))
    assert "not written by this package" in train("--resume", out=run)
    assert "not written by this package" in command("evaluate", run, code=1)
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("width: 4", "width: 6"))
    said = command("evaluate", run, code=1)
    assert "do not fit the model convnet_small" in said
    assert "mixed" in said


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = command("evaluate", tmp_path / "empty", code=1)
    assert "neither a run nor inside one" in said
    assert "does not exist" in command("evaluate", tmp_path / "gone", code=2)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_bomb_in_a_run(run: Path, tmp_path: Path) -> None:
    went_off = tmp_path / "went_off"
    checkpoint = find_checkpoint(run)
    meta = json.loads((checkpoint / "meta.json").read_text())
    for name in ("training_state.pt", "model.safetensors"):
        torch.save({"bomb": Bomb(went_off)}, checkpoint / name)
        digest = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        meta["files"][name] = digest  # an attacker knows how to compute it
        (checkpoint / "meta.json").write_text(json.dumps(meta))
        said = train("--resume", "--no-evaluate", out=run)
        assert "refused" in said if name == "training_state.pt" else name in said
    assert "model.safetensors is damaged" in command("evaluate", run, code=1)
    assert not went_off.exists()


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_pickle_bomb_as_a_teacher(tmp_path: Path, protocol: str) -> None:
    went_off, file = tmp_path / "went_off", tmp_path / "teacher.pt"
    if protocol == "torch":
        torch.save({"state_dict": Bomb(went_off)}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(went_off)))
    teacher = f"method.teacher={{checkpoint: {file}, model: {{name: convnet_small}}}}"
    said = command("train", "digits_kd", *SHORT, teacher, "--out", "student", code=1)
    assert str(file) in said
    assert not went_off.exists()
    with pytest.raises(ValueError, match="teacher"):
        load_weights_file(create_model("convnet_small", 10, in_channels=1), file)
    assert not went_off.exists()
    pickle.loads(pickle.dumps(Bomb(went_off)))
    assert went_off.exists(), "the bomb is a real one"


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mount a file system with room for a few checkpoints."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small tmpfs can be mounted by root only")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_leaves_the_last_good_checkpoint(small_disk: Path) -> None:
    run = small_disk / "run"
    long = [word for word in SHORT if "epochs" not in word]
    words = ["digits_natural", *long, "training.epochs=3", "--no-evaluate"]
    real = ImageData.batches
    filler = small_disk / "filler"

    def batches(self, plan, device):
        for number, batch in enumerate(real(self, plan, device)):
            if number == 2 and (run / "checkpoints" / "best").exists() and not filler.exists():
                free = shutil.disk_usage(small_disk).free
                filler.write_bytes(bytes(free - 4096))
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageData, "batches", batches)
        said = command("train", *words, "--out", run, code=1)
    assert "No space left on device" in said
    assert "last good checkpoint is untouched; free some space" in said
    good = load_checkpoint(find_checkpoint(run))
    assert good.meta["epoch"] == 1
    assert not list((run / "checkpoints").glob(".writing-*"))
    filler.unlink()
    command("train", *words, "--out", run, "--resume", code=0)
    assert load_checkpoint(find_checkpoint(run)).meta["epoch"] == 3


def test_errors_of_the_process_have_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dkl", "train", "digits_natural", "--out", "gone", "--resume"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "start it without --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
