"""Files of the field's code bases: each form written with one of our networks inside."""

import argparse
import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from dkl.models import CheckpointError, add_dual_batch_norm, create_model, load_checkpoint

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]


def build(name="wrn_10_1", seed=1, normalize=True, **options):
    torch.manual_seed(seed)
    mean, std = (MEAN, STD) if normalize else (None, None)
    model = create_model(name, 4, mean=mean, std=std, **options)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
        else:
            value.fill_(seed)
    return model


def weights(prefix="", **options):
    return OrderedDict(
        (prefix + key, value) for key, value in build(**options).state_dict().items()
    )


def sub_block(prefix=""):
    """The copy of the first block that TRADES's class makes and never calls."""
    state = build().state_dict()
    return {
        prefix + "sub_block1" + key.removeprefix("block1"): value
        for key, value in state.items()
        if key.startswith("block1")
    }


def auto(prefix=""):
    state = add_dual_batch_norm(build()).state_dict()
    return {prefix + key: value for key, value in state.items() if "_auto" in key}


def channels(values):
    return torch.tensor(values).view(1, 3, 1, 1)


def resume_file():
    """What DM-AT writes to go on from: averaged and raw weights, optimiser, schedule, epoch."""
    name = "wrn_10_1_silu"
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=4)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "model_state_dict": weights("module.0.", name=name),
        "unaveraged_model_state_dict": weights("module.0.", name=name, seed=5),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": schedule.state_dict(),
        "epoch": 7,
    }


def robustness_file():
    """MadryLab's robustness: network, normalisation, and an attacker with copies of both."""
    normalization = {"new_mean": channels(MEAN)[0], "new_std": channels(STD)[0]}
    state = weights("module.model.")
    for holder in ("module.normalizer.", "module.attacker.normalize."):
        state.update({holder + key: value for key, value in normalization.items()})
    state.update(weights("module.attacker.model."))
    return {"model": state, "optimizer": {"state": {}}, "schedule": None, "epoch": 150, "amp": None}


def normalization_of_robustness():
    names = [f"module.normalizer.new_{which}" for which in ("mean", "std")]
    return [key for key in robustness_file()["model"] if "attacker" in key] + names


# Form -> (model, what the file holds, names that are left out).
FORMS = {
    "DKL and AWP and LBGAT: DataParallel": ("wrn_10_1", lambda: weights("module."), []),
    "LBGAT with TRADES's block": (
        "wrn_10_1",
        lambda: {**weights("module."), **sub_block("module.")},
        sub_block("module."),
    ),
    "TRADES": ("wrn_10_1", lambda: {**weights(), **sub_block()}, sub_block()),
    "MART": ("wrn_10_1", weights, []),
    "DAJAT": (
        "wrn_10_1",
        lambda: {**weights("module."), **auto("module.")},
        auto("module."),
    ),
    "AT-AWP and Rice": (
        "preact_resnet18",
        lambda: {
            "state_dict": weights("module.", name="preact_resnet18", width=4),
            "test_robust_loss": 1.5,
            "test_robust_acc": 0.5,
            "test_loss": 0.9,
            "test_acc": 0.8,
        },
        [],
    ),
    "DM-AT": (
        "wrn_10_1_silu",
        lambda: {
            "model_state_dict": weights("module.0.", name="wrn_10_1_silu"),
            "unaveraged_model_state_dict": weights("module.0.", name="wrn_10_1_silu", seed=5),
        },
        [],
    ),
    "DM-AT to resume from": ("wrn_10_1_silu", resume_file, []),
    "LAS-AT": (
        "wrn_10_1",
        lambda: {"net": {**weights("module."), **sub_block("module.")}, "acc": 56.3, "epoch": 109},
        sub_block("module."),
    ),
    "LAS-AT, bare": ("wrn_10_1", lambda: {"net": weights(), "acc": torch.ones(())}, []),
    "RobustBench": ("wrn_10_1", lambda: weights("model."), []),
    "RobustBench, state_dict": (
        "wrn_10_1", lambda: {"state_dict": weights("module.model.")}, [],
    ),
    "RobustBench's AWP and Rice: mu and sigma": (
        "wrn_10_1",
        lambda: {"mu": channels(MEAN), "sigma": channels(STD), **weights()},
        ["mu", "sigma"],
    ),
    "mu and sigma inside DataParallel": (
        "wrn_10_1",
        lambda: {
            "state_dict": {
                **weights("module."), "module.mu": channels(MEAN), "module.sigma": channels(STD),
            }
        },
        ["module.mu", "module.sigma"],
    ),
    "a normalising wrapper": (
        "wrn_10_1",
        lambda: {
            "normalize.mean": channels(MEAN), "normalize.std": channels(STD), **weights("model."),
        },
        ["normalize.mean", "normalize.std"],
    ),
    "MadryLab": ("wrn_10_1", robustness_file, normalization_of_robustness()),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_published_form(form, legacy, tmp_path, caplog):
    name, contents, left_out = FORMS[form]
    options = {"width": 4} if name == "preact_resnet18" else {}
    source, target = build(name, **options), build(name, seed=2, **options)
    path = tmp_path / "model_best.t7"
    torch.save(contents(), path, _use_new_zipfile_serialization=not legacy)
    with caplog.at_level(logging.INFO, logger="dkl.models"):
        assert load_checkpoint(target, path) == list(left_out)
    for key, value in source.state_dict().items():
        assert target.state_dict()[key].equal(value), key
    if left_out:
        assert next(iter(left_out)) in caplog.text


@pytest.mark.parametrize(
    ("names", "values", "normalize", "message"),
    [
        # CIFAR-100's constants with a model for CIFAR-10.
        (
            ("mu", "sigma"),
            ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
            True,
            r"mean \[0.5071, 0.4865, 0.4409\] \(mu\).*uses \[0.4914, 0.4822, 0.4465\].*build",
        ),
        # Mean over images of each image's deviation, as many CIFAR-10 codes have it.
        (("mu", "sigma"), (MEAN, [0.2023, 0.1994, 0.2010]), True, r"std \[0.2023.*uses \[0.2471"),
        (("mu", "sigma"), (MEAN, STD), False, "mean.*mu.*the model does not normalise"),
        (("mean", "std"), ([0.0] * 3, [1.0] * 3), True, r"mean \[0, 0, 0\] \(mean\)"),
        (("normalizer.new_mean", "normalizer.new_std"), (MEAN, [0.5] * 3), True, "new_std"),
        (("mu", "sigma"), ([float("nan")] * 3, STD), True, r"mean \[nan"),
        (("mu", "sigma"), ([0.5, 0.5], STD), True, r"mean \[0.5, 0.5\]"),
    ],
)
def test_another_normalisation_is_refused(names, values, normalize, message, tmp_path):
    path = tmp_path / "a.pt"
    target = build(seed=2, normalize=normalize)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    extra = {
        name: torch.tensor(numbers).view(1, -1, 1, 1)
        for name, numbers in zip(names, values, strict=True)
    }
    torch.save({**extra, **weights()}, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(target, path)
    assert all(value.equal(before[key]) for key, value in target.state_dict().items())


def test_a_normalisation_that_agrees_is_left_out_with_a_note(tmp_path, caplog):
    # As other codes write them: more digits, or no normalisation at all.
    precise = {"mu": channels([0.49139968, 0.48215841, 0.44653091]), "sigma": channels(STD)}
    torch.save({**precise, **weights()}, tmp_path / "a.pt")
    neutral = {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}
    torch.save({**neutral, **weights()}, tmp_path / "b.pt")
    for file, normalize in (("a.pt", True), ("b.pt", False)):
        with caplog.at_level(logging.INFO, logger="dkl.models"):
            assert load_checkpoint(build(seed=2, normalize=normalize), tmp_path / file) == [
                "mu", "sigma",
            ]  # fmt: skip
        assert "mu, sigma" in caplog.text
        caplog.clear()


def test_own_entries_of_such_names_are_loaded(tmp_path):
    """Names that the model itself has are its own, whatever they look like."""

    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.attacker = nn.Linear(2, 2)
            self.mu = nn.Parameter(torch.full((3,), float(seed)))

    source, target = Model(1), Model(2)
    torch.save({"module." + k: v for k, v in source.state_dict().items()}, tmp_path / "a.pt")
    assert load_checkpoint(target, tmp_path / "a.pt") == []
    assert all(v.equal(target.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize("name", ["module.mu.weight", "encoder.mean", "module.normalizer.gain"])
def test_unknown_entries_are_no_normalisation(name, tmp_path):
    prefix = "module." if name.startswith("module.") else ""
    torch.save({**weights(prefix), name: torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="1 names unknown to the model"):
        load_checkpoint(build(seed=2), tmp_path / "a.pt")


@pytest.mark.parametrize(
    "extra",
    [
        {"args": argparse.Namespace(folder=Path("runs"))},
        {"scheduler_state_dict": {"anneal_func": max}},
        {"optimizer_state_dict": {"lr_lambda": print}},
    ],
    ids=["object in a namespace", "function in a schedule", "function in an optimiser"],
)
def test_resume_files_with_objects_get_the_one_clear_error(extra, tmp_path):
    torch.save({**resume_file(), **extra}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="was refused: besides tensors it holds Python") as e:
        load_checkpoint(build("wrn_10_1_silu", seed=2), tmp_path / "a.pt")
    assert "save its bare state dict" in str(e.value)


def test_families_do_not_fit_each_other(tmp_path):
    torch.save(weights("module.0.", name="wrn_10_1_silu"), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is it another architecture"):
        load_checkpoint(build(), tmp_path / "a.pt")
