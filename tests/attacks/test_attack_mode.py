import copy

import pytest
import torch
from torch import nn

from dkl.attacks import attack_mode


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 3),
    )
    # A state no single call of train() or eval() would restore.
    model.train()
    model[1].eval()
    model[5].eval()
    model[0].weight.requires_grad_(False)
    return model


def state_of(model):
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "tracking": [getattr(m, "track_running_stats", None) for m in model.modules()],
        "momentum": [getattr(m, "momentum", None) for m in model.modules()],
    }


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_buffers(model, expected):
    actual = buffers_of(model)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


IMAGES = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))
MODES = ["eval", "train", "batch-stats"]


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_restored(mode):
    model = make_model()
    before = state_of(model)
    with attack_mode(model, mode):
        assert all(module.training == (mode != "eval") for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model(IMAGES)
    assert state_of(model) == before


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", MODES)
def test_nested_and_left_by_an_error(outer, inner):
    model = make_model()
    before = state_of(model)

    def nest():
        with attack_mode(model, outer):
            within = state_of(model)
            with attack_mode(model, inner):
                model(IMAGES)
            assert state_of(model) == within
            with attack_mode(model, inner):
                raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        nest()
    assert state_of(model) == before


@pytest.mark.parametrize("mode", MODES)
def test_restored_when_entering_fails(mode):
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode=True):
            raise RuntimeError("never")

    model = nn.Sequential(nn.Conv2d(2, 4, 3), Stubborn(4))
    before = state_of(model)
    with pytest.raises(RuntimeError, match="never"), attack_mode(model, mode):
        pass
    assert state_of(model) == before


@pytest.mark.parametrize("mode", ["eval", "batch-stats"])
def test_buffers_are_not_touched(mode):
    model = make_model()
    before = buffers_of(model)
    versions = [buffer._version for buffer in model.buffers()]
    with attack_mode(model, mode):
        model(IMAGES)
    assert_same_buffers(model, before)
    # Not even written and put back: graphs recorded earlier may have saved them.
    assert [buffer._version for buffer in model.buffers()] == versions


def test_train_updates_buffers_as_training_does():
    model = make_model()
    reference = copy.deepcopy(model).train()
    with attack_mode(model, "train"):
        model(IMAGES)
    reference(IMAGES)
    assert reference[1].num_batches_tracked == 1
    assert_same_buffers(model, buffers_of(reference))


def test_batch_stats_normalises_as_train_does():
    model = make_model()
    model[5].p = 0.0
    with attack_mode(model, "eval"):
        other = model(IMAGES)
    with attack_mode(model, "train"):
        expected = model(IMAGES)
    with attack_mode(model, "batch-stats"):
        actual = model(IMAGES)
    assert torch.equal(actual, expected)
    assert not torch.allclose(other, expected)


def test_nested_eval_inside_batch_stats_uses_the_running_statistics():
    model = make_model()
    with attack_mode(model, "eval"):
        expected = model(IMAGES)
    with attack_mode(model, "batch-stats"):
        model(IMAGES)
        with attack_mode(model, "eval"):
            assert torch.equal(model(IMAGES), expected)


def test_an_attack_between_forward_and_backward_of_training_does_no_harm():
    model = make_model().train()
    model[1].momentum = 0.1
    model.requires_grad_(True)
    loss = model(IMAGES).square().sum()
    with attack_mode(model, "batch-stats"):
        model(IMAGES)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_copies_made_in_an_attack_do_not_cut_the_training_graph():
    model = nn.Linear(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with attack_mode(model), torch.no_grad():
            model(torch.rand(3, 4))
        model(torch.rand(3, 4)).float().sum().backward()
    assert model.weight.grad is not None


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="got 'batch'"), attack_mode(nn.Linear(1, 1), "batch"):
        pass
