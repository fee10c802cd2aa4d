"""A run's weights in the formats of others, read back as those others read them."""

import importlib.util
import json
import logging

import pytest
import robustbench_stand_in
import torch
from safetensors import safe_open
from small_runs import few_digits, small, use_few_digits

from dkl.build import evaluate_run, exporting, train_recipe
from dkl.build.exporting import export_run, robustbench_state
from dkl.build.model_info import Submission
from dkl.build.objects import Splits, build_model
from dkl.build.runs import RECIPE_FILE, hash_weights
from dkl.config import load_recipe, to_yaml
from dkl.data import ImageData
from dkl.engine.state import save_checkpoint
from dkl.models import create_model, load_checkpoint
from dkl.reports import ResultRow, append_results

PAPER = Submission(
    name="D\u00e9coupled losses: a study",
    authors="Ada Lovelace, Alan Turing",
    link="https://example.org/paper",
    venue="NeurIPS 2024",
    year=2023,
)
ORIGIN = {"seed": 0, "settings_hash": "00", "run_name": "digits_trades"}
WRN = ("model.name=wrn_10_1", "model.kwargs={}")


def color_images():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    return ImageData(images, torch.arange(40) % 10, 10, tuple("abcdefghij"))


@pytest.fixture(autouse=True)
def _few_color_images(monkeypatch):
    data = color_images()
    monkeypatch.setattr(exporting, "build_data", lambda settings, seed: Splits(data, None, data))


def recipe_of(*overrides, dataset="cifar10"):
    own = [f"data.name={dataset}", "averaging=null", *WRN, "model.normalize=false"]
    given = {text.partition("=")[0] for text in overrides}
    own = [text for text in own if text.partition("=")[0] not in given]
    return load_recipe("digits_trades", [*own, *overrides])


def random_weights(recipe, seed):
    model = build_model(recipe.model, color_images(), seed=seed)
    if recipe.training.dtype == "float64":
        model.double()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if "running" in name:
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
    return model.eval()


def make_run(folder, recipe, model, average=None):
    """Leave what training leaves: a recipe and a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(to_yaml(recipe))
    save_checkpoint(
        folder,
        "step_000001",
        model=model.state_dict(),
        average=None if average is None else average.state_dict(),
        training={},
        meta={},
        is_best=True,
    )
    return folder


@pytest.fixture
def run(tmp_path):
    """A run on three-channel images, and its model."""
    recipe = recipe_of()
    model = random_weights(recipe, seed=1)
    return make_run(tmp_path / "run", recipe, model), model


def rows(run, model, *, auto_attack=(0.5678, 10_000, 8 / 255, True), clean=(0.8534, 10_000)):
    common = {**ORIGIN, "weights_hash": hash_weights(model.state_dict())}
    found = []
    if clean is not None:
        value, count = clean
        found.append(ResultRow(metric="clean_accuracy", value=value, num_samples=count, **common))
    if auto_attack is not None:
        value, count, eps, standard = auto_attack
        found.append(
            ResultRow(
                metric="auto_attack_accuracy",
                value=value,
                num_samples=count,
                epsilon=eps,
                norm="Linf",
                details={"standard": standard},
                **common,
            )
        )
    append_results(run / "results.jsonl", found)


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def info_of(files):
    return json.loads(files[1].read_text())


# RobustBench


def test_a_strict_loader_of_others_reads_the_weights(run):
    folder, model = run
    weights_file, info_file = export_run(folder, format="robustbench")
    assert weights_file.parent == folder / "export"
    assert weights_file.with_suffix(".json") == info_file
    network = robustbench_stand_in.load(weights_file, robustbench_stand_in.Network(10))
    assert network(images()).equal(model(images()))
    state = torch.load(weights_file, weights_only=True)
    assert type(state) is dict
    assert list(state) == list(model.state_dict())
    for name, value in state.items():
        assert value.dtype == (torch.int64 if "num_batches" in name else torch.float32), name
        assert value.is_contiguous()
        assert value.device.type == "cpu"
    target = random_weights(recipe_of(), seed=2)
    assert load_checkpoint(target, weights_file) == []
    assert target(images()).equal(model(images()))


def test_the_family_that_normalises(tmp_path):
    recipe = recipe_of("model.name=wrn_10_1_silu", "model.normalize=true")
    model = random_weights(recipe, seed=1)
    files = export_run(make_run(tmp_path, recipe, model), format="robustbench")
    mean, std = color_images().mean_std()
    network = robustbench_stand_in.NormalizingSiLUNetwork(10, mean, std)
    robustbench_stand_in.load(files[0], network)
    torch.testing.assert_close(network(images()), model(images()), rtol=1e-5, atol=1e-6)
    info = info_of(files)
    assert info["architecture"] == "WideResNet-10-1"
    assert f"mean ({', '.join(f'{value:.4f}' for value in mean)})" in info["footnote"]
    assert "DMWideResNet" in info["footnote"]


def test_averaged_weights_are_the_ones(tmp_path):
    recipe = recipe_of("averaging={decay: 0.9}")
    raw, average = random_weights(recipe, seed=1), random_weights(recipe, seed=2)
    folder = make_run(tmp_path, recipe, raw, average)
    for name in ("robustbench", "safetensors"):
        target = random_weights(recipe, seed=3)
        load_checkpoint(target, export_run(folder, format=name)[0])
        assert target(images()).equal(average(images()))


def test_double_and_auxiliary_weights_become_what_the_loader_takes(tmp_path):
    recipe = recipe_of("training.dtype=float64")
    model = random_weights(recipe, seed=1)
    folder = make_run(tmp_path / "double", recipe, model)
    network = robustbench_stand_in.load(
        export_run(folder, format="robustbench")[0], robustbench_stand_in.Network(10)
    )
    torch.testing.assert_close(network(images()), model(images().double()).float())


def test_auxiliary_batch_norms_are_left_out(tmp_path):
    recipe = load_recipe("fashion_mnist_dajat_small", ["data.name=cifar10", "averaging=null", *WRN])
    assert recipe.model.dual_batch_norm
    model = random_weights(recipe, seed=1)
    folder, told = make_run(tmp_path, recipe, model), []
    network = robustbench_stand_in.Network(10)
    robustbench_stand_in.load(
        export_run(folder, format="robustbench", tell=told.append)[0], network
    )
    torch.testing.assert_close(
        network((images() - model.input_mean) / model.input_std), model(images())
    )
    assert any("left out 35 entries of auxiliary batch-norm" in note for note in told)
    (file,) = export_run(folder, format="safetensors", tell=told.append)
    plain = create_model("wrn_10_1", 10, mean=[0.5] * 3, std=[0.5] * 3)
    assert load_checkpoint(plain, file) == []


def test_a_full_description(run):
    folder, model = run
    rows(folder, model)
    told = []
    files = export_run(folder, format="robustbench", submission=PAPER, tell=told.append)
    assert [file.name for file in files] == [
        "Lovelace2023Decoupled_WRN-10-1.pt",
        "Lovelace2023Decoupled_WRN-10-1.json",
    ]
    assert info_of(files) == {
        "link": "https://example.org/paper",
        "name": "D\u00e9coupled losses: a study",
        "authors": "Ada Lovelace, Alan Turing",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "NeurIPS 2024",
        "architecture": "WideResNet-10-1",
        "eps": "8/255",
        "clean_acc": "85.34",
        "reported": "56.78",
        "autoattack_acc": "56.78",
        "unreliable": False,
    }
    assert told == []


def test_what_is_missing_is_marked_and_told(run, caplog):
    folder, model = run
    rows(folder, model, auto_attack=(0.412, 500, 8 / 255, True))
    with caplog.at_level(logging.WARNING, logger="dkl"):
        files = export_run(folder, format="robustbench")
    info = info_of(files)
    assert files[0].name == "digits_trades.pt"
    assert {info[key] for key in ("link", "name", "authors", "venue")} == {"to be filled in"}
    assert info["autoattack_acc"] is None
    assert info["reported"] is None
    assert info["clean_acc"] == "85.34"
    assert info["eps"] == "8/255"
    footnote = "AutoAttack was run on 500 test images only: 41.20 % are robust at Linf 8/255."
    assert info["footnote"] == footnote
    assert "to be filled in: link, name, authors, venue" in caplog.text
    assert "AutoAttack accuracy was measured on 500 images" in caplog.text
    assert "<Name><Year><FirstWord>" in caplog.text


@pytest.mark.parametrize(
    ("measured", "note"),
    [
        ({}, "clean accuracy was not measured"),
        ({"clean": (0.9, 10_000)}, "AutoAttack accuracy was not measured"),
        ({"auto_attack": (0.5, 10_000, 8 / 255, False)}, "AutoAttack accuracy was not measured"),
        ({"clean": (0.9, 9_999)}, "clean accuracy was measured on 9999 images"),
        ({"auto_attack": (0.5, 10_000, 0.031, True)}, "no cifar10 leaderboard for Linf 0.031"),
    ],
)
def test_numbers_that_do_not_count(measured, note, run):
    folder, model = run
    rows(folder, model, **{"clean": None, "auto_attack": None, **measured})
    told = []
    info = info_of(export_run(folder, format="robustbench", tell=told.append))
    assert any(note in one for one in told), told
    robust = measured.get("auto_attack")
    counts = robust is not None and robust[3]
    assert (info["autoattack_acc"] is not None) == counts
    if counts:
        assert info["eps"] == "0.031"


def test_rows_of_other_weights_are_not_taken(run):
    folder, _ = run
    rows(folder, random_weights(recipe_of(), seed=9))
    told = []
    info = info_of(export_run(folder, format="robustbench", tell=told.append))
    assert info["clean_acc"] is None
    assert any("results.jsonl is about other weights" in note for note in told)


def test_other_datasets_and_generated_data_are_said(tmp_path):
    recipe = recipe_of(
        "data.generated={parts: [a.npz], fraction: 0.7}", "model.normalize=true", dataset="cifar100"
    )
    folder = make_run(tmp_path / "a", recipe, random_weights(recipe, seed=1))
    info = info_of(export_run(folder, format="robustbench", tell=print))
    assert "generated images in training, 70 % of a batch" in info["footnote"]
    assert "RobustBench's WideResNet has no normalisation" in info["footnote"]
    assert info["additional_data"] is False
    recipe = recipe_of(dataset="fashion_mnist")
    folder, told = make_run(tmp_path / "b", recipe, random_weights(recipe, seed=1)), []
    info = info_of(
        export_run(
            folder,
            format="robustbench",
            submission=Submission(additional_data=True),
            tell=told.append,
        )
    )
    assert "RobustBench has no leaderboard for fashion_mnist" in told
    assert info["additional_data"] is True


@pytest.mark.parametrize("name", ["module.conv.weight", "conv.model.weight", "submodel.x"])
def test_names_that_the_loader_would_cut_are_refused(name):
    with pytest.raises(ValueError, match=r"RobustBench cannot load 1 of the names"):
        robustbench_state({name: torch.zeros(1), "fc.weight": torch.zeros(1)})
    # The words without the dot are no trouble.
    assert list(robustbench_state({"modules_x": torch.zeros(1)})) == ["modules_x"]


def test_exported_tensors_share_no_memory():
    whole = torch.arange(6.0)
    state = robustbench_state({"a": whole[:2], "b": whole.view(2, 3).t(), "c": whole})
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in state.values())
    assert state["b"].is_contiguous()
    whole.zero_()
    assert state["c"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": " "}, "name is empty; leave it out"),
        ({"year": 24}, "year must have four digits, got 24"),
    ],
)
def test_submissions_that_look_finished_and_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        Submission(**options)


# safetensors, ONNX


def test_safetensors_says_how_to_build_the_model(tmp_path):
    recipe = recipe_of("model.normalize=true")
    model = random_weights(recipe, seed=1)
    folder = make_run(tmp_path, recipe, model)
    (file,) = export_run(folder, format="safetensors", out=tmp_path / "there")
    assert file == tmp_path / "there" / "digits_trades.safetensors"
    with safe_open(file, "pt") as reader:
        said = reader.metadata()
    assert said["recipe"] == "digits_trades"
    assert said["weights_hash"] == hash_weights(model.state_dict())
    assert said["checkpoint"] == "best"
    rebuilt = create_model(
        said["model"],
        int(said["num_classes"]),
        int(said["in_channels"]),
        mean=json.loads(said["mean"]),
        std=json.loads(said["std"]),
        **json.loads(said["model_kwargs"]),
    ).eval()
    assert load_checkpoint(rebuilt, file) == []
    assert rebuilt(images()).equal(model(images()))


def test_onnx_computes_what_the_model_computes(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"writing ONNX needs {package}")
    runtime = pytest.importorskip("onnxruntime", reason="running ONNX needs onnxruntime")
    # The hardest: normalisation built in, padding by hand, auxiliary layers, float64 weights.
    recipe = load_recipe(
        "fashion_mnist_dajat_small",
        [
            *("data.name=cifar10", "averaging=null", "training.dtype=float64"),
            *("model.name=wrn_10_1_silu", "model.kwargs={}", "model.normalize=true"),
        ],
    )
    model = random_weights(recipe, seed=1)
    (file,) = export_run(make_run(tmp_path, recipe, model), format="onnx", tell=print)
    assert [path.name for path in file.parent.iterdir()] == ["fashion_mnist_dajat_small.onnx"]
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    said = session.get_modelmeta().custom_metadata_map
    assert said["weights_hash"] == hash_weights(model.state_dict())
    for count in (1, 2, 5):
        (logits,) = session.run(["logits"], {"images": images(count).numpy()})
        expected = model(images(count).double()).float()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_missing_onnx_is_named(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match="needs onnx and onnxscript: pip install onnx "):
        export_run(run[0], format="onnx")
    assert not (run[0] / "export").exists()


# Any format


@pytest.mark.parametrize("name", ["robustbench", "safetensors"])
def test_nothing_is_overwritten_unasked(name, run):
    folder, _ = run
    files = export_run(folder, format=name, tell=print)
    before = [file.read_bytes() for file in files]
    other = random_weights(recipe_of(), seed=2)
    make_run(folder, recipe_of(), other)
    save_checkpoint(
        folder, "step_000002", model=other.state_dict(), average=None, training={}, meta={}
    )
    with pytest.raises(FileExistsError, match=r"exists; --force"):
        export_run(folder, format=name, which="last")
    assert [file.read_bytes() for file in files] == before
    # One of two files is enough for a refusal.
    files[0].rename(folder / "moved")
    if len(files) == 2:
        with pytest.raises(FileExistsError, match=r"json exists"):
            export_run(folder, format=name, which="last")
        assert not files[0].exists()
    assert export_run(folder, format=name, which="last", force=True, tell=print) == files
    target = random_weights(recipe_of(), seed=3)
    load_checkpoint(target, files[0])
    assert target(images()).equal(other(images()))
    assert sorted(files) == sorted((folder / "export").iterdir())


def test_a_write_that_fails_leaves_the_old_file(run, monkeypatch):
    folder, _ = run
    files = export_run(folder, format="robustbench", tell=print)
    before = files[0].read_bytes()

    def save(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(exporting.torch, "save", save)
    with pytest.raises(OSError, match="no space left"):
        export_run(folder, format="robustbench", force=True)
    assert files[0].read_bytes() == before
    assert sorted(files) == sorted((folder / "export").iterdir())


def test_single_checkpoints_can_be_exported(run):
    folder, _ = run
    checkpoint = folder / "checkpoints" / "step_000001"
    (file,) = export_run(checkpoint, format="safetensors")
    assert file.parent == folder / "export"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "pickle"}, "one of robustbench, safetensors, onnx; got 'pickle'"),
        ({"format": "onnx", "submission": PAPER}, "onnx would ignore it"),
        ({"format": "safetensors", "data_overrides": ["model.name=a"]}, "has settled model.name"),
    ],
)
def test_wrong_arguments(options, message, run):
    with pytest.raises(ValueError, match=message):
        export_run(run[0], **options)


def test_what_is_no_run_or_no_folder(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="neither a run nor inside one"):
        export_run(empty, format="safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        export_run(run[0], format="safetensors", out=tmp_path / "file")


def test_train_evaluate_export_reload(tmp_path, monkeypatch):
    """The whole way, with nothing made up: the exported file scores what the run scored."""
    use_few_digits(monkeypatch)
    monkeypatch.setattr(exporting, "build_data", few_digits)
    recipe = small("digits_natural", *WRN, "training.epochs=2")
    train_recipe(recipe, tmp_path / "run")
    measured = evaluate_run(tmp_path / "run")
    clean = next(row for row in measured if row.metric == "clean_accuracy")
    told = []
    weights_file, info_file = export_run(tmp_path / "run", format="robustbench", tell=told.append)
    assert json.loads(info_file.read_text())["clean_acc"] is None
    assert f"clean accuracy was measured on {clean.num_samples} images" in " ".join(told)
    network = robustbench_stand_in.load(weights_file, robustbench_stand_in.Network(10, 1))
    splits = few_digits(recipe.data, recipe.seed)
    mean, std = splits.train.mean_std()
    pixels = (splits.test.images.float() / 255 - mean[0]) / std[0]
    accuracy = (network(pixels).argmax(1) == splits.test.labels).double().mean().item()
    assert accuracy == pytest.approx(clean.value)
