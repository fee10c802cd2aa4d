"""Files of the published distillation teachers: each form made from one of our networks."""

import argparse
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from dkl.models import CheckpointError, create_model, load_checkpoint

NAMES = ["resnet8", "resnet8x4", "wrn_10_1", "vgg8", "resnet50_cifar", "shufflenet_v1"]


def build(name="resnet8", seed=1):
    torch.manual_seed(seed)
    model = create_model(name, 5, **({} if name in ("wrn_10_1", "shufflenet_v1") else {"width": 4}))
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return model


def settings():
    """RepDistiller's options, as its last file has them."""
    return argparse.Namespace(
        print_freq=100, learning_rate=0.05, lr_decay_epochs=[150, 180, 210], model="resnet8",
        dataset="cifar100", model_path="./save/models", trial=0, momentum=0.9, nothing=None,
    )  # fmt: skip


def optimizer_state(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def parallel(state):
    return {f"module.{key}": value for key, value in state.items()}


# Form -> what the file holds, of a model's weights.
FORMS = {
    "mdistiller's and RepDistiller's teachers": lambda model, state: {
        "epoch": 240,
        "model": state,
        "accuracy": torch.tensor(72.34),
        "optimizer": optimizer_state(build()),
    },
    "in DataParallel": lambda model, state: {"epoch": 240, "model": parallel(state)},
    "RepDistiller's best": lambda model, state: {
        "epoch": 200, "model": state, "best_acc": np.float64(72.5), "optimizer": {},
    },
    "RepDistiller's last": lambda model, state: {"opt": settings(), "model": state},
    "settings before and after": lambda model, state: {
        "opt": settings(), "model": parallel(state), "args": [settings()], "score": np.float32(1),
    },
    "mdistiller's student": lambda model, state: {"model": state},
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, legacy, tmp_path):
    source, target = build(), build(seed=2)
    path = tmp_path / "ckpt_epoch_240.pth"
    contents = FORMS[form](source, source.state_dict())
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    assert load_checkpoint(target, path) == []
    for key, value in source.state_dict().items():
        assert target.state_dict()[key].equal(value), key


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name, tmp_path):
    source, target = build(name), build(name, seed=2)
    path = tmp_path / f"{name}_last.pth"
    torch.save({"opt": settings(), "model": parallel(source.state_dict())}, path)
    assert load_checkpoint(target, path) == []
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(source.eval()(images), target.eval()(images))


def test_families_with_the_same_sizes_do_not_fit_each_other(tmp_path):
    torch.save({"model": build("resnet8").state_dict()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="does not fit ResNet"):
        load_checkpoint(create_model("resnet18_cifar", 5, width=4), tmp_path / "a.pth")


class Call:
    """Pickled as ``function(*arguments)``, and as a state that is given to the result."""

    def __init__(self, function, *arguments, state=None):
        self.contents = (function, arguments, state)

    def __reduce__(self):
        return self.contents


class Trap(argparse.Namespace):
    """Pickled as a Namespace with a state that is no dictionary of settings."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def __reduce__(self):
        return argparse.Namespace, (), self.state


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_payloads_beside_and_inside_of_settings_do_not_run(place, legacy, tmp_path):
    trace = tmp_path / "trace"
    payload = Call(os.mkdir, str(trace))
    extra = (
        {"opt": settings(), "x": payload} if place == "beside" else {"opt": Trap({"x": payload})}
    )
    path = tmp_path / "a.pth"
    contents = {**extra, "model": build().state_dict()}
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"was refused: besides tensors.*mkdir"):
        load_checkpoint(build(seed=2), path)
    assert not trace.exists()
    # The payload works: a loader that trusts the file runs it.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "state",
    [
        {"__setstate__": torch.Size},
        (None, {"__class__": OrderedDict, "__dict__": {}}),
        [1, 2, 3],
        "text",
        torch.zeros(2),
    ],
    ids=["methods", "slots", "list", "text", "tensor"],
)
def test_settings_with_a_strange_state_are_passed_over(state, tmp_path):
    """An own class stands in for Namespace, so whatever the file says about it has no effect."""
    source, target = build(), build(seed=2)
    torch.save({"opt": Trap(state), "model": source.state_dict()}, tmp_path / "a.pth")
    assert load_checkpoint(target, tmp_path / "a.pth") == []
    assert target.fc.weight.equal(source.fc.weight)


def test_settings_among_the_weights_are_no_weights(tmp_path):
    state = {**build().state_dict(), "conv1.weight": settings()}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"1 entries among the weights.*conv1.weight"):
        load_checkpoint(build(seed=2), tmp_path / "a.pth")
    torch.save(settings(), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="not a dictionary of weights"):
        load_checkpoint(build(seed=2), tmp_path / "b.pth")


def test_nothing_stays_allowed(tmp_path):
    """What we accept for our files, other users of torch.load in the process do not get."""
    path = tmp_path / "a.pth"
    torch.save({"opt": settings(), "model": build().state_dict()}, path)
    torch.serialization.add_safe_globals([nn.Identity])
    try:
        before = torch.serialization.get_safe_globals()
        load_checkpoint(build(seed=2), path)
        assert torch.serialization.get_safe_globals() == before
        with pytest.raises(pickle.UnpicklingError, match="Namespace"):
            torch.load(path, weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
