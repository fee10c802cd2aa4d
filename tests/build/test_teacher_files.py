"""Published teachers: the list agrees with the recipes, and files are checked strictly."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dkl.build import teacher_files
from dkl.build.teacher_files import PUBLISHED_TEACHERS, check_teachers
from dkl.cli import app
from dkl.config import load_recipe, table_recipes
from dkl.models import create_model, list_models

BY_NAME = {teacher.architecture: teacher for teacher in PUBLISHED_TEACHERS}


def write(folder: Path, architecture: str, content: object) -> None:
    file = folder / BY_NAME[architecture].file
    file.parent.mkdir(parents=True)
    torch.save(content, file)


def test_recipes_name_teachers_of_the_list():
    used = set()
    for name, one in table_recipes().items():
        teacher = getattr(load_recipe(name).method, "teacher", None)
        if teacher is None or teacher.checkpoint is None:
            continue
        known = BY_NAME[teacher.model.name]
        assert teacher.checkpoint == f"teachers/{known.file}", name
        assert (teacher.model.mean, teacher.model.std) == (known.mean, known.std), name
        assert known.dataset == load_recipe(name).data.name
        used.add(teacher.model.name)
        assert one.published is None or 60 < one.published < 90
    assert used >= {name for name in BY_NAME if not name.startswith("timm/")}


def test_the_list_is_plain():
    assert len({teacher.file for teacher in PUBLISHED_TEACHERS}) == len(PUBLISHED_TEACHERS) == 9
    for teacher in PUBLISHED_TEACHERS:
        assert teacher.architecture in list_models() or teacher.architecture.startswith("timm/")
        assert 70 < teacher.top1 < 90
        assert teacher.source
    # The first weights of torchvision, not its later ones of the same network (80.86).
    assert BY_NAME["timm/resnet50"].top1 == 76.13


def test_files_are_absent_fit_or_are_wrong(tmp_path):
    weights = {name: create_model(name, 100).state_dict() for name in ("resnet56", "vgg13")}
    write(tmp_path, "resnet56", {"epoch": 240, "model": weights["resnet56"], "accuracy": 72.3})
    write(tmp_path, "vgg13", {"model": weights["resnet56"]})
    ten = create_model("wrn_40_2", 10).state_dict()
    write(tmp_path, "wrn_40_2", {"model": ten})
    page = tmp_path / BY_NAME["timm/resnet34"].file
    page.write_text("<html>not found</html>")
    checks = {one.teacher.architecture: one for one in check_teachers(tmp_path)}
    assert list(checks) == list(BY_NAME)
    assert checks["resnet56"].found == "fits"
    for name, message in (
        ("vgg13", "is it another architecture"),
        ("wrn_40_2", "the file has 10 classes, the model 100"),
        ("timm/resnet34", "is a web page"),
    ):
        assert checks[name].found == "wrong"
        assert message in checks[name].message
    assert {one.found for one in checks.values() if not one.message} == {"fits", "absent"}


def test_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(ValueError, match="`dkl teachers list` names"):
        check_teachers(tmp_path / "teachers")


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    listed = runner.invoke(app, ["teachers", "list"])
    assert listed.exit_code == 0
    for teacher in PUBLISHED_TEACHERS:
        assert teacher.file in listed.stdout
        assert f"{teacher.top1:.2f}" in listed.stdout
    documents = json.loads(runner.invoke(app, ["teachers", "list", "--json"]).stdout)
    assert [one["top1"] for one in documents] == [one.top1 for one in PUBLISHED_TEACHERS]
    assert runner.invoke(app, ["teachers", "check"]).exit_code != 0
    folder = tmp_path / "teachers"
    folder.mkdir()
    found = runner.invoke(app, ["teachers", "check", "--json"])
    assert found.exit_code == 0
    assert {one["found"] for one in json.loads(found.stdout)} == {"absent"}
    monkeypatch.setattr(teacher_files, "PUBLISHED_TEACHERS", (BY_NAME["resnet56"],))
    write(folder, "resnet56", {"model": create_model("resnet20", 100).state_dict()})
    wrong = runner.invoke(app, ["teachers", "check"])
    assert wrong.exit_code == 1
    assert "wrong" in wrong.stdout
    assert "does not fit" in wrong.stderr
