"""Weights in every container and prefix of the field, damaged files and hostile ones."""

import argparse
import logging
import os
import resource
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dkl.models import CheckpointError, create_model, load_checkpoint, save_weights

CONTAINERS = {
    "flat": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"state_dict": state, "test_acc": 0.5, "epoch": 3},
    "averaged": lambda state: {
        "unaveraged_model_state_dict": {key: value + 1 for key, value in state.items()},
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]},
    },
    "net": lambda state: {"net": state, "acc": 0.5, "epoch": 3},
    "model": lambda state: {"model": state, "schedule": None, "loss": torch.tensor(0.1)},
    "model name": lambda state: {"state_dict": state, "model": "wrn_10_1"},
}
PREFIXES = [
    "", "module.", "module.0.", "model.", "_orig_mod.", "module.model.", "_orig_mod.module.",
    "module._orig_mod.",
]  # fmt: skip


def build(seed, num_classes=4, in_channels=1):
    torch.manual_seed(seed)
    model = create_model("wrn_10_1", num_classes, in_channels=in_channels)
    for name, buffer in model.named_buffers():
        # Buffers that differ between seeds, so that forgetting one shows.
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.fill_(seed)
    return model


def with_prefix(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def assert_same(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for key, value in state.items():
        assert torch.equal(value, other_state[key]), key


def assert_refused(model, path, message):
    """One clear error, and a model that is as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(model, path)
    assert isinstance(caught.value, CheckpointError)
    assert path.name in str(caught.value)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return str(caught.value)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_torch_files(container, prefix, tmp_path):
    source, target = build(1), build(2)
    path = tmp_path / "weights.pt"
    torch.save(CONTAINERS[container](with_prefix(source.state_dict(), prefix)), path)
    assert load_checkpoint(target, path) == []
    assert_same(target, source)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_safetensors_files(prefix, tmp_path):
    source, target = build(1), build(2)
    # The content decides, not the name.
    path = tmp_path / "weights.bin"
    save_file(with_prefix(source.state_dict(), prefix), path)
    assert load_checkpoint(target, path) == []
    assert_same(target, source)


def test_legacy_torch_format(tmp_path):
    source, target = build(1), build(2)
    path = tmp_path / "weights.t7"
    torch.save({"net": source.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert load_checkpoint(target, str(path)) == []
    assert_same(target, source)


def test_compiled_model_takes_plain_weights(tmp_path):
    source, target = build(1), build(2)
    save_weights(source.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(torch.compile(target), tmp_path / "weights.safetensors")
    assert_same(target, source)


def test_a_model_whose_own_names_look_like_a_prefix(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = build(seed)

    source, target = Wrapper(1), Wrapper(2)
    save_weights(source.state_dict(), tmp_path / "a.safetensors")
    assert load_checkpoint(target, tmp_path / "a.safetensors") == []
    assert_same(target, source)


@pytest.mark.parametrize("prefix", ["", "module.", "module.0."])
def test_unused_layers_are_left_out_and_logged(prefix, tmp_path, caplog):
    source, target = build(1), build(2)
    state = with_prefix(source.state_dict(), prefix)
    unused = with_prefix(
        {
            "sub_block1.layer.0.conv1.weight": torch.zeros(2, 2, 3, 3),
            "block1.layer.0.bn1_auto.weight": torch.zeros(2),
            "bn1_auto.running_mean": torch.zeros(2),
        },
        prefix,
    )
    torch.save({"state_dict": {**state, **unused}, "epoch": 1}, tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO, logger="dkl.models"):
        assert load_checkpoint(target, tmp_path / "weights.pt") == list(unused)
    assert_same(target, source)
    assert next(iter(unused)) in caplog.text
    assert "epoch" in caplog.text


def test_an_own_layer_of_such_a_name_is_loaded(tmp_path):
    source, target = nn.Module(), nn.Module()
    source.bn_auto, target.bn_auto = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    nn.init.uniform_(source.bn_auto.weight)
    save_weights(source.state_dict(), tmp_path / "a.safetensors")
    assert load_checkpoint(target, tmp_path / "a.safetensors") == []
    assert_same(target, source)


def test_batch_norm_counters_may_be_missing_or_floats_and_types_differ(tmp_path):
    source, target, other = build(1), build(2), build(3)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pt")
    assert load_checkpoint(target, tmp_path / "old.pt") == []
    assert target.bn1.num_batches_tracked == 2
    torch.save({k: v.double() for k, v in source.state_dict().items()}, tmp_path / "double.pt")
    assert load_checkpoint(other, tmp_path / "double.pt") == []
    assert_same(other, source)


def test_missing_and_unexpected_names(tmp_path):
    state = build(1).state_dict()
    del state["conv1.weight"], state["fc.bias"]
    state["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pt")
    message = assert_refused(build(2), tmp_path / "a.pt", "does not fit WideResNet")
    assert "2 names missing in the file (conv1.weight, fc.bias)" in message
    assert "1 names unknown to the model (head.weight)" in message
    assert "another architecture" not in message


def test_another_architecture(tmp_path):
    torch.save({"module.foo": torch.zeros(1)}, tmp_path / "a.pt")
    message = assert_refused(build(2), tmp_path / "a.pt", "another architecture")
    assert ", ...)" in message
    assert len(message) < 600


def test_shape_mismatches_teach(tmp_path):
    torch.save(build(1, num_classes=9).state_dict(), tmp_path / "a.pt")
    message = assert_refused(build(2), tmp_path / "a.pt", "2 shapes differ")
    assert "fc.weight is [9, 64] in the file, [4, 64] here" in message
    assert "build it with num_classes=9" in message
    torch.save(build(1, in_channels=3).state_dict(), tmp_path / "b.pt")
    message = assert_refused(build(2), tmp_path / "b.pt", "1 shapes differ")
    assert "build it with in_channels=3" in message
    assert "num_classes" not in message


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a dictionary"),
        ({"epoch": 3, "loss": 0.5}, "holds no weights.*epoch, loss"),
        ({}, "holds no weights.*nothing"),
        ({"net": {"a": torch.zeros(1)}, "model": {"a": torch.ones(1)}}, "each of net, model"),
        ({"a": torch.zeros(1), "b": 3}, "1 entries among the weights are no tensors: b"),
    ],
)
def test_torch_files_without_one_set_of_weights(contents, message, tmp_path):
    torch.save(contents, tmp_path / "a.pt")
    assert_refused(build(1), tmp_path / "a.pt", message)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>Quota exceeded</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"hello, this is no checkpoint at all", "damaged or no checkpoint"),
        (os.urandom(2000).replace(b"<", b"x"), "damaged or no checkpoint"),
        (b"PK\x03\x04" + bytes(100), "damaged or no checkpoint"),
        (b"\x80\x02", "damaged or no checkpoint"),
        ((30).to_bytes(8, "little") + b"{" + bytes(40), "damaged or no checkpoint"),
        ((1 << 40).to_bytes(8, "little") + b'{"a":', "damaged or no checkpoint"),
    ],
    ids=["empty", "html", "lfs", "text", "noise", "zip", "pickle", "safetensors", "huge header"],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints(contents, message, suffix, tmp_path):
    path = tmp_path / f"download{suffix}"
    path.write_bytes(contents)
    assert_refused(build(1), path, message)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind, fraction, tmp_path):
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_weights(build(1).state_dict(), path)
    else:
        torch.save(build(1).state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    contents = path.read_bytes()
    path.write_bytes(contents[: int(fraction * len(contents))])
    assert_refused(build(2), path, "damaged or no checkpoint")


def test_missing_files_and_folders(tmp_path):
    assert_refused(build(1), tmp_path / "absent.pt", "does not exist")
    assert_refused(build(1), tmp_path, "is a folder")


class Payload:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_payloads_do_not_run(zipped, tmp_path):
    path, trace = tmp_path / "bomb.pt", tmp_path / "trace"
    contents = {"state_dict": build(1).state_dict(), "extra": Payload(trace)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    message = assert_refused(build(2), path, "was refused: besides tensors it holds Python objects")
    assert "mkdir" in message
    assert not trace.exists()
    # The payload works: a loader that trusts the file runs it.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_arbitrary_objects_are_refused(tmp_path):
    torch.save({"net": build(1).state_dict(), "args": argparse.Action([], "")}, tmp_path / "a.pt")
    assert_refused(build(2), tmp_path / "a.pt", "was refused.*Action")
    torch.save(build(1), tmp_path / "b.pt")
    assert_refused(build(2), tmp_path / "b.pt", "was refused.*WideResNet")


def test_model_without_memory_is_refused(tmp_path):
    save_weights(build(1).state_dict(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = create_model("wrn_10_1", 4, in_channels=1)
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(model, tmp_path / "a.safetensors")


def test_save_weights_takes_any_layout_and_shared_memory(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "a": shared,
        "b": shared.t(),
        "c": shared[1],
        "d": nn.Parameter(torch.rand(2, 3, 2, 2)).contiguous(memory_format=torch.channels_last),
        "e": torch.tensor(7),
        "f": torch.rand(3).to(torch.bfloat16),
        "g": shared,
    }
    path = tmp_path / "new" / "folder" / "a.safetensors"
    save_weights(state, path)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in state.items():
                self.register_buffer(name, torch.zeros_like(value))

    holder = Holder()
    assert load_checkpoint(holder, path) == []
    for name, value in state.items():
        assert torch.equal(holder.get_buffer(name), value), name
    assert torch.equal(shared, torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("value", [3, torch.eye(2).to_sparse()])
def test_save_weights_refuses_what_is_not_dense(value, tmp_path):
    with pytest.raises(ValueError, match="dense tensors; a is"):
        save_weights({"a": value}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_failed_writes_leave_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    source = build(1)
    save_weights(source.state_dict(), path)
    # A limit on the size of files fails like a full disk: in the middle of writing.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            save_weights(build(2).state_dict(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    target = build(3)
    load_checkpoint(target, path)
    assert_same(target, source)


def test_rewriting_replaces_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(build(1).state_dict(), path)
    save_weights(build(2).state_dict(), path)
    target = build(3)
    load_checkpoint(target, path)
    assert_same(target, build(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
