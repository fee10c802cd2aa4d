"""Every model of the package: shapes, names of parameters, values, behaviour under torch."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from dkl.models import create_model
from tests.models.golden_networks import DISTILLATION, ROBUST

# One small member of every family.
SMALL_MODELS = [
    ("convnet_small", {"width": 4}),
    ("preact_resnet10", {"width": 4}),
    ("preact_resnet18", {"width": 4}),
    ("wrn_10_1", {"dropout": 0.1}),
    ("wrn_16_2", {}),
    ("wrn_10_1_silu", {}),
    ("wrn_16_2_silu", {"batch_norm_momentum": 0.1}),
    ("resnet8", {"width": 4}),
    ("resnet8x4", {"width": 2}),
    ("resnet50_cifar", {"width": 2}),
    ("vgg8", {"width": 4}),
    ("vgg16", {"width": 2}),
    ("mobilenet_v1", {"width": 4}),
    ("mobilenet_v2_half", {}),
    ("shufflenet_v1", {}),
    ("shufflenet_v2", {}),
    ("resnet18_cifar", {"width": 4}),
    ("resnet18_cifar", {"width": 4, "strides": [1, 1, 2, 2]}),
]


@pytest.mark.parametrize("name", ["wrn_34_10", "wrn_34_20", "wrn_28_10_silu"])
def test_wide_resnets_have_the_published_names_and_shapes_in_order(name):
    golden = ROBUST[name]
    with torch.device("meta"):
        model = create_model(name, num_classes=list(golden.values())[-1][0])
    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(golden.items())


@pytest.mark.parametrize("name", ["wrn_70_16_silu", "wrn_70_16", "wrn_34_20"])
def test_the_largest_can_be_built_without_memory(name):
    with torch.device("meta"):
        model = create_model(name, 100, mean=[0.5071, 0.4865, 0.4409], std=[0.2673, 0.2564, 0.2762])
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert [n for n, _ in model.named_buffers() if n not in model.state_dict()] == [
        "input_mean", "input_std",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["wrn_10_4", "wrn_10_4_silu"])
def test_wide_resnet_initialisation(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    last_stage = model.block3.layer if name == "wrn_10_4" else model.layer[2].block
    conv = [module for module in last_stage.modules() if isinstance(module, nn.Conv2d)][1]
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert stem.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.1)
    assert model.get_classifier().bias.abs().max() == 0
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


def randomise_batch_norm(module):
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -1, 1)
            nn.init.uniform_(layer.running_var, 0.5, 1)


def convolve_by_hand(inputs, weight, stride, before):
    """Sum over the nine taps; ``before`` rows and columns of zeros come before the image."""
    height, width = inputs.shape[2:]
    out_height, out_width = -(-height // stride), -(-width // stride)
    padded = inputs.new_zeros(*inputs.shape[:2], height + 4, width + 4)
    padded[:, :, before : before + height, before : before + width] = inputs
    total = 0
    for row in range(3):
        for column in range(3):
            rows = torch.arange(out_height) * stride + row
            columns = torch.arange(out_width) * stride + column
            taps = padded[:, :, rows][:, :, :, columns]
            total = total + torch.einsum("nchw,oc->nohw", taps, weight[:, :, row, column])
    return total


@pytest.mark.parametrize("size", [8, 6, 7])
def test_silu_blocks_by_their_formula(size):
    """Zeros come after the image only where stride is 2 and the size even, else on both sides."""
    stage = create_model("wrn_16_1_silu", 10).double().eval().layer[1]
    randomise_batch_norm(stage)
    inputs = torch.randn(2, 16, size, size, dtype=torch.float64)
    first, second = stage.block

    def silu(values):
        return values / (1 + (-values).exp())

    def branch(block, inputs, stride, before):
        hidden = silu(block.batchnorm_0(inputs))
        hidden = convolve_by_hand(hidden, block.conv_0.weight, stride, before)
        hidden = silu(block.batchnorm_1(hidden))
        return convolve_by_hand(hidden, block.conv_1.weight, 1, 1)

    activated = silu(first.batchnorm_0(inputs))[:, :, ::2, ::2]
    shortcut = torch.einsum("nchw,oc->nohw", activated, first.shortcut.weight[:, :, 0, 0])
    middle = branch(first, inputs, 2, before=size % 2) + shortcut
    torch.testing.assert_close(stage(inputs), branch(second, middle, 1, 1) + middle)


def test_silu_networks_differ_from_symmetric_padding():
    """The same weights see other pixels, so the families' strided convolutions are not the same."""
    conv = create_model("wrn_10_1_silu", 10).double().layer[1].block[0].conv_0
    inputs = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    symmetric = torch.nn.functional.conv2d(inputs, conv.weight, stride=2, padding=1)
    shifted = torch.nn.functional.conv2d(inputs[:, :, 1:, 1:], conv.weight, stride=2, padding=1)
    assert conv(inputs).shape == symmetric.shape
    assert not torch.allclose(conv(inputs), symmetric)
    # Away from the border it is the symmetric convolution of the image moved by one pixel.
    torch.testing.assert_close(conv(inputs)[:, :, 1:3, 1:3], shifted[:, :, 1:3, 1:3])


def test_batch_norm_momentum_of_the_silu_family():
    def momenta(**options):
        model = create_model("wrn_10_1_silu", 10, **options)
        return {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}

    assert momenta() == {0.01}
    assert momenta(batch_norm_momentum=1) == {1}


def test_other_strides_change_no_name_and_no_shape_of_a_weight():
    golden = DISTILLATION["ResNet18"]
    with torch.device("meta"):
        model = create_model("resnet18_cifar", 100, strides=(1, 1, 2, 2))
        features = model.forward_features(torch.empty(1, 3, 32, 32))
    state = model.state_dict()
    assert [[key, list(value.shape)] for key, value in state.items()] == golden["keys"]
    assert features.shape[1:] == (512, 8, 8)


def test_wide_resnet_dropout_acts_in_training_only():
    model = create_model("wrn_10_1", 10, dropout=0.5)
    images = torch.rand(4, 3, 8, 8)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_preact_block_by_its_formula():
    """Shortcuts take the activated input where they convolve and the raw one elsewhere."""
    stage = create_model("preact_resnet18", 10, width=4).double().eval().layer2
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.running_mean, -1), (module.running_var, 0.5)):
                value.uniform_(low, 1)
    inputs = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def branch(block, inputs):
        hidden = block.conv1(block.bn1(inputs).clamp(min=0))
        return block.conv2(block.bn2(hidden).clamp(min=0))

    first, second = stage
    middle = branch(first, inputs) + first.shortcut[0](first.bn1(inputs).clamp(min=0))
    torch.testing.assert_close(stage(inputs), branch(second, middle) + middle)


def test_preact_resnet_names():
    keys = set(create_model("preact_resnet18", 10, width=4).state_dict())
    blocks = {key.split(".", 2)[2] for key in keys if key.startswith("layer2.0.")}
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert blocks == {"conv1.weight", "conv2.weight", "shortcut.0.weight"} | {
        f"bn{i}.{leaf}" for i in (1, 2) for leaf in norm
    }
    top = {key for key in keys if not key.startswith("layer")}
    assert top == {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn.{leaf}" for leaf in norm}
    assert {key.rsplit(".", 2)[0] for key in keys if "shortcut" in key} == {
        f"layer{stage}.0.shortcut" for stage in (2, 3, 4)
    }
    assert {key.split(".")[1] for key in keys if key.startswith("layer3")} == {"0", "1"}


# The field's number for 18 layers; for 10, less the second block (18 c^2 + 4 c) of every stage.
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("preact_resnet18", 11_172_170),
        ("preact_resnet10", 11_172_170 - sum(18 * c**2 + 4 * c for c in (64, 128, 256, 512))),
    ],
)
def test_preact_resnet_sizes(name, num_parameters):
    with torch.device("meta"):
        model = create_model(name, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_convnet_small_is_small():
    for in_channels in (1, 3):
        model = create_model("convnet_small", 10, in_channels=in_channels)
        assert 50_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 100_000


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(("name", "options"), SMALL_MODELS)
def test_forward_and_backward(name, options, in_channels, size):
    model = create_model(name, 7, in_channels=in_channels, **options)
    images = torch.rand(3, in_channels, size, size, requires_grad=True)
    logits = model(images)
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    gradients = [images.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "options"), SMALL_MODELS)
def test_attributes_and_methods_of_timm(name, options):
    model = create_model(name, 7, in_channels=1, **options).eval()
    images = torch.rand(2, 1, 8, 8)
    assert (model.num_classes, model.in_chans) == (7, 1)
    features = model.forward_features(images)
    assert features.shape[:2] == (2, model.num_features)
    # The least value of SiLU is -0.2785 and of ReLU 0.
    assert features.min() >= (-0.2785 if name.endswith("silu") else 0)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(model.get_classifier()(pooled), model(images))


@pytest.mark.parametrize(("name", "options"), SMALL_MODELS)
def test_copies_formats_and_types_agree(name, options):
    model = create_model(name, 7, mean=[0.4] * 3, std=[0.2] * 3, **options).eval()
    images = torch.rand(2, 3, 8, 8)
    logits = model(images)
    assert torch.equal(copy.deepcopy(model)(images), logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), logits)
    double = copy.deepcopy(model).double()(images.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), logits, rtol=1e-4, atol=1e-4)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(images_last), logits, rtol=1e-4, atol=1e-4)
    features = channels_last.forward_features(images_last)
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "options"), SMALL_MODELS[:1] + SMALL_MODELS[-1:])
def test_forward_keeps_the_values_that_taps_see(name, options):
    """Hooks on layers must get what the layer gave, also after the forward pass is over."""
    model = create_model(name, 7, **options).eval()
    taps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook_for(name):
        return lambda module, inputs, output: taps.update({name: (output, output.clone())})

    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(hook_for(key))
    model(torch.rand(2, 3, 8, 8))
    assert taps
    assert all(torch.equal(output, copied) for output, copied in taps.values())
