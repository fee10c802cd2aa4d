"""The command ``dkl export``: what it passes on, prints and refuses."""

import json
import logging
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dkl.build import exporting
from dkl.build.model_info import Submission
from dkl.cli.errors import Commands, common_options
from dkl.cli.export import export

app = typer.Typer(name="dkl", cls=Commands, pretty_exceptions_enable=False)
app.callback()(common_options)
app.command()(export)


@pytest.fixture(autouse=True)
def _logging_as_before():
    logger = logging.getLogger("dkl")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers, logger.level = before


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stand in for the export: note the call, print noise, tell two notes."""
    noted = []

    def export_run(run, *, tell, **options):
        noted.append((run, options))
        print("noise on stdout")
        tell("left null")
        tell("to be filled in: link")
        return [Path("out/a.pt"), Path("out/a.json")]

    monkeypatch.setattr(exporting, "export_run", export_run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "run").mkdir()
    return noted


def run(*words, code=0):
    result = CliRunner().invoke(app, ["export", *words], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_files_on_stdout_and_notes_on_stderr(calls):
    result = run("run")
    assert result.stdout.split() == ["out/a.pt", "out/a.json"]
    assert "Note: left null" in result.stderr
    assert "Note: to be filled in: link" in result.stderr
    defaults = {"format": "robustbench", "out": None, "which": "best", "force": False}
    assert calls == [(Path("run"), {**defaults, "submission": Submission(), "data_overrides": []})]


def test_every_option_arrives(calls):
    paper = ["--name", "A study", "--authors", "A. B", "--link", "l", "--venue", "v"]
    run(
        *["run", "data.folder=x", "--format", "robustbench", "--out", "there", "--force"],
        *["--checkpoint", "last", "--year", "2023", "--additional-data", *paper],
    )
    run_path, options = calls[0]
    assert run_path == Path("run")
    assert options["submission"] == Submission("A study", "A. B", "l", "v", 2023, True)
    assert options["data_overrides"] == ["data.folder=x"]
    assert (options["out"], options["which"], options["force"]) == (Path("there"), "last", True)


def test_other_formats_have_no_submission(calls):
    run("run", "--format", "onnx")
    assert calls[0][1]["submission"] is None
    result = run("run", "--format", "onnx", "--additional-data", code=2)
    assert "--additional-data is for --format robustbench" in " ".join(result.stderr.split())
    assert len(calls) == 1


def test_json_is_one_document(calls):
    document = json.loads(run("run", "--json").stdout)
    assert document == {
        "format": "robustbench",
        "files": ["out/a.pt", "out/a.json"],
        "notes": ["left null", "to be filled in: link"],
    }


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RobustBench cannot load 1 of the names"),
        FileExistsError("a.pt exists; --force (force=True) replaces it"),
        ModuleNotFoundError("exporting to ONNX needs onnx: pip install onnx"),
    ],
)
def test_errors_are_told_in_one_message(error, calls, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(exporting, "export_run", fail)
    result = run("run", code=1)
    assert f"Error: {error}" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "does not exist"),
        (["run", "--format", "pickle"], "'pickle' is not one of"),
        (["run", "--year", "soon"], "valid int"),
    ],
)
def test_wrong_words(words, message, calls):
    assert message in " ".join(run(*words, code=2).stderr.split())
    assert calls == []


def test_a_folder_that_is_no_run(tmp_path):
    result = run(str(tmp_path), code=1)
    assert "neither a run nor inside one" in " ".join(result.stderr.split())


def test_an_empty_title_is_refused(calls):
    assert "name is empty" in run("run", "--name", "", code=1).stderr
    assert calls == []
