"""What is measured of a run: rows in order, written as they come, and never measured twice."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import results, small, use_few_digits
from torch import nn
from typer.testing import CliRunner

import dkl.evaluation
from dkl.build import evaluate_run, train_recipe
from dkl.build.evaluating import evaluate_weights
from dkl.build.measuring import pack_flags, unpack_flags
from dkl.build.measuring_checks import first_of_each_class
from dkl.cli import app
from dkl.cli.evaluating import MeasuringProgress, show_time
from dkl.config import RecipeError, load_recipe
from dkl.engine import load_weights
from dkl.evaluation import AttackProgress
from dkl.reports import read_run

BARE = (
    "evaluation.pgd_steps=[]",
    "evaluation.cw_steps=[]",
    "evaluation.sweep=[]",
    "evaluation.auto_attack=null",
    "evaluation.num_images=12",
    "evaluation.batch_size=5",
    "evaluation.eps=0.1",
    "evaluation.step_size=0.025",
)


def options(*overrides):
    """Return overrides that measure nothing but what is named."""
    named = {text.partition("=")[0] for text in overrides}
    return [text for text in BARE if text.partition("=")[0] not in named] + list(overrides)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    use_few_digits(monkeypatch)


@pytest.fixture(autouse=True)
def quick_attacks(monkeypatch):
    import pyautoattack

    from dkl.evaluation import auto_attack_phases

    class QuickAutoAttack(pyautoattack.AutoAttack):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.apgd.n_iter = self.apgd_targeted.n_iter = 5
            self.apgd.n_iter_orig = self.apgd_targeted.n_iter_orig = 5
            self.fab.n_iter = 3

    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    monkeypatch.setattr(auto_attack_phases, "SQUARE_QUERIES", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        for name, seed in (("one", 0), ("other", 1)):
            overrides = (f"seed={seed}", "training.epochs=6", "model.kwargs={width: 8}")
            train_recipe(small("digits_natural", *overrides), runs / name)
    return runs


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "one", tmp_path / "run", symlinks=True))


def measured(run: Path, *overrides: str, **how):
    return evaluate_run(run, recipe_overrides=options(*overrides), **how)


def flags(row):
    return unpack_flags(row.details["robust"], row.num_samples)


def comparable(rows):
    """Return rows without times, and without the state of the checkout, which may be edited."""
    fields = [json.loads(row.to_json()) for row in rows]
    for row in fields:
        for name in ("seconds", "time", "commit"):
            row.pop(name)
        for attack in row["details"].get("attacks", []):
            if isinstance(attack, dict):
                attack.pop("seconds")
    return fields


ATTACKS = (
    "evaluation.pgd_steps=[2, 3]",
    "evaluation.cw_steps=[2, 3]",
    "evaluation.auto_attack=standard",
    "evaluation.square=true",
)


def test_rows_come_in_the_order_of_the_table_and_fit_together(run: Path) -> None:
    rows = measured(run, *ATTACKS, "evaluation.sweep=[0.05]")
    order = list(dict.fromkeys(row.metric for row in rows))
    assert order == [
        "clean_accuracy",
        "class_margin",
        "class_accuracy",
        "pgd_2_accuracy",
        "pgd_3_accuracy",
        "cw_2_accuracy",
        "cw_3_accuracy",
        "auto_attack_accuracy",
        "square_accuracy",
        "worst_case_accuracy",
        "class_robust_accuracy",
        "epsilon_sweep_accuracy",
    ]
    by_name = {row.metric: row for row in rows}
    attacks = [by_name[name] for name in order[3:9]]
    for row in attacks:
        assert (row.num_samples, row.epsilon, row.norm) == (12, 0.1, "Linf")
        assert row.value == float(flags(row).double().mean())
    worst = by_name["worst_case_accuracy"]
    assert torch.equal(flags(worst), torch.stack([flags(row) for row in attacks]).all(0))
    assert worst.details["attacks"] == [row.metric.removesuffix("_accuracy") for row in attacks]
    clean = [row for row in rows if row.metric == "class_accuracy"]
    average = sum(row.value * row.num_samples for row in clean) / 40
    assert average == pytest.approx(by_name["clean_accuracy"].value)
    robust = [row for row in rows if row.metric == "class_robust_accuracy"]
    assert {row.details["attack"] for row in robust} == {"auto_attack"}
    assert sum(row.num_samples for row in robust) == 12
    average = sum(row.value * row.num_samples for row in robust) / 12
    assert average == pytest.approx(by_name["auto_attack_accuracy"].value)
    names = {path.name for path in run.iterdir()}
    assert names == {"recipe.yaml", "records.jsonl", "results.jsonl", "checkpoints"}
    assert len(read_run(run).results) == len(rows)


def test_classes_under_the_strongest_attack_where_there_is_no_ensemble(run: Path) -> None:
    rows = measured(run, "evaluation.pgd_steps=[1, 4]", "evaluation.clean=false")
    attacks = {row.metric.removesuffix("_accuracy"): row for row in rows[:2]}
    strongest = min(attacks, key=lambda name: attacks[name].value)
    chosen = {row.details["attack"] for row in rows if row.metric == "class_robust_accuracy"}
    assert chosen == {strongest}
    one = measured(run, "evaluation.pgd_steps=[1]", "evaluation.clean=false")
    assert "worst_case_accuracy" not in {row.metric for row in one}


# What was measured before


def test_nothing_is_measured_twice(run: Path, monkeypatch) -> None:
    first = measured(run, *ATTACKS, "evaluation.sweep=[0.05]")
    size = (run / "results.jsonl").stat().st_size
    with monkeypatch.context() as patch:
        for name in ("predict_logits", "pgd_robust", "auto_attack", "epsilon_sweep"):
            patch.setattr(dkl.evaluation, name, lambda *_a, **_k: pytest.fail("measured twice"))
        assert measured(run, *ATTACKS, "evaluation.sweep=[0.05]") == first
        assert (run / "results.jsonl").stat().st_size == size
        part = measured(run, "evaluation.pgd_steps=[3]")
        assert part[0] == first[0], "what was asked for with other things is there as well"
    again = measured(run, *ATTACKS, "evaluation.sweep=[0.05]", again=True)
    assert comparable(again) == comparable(first)
    assert again[0].time >= first[0].time
    assert len(results(run)) >= 2 * len(first)
    assert len(read_run(run).results) < len(results(run))


@pytest.mark.parametrize(
    "changed",
    [
        "evaluation.eps=0.11",
        "evaluation.step_size=0.05",
        "evaluation.num_images=11",
        "evaluation.norm=L2",
    ],
)
def test_other_settings_are_another_measurement(run: Path, changed: str) -> None:
    first = measured(run, "evaluation.pgd_steps=[2]", "evaluation.clean=false")[0]
    other = measured(run, "evaluation.pgd_steps=[2]", "evaluation.clean=false", changed)[0]
    assert other.details["key"] != first.details["key"]
    back = measured(run, "evaluation.pgd_steps=[2]", "evaluation.clean=false")[0]
    assert back == first


def test_a_shorter_split_has_another_accuracy_but_the_same_attacked_images(run: Path) -> None:
    clean, *_, pgd = (r for r in measured(run, "evaluation.pgd_steps=[2]") if r.class_index is None)
    short = measured(run, "evaluation.pgd_steps=[2]", "data.test_limit=30")
    assert short[0].num_samples == 30
    assert short[0].details["key"] != clean.details["key"]
    assert pgd in short


def test_other_weights_are_another_measurement(run: Path, trained: Path) -> None:
    first = measured(run)[0]
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(trained / "other" / "checkpoints", run / "checkpoints", symlinks=True)
    second = measured(run)[0]
    assert second.weights_hash != first.weights_hash
    assert second.details["key"] != first.details["key"]


def test_an_evaluation_goes_on_after_every_stop(run: Path, trained: Path, tmp_path: Path) -> None:
    """Stopped at each of its batches in turn, it attacks none again and ends up the same."""
    wanted = ("evaluation.pgd_steps=[2]", "evaluation.auto_attack=fast", "evaluation.sweep=[0.05]")
    told: set[tuple[str, str, int]] = set()
    rows = None

    def stop_at_news(what, state):
        # Batches that were saved are told as well: they pass until one comes that is new.
        if state is not None and (batch := (what, state.attack, state.num_done)) not in told:
            told.add(batch)
            raise KeyboardInterrupt

    for _ in range(60):
        try:
            rows = measured(run, *wanted, progress=stop_at_news)
            break
        except KeyboardInterrupt:
            assert (run / "evaluation_state").is_dir()
    assert rows is not None
    assert len(told) >= 8
    straight = Path(shutil.copytree(trained / "one", tmp_path / "straight", symlinks=True))
    assert comparable(rows) == comparable(measured(straight, *wanted))
    assert len(results(run)) == len(rows), "every row was written once"
    assert not (run / "evaluation_state").exists()


def test_a_measurement_whose_rows_were_cut_off_is_made_again(run: Path) -> None:
    rows = measured(run, "evaluation.pgd_steps=[2]")
    file = run / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for kept in (0, 5, len(lines) - 3):
        file.write_text("".join(lines[:kept]) + lines[kept][:40])
        assert comparable(measured(run, "evaluation.pgd_steps=[2]")) == comparable(rows)
        assert comparable(read_run(run).results) == comparable(rows)


def test_what_a_crash_left_behind_is_cleared(run: Path) -> None:
    key = measured(run, "evaluation.pgd_steps=[2]")[-1].details["key"]
    left = run / "evaluation_state" / key
    left.mkdir(parents=True)
    (left / "batch-00000.npz").write_bytes(b"half")
    measured(run, "evaluation.pgd_steps=[2]")
    assert not (run / "evaluation_state").exists()


# The curve


@pytest.mark.parametrize("attack", ["auto_attack", "auto_attack_fast", "pgd", "cw"])
def test_the_curve_takes_the_flags_of_its_attack(run: Path, monkeypatch, attack: str) -> None:
    version = "standard" if attack == "auto_attack" else "fast"
    wanted = (
        "evaluation.pgd_steps=[2, 3]",
        "evaluation.cw_steps=[3]",
        f"evaluation.auto_attack={version}",
        "evaluation.sweep=[0.05, 0.2]",
        f"evaluation.sweep_attack={attack}",
        "evaluation.clean=false",
    )
    swept = []
    original = dkl.evaluation.epsilon_sweep

    def noted(*args, known, **settings):
        swept.append((args[3], sorted(known)))
        return original(*args, known=known, **settings)

    monkeypatch.setattr(dkl.evaluation, "epsilon_sweep", noted)
    rows = measured(run, *wanted)
    curve = [row for row in rows if row.metric == "epsilon_sweep_accuracy"]
    assert [row.epsilon for row in curve] == [0.0, 0.05, 0.1, 0.2]
    name = {"pgd": "pgd_3", "cw": "cw_3"}.get(attack, attack)
    assert {row.details["attack"] for row in curve} == {name}
    # Its own radius is known from the row; nothing is swept again from the start.
    assert swept[2] == ([0.1], [0.0, 0.05, 0.1])
    assert swept[3] == ([0.2], [0.0, 0.05, 0.1])
    own = next(row for row in rows if row.metric == f"{name}_accuracy")
    assert torch.equal(flags(curve[2]), flags(own) & flags(curve[1]))
    for smaller, larger in pairwise(curve):
        assert not (flags(larger) & ~flags(smaller)).any()


def test_steps_of_the_curve_are_scaled(run: Path) -> None:
    wanted = ("evaluation.pgd_steps=[2]", "evaluation.clean=false", "evaluation.sweep=[0.05]")
    rows = measured(run, *wanted, "evaluation.step_size=0.1")
    half = next(r for r in rows if r.metric == "epsilon_sweep_accuracy" and r.epsilon == 0.05)
    single = measured(
        run,
        "evaluation.pgd_steps=[2]",
        "evaluation.clean=false",
        "evaluation.eps=0.05",
        "evaluation.step_size=0.05",
    )[0]
    assert torch.equal(flags(half), flags(single))


# Further measurements


def test_transfer_from_another_run(run: Path, trained: Path) -> None:
    wanted = ("evaluation.pgd_steps=[2, 3]", "evaluation.clean=false")
    rows = measured(run, *wanted, transfer_from=trained / "other")
    row = rows[-1]
    assert row.metric == "transfer_accuracy"
    assert row.details["source"] == "digits_natural, seed 1, best checkpoint"
    assert row.details["source_weights_hash"] != row.weights_hash
    assert row.details["made_with"] == "pgd_3"
    own = next(one for one in rows if one.metric == "pgd_3_accuracy")
    assert row.value >= own.value
    assert measured(run, *wanted, transfer_from=trained / "other") == rows
    itself = measured(run, *wanted, transfer_from=run)[-1]
    assert torch.equal(flags(itself), flags(own))
    with pytest.raises(ValueError, match="pgd_steps"):
        measured(run, transfer_from=trained / "other")


def test_transfer_needs_a_run_of_the_same_data(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "fashion", symlinks=True))
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: digits\n", "name: fashion_mnist\n"))
    with pytest.raises(ValueError, match="same data"):
        measured(run, "evaluation.pgd_steps=[2]", transfer_from=other)
    assert not (run / "results.jsonl").exists(), "found before anything is measured"


def test_masking_checks_become_rows(run: Path) -> None:
    rows = measured(run, "evaluation.masking_checks=true", "evaluation.clean=false")
    assert {row.metric for row in rows} == {"masking_check"}
    checks = {row.details["check"]: row for row in rows}
    assert len(checks) == len(rows) == 7
    for row in rows:
        assert row.value in (0.0, 1.0)
        assert set(row.details) >= {"measured", "expected", "message"}
        assert (row.epsilon, row.norm, row.num_samples) == (0.1, "Linf", 12)
    assert checks["randomised"].value == 1.0
    assert len(read_run(run).results) == 7, "rows of different checks do not replace each other"
    square = measured(
        run, "evaluation.masking_checks=true", "evaluation.square=true", "evaluation.clean=false"
    )
    assert len([row for row in square if row.metric == "masking_check"]) == 7


def test_features_are_kept_and_measured(run: Path, monkeypatch) -> None:
    wanted = (
        "evaluation.features=2",
        "evaluation.pgd_steps=[1, 3]",
        "evaluation.clean=false",
    )
    rows = [row for row in measured(run, *wanted) if row.metric == "feature_compactness"]
    found = {(row.details["images"], row.details["measure"]): row for row in rows}
    assert len(found) == len(rows) == 6
    file = run / "features.npz"
    with np.load(file, allow_pickle=False) as arrays:
        content = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "key"}
    labels = content["labels"]
    assert content["clean"].shape == content["adversarial"].shape == (len(labels), 16)
    assert content["clean"].dtype == torch.float32
    assert content["class_indices"].tolist() == sorted(set(labels.tolist()))
    assert (torch.bincount(labels) <= 2).all()
    assert not torch.equal(content["clean"], content["adversarial"])
    clean = dkl.evaluation.compactness(content["clean"], labels)
    assert found["clean", "silhouette"].value == pytest.approx(clean.silhouette)
    assert found["clean", "intra_inter_ratio"].value == pytest.approx(clean.intra_inter_ratio)
    assert found["clean", "silhouette"].epsilon is None
    assert found["adversarial", "silhouette"].epsilon == 0.1
    assert found["both", "silhouette"].num_samples == 2 * len(labels)
    # Measured once, unless the file is gone or is another measurement's.
    with monkeypatch.context() as patch:
        patch.setattr(dkl.evaluation, "penultimate_features", pytest.fail)
        measured(run, *wanted)
    before = file.read_bytes()
    for damage in (b"", before[:50]):
        file.write_bytes(damage)
        measured(run, *wanted)
        with np.load(file) as arrays:
            assert torch.equal(torch.from_numpy(arrays["clean"]), content["clean"])
    file.unlink()
    measured(run, *wanted)
    assert file.exists()
    assert not list(run.glob(".features*"))


def test_features_of_the_first_classes() -> None:
    labels = torch.arange(60) % 30
    chosen = first_of_each_class(labels, per_class=5, max_classes=20)
    assert labels[chosen].tolist() == [label for label in range(20) for _ in range(2)]


def test_features_need_a_known_last_layer(run: Path, monkeypatch) -> None:
    from dkl.models.convnet import ConvNet

    monkeypatch.setattr(ConvNet, "get_classifier", lambda self: (self.fc, self.fc))
    with pytest.raises(ValueError, match="tuple"):
        measured(run, "evaluation.features=2", "evaluation.pgd_steps=[1]")
    assert not (run / "results.jsonl").exists(), "found before anything is measured"


def test_l1_is_measured_by_auto_attack_alone(run: Path) -> None:
    wanted = ("evaluation.norm=L1", "evaluation.eps=2.0", "evaluation.clean=false")
    rows = measured(run, *wanted, "evaluation.auto_attack=standard", "evaluation.square=true")
    attacked = [row for row in rows if row.class_index is None]
    assert [row.metric for row in attacked] == [
        "auto_attack_accuracy",
        "square_accuracy",
        "worst_case_accuracy",
    ]
    assert {(row.norm, row.epsilon) for row in attacked} == {("L1", 2.0)}
    assert [a["n_restarts"] for a in attacked[0].details["attacks"]] == [5, 1, 1, 1]
    for other in ("pgd_steps=[2]", "masking_checks=true", "cw_steps=[2]"):
        with pytest.raises(RecipeError, match="Linf or L2"):
            measured(run, *wanted, f"evaluation.{other}")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["evaluation.features=2", "evaluation.pgd_steps=[]"], "evaluation.features"),
        (["evaluation.sweep=[0.1]", "evaluation.sweep_attack=cw"], "evaluation.sweep_attack"),
        (["evaluation.sweep=[0.1]", "evaluation.sweep_attack=fab"], "evaluation.sweep_attack"),
        (["evaluation.features=-1"], "evaluation.features"),
    ],
)
def test_settings_that_make_no_sense(run: Path, overrides: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        measured(run, *overrides)


# A file of weights


@pytest.fixture
def weights(run: Path, tmp_path: Path) -> Path:
    """Save the run's weights the way DataParallel and many codes do."""
    file = tmp_path / "weights.pt"
    state = {f"module.{name}": value for name, value in load_weights(run, "best").items()}
    torch.save({"state_dict": state}, file)
    return file


def test_a_file_of_weights_is_measured_like_the_run(run: Path, weights: Path) -> None:
    recipe = small("digits_natural", "training.epochs=6", "model.kwargs={width: 8}")
    wanted = options("evaluation.pgd_steps=[2]")
    of_run = evaluate_run(run, recipe_overrides=wanted)
    rows = evaluate_weights(weights, recipe, recipe_overrides=wanted)
    assert [row.value for row in rows] == [row.value for row in of_run]
    assert rows[0].weights_hash == of_run[0].weights_hash
    assert {row.checkpoint for row in rows} == {"weights.pt"}
    folder = weights.parent / "weights_evaluation"
    read = read_run(folder)
    assert read.name == "digits_natural"
    assert len(read.results) == len(rows)
    assert {row.settings_hash for row in rows} == {read.settings_hash}
    assert evaluate_weights(weights, recipe, recipe_overrides=wanted) == rows
    more = evaluate_weights(weights, recipe, recipe_overrides=options("evaluation.cw_steps=[2]"))
    assert {row.settings_hash for row in more} == {read.settings_hash}
    other = small("digits_natural", "training.epochs=7", "model.kwargs={width: 8}")
    with pytest.raises(ValueError, match="another recipe"):
        evaluate_weights(weights, other, recipe_overrides=wanted)
    with pytest.raises(ValueError, match="other files"):
        evaluate_weights(weights, recipe, recipe_overrides=wanted, out=weights.parent)
    with pytest.raises(ValueError, match="belongs in the recipe"):
        evaluate_weights(weights, recipe, recipe_overrides=["data.test_limit=3"])


def test_weights_of_another_model_are_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        evaluate_weights(weights, small("digits_natural"))
    assert not (weights.parent / "weights_evaluation").exists()


# The command


def command(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_the_command_measures_runs_and_files(run: Path, trained: Path, weights: Path) -> None:
    more = options("evaluation.pgd_steps=[2]", "evaluation.masking_checks=true")
    done = command("evaluate", run, *more, "--transfer-from", trained / "other")
    assert "PGD-2" in done.stdout
    assert "of 7 pass" in done.stdout
    assert "masking" not in done.stdout.split("checks for masked")[0]
    document = json.loads(command("evaluate", run, *more, "--json").stdout)
    assert document["results"][0]["metric"] == "clean_accuracy"
    assert command("evaluate", run, *more, "--again").stdout.count("PGD-2") == 1
    out = weights.parent / "out"
    recipe = ("--recipe", run / "recipe.yaml", "--out", out)
    named = options("evaluation.pgd_steps=[2]", "evaluation.features=2")
    done = command("evaluate", weights, *recipe, *named)
    assert "features of clean images: silhouette" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml",
        "results.jsonl",
        "features.npz",
    }
    assert "digits_natural" in command("compare", out).stdout


def test_a_command_that_makes_no_sense(run: Path, weights: Path) -> None:
    for words, said in [
        ((weights,), "--recipe"),
        ((run, "--recipe", "digits_natural"), "for a file of weights"),
        ((run, "--out", "there"), "stay in the run"),
        ((run, "training.epochs=3"), "training has settled"),
        ((weights, "--recipe", "digits_natural", "optimizer.lr=3"), "would be ignored"),
        ((weights, "--recipe", "digits_natural", "--checkpoint", "last"), "leave out"),
        ((run, "--transfer-from", "nowhere"), "does not exist"),
    ]:
        output = " ".join(command("evaluate", *words, code=2).output.replace("\u2502", " ").split())
        assert said in output


def test_failed_checks_are_said(run: Path, monkeypatch) -> None:
    failed = dkl.evaluation.MaskingCheck("more_steps", False, 0.4, 0.05, "PGD-10 leaves much")
    monkeypatch.setattr(dkl.evaluation, "masking_checks", lambda *_a, **_k: [failed])
    done = command("evaluate", run, *options("evaluation.masking_checks=true"))
    assert "0 of 1 pass" in done.stdout
    assert "more steps failed: PGD-10 leaves much" in done.stderr
    assert "may be too high" in done.stderr


def test_progress_shows_the_time_left(monkeypatch) -> None:
    shown = []

    class Status:
        def update(self, text):
            shown.append(str(text))

    progress = MeasuringProgress()
    progress._status = Status()
    progress("PGD-20", AttackProgress("pgd-20", 0, 1, 30, 90, 25, 100, 60.0))
    progress("AutoAttack", AttackProgress("apgd-t", 1, 4, 0, 90, 25, 100, 0.0))
    assert shown == [
        "Measuring PGD-20, 30/90 images, 25/100 robust, 1:00 min, about 2:00 min left",
        "Measuring AutoAttack: apgd-t (2 of 4), 0/90 images, 25/100 robust, 0 s",
    ]
    assert [show_time(seconds) for seconds in (59.4, 3599, 3600)] == ["59 s", "59:59 min", "1:00 h"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_write_the_rows_of_one(run: Path, trained: Path, tmp_path: Path) -> None:
    wanted = options(
        "evaluation.pgd_steps=[2]",
        "evaluation.sweep=[0.05]",
        "evaluation.features=1",
        "data.test_limit=40",
    )
    both = Path(shutil.copytree(run, tmp_path / "both", symlinks=True))
    alone = Path(shutil.copytree(run, tmp_path / "alone", symlinks=True))
    transfer = ("--transfer-from", str(trained / "other"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for folder, words in ((both, start), (alone, ())):
        done = subprocess.run(
            [sys.executable, *words, "-m", "dkl", "evaluate", str(folder), *wanted, *transfer],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("PGD-2") == 1, "only the first process speaks"
    assert comparable(read_run(both).results) == comparable(read_run(alone).results)
    assert len(results(both)) == len(results(alone))


# Small things


def test_flags_are_packed_without_loss() -> None:
    for count in (1, 7, 8, 9, 100):
        some = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
        assert torch.equal(unpack_flags(pack_flags(some), count), some)


def test_shipped_recipes_stay_valid() -> None:
    settings = load_recipe("digits_ikl_at").evaluation
    assert not settings.square
    assert not settings.masking_checks
    assert settings.features == 0


def test_a_model_left_in_training_mode_is_measured_in_evaluation_mode(run: Path, monkeypatch):
    from dkl.build import evaluating

    load = evaluating.load_run_model

    def in_training(*args):
        model, weights_hash = load(*args)
        assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        return model.train(), weights_hash

    expected = comparable(measured(run, "evaluation.pgd_steps=[2]"))
    monkeypatch.setattr(evaluating, "load_run_model", in_training)
    assert comparable(measured(run, "evaluation.pgd_steps=[2]", again=True)) == expected
