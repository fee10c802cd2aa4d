"""The README's Python runs as it stands, on small stand-ins for the reader's own objects."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dkl

ROOT = Path(dkl.__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


LOSSES_PAGE = (ROOT / "docs" / "losses.md").read_text()


def test_python_of_the_page_on_losses_runs() -> None:
    names: dict[str, object] = {}
    values = []
    for block in re.findall(r"```python\n(.*?)```", LOSSES_PAGE, re.DOTALL):
        exec(block, names)
        values.append(names["loss"])
    assert len(values) == 2
    assert all(isinstance(value, torch.Tensor) and value.isfinite() for value in values)


def test_the_readme_has_two_python_blocks() -> None:
    assert len(BLOCKS) == 2


def test_losses_of_the_readme_run() -> None:
    logits = {name: torch.randn(4, 100) for name in ("student", "teacher", "adversarial", "clean")}
    batch = (torch.rand(4, 8), torch.tensor([0, 5, 5, 99]))
    names = {f"{name}_logits": value for name, value in logits.items()}
    names |= {"model": nn.Linear(8, 100), "teacher": nn.Linear(8, 100)}
    names |= {"epochs": 2, "loader": [batch, batch]}
    exec(BLOCKS[0], names)
    assert names["loss"].isfinite()
    table = names["statistics"].table
    torch.testing.assert_close(table.sum(1), torch.ones(100))
    assert not torch.allclose(table[5], torch.full((100,), 0.01))


def test_training_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = TensorDataset(torch.rand(16, 1, 4, 4), torch.arange(16) % 10)
    names = {
        "dkl": dkl,
        "my_model": nn.Sequential(nn.Flatten(), nn.Linear(16, 10)),
        "my_train_dataset": dataset,
        "my_val_dataset": dataset,
    }
    exec(BLOCKS[1].replace("epochs=100", "epochs=1"), names)
    assert (tmp_path / "runs" / "mine" / "records.jsonl").is_file()
