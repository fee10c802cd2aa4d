"""Records: one object a line, whole lines only, cut back to the checkpoint on resume."""

import io
import json
import math
from pathlib import Path

import pytest
from accelerate import Accelerator

from dkl.engine import progress
from dkl.engine.progress import ProgressDisplay
from dkl.engine.recorder import Recorder, read_rows, truncate_records

ROWS = [
    {"kind": "step", "epoch": 0, "step": 1},
    {"kind": "step", "epoch": 0, "step": 2},
    {"kind": "epoch", "epoch": 0, "step": 2},
    {"kind": "step", "epoch": 1, "step": 3},
    {"kind": "step", "epoch": 1, "step": 4},
    {"kind": "epoch", "epoch": 1, "step": 4},
]
EPOCH_ROW = {"kind": "epoch", "epoch": 1, "step": 4, "images_per_second": 10.0, "train_loss": 0.5}


def write_rows(path: Path, rest: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + rest)


def recorder(run_dir: Path, **options) -> Recorder:
    defaults = {"trackers": (), "num_steps": 4, "num_epochs": 2}
    return Recorder(Accelerator(), run_dir, **defaults | options)


@pytest.mark.parametrize(
    ("epoch", "step", "num_kept"),
    [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 2, 3), (1, 3, 4), (1, 4, 5), (2, 4, 6)],
)
def test_truncation_to_a_checkpoint(tmp_path: Path, epoch: int, step: int, num_kept: int) -> None:
    path = tmp_path / "records.jsonl"
    write_rows(path, '{"kind": "step", "ep')
    truncate_records(path, epoch=epoch, step=step)
    assert read_rows(path) == ROWS[:num_kept]
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in ROWS[:num_kept])
    assert [file.name for file in tmp_path.iterdir()] == ["records.jsonl"]


def test_truncation_without_records(tmp_path: Path) -> None:
    truncate_records(tmp_path / "records.jsonl", epoch=0, step=1)
    assert not list(tmp_path.iterdir())


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_rows(path, '{"kind": "st')
    assert read_rows(path) == ROWS


def test_damage_elsewhere_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "step"}\n{"kind\n{"kind": "step"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_rows(path)


def test_rows_are_on_disk_at_once_and_strict_json(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    records.write({"kind": "step", "epoch": 0, "step": 1, "loss": math.nan})
    line = (tmp_path / "records.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    records.close()


def test_resumed_records_are_appended_to(tmp_path: Path) -> None:
    write_rows(tmp_path / "records.jsonl")
    records = recorder(tmp_path, epoch=1, step=3)
    records.write(EPOCH_ROW)
    records.close()
    assert read_rows(tmp_path / "records.jsonl") == [*ROWS[:4], EPOCH_ROW]


def test_fresh_records_replace_those_without_a_checkpoint(tmp_path: Path) -> None:
    write_rows(tmp_path / "records.jsonl")
    recorder(tmp_path).close()
    assert (tmp_path / "records.jsonl").read_text() == ""


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    records = recorder(tmp_path, trackers=("tensorboard",))
    for step, loss in [(1, 0.5), (2, 0.25)]:
        records.write({"kind": "step", "epoch": 0, "step": step, "loss": loss})
    records.close()
    resumed = recorder(tmp_path, trackers=("tensorboard",), step=1)
    resumed.write({"kind": "step", "epoch": 0, "step": 2, "loss": 0.125})
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 0.5), (2, 0.125)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level("INFO"):
        display = ProgressDisplay(4, 2, 0, visible=True)
        display.show({"kind": "step", "loss": 1.2345})
        display.advance(0, 1, 8)
        display.show(EPOCH_ROW)
        display.close()
    text = terminal.getvalue()
    assert "epoch 1/2" in text
    assert "loss 1.2345" in text
    assert "images/s" in text
    assert not caplog.records


def test_one_log_line_per_epoch_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    output = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", output)
    with caplog.at_level("INFO", logger="dkl.engine"):
        for visible in (True, False):
            display = ProgressDisplay(4, 2, 0, visible=visible)
            display.advance(0, 1, 8)
            display.show(EPOCH_ROW)
            display.close()
    assert not output.getvalue()
    assert [record.message for record in caplog.records] == [
        "epoch 2/2: train_loss 0.5000, 10 images/s"
    ]
