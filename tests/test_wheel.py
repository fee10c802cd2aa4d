"""The wheel holds all that is needed, and its losses need torch alone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "accelerate",
    "jinja2",
    "lightning",
    "matplotlib",
    "optuna",
    "pyautoattack",
    "pydantic",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
    "transformers",
    "typer",
    "yaml",
)

BARE = f"""
import sys

class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"{{name}} is not here", name=name)

sys.meta_path.insert(0, OnlyTorch())
import torch
import dkl

assert dkl.__file__.startswith(sys.argv[1]), dkl.__file__
student = torch.randn(4, 10, requires_grad=True)
statistics = dkl.ClassStatistics(10)
labels = torch.tensor([1, 2, 3, 4])
loss = dkl.ikl_loss(student, torch.randn(4, 10), class_table=statistics.table, labels=labels)
loss.backward()
assert student.grad.isfinite().all() and student.grad.abs().sum() > 0
try:
    dkl.train
except ModuleNotFoundError as error:
    print("no", error.name)
"""


def run(*words: object, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "dkl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"dkl/py.typed", "dkl/recipes/digits_ikl_at.yaml"} <= wanted
    assert "dkl/reports/templates/report.html.j2" in wanted
    assert wanted <= inside
    others = {name for name in inside - wanted if ".dist-info/" not in name}
    assert others == set(), "nothing else is shipped"
    assert any(name.endswith("LICENSE") for name in inside)


def test_its_losses_need_torch_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    paths = f"import sys; sys.path.insert(0, {str(target)!r})\n"
    said = run("-c", paths + BARE, target, cwd=tmp_path)
    assert said.startswith("no "), "training asks for the extras, losses do not"
    metadata = next(target.glob("dkl-*.dist-info")) / "METADATA"
    required = [
        line
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.6"]
