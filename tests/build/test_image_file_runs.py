"""Runs on images in files: every format, workers, resumption, two processes, measurements."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import records, results, same_weights, small, weights

from dkl.build import evaluate_run, train_recipe
from dkl.build.exporting import export_run
from dkl.build.objects import build_data
from dkl.config import RecipeError, load_recipe
from dkl.data import ImageFiles
from dkl.reports import read_run
from tests.data.image_trees import write_lists, write_shards, write_tree

STRONG = "rand_augment: rand-m9-mstd0.5-inc1, random_erasing: 0.5"
MIXED = "data.augment={cutmix: 0.5, mixup: 0.5, padding: 0, flip: false}"
FORMATS = ("image_folder", "imagenet_lt", "webdataset")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("images")
    tree = write_lists(write_tree(root / "tree", train=8, val=4))
    shards = write_shards(tree, root / "shards")
    return {"image_folder": tree, "imagenet_lt": tree, "webdataset": shards}


def settings(places, name: str = "image_folder", decoding: str = "", *more: str) -> list[str]:
    own = [
        f"data.name={name}",
        f"data.folder={places[name]}",
        f"data.decoding={{image_size: 16, resize: 20, {decoding or 'workers: 0'}}}",
        "training.batch_size=6",
        "training.epochs=2",
        *more,
    ]
    if not any(word.startswith("data.augment") for word in more):
        own.append("data.augment=null")
    if name == "imagenet_lt":
        own.append("data.validation_fraction=0")
    return own


def recipe(*args, method: str = "digits_natural"):
    return small(method, *settings(*args))


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_trains_and_is_measured(places, tmp_path: Path, name: str) -> None:
    outcome = train_recipe(recipe(places, name), tmp_path / "run")
    assert outcome.best_metric == "val_accuracy"
    rows = {row.metric: row for row in evaluate_run(tmp_path / "run")}
    num_test = len(build_data(recipe(places, name).data, 0).test)
    assert rows["clean_accuracy"].num_samples == num_test in (6, 12)
    if name == "imagenet_lt":
        assert rows["few_accuracy"].details["least"] == 2
    count = len(results(tmp_path / "run"))
    evaluate_run(tmp_path / "run", recipe_overrides=["data.decoding.workers=1"])
    assert len(results(tmp_path / "run")) == count, "what is measured is not measured again"


def test_shards_train_the_run_of_the_folder(places, tmp_path: Path) -> None:
    for name in ("image_folder", "webdataset"):
        train_recipe(recipe(places, name, f"workers: 0, {STRONG}"), tmp_path / name)
    assert same_weights(tmp_path / "image_folder", tmp_path / "webdataset")


def test_workers_change_nothing(places, tmp_path: Path) -> None:
    for workers in (0, 2):
        one = recipe(places, "image_folder", f"workers: {workers}, {STRONG}, repeats: 2")
        train_recipe(one, tmp_path / str(workers))
    assert same_weights(tmp_path / "0", tmp_path / "2")
    assert records(tmp_path / "0") == records(tmp_path / "2")
    other = recipe(places, "image_folder", f"workers: 0, {STRONG}, repeats: 1")
    train_recipe(other, tmp_path / "other")
    assert not same_weights(tmp_path / "0", tmp_path / "other")


def test_a_stopped_run_goes_on_with_other_workers(places, monkeypatch, tmp_path: Path) -> None:
    one = recipe(places, "image_folder", f"workers: 0, {STRONG}")
    train_recipe(one, tmp_path / "straight")
    batches = ImageFiles.batches

    def stopping(self, index_batches, device):
        for number, batch in enumerate(batches(self, index_batches, device)):
            if self.augmented and number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "batches", stopping)
        assert train_recipe(one, tmp_path / "stopped").stopped_early
    again = recipe(places, "image_folder", f"workers: 1, prefetch: 2, {STRONG}")
    assert not train_recipe(again, tmp_path / "stopped", resume=True).stopped_early
    assert same_weights(tmp_path / "straight", tmp_path / "stopped")


def test_two_processes_train_the_run_of_one(places, tmp_path: Path) -> None:
    words = settings(places, "image_folder", f"workers: 1, {STRONG}", "training.dtype=float64")
    # No batch norm, whose statistics are those of a process.
    vit = "{img_size: 16, patch_size: 8, depth: 1, embed_dim: 12, num_heads: 2}"
    words += ["model.name=timm/vit_tiny_patch16_224", f"model.kwargs={vit}", "trackers=[]"]
    train_recipe(load_recipe("digits_natural", words), tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "dkl", "train", "digits_natural", *words, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-10)
    numbers = [
        [row["val_accuracy"] for row in records(tmp_path / run) if row["kind"] == "epoch"]
        for run in ("one", "two")
    ]
    assert numbers[0] == numbers[1]


def test_mixed_images_and_a_teacher_that_is_trained_first(places, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(
        "base: digits_natural\nname: small_teacher\ndescription: a teacher\n"
        "data: {name: image_folder, decoding: {image_size: 16, resize: 20, workers: 0}, "
        "augment: null}\ntraining: {epochs: 1, batch_size: 6}\ntrackers: []\n"
    )
    student = small(
        "digits_ikl_kd",
        *settings(places, "image_folder", "", MIXED, f"method.teacher={{recipe: {teacher}}}"),
    )
    train_recipe(student, tmp_path / "run")
    assert read_run(tmp_path / "run" / "teacher").recipe["data"]["folder"] == str(
        places["image_folder"]
    )
    assert all(row["train_loss"] > 0 for row in records(tmp_path / "run") if row["kind"] == "epoch")


def test_robustness_is_measured_and_the_model_exported(places, tmp_path: Path) -> None:
    attacked = small("digits_pgd_at", *settings(places), "evaluation.features=1")
    train_recipe(attacked, tmp_path / "run")
    rows = {row.metric: row for row in evaluate_run(tmp_path / "run")}
    assert rows["pgd_2_accuracy"].num_samples == 8
    assert rows["clean_accuracy"].num_samples == 12
    assert list((tmp_path / "run").rglob("*features*.npz"))
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnxscript")
    export_run(tmp_path / "run", format="onnx", out=tmp_path / "exported")
    assert list((tmp_path / "exported").glob("*.onnx"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.decoding={}"], "decoding.*would be ignored: digits is in memory"),
        (["data.name=imagenet", "data.download=true"], "download.*cannot fetch imagenet"),
        (["data.name=imagenet_lt"], "validation_fraction.*must be 0: imagenet_lt brings a list"),
        (["data.name=imagenet", "data.decoding={resize: 200}"], "resize.*at least image_size"),
        (["data.name=imagenet", "data.decoding={scale: [1, 0.1]}"], "scale.*two ascending shares"),
        (["data.name=imagenet", "data.decoding={rand_augment: m9}"], "rand_augment"),
        (["data.name=webdataset", "data.generated={held_out: true}"], "generated.*must be null"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits_natural", words)


def test_a_cache_of_answers_is_refused(places) -> None:
    words = settings(places, "image_folder", "", "method.teacher.cache=somewhere")
    with pytest.raises(RecipeError, match=r"teacher\.cache.*decoded"):
        load_recipe("digits_ikl_kd", words)
