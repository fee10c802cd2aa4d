"""The Python of docs/integrations.md runs as it stands, where its packages are installed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dkl
from dkl.integrations.distillation import DistillationLoss

PAGE = (Path(dkl.__file__).parents[2] / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"## ([^\n]*)\n[^#]*?```python\n(.*?)```", PAGE, re.DOTALL)
PACKAGES = {"timm": "timm", "Lightning": "lightning", "Hugging Face": "transformers"}


class Student(nn.Module):
    """A classifier for all three loops."""

    num_classes, in_chans = 10, 3

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 10)
        self.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Return logits, or what Hugging Face's models return."""
        logits = self.head(pixel_values.flatten(1))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_every_loop_has_its_block() -> None:
    assert [title for title, _ in BLOCKS] == [*PACKAGES, "torchdistill", "TRL"]


@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_python_of_the_page_runs(
    title: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile(block, title, "exec")
    if title not in PACKAGES:
        return  # written against packages that are not installed here; the page says so
    pytest.importorskip(PACKAGES[title])
    monkeypatch.chdir(tmp_path)
    images, labels = torch.rand(16, 3, 2, 2), torch.arange(16) % 10
    pairs = zip(images, labels.tolist(), strict=True)
    names: dict[str, Any] = {
        "DistillationLoss": DistillationLoss,
        "student": Student(),
        "teacher": Student(),
        "criterion": nn.CrossEntropyLoss(),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=8),
        "train_dataset": [{"pixel_values": x, "labels": y} for x, y in pairs],
    }
    before = names["student"].head.weight.clone()
    exec(code, names)
    if title == "timm":
        names["loss"].backward()
        assert names["student"].head.weight.grad.abs().sum() > 0
        table = names["task"].distillation.statistics.table
    else:
        assert not torch.equal(names["student"].head.weight, before)
        table = names["loss"].statistics.table
    assert not torch.allclose(table, torch.full_like(table, 0.1)), "the epoch was committed"
