"""Stopped runs go on bit for bit; what cannot go on says why."""

import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_training import (
    InterruptingData,
    TinyData,
    TinyMethod,
    TinyPerturbation,
    assert_same_run,
    tiny_fit,
    tiny_model,
    tiny_settings,
)

from dkl.engine import (
    AverageSettings,
    CheckpointError,
    ResumeError,
    find_checkpoint,
    load_checkpoint,
    step_decay,
)
from dkl.engine.recorder import read_rows


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


VARIANTS = {
    "plain": {},
    "average_per_step": {"weight_average": AverageSettings(decay=0.9, ramp=True)},
    "average_per_epoch": {"weight_average": AverageSettings(decay=0.9, per="epoch")},
    "perturbed": {"weight_perturbation": TinyPerturbation(start_epoch=1)},
    "adamw_scheduled": {"make_optimizer": adamw, "schedule": step_decay([0.5, 1.5], 0.5)},
}


def run(out_dir: Path, data=None, resume: bool = False, settings=None, **options):
    """Train a model with dropout and batch-norm: both have state that a resume must keep."""
    return tiny_fit(
        out_dir,
        model=tiny_model(dropout=0.3, batch_norm=True),
        data=data,
        settings=settings or tiny_settings(),
        resume=resume,
        **options,
    )[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at_batch", [1, 4, 6])
def test_stopped_run_goes_on_bit_for_bit(tmp_path: Path, variant: str, at_batch: int) -> None:
    run(tmp_path / "straight", **VARIANTS[variant])
    stopped = run(tmp_path / "stopped", data=InterruptingData(at_batch), **VARIANTS[variant])
    assert stopped.stopped_early
    assert stopped.steps_done == at_batch
    resumed = run(tmp_path / "stopped", resume=True, **VARIANTS[variant])
    assert not resumed.stopped_early
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_stopped_at_every_step_in_turn(tmp_path: Path) -> None:
    settings = tiny_settings(accumulation=2)
    run(tmp_path / "straight", settings=settings)
    run(tmp_path / "stopped", data=InterruptingData(2), settings=settings)
    while find_checkpoint(tmp_path / "stopped").name < "step_00000006_epoch_00002":
        run(tmp_path / "stopped", data=InterruptingData(2), settings=settings, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_only_the_rest_of_the_data_is_read(tmp_path: Path) -> None:
    straight, rest = TinyData(), TinyData()
    run(tmp_path / "straight", data=straight)
    run(tmp_path / "stopped", data=InterruptingData(2))
    run(tmp_path / "stopped", data=rest, resume=True)
    assert rest.asked == straight.asked[2:]


def test_crash_falls_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    class Crashing(TinyData):
        def batches(self, index_batches, device):
            for batch in super().batches(index_batches, device):
                if len(self.asked) == 5:
                    raise OSError("the disk went away")
                yield batch

    settings = tiny_settings(checkpoint_every_steps=2)
    run(tmp_path / "straight", settings=settings)
    with pytest.raises(OSError, match="went away"):
        run(tmp_path / "crashed", data=Crashing(), settings=settings)
    assert find_checkpoint(tmp_path / "crashed").name == "step_00000004_epoch_00001"
    run(tmp_path / "crashed", settings=settings, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "crashed")


def test_records_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    run(tmp_path / "stopped", data=InterruptingData(2))
    with (tmp_path / "stopped" / "records.jsonl").open("a") as file:
        file.write('{"kind": "step", "epoch": 0, "step": 3}\n{"kind": "epo')
    run(tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    first = run(tmp_path)
    rows = read_rows(tmp_path / "records.jsonl")
    data = TinyData()
    again = run(tmp_path, data=data, resume=True)
    assert again == first
    assert not data.asked
    assert read_rows(tmp_path / "records.jsonl") == rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_after_the_step(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    result = run(tmp_path, data=InterruptingData(2, number))
    assert signal.getsignal(number) is before
    assert result.stopped_early
    assert (result.epochs_done, result.steps_done) == (0, 2)
    assert result.last_checkpoint.name == "step_00000002_epoch_00000"
    assert [row["step"] for row in read_rows(tmp_path / "records.jsonl")] == [1, 2]


def test_second_interrupt_is_immediate(tmp_path: Path) -> None:
    class Impatient(InterruptingData):
        def batches(self, index_batches, device):
            for batch in super().batches(index_batches, device):
                if len(self.asked) == self.at_batch:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=Impatient(2, signal.SIGINT))
    assert find_checkpoint(tmp_path).name == "step_00000000_epoch_00000"


def test_signal_during_validation_stops_after_the_epoch(tmp_path: Path) -> None:
    def validate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"val_loss": 1.0}

    result = run(tmp_path, validate=validate)
    assert result.stopped_early
    assert (result.epochs_done, result.steps_done) == (1, 3)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="start without --resume"):
        run(tmp_path, resume=True)


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    run(tmp_path, data=InterruptingData(2))
    with pytest.raises(ResumeError, match=r"already holds a run.*--resume"):
        run(tmp_path)


def test_run_that_lost_its_links(tmp_path: Path) -> None:
    run(tmp_path, data=InterruptingData(2))
    (tmp_path / "checkpoints" / "last").unlink()
    for resume in (False, True):
        with pytest.raises(ResumeError, match=r"link .*last to step_00000002_epoch_00000"):
            run(tmp_path, resume=resume)


def test_start_that_was_killed_before_its_first_link(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    first = tmp_path / "killed" / "checkpoints" / "step_00000000_epoch_00000"
    first.mkdir(parents=True)
    (first / "meta.json").write_text(
        '{"format": "dkl-checkpoint", "format_version": 1, "files": {}, "step": 0}'
    )
    run(tmp_path / "killed")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_other_recipe_is_refused_by_key(tmp_path: Path) -> None:
    recipe = {"name": "tiny", "optimizer": {"lr": 0.1, "kind": "sgd"}, "steps": (1, 2)}
    run(tmp_path, data=InterruptingData(2), recipe=recipe)
    other = recipe | {"optimizer": {"lr": 0.2, "kind": "sgd"}, "extra": 1}
    with pytest.raises(ResumeError) as caught:
        run(tmp_path, recipe=other, resume=True)
    message = str(caught.value)
    assert "recipe.optimizer.lr was 0.1 and is now 0.2" in message
    assert "recipe.extra was None and is now 1" in message
    assert "kind" not in message
    run(tmp_path, recipe=recipe, resume=True)


def test_other_settings_and_data_are_refused(tmp_path: Path) -> None:
    run(tmp_path, data=InterruptingData(2))
    with pytest.raises(ResumeError, match=r"settings\.epochs was 2 and is now 3"):
        run(tmp_path, settings=tiny_settings(epochs=3), resume=True)
    with pytest.raises(ResumeError, match="num_samples was 22 and is now 10"):
        run(tmp_path, data=TinyData(10), resume=True)
    # Bookkeeping is not part of the trajectory.
    settings = tiny_settings(keep_last=3, checkpoint_every_steps=1, record_every_steps=7)
    run(tmp_path, settings=settings, resume=True)


def test_recipe_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON values only"):
        run(tmp_path, recipe={"path": Path("x")})


def test_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    run(tmp_path, data=InterruptingData(2))
    path = find_checkpoint(tmp_path) / "training_state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"training_state\.pt is damaged"):
        run(tmp_path, resume=True)


def test_full_disk_ends_the_run_but_not_the_checkpoint(tmp_path: Path, monkeypatch) -> None:
    run(tmp_path / "straight")
    real = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if "step_00000006" in str(path) and path.suffix == ".pt":
            real(path, data[:100])
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(tmp_path / "full")
    assert find_checkpoint(tmp_path / "full").name == "step_00000003_epoch_00001"
    monkeypatch.undo()
    run(tmp_path / "full", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "full")


def test_everything_a_resume_needs_is_plain(tmp_path: Path) -> None:
    run(tmp_path, weight_average=AverageSettings(decay=0.9))
    training = load_checkpoint(find_checkpoint(tmp_path)).training
    assert training["average"] == {"num_updates": 6}
    assert {"label_sums", "histogram", "scale"} == training["method"].keys()
    assert {"torch", "python", "numpy"} <= training["processes"][0]["rng"].keys()


def test_method_state_is_consolidated_before_it_is_saved(tmp_path: Path) -> None:
    calls = []

    class Watching(TinyMethod):
        def on_epoch_end(self, epoch: int) -> None:
            calls.append(f"end {epoch}")
            super().on_epoch_end(epoch)

        def consolidate(self) -> None:
            calls.append("consolidate")
            super().consolidate()

    tiny_fit(tmp_path, method=Watching())
    assert calls == ["consolidate", "end 0", "consolidate", "end 1", "consolidate"]
