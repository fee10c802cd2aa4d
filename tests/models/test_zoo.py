"""Models by name."""

import sys

import pytest
import torch

from dkl.models import create_model, list_models


def test_every_listed_model_can_be_built():
    names = list_models()
    assert names == sorted(set(names))
    families = {"convnet_small", "preact_resnet10", "preact_resnet18", "resnet18_cifar"}
    assert families | {"wrn_34_10", "wrn_34_20", "wrn_70_16", "wrn_28_10_silu"} <= set(names)
    for name in names:
        with torch.device("meta"):
            model = create_model(name, 10, in_channels=1)
            assert model(torch.empty(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 3), (22, 2), (70, 16)])
@pytest.mark.parametrize("family", ["", "_silu"])
def test_wide_resnets_of_any_depth_and_width(depth, width, family):
    with torch.device("meta"):
        model = create_model(f"wrn_{depth}_{width}{family}", 10)
    blocks = model.layer[1].block if family else model.block2.layer
    assert len(blocks) == (depth - 4) // 6
    assert model.num_features == 64 * width


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn_35_10", r"6 n \+ 4.*got 35.*34 and 40"),
        ("wrn_4_1", "got 4.*10 and 16"),
        ("wrn_35_10_silu", "got 35.*34 and 40"),
        ("wrn_28_10_relu", "did you mean wrn_28_10"),
        ("wrn_34_0", "width must be a positive integer, got 0"),
        ("preact_resnet81", "did you mean preact_resnet18"),
        ("Convnet_Small", "did you mean convnet_small"),
        ("qqqqqqqq", "there are convnet_small"),
        ("timm/qqqqqqqq", "unknown model 'timm/qqqqqqqq'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
        ({"num_classes": 10.0}, "num_classes must be a positive integer, got 10.0"),
        ({"num_classes": True}, "num_classes must be a positive integer, got True"),
        ({"num_classes": 10, "in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ({"num_classes": 10, "width": 0}, "width must be a positive integer, got 0"),
        ({"num_classes": 10, "breadth": 8}, "convnet_small has no option breadth; it takes width"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model("convnet_small", **arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wrn_16_1", {"dropout": 1.0}, r"probability in \[0, 1\), got 1.0"),
        ("wrn_16_1", {"depth": 28}, "wrn_16_1 has no option depth; it takes dropout"),
        ("wrn_16_1_silu", {"dropout": 0.1}, "has no option dropout; it takes batch_norm_momentum"),
        ("wrn_16_1_silu", {"batch_norm_momentum": 0}, r"share in \(0, 1\], got 0"),
        ("wrn_16_1_silu", {"batch_norm_momentum": 1.1}, r"share in \(0, 1\], got 1.1"),
        ("resnet18_cifar", {"strides": (2, 2, 2)}, r"four numbers, 1 or 2.*got \(2, 2, 2\)"),
        ("resnet18_cifar", {"strides": (1, 2, 2, 4)}, "four numbers, 1 or 2"),
        ("resnet18_cifar", {"strides": 2}, "four numbers, 1 or 2.*got 2"),
        ("resnet18_cifar", {"width": 0}, "width must be a positive integer, got 0"),
        ("resnet18_cifar", {"depth": 18}, "it takes width, strides"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 10, **options)


@pytest.mark.parametrize("name", ["resnet26", "timm/resnet26", "vit_tiny_patch16_224"])
def test_missing_timm_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*pip install timm"):
        create_model(name, 10)


def test_missing_timm_is_not_blamed_for_a_slip(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="did you mean preact_resnet18") as caught:
        create_model("preact_resnet_18", 10)
    assert "install" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet10t", "timm/resnet10t"])
def test_timm_models(name):
    pytest.importorskip("timm")
    mean, std = [0.3], [0.6]
    model = create_model(name, 6, in_channels=1, mean=mean, std=std).eval()
    plain = create_model(name, 6, in_channels=1).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 32, 32)
    logits = model(images)
    assert logits.shape == (2, 6)
    assert (model.num_classes, model.in_chans) == (6, 1)
    torch.testing.assert_close(logits, plain((images - 0.3) / 0.6))


def test_timm_errors_teach():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm cannot build resnet10t.*breadth"):
        create_model("timm/resnet10t", 6, breadth=3)
    with pytest.raises(ValueError, match=r"unknown model 'resnet18d_'.*resnet18d"):
        create_model("resnet18d_", 6)
