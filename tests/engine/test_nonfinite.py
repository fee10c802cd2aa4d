"""A loss that is not finite ends the run with its batch kept, and never reaches a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyData, TinyMethod, tiny_fit, tiny_model, tiny_settings

from dkl.engine import NonFiniteLossError, find_checkpoint, load_weights
from dkl.engine.recorder import read_rows


class Exploding(TinyMethod):
    """Returns a bad loss, or bad gradients, at one step."""

    def __init__(self, at_step: int, value: float, in_gradient: bool = False) -> None:
        super().__init__()
        self.at_step, self.value, self.in_gradient = at_step, value, in_gradient

    def loss(self, model, batch, context):
        output = super().loss(model, batch, context)
        if context.step != self.at_step:
            return output
        if self.in_gradient:
            output.loss.register_hook(lambda gradient: gradient * self.value)
            return output
        return replace(output, loss=output.loss * self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at_step", [0, 4, 5])
def test_bad_loss(tmp_path: Path, value: float, at_step: int) -> None:
    data = TinyData()
    settings = tiny_settings(checkpoint_every_steps=1)
    with pytest.raises(NonFiniteLossError) as caught:
        tiny_fit(tmp_path, method=Exploding(at_step, value), data=data, settings=settings)
    path = tmp_path / "nonfinite" / f"step_{at_step:08d}.safetensors"
    for needed in (f"at step {at_step} ", str(path), "lower learning rate"):
        assert needed in str(caught.value)
    batch = load_file(path)
    assert batch["indices"].tolist() == data.asked[at_step]
    assert torch.equal(batch["labels"], data.labels[batch["indices"]])
    assert batch["images"].shape == batch["extras.noisy"].shape
    assert batch["mask"].all()
    assert find_checkpoint(tmp_path).name.startswith(f"step_{at_step:08d}")
    assert all(tensor.isfinite().all() for tensor in load_weights(tmp_path, "last").values())
    assert [r["step"] for r in read_rows(tmp_path / "records.jsonl") if r["kind"] == "step"] == (
        list(range(1, at_step + 1))
    )


def test_bad_gradient_does_not_reach_a_checkpoint(tmp_path: Path) -> None:
    # The loss is finite, so nothing shows until the weights are looked at.
    settings = tiny_settings(checkpoint_every_steps=1)
    method = Exploding(1, float("nan"), in_gradient=True)
    with pytest.raises(NonFiniteLossError, match="the weights are not finite at step 1 "):
        tiny_fit(tmp_path, method=method, settings=settings)
    assert find_checkpoint(tmp_path).name.startswith("step_00000001")
    assert all(tensor.isfinite().all() for tensor in load_weights(tmp_path, "last").values())


def test_nan_images(tmp_path: Path) -> None:
    class Broken(TinyData):
        def batches(self, index_batches, device):
            for images, labels in super().batches(index_batches, device):
                yield torch.where(images == images.max(), torch.nan, images / 255), labels

    with pytest.raises(NonFiniteLossError, match="NaN in the images"):
        tiny_fit(tmp_path, data=Broken())
    assert load_file(tmp_path / "nonfinite" / "step_00000000.safetensors")["images"].isnan().any()


def test_accumulated_batches_are_all_kept(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError):
        tiny_fit(
            tmp_path, method=Exploding(2, float("nan")), settings=tiny_settings(accumulation=4)
        )
    batch = load_file(tmp_path / "nonfinite" / "step_00000002.safetensors")
    assert len(batch["images"]) == 8
    assert batch["mask"].sum() == 6


def test_bad_weights_at_the_start(tmp_path: Path) -> None:
    model = tiny_model()
    torch.nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(ValueError, match="not finite before the first step"):
        tiny_fit(tmp_path, model=model)


def test_values_that_do_not_count_do_not_matter(tmp_path: Path) -> None:
    class BadPart(TinyMethod):
        def loss(self, model, batch, context):
            output = super().loss(model, batch, context)
            return replace(output, parts={**output.parts, "bad": output.loss.detach() * torch.nan})

    tiny_fit(tmp_path, method=BadPart())
    rows = read_rows(tmp_path / "records.jsonl")
    assert all(row.get("bad") is None and row.get("train_bad") is None for row in rows)
