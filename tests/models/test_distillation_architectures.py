"""The 23 networks of the distillation tables, against the reference implementations' values."""

import math

import pytest
import torch
from torch import nn

from dkl.models import create_model, feature_maps, tap_norms
from dkl.models.mobilenet import InvertedResidual
from dkl.models.shufflenet import DownBlock, GroupedBlock, SplitBlock, shuffle_channels
from tests.models.golden_networks import DISTILLATION, DISTILLATION_NAMES, fill, probe_images

# Sums of numbers of both signs are close to zero in some networks.
close = {"rel": 1e-6, "abs": 1e-12}


@pytest.mark.parametrize("golden_name", DISTILLATION_NAMES)
def test_names_shapes_and_sizes_are_the_published_ones(golden_name):
    golden = DISTILLATION[golden_name]
    with torch.device("meta"):
        model = create_model(DISTILLATION_NAMES[golden_name], 100)
    state = model.state_dict()
    assert [[key, list(value.shape)] for key, value in state.items()] == golden["keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == golden["params"]


@pytest.mark.parametrize("golden_name", DISTILLATION_NAMES)
def test_values_are_the_published_ones(golden_name):
    """Logits, maps, pre-activations and pooled features with weights from a closed formula."""
    probe = DISTILLATION[golden_name]["probe"]
    model = fill(create_model(DISTILLATION_NAMES[golden_name], 100))
    with torch.no_grad():
        features = feature_maps(model, probe_images())
    logits = features.logits
    assert logits[0, :4].tolist() == pytest.approx(probe["logits_first4"], **close)
    assert logits.sum().item() == pytest.approx(probe["logits_sum"], **close)
    assert logits.abs().mean().item() == pytest.approx(probe["logits_absmean"], **close)
    shape, mean = probe["pooled"]
    assert list(features.pooled.shape[1:]) == shape
    assert features.pooled.mean().item() == pytest.approx(mean, **close)
    assert_maps(features.maps, probe["feats"])
    # The reference has no pre-activations for linear bottlenecks; they are the maps themselves.
    assert_maps(features.pre_activations, probe["preact"] or probe["feats"])


def assert_maps(maps, golden):
    for map_NCHW, (shape, mean, mean_abs) in zip(maps, golden, strict=True):
        assert list(map_NCHW.shape[1:]) == shape
        assert map_NCHW.mean().item() == pytest.approx(mean, **close)
        assert map_NCHW.abs().mean().item() == pytest.approx(mean_abs, **close)


def test_there_are_23():
    assert len(DISTILLATION_NAMES) == 23


def test_mobilenet_v1_has_the_published_names_and_sizes():
    with torch.device("meta"):
        model = create_model("mobilenet_v1", 1000)
        features = feature_maps(model, torch.empty(1, 3, 224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_231_976
    keys = [key for key in model.state_dict() if key.endswith("weight")]
    separable = [f"model.{k}.{j}.weight" for k in range(1, 14) for j in (0, 1, 3, 4)]
    assert keys == ["model.0.0.weight", "model.0.1.weight", *separable, "fc.weight"]
    shapes = [tuple(map_NCHW.shape[1:]) for map_NCHW in features.maps]
    stages = [(128, 56, 56), (256, 28, 28), (512, 14, 14), (1024, 7, 7)]
    assert shapes == [(32, 112, 112), *stages]
    assert features.pooled.shape == (1, 1024)


# Which batch-norm layers stand before the last ReLU of each stage.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet56", ["layer1.8.bn2", "layer2.8.bn2", "layer3.8.bn2"]),
        ("resnet32x4", ["layer1.4.bn2", "layer2.4.bn2", "layer3.4.bn2"]),
        ("resnet50_cifar", ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"]),
        ("wrn_40_2", ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
        ("vgg13", ["block1.4", "block2.4", "block3.4", "block4.4"]),
        ("vgg8", ["block1.1", "block2.1", "block3.1", "block4.1"]),
        ("mobilenet_v2_half", [f"blocks.{k}.conv.7" for k in ("1.1", "2.2", "4.2", "6.0")]),
        ("shufflenet_v1", ["layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"]),
    ],
)
def test_norms_before_the_last_activations(name, expected):
    with torch.device("meta"):
        model = create_model(name, 100)
    norms = tap_norms(model)
    assert norms[0] is None
    assert norms[1:] == [model.get_submodule(layer) for layer in expected]
    maps = feature_maps(model, torch.empty(1, 3, 32, 32, device="meta")).pre_activations
    channels = [norm.num_features for norm in norms[1:]]
    assert channels == [map_NCHW.shape[1] for map_NCHW in maps[1:]]


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "shufflenet_v1", "resnet50_cifar"])
def test_maps_are_the_activated_pre_activations(name):
    model = create_model(name, 10).eval()
    features = feature_maps(model, torch.rand(2, 3, 32, 32))
    for map_NCHW, before_NCHW in zip(features.maps, features.pre_activations, strict=True):
        assert torch.equal(map_NCHW, before_NCHW.clamp(min=0))
    assert (features.pre_activations[-1] < 0).any()


def test_wide_resnets_look_once_at_their_batch_norms():
    """The reference counts a batch twice when it also returns pre-activations."""
    model = create_model("wrn_10_1", 10)
    feature_maps(model, torch.rand(2, 3, 32, 32))
    counts = {b.item() for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts == {1}


def test_shufflenet_v2_names_its_pre_activations_in_the_order_before_the_shuffle():
    features = feature_maps(create_model("shufflenet_v2", 10).eval(), torch.rand(2, 3, 32, 32))
    for map_NCHW, before_NCHW in zip(features.maps[1:], features.pre_activations[1:], strict=True):
        assert torch.equal(map_NCHW, shuffle_channels(before_NCHW.clamp(min=0), 2))
        assert not torch.equal(map_NCHW, before_NCHW.clamp(min=0))


def test_shuffle_channels_inverts_itself_with_the_other_number_of_groups():
    map_NCHW = torch.rand(2, 12, 3, 3)
    assert torch.equal(shuffle_channels(shuffle_channels(map_NCHW, 3), 4), map_NCHW)


def test_kept_half_of_a_split_block_passes_with_its_gradient():
    block = SplitBlock(8).double().eval()
    inputs = torch.rand(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    outputs = block(inputs)
    assert torch.equal(outputs[:, ::2], inputs[:, :4])
    outputs[:, ::2].sum().backward()
    assert torch.equal(inputs.grad[:, :4], torch.ones(2, 4, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("size", [4, 5])
def test_blocks_that_halve(size):
    half = -(-size // 2)
    images = torch.rand(2, 24, size, size)
    assert GroupedBlock(24, 240, stride=2)(images).shape == (2, 240, half, half)
    assert DownBlock(24, 116)(images).shape == (2, 116, half, half)
    assert InvertedResidual(24, 12, stride=2, expansion=6)(images).shape == (2, 12, half, half)


@pytest.mark.parametrize(("size", "last"), [(8, 1), (28, 3), (32, 4), (64, 4), (96, 6)])
def test_vgg_pools_once_more_from_64_on(size, last):
    with torch.device("meta"):
        model = create_model("vgg8", 10, width=2)
        assert model.forward_features(torch.empty(2, 3, size, size)).shape == (2, 16, last, last)


@pytest.mark.parametrize("shape", [(1, 3, 7, 8), (1, 3, 32, 4)])
def test_vgg_says_the_least_size(shape):
    model = create_model("vgg8", 10, width=2)
    with pytest.raises(ValueError, match=r"needs images of 8x8 or more, got \[1, 3, "):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {"width": 0}, "width must be a positive integer, got 0"),
        ("resnet8", {"depth": 14}, "resnet8 has no option depth; it takes width"),
        ("resnet8x4", {"multiplier": 2}, "resnet8x4 has no option multiplier; it takes width"),
        ("vgg8", {"width": 2.5}, "width must be a positive integer, got 2.5"),
        ("mobilenet_v1", {"width": -1}, "width must be a positive integer, got -1"),
        ("mobilenet_v2_half", {"width": 1}, "no option width; it takes none"),
        ("shufflenet_v1", {"groups": 2}, "no option groups; it takes none"),
        ("resnet50_cifar", {"width": True}, "width must be a positive integer, got True"),
        ("resnet26_cifar", {}, "did you mean"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 10, **options)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "resnet50_cifar", "vgg8"])
def test_convolutions_start_from_the_fan_out(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    largest = max(
        (module for module in model.modules() if isinstance(module, nn.Conv2d)),
        key=lambda module: module.weight.numel(),
    )
    fan_out = math.prod(largest.kernel_size) * largest.out_channels
    assert largest.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


@pytest.mark.parametrize("name", ["vgg8", "mobilenet_v2_half"])
def test_small_linear_layers_start_small(name):
    torch.manual_seed(0)
    classifier = create_model(name, 100).get_classifier()
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert classifier.bias.abs().max() == 0
