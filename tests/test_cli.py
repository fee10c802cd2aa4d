import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dkl.cli import app
from dkl.config import load_recipe, recipe_text, resolved, to_yaml
from dkl.reports import ResultRow, append_results


@dataclass
class Outcome:
    run_dir: Path
    stopped_early: bool = False
    best_metric: str | None = "val_accuracy"
    best_value: float | None = 0.75
    seconds: float = 12.0


@dataclass
class TuneOutcome:
    best_overrides: list[str]
    best_value: float
    trials: list[dict[str, Any]]


@dataclass
class Build:
    """Stands in for dkl.build: notes calls and leaves run folders behind."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    stop_seed: int | None = None
    error: BaseException | None = None
    value: float = 0.5

    def train_recipe(self, recipe, out, *, resume=False):
        print("noise on stdout")
        self.calls.append(("train", recipe.name, recipe.seed, out, resume))
        if self.error is not None:
            raise self.error
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(to_yaml(recipe))
        self.recipe = recipe
        return Outcome(out, stopped_early=recipe.seed == self.stop_seed)

    def evaluate_run(self, path, *, recipe_overrides=None, which="best", progress=None):
        print("noise on stdout")
        self.calls.append(("evaluate", path, recipe_overrides, which))
        if self.error is not None:
            raise self.error
        progress("clean accuracy", None)
        recipe = yaml.safe_load((path / "recipe.yaml").read_text())
        common = {"run_name": recipe["name"], "seed": recipe["seed"], "settings_hash": "00"}
        rows = [
            ResultRow(metric="clean_accuracy", value=self.value, num_samples=8, **common),
            ResultRow(metric="class_margin", value=0.1, num_samples=8, class_index=0, **common),
        ]
        append_results(path / "results.jsonl", rows)
        return rows

    def tune_recipe(self, recipe, *, budget, out, progress=None):
        print("noise on stdout")
        self.calls.append(("tune", recipe.name, budget, out))
        trial = {
            "kind": "trial",
            "number": 0,
            "state": "complete",
            "value": 0.9,
            "overrides": ["method.beta=3.0"],
            "seconds": 1.0,
        }
        progress(trial)
        return TuneOutcome(["method.beta=3.0"], 0.9, [trial])


@pytest.fixture
def build(monkeypatch, tmp_path):
    stand_in = Build()
    module = ModuleType("dkl.build")
    for name in ("train_recipe", "evaluate_run", "tune_recipe"):
        setattr(module, name, getattr(stand_in, name))
    monkeypatch.setitem(sys.modules, "dkl.build", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    return stand_in


@pytest.fixture(autouse=True)
def _logging_as_before():
    logger = logging.getLogger("dkl")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers, logger.level = before


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    if code:
        assert "Traceback" not in result.output
    return result


def plain(text):
    """Join what the terminal wrapped and boxed."""
    return " ".join(text.replace("\u2502", " ").split())


# train


def test_train_makes_a_run_per_seed_then_measures_and_compares(build):
    result = run("train", "digits_trades", "method.beta=3", "--seeds", "0,2")
    folders = [Path("runs/digits_trades/seed_0"), Path("runs/digits_trades/seed_2")]
    assert build.calls == [
        ("train", "digits_trades", 0, folders[0], False),
        ("evaluate", folders[0], [], "best"),
        ("train", "digits_trades", 2, folders[1], False),
        ("evaluate", folders[1], [], "best"),
    ]
    assert build.recipe.method.beta == 3
    assert "50.0" in result.stdout
    assert str(folders[1]) in result.stdout


@pytest.mark.parametrize(
    ("options", "seed", "folder"),
    [
        ((), 0, "runs/digits_kd/seed_0"),
        (("--seed", 7), 7, "runs/digits_kd/seed_7"),
        (("seed=5",), 5, "runs/digits_kd/seed_5"),
        (("--out", "here"), 0, "here"),
        (("--out", "here", "--seed", 3, "--resume"), 3, "here"),
        (("--out", "here", "--seeds", "4"), 4, "here/seed_4"),
    ],
)
def test_where_a_run_goes(build, options, seed, folder):
    run("train", "digits_kd", "--no-evaluate", *options)
    assert build.calls == [("train", "digits_kd", seed, Path(folder), "--resume" in options)]


def test_without_validation_the_last_checkpoint_is_measured(build):
    run("train", "digits_natural", "training.best_metric=null")
    assert build.calls[-1][-1] == "last"


def test_a_stopped_run_exits_with_0_and_says_how_to_go_on(build):
    build.stop_seed = 1
    result = run("train", "digits_trades", "method.beta=3", "--seeds", "0,1,2", "--out", "my runs")
    assert [call[0] for call in build.calls] == ["train", "evaluate", "train"]
    command = "dkl train digits_trades method.beta=3 --out 'my runs' --seeds 0,1,2 --resume"
    assert command in plain(result.stderr)


def test_train_json_is_the_only_thing_on_stdout(build):
    result = run("train", "digits_trades", "--seeds", "0,1", "--json")
    document = json.loads(result.stdout)
    assert document["recipe"] == "digits_trades"
    assert [one["seed"] for one in document["runs"]] == [0, 1]
    assert document["runs"][0]["results"][0]["value"] == 0.5
    assert document["runs"][0]["best_value"] == 0.75
    assert "noise on stdout" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", 1, "--seeds", "1,2"), "not both"),
        (("--seeds", "1,x"), "0,1,2"),
        (("--seeds", "1,1"), "different"),
        (("--seed", -1), "--seed"),
        (("--bogus",), "--bogus"),
    ],
)
def test_bad_options_exit_with_2(build, options, message):
    assert message in plain(run("train", "digits_trades", *options, code=2).stderr)
    assert build.calls == []


def test_recipe_errors_exit_with_2_before_anything_runs(build):
    result = run("train", "digits_trades", "method.betta=1", "training.epochs=0", code=2)
    assert "did you mean 'beta'?" in result.stderr
    assert "training.epochs = 0" in result.stderr
    assert result.stdout == ""
    assert "did you mean 'digits_trades'?" in run("train", "digits_tradse", code=2).stderr
    assert build.calls == []


def test_brackets_in_messages_are_not_markup(build):
    build.error = ValueError("values [red] must be in [0, 1]")
    assert "values [red] must be in [0, 1]" in run("train", "digits_trades", code=1).stderr


# Errors


class OurError(RuntimeError):
    pass


OurError.__module__ = "dkl.engine.state"


@pytest.mark.parametrize(
    "error",
    [ValueError("why"), FileNotFoundError("why"), ImportError("why"), OurError("why")],
)
def test_errors_that_users_can_mend_are_one_message(build, error):
    build.error = error
    result = run("train", "digits_trades", code=1)
    assert "Error: why" in result.stderr
    assert "--traceback" in result.stderr
    assert "why" not in result.stdout


@pytest.mark.parametrize("where", [0, 1, 2])
def test_traceback_is_understood_anywhere(build, where):
    build.error = ValueError("why")
    words = ["train", "digits_trades"]
    words.insert(where, "--traceback")
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ValueError)


def test_mistakes_in_the_code_are_not_hidden(build):
    build.error = TypeError("a bug")
    result = CliRunner().invoke(app, ["train", "digits_trades"])
    assert isinstance(result.exception, TypeError)


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(build):
    build.error = KeyboardInterrupt()
    assert "--resume" in run("train", "digits_trades", code=130).stderr
    run("train", "digits_trades", "--no-evaluate", code=130)


def test_only_the_first_process_speaks(build, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = run("train", "digits_trades", "--json")
    assert result.stdout == ""
    assert [call[0] for call in build.calls] == ["train"]


# evaluate


def test_evaluate_prints_a_table_or_json(build):
    run("train", "digits_trades", "--no-evaluate")
    folder = Path("runs/digits_trades/seed_0")
    result = run("evaluate", folder, "evaluation.num_images=9", "--checkpoint", "last")
    assert build.calls[-1] == ("evaluate", folder, ["evaluation.num_images=9"], "last")
    assert "50.00" in result.stdout
    assert "Measuring clean accuracy" in result.stderr
    assert "class" not in result.stdout
    document = json.loads(run("evaluate", folder, "--json").stdout)
    assert [row["metric"] for row in document["results"]] == ["clean_accuracy", "class_margin"]


def test_evaluate_needs_something_that_exists(build):
    assert "does not exist" in plain(run("evaluate", "nowhere", code=2).stderr)


def test_evaluate_refuses_what_training_settled(build, tmp_path):
    result = run("evaluate", tmp_path, "evaluation.eps=0.1", "training.epochs=3", code=2)
    assert "training.epochs=3" in plain(result.stderr)
    assert build.calls == []


# compare and report


def test_compare_expands_folders_and_patterns_once_each(build):
    run("train", "digits_trades", "--seeds", "0,1,2")
    build.value = 0.75
    run("train", "digits_ikl_at", "--seeds", "0,1")
    # A teacher inside a run and the trials of a search are no rows of their own.
    teacher = Path("runs/digits_trades/seed_0/teacher")
    trial = Path("runs/digits_trades/tune/trial_0000")
    for folder in (teacher, trial):
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(to_yaml(load_recipe("digits_natural")))
    (trial.parent / "trials.jsonl").write_text("")
    for words in (
        ["runs"],
        ["runs/digits_*", "runs/digits_trades/seed_0"],
        [Path("runs").resolve()],
    ):
        document = json.loads(run("compare", *words, "--json").stdout)
        seeds = {row["recipe"]: row["seeds"] for row in document["rows"]}
        assert seeds == {"digits_trades": [0, 1, 2], "digits_ikl_at": [0, 1]}
    table = run("compare", "runs").stdout
    assert "75.0" in table
    assert "digits_ikl_at" in table
    named = json.loads(run("compare", teacher, "--json").stdout)
    assert [row["recipe"] for row in named["rows"]] == ["digits_natural"]


@pytest.mark.parametrize("command", ["compare", "report"])
def test_no_run_is_bad_usage(build, command, tmp_path):
    for pattern in ("nowhere", "runs_*", tmp_path):
        assert "recipe.yaml" in plain(run(command, pattern, code=2).stderr)


def test_report_goes_beside_the_runs_unless_told(build, monkeypatch):
    written = []
    monkeypatch.setattr("dkl.reports.write_report", lambda runs, path: written.append((runs, path)))
    run("train", "digits_trades", "--seeds", "0,1")
    assert "report.html" in run("report", "runs").stdout
    run("report", "runs/digits_trades/seed_1")
    run("report", "runs", "--out", "new/all.html")
    runs, paths = zip(*written, strict=True)
    assert [len(each) for each in runs] == [2, 1, 2]
    assert [path.resolve().relative_to(Path.cwd()).as_posix() for path in paths] == [
        "runs/digits_trades/report.html",
        "runs/digits_trades/seed_1/report.html",
        "new/all.html",
    ]
    assert Path("new").is_dir()


# tune


def test_tune_prints_the_command_that_trains_the_best(build):
    result = run("tune", "digits_trades", "training.epochs=2", "--budget", 5)
    assert build.calls == [("tune", "digits_trades", 5, Path("runs/digits_trades/tune"))]
    assert "dkl train digits_trades training.epochs=2 method.beta=3.0" in plain(result.stdout)
    assert "Trial 0 (complete): 0.9" in result.stderr
    document = json.loads(run("tune", "digits_trades", "--budget", 5, "--json").stdout)
    assert document["best_overrides"] == ["method.beta=3.0"]
    assert len(document["trials"]) == 1


def test_tune_needs_a_budget(build):
    assert "--budget" in run("tune", "digits_trades", code=2).stderr


# recipes


def test_recipes_are_listed_shown_and_copied(build, tmp_path):
    assert "digits_ikl_at" in run("recipes", "list").stdout
    listed = json.loads(run("recipes", "list", "--json").stdout)
    assert {"digits_trades", "digits_kd"} <= {one["name"] for one in listed}
    assert run("recipes", "show", "digits_kd").stdout == recipe_text("digits_kd")
    assert json.loads(run("recipes", "show", "digits_kd", "--json").stdout)["name"] == "digits_kd"
    full = yaml.safe_load(run("recipes", "show", "cifar100_ikl_at_mse_3", "--full").stdout)
    assert full == resolved(load_recipe("cifar100_ikl_at_mse_3"))
    run("recipes", "copy", "digits_kd")
    assert load_recipe("digits_kd.yaml") == load_recipe("digits_kd")
    run("recipes", "copy", "digits_kd", "folder/mine.yaml")
    assert Path("folder/mine.yaml").read_text() == recipe_text("digits_kd")
    run("recipes", "copy", "digits_trades", "folder")
    assert Path("folder/digits_trades.yaml").exists()


def test_copy_does_not_overwrite_unless_told(build):
    Path("digits_kd.yaml").write_text("mine")
    assert "--force" in plain(run("recipes", "copy", "digits_kd", code=2).stderr)
    assert Path("digits_kd.yaml").read_text() == "mine"
    run("recipes", "copy", "digits_kd", "--force")
    assert Path("digits_kd.yaml").read_text() == recipe_text("digits_kd")


def test_unknown_recipes_are_named_with_the_nearest(build):
    assert "'digits_kd'" in run("recipes", "show", "digit_kd", code=2).stderr
    assert "'digits_kd'" in run("recipes", "copy", "digit_kd", code=2).stderr


# Help and the process


@pytest.mark.parametrize(
    "words",
    [(), ("train",), ("evaluate",), ("compare",), ("report",), ("tune",), ("recipes", "copy")],
)
def test_help_shows_examples(words):
    text = plain(run(*words, "--help").stdout)
    assert "Usage: " in text
    assert "Examples dkl " in text


def test_commands_with_a_typo_get_a_suggestion():
    assert "train" in run("trian", code=2).stderr


def shell(*words, cwd, code, afterwards="pass"):
    script = f"from dkl.cli import main\ntry: main()\nfinally: {afterwards}"
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_process_prints_its_version_and_nothing_heavy_is_imported(tmp_path):
    code = "import sys; print(sorted({'accelerate', 'matplotlib', 'dkl.build'} & set(sys.modules)))"
    done = shell("--version", cwd=tmp_path, code=0, afterwards=code)
    version, heavy = done.stdout.splitlines()
    assert version.startswith("dkl ")
    assert heavy == "[]"


def test_the_process_tells_errors_without_traceback(tmp_path):
    done = shell("train", "digits_trade", cwd=tmp_path, code=2)
    assert "did you mean 'digits_trades'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
