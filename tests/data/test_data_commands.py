"""``dkl data convert`` and ``dkl data convert-carmon`` as commands."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from dkl.cli.data import convert, convert_carmon, show_long_tailed
from dkl.cli.errors import Commands, common_options
from dkl.data import GeneratedImages, class_sizes


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
    made.callback()(common_options)
    made.command("convert")(convert)
    made.command("convert-carmon")(convert_carmon)
    made.command("long-tailed")(show_long_tailed)
    return made


def compressed(path: Path, num: int) -> Path:
    images = np.full((num, 2, 2, 3), num, np.uint8)
    np.savez_compressed(path, image=images, label=np.arange(num))
    return path


def test_convert(app: typer.Typer, tmp_path: Path) -> None:
    parts = [compressed(tmp_path / f"{num}.npz", num) for num in (4, 6)]
    out = tmp_path / "out"
    arguments = ["convert", *map(str, parts), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(out / "4.npz"), str(out / "6.npz")]
    generated = GeneratedImages(done.stdout.split(), num_classes=6, image_shape=(3, 2, 2))
    assert generated.rows(torch.tensor([0, 9]))[0][:, 0, 0, 0].tolist() == [4, 6]

    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == {"parts": [str(out / "4.npz"), str(out / "6.npz")]}

    mapped = CliRunner().invoke(app, ["convert", str(out / "4.npz"), "--out", str(tmp_path / "x")])
    assert mapped.stdout.split() == [str(out / "4.npz")]
    assert "1 of 1 parts can be mapped as they are" in mapped.stderr


def test_convert_carmon(app: typer.Typer, tmp_path: Path) -> None:
    content = {
        "data": np.full((5, 2, 2, 3), 7, np.uint8),
        "extrapolated_targets": np.arange(5),
    }
    (tmp_path / "ti.pickle").write_bytes(pickle.dumps(content))
    out = tmp_path / "ti.npz"
    arguments = ["convert-carmon", str(tmp_path / "ti.pickle"), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"parts": [str(out)]}
    generated = GeneratedImages([out], num_classes=5, image_shape=(3, 2, 2))
    assert generated.rows(torch.arange(5))[1].tolist() == [0, 1, 2, 3, 4]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    # The frame that the message stands in breaks its lines where the path ends.
    assert "exists; move it" in " ".join(again.stderr.replace("\u2502", " ").split())


def test_errors_are_one_message(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"hello")
    for arguments, message in (
        (["convert", str(tmp_path / "bad.npz"), "--out", str(tmp_path)], "is not an npz file"),
        (["convert", str(tmp_path / "gone"), "--out", str(tmp_path)], "does not exist"),
        (
            ["convert-carmon", str(tmp_path / "bad.npz"), "--out", str(tmp_path / "x.npz")],
            "cannot be read safely",
        ),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert message in done.stderr
        assert "Traceback" not in done.output
        assert done.stdout == ""


def test_long_tailed(app: typer.Typer) -> None:
    arguments = ["long-tailed", "digits", "--imbalance", "20", "--max-per-class", "120"]
    sizes = class_sizes(120, 10, 20)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert ["0", "120", "many"] in lines
    assert ["9", "6", "few"] in lines
    assert [str(sum(sizes)), "images"] in lines

    content = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert content["images"] == sum(sizes)
    assert tuple(one["images"] for one in content["classes"]) == sizes
    groups = ["many" if size > 100 else "few" if size < 20 else "medium" for size in sizes]
    assert [one["group"] for one in content["classes"]] == groups

    wrong = CliRunner().invoke(app, ["long-tailed", "digits", "--imbalance", "1000"])
    assert wrong.exit_code != 0
    assert "imbalance must lie in 1 to" in wrong.stderr
