"""Feature maps of timm's and torchvision's networks."""

import pytest
import torch
from torch import nn

from dkl.models import create_model, feature_maps, load_checkpoint, tap_norms, tap_shapes

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")

# Every kind of layout: maps, channels last, tokens after a class token, tokens alone.
TIMM = {
    "timm/resnet18": {},
    "timm/mobilenetv3_small_050": {},
    "timm/convnext_atto": {},
    "timm/regnetx_002": {},
    "timm/swin_tiny_patch4_window7_224": {"img_size": 64},
    "timm/vit_tiny_patch16_224": {"img_size": 64},
    "timm/mixer_s32_224": {"img_size": 64},
}


def shift_norms(model):
    """Give every batch-norm something to do; some start at scale zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -1, 1)
    return model.eval()


@pytest.mark.parametrize("name", TIMM)
def test_timm_maps_are_those_of_forward_intermediates(name):
    torch.manual_seed(0)
    model = shift_norms(create_model(name, 5, **TIMM[name]))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features = feature_maps(model, images)
        expected = model.forward_intermediates(images, intermediates_only=True)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.equal(features.logits, model(images))
    torch.testing.assert_close(features.maps, list(expected))
    torch.testing.assert_close(features.pooled, pooled)
    channels = [map_NCHW.shape[1] for map_NCHW in features.maps]
    assert channels == [entry["num_chs"] for entry in model.feature_info]


def test_timm_networks_without_known_pre_activations_have_none():
    shapes = tap_shapes(create_model("timm/convnext_atto", 5), (3, 64, 64))
    assert (len(shapes.maps), shapes.pre_activations) == (4, [])
    assert tap_norms(create_model("timm/convnext_atto", 5)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/deit_tiny_distilled_patch16_224", "last linear layer of.*is not known; name it"),
        ("timm/pit_ti_224", r"'transformers.0' must be a tensor.*got tuple"),
    ],
)
def test_timm_networks_of_other_shapes(name, message):
    model = create_model(name, 5).eval()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        feature_maps(model, torch.rand(1, 3, 224, 224))


def test_timm_without_a_classifier():
    model = timm.create_model("convnext_atto", num_classes=0)
    with pytest.raises(ValueError, match="last linear layer of ConvNeXt is not known"):
        feature_maps(model, torch.rand(1, 3, 64, 64))


def test_tokens_that_are_no_grid():
    options = {"dynamic_img_size": True, "dynamic_img_pad": True}
    model = create_model("timm/vit_tiny_patch16_224", 5, **options).eval()
    with pytest.raises(ValueError, match=r"tokens of 2x2 patches.*got \[1, 10, 192\]"):
        feature_maps(model, torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_imagenet_resnets_of_timm_and_torchvision_are_the_same(name, tmp_path):
    torch.manual_seed(0)
    ours = create_model(f"timm/{name}", 9).eval()
    theirs = shift_norms(getattr(models, name)(num_classes=9))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    assert load_checkpoint(ours, tmp_path / f"{name}.pth") == []
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features, expected = feature_maps(ours, images), feature_maps(theirs, images)
    torch.testing.assert_close(features, expected)
    stages = [64, 64, 128, 256, 512] if name != "resnet50" else [64, 256, 512, 1024, 2048]
    assert [map_NCHW.shape[1] for map_NCHW in features.maps] == stages
    assert features.pooled.shape == (2, stages[-1])
    assert [norm and norm.num_features for norm in tap_norms(theirs)] == [None, *stages[1:]]


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/resnet50"])
def test_imagenet_resnets_activate_in_place_after_the_tap(name):
    torch.manual_seed(0)
    model = shift_norms(create_model(name, 9))
    features = feature_maps(model, torch.rand(2, 3, 64, 64))
    for map_NCHW, before_NCHW in zip(features.maps[1:], features.pre_activations[1:], strict=True):
        assert torch.equal(map_NCHW, before_NCHW.clamp(min=0))
        assert (before_NCHW < 0).any()
    assert features.pre_activations[0] is features.maps[0]
    features.pre_activations[1].sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


def test_torchvision_networks_by_names():
    model = models.mobilenet_v2(num_classes=5)
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="of MobileNetV2 are not known; give the names"):
        feature_maps(model, images)
    features = feature_maps(model, images, ["features.3", "features.6"])
    assert [tuple(map_NCHW.shape[1:]) for map_NCHW in features.maps] == [(24, 16, 16), (32, 8, 8)]
    assert features.pooled.shape == (2, 1280)


@pytest.mark.parametrize("normalize", [False, True])
def test_timm_reads_our_models_settings(normalize):
    given = {"mean": [0.5] * 3, "std": [0.2] * 3} if normalize else {}
    config = timm.data.resolve_data_config({}, model=create_model("resnet20", 100, **given))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == ((0.0,) * 3 if normalize else (0.5071, 0.4867, 0.4408))
    assert config["std"] == ((1.0,) * 3 if normalize else (0.2675, 0.2565, 0.2761))
    gray = create_model("vgg8", 10, in_channels=1, width=4).pretrained_cfg
    assert (gray["input_size"], gray["mean"], gray["classifier"]) == (
        (1, 32, 32),
        (0.0,),
        "classifier",
    )


@pytest.mark.parametrize("kind", ["LogitDistillationTask", "FeatureDistillationTask"])
def test_timm_distils_between_our_models(kind):
    task_kinds = pytest.importorskip("timm.task")
    student, teacher = create_model("shufflenet_v1", 10), create_model("resnet8x4", 10, width=4)
    task = getattr(task_kinds, kind)(
        student, teacher, criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False
    )
    losses = task(torch.rand(4, 3, 32, 32), torch.arange(4))
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert student.conv1.weight.grad.abs().sum() > 0
    assert teacher.conv1.weight.grad is None
