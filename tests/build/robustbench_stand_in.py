"""What stands on the other side of an export: RobustBench's loader and its two architectures.

Written from its documentation of names and behaviour, apart from the package's own models, because
the benchmark's package cannot be imported.
"""

import torch
from torch import nn


def load(path, network):
    """Load as RobustBench's ``load_model`` does: flat or nested, prefixes cut, strictly."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("state_dict", checkpoint)
    for word in ("module.", "model."):
        # Wherever the word stands in a name, as many characters go from its beginning.
        state = {key[len(word) :] if word in key else key: value for key, value in state.items()}
    network.load_state_dict(state, strict=True)
    return network.eval()


class _Layers(nn.Module):
    """Layers under given names."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def _conv(inputs, outputs, size, stride):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Network(nn.Module):
    """A wide ResNet of depth 10: one block per stage, so that every block is a first one."""

    names = ("conv1", "bn1", "fc")

    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        widths = (16, 16, 32, 64)
        self.conv1 = _conv(in_channels, 16, 3, 1)
        for stage in (1, 2, 3):
            inputs, outputs = widths[stage - 1 : stage + 1]
            stride = 1 if stage == 1 else 2
            layers = {
                "bn1": nn.BatchNorm2d(inputs),
                "conv1": _conv(inputs, outputs, 3, stride),
                "bn2": nn.BatchNorm2d(outputs),
                "conv2": _conv(outputs, outputs, 3, 1),
            }
            if inputs != outputs:
                layers["convShortcut"] = _conv(inputs, outputs, 1, stride)
            self.add_module(f"block{stage}", _Layers(layer=nn.Sequential(_Layers(**layers))))
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images):
        maps = self.conv1(images)
        for stage in (self.block1, self.block2, self.block3):
            (block,) = stage.layer
            active = torch.relu(block.bn1(maps))
            hidden = block.conv2(torch.relu(block.bn2(block.conv1(active))))
            maps = hidden + (block.convShortcut(active) if hasattr(block, "convShortcut") else maps)
        return self.fc(torch.relu(self.bn1(maps)).flatten(2).mean(2))


class NormalizingSiLUNetwork(nn.Module):
    """The same of the other family, which normalises with tensors that are not in its state."""

    def __init__(self, num_classes, mean, std):
        super().__init__()
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        widths = (16, 16, 32, 64)
        self.init_conv = _conv(len(mean), 16, 3, 1)
        stages = []
        for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
            layers = {
                "batchnorm_0": nn.BatchNorm2d(inputs),
                "conv_0": nn.Conv2d(inputs, outputs, 3, stride, bias=False),
                "batchnorm_1": nn.BatchNorm2d(outputs),
                "conv_1": _conv(outputs, outputs, 3, 1),
            }
            if inputs != outputs:
                layers["shortcut"] = _conv(inputs, outputs, 1, stride)
            stages.append(_Layers(block=nn.Sequential(_Layers(**layers))))
        self.layer = nn.Sequential(*stages)
        self.batchnorm = nn.BatchNorm2d(64)
        self.logits = nn.Linear(64, num_classes)

    def forward(self, images):
        maps = self.init_conv((images - self.mean) / self.std)
        pads = (nn.ZeroPad2d(1), nn.ZeroPad2d((0, 1, 0, 1)), nn.ZeroPad2d((0, 1, 0, 1)))
        for stage, pad in zip(self.layer, pads, strict=True):
            (block,) = stage.block
            active = nn.functional.silu(block.batchnorm_0(maps))
            hidden = nn.functional.silu(block.batchnorm_1(block.conv_0(pad(active))))
            shortcut = block.shortcut(active) if hasattr(block, "shortcut") else maps
            maps = block.conv_1(hidden) + shortcut
        return self.logits(nn.functional.silu(self.batchnorm(maps)).flatten(2).mean(2))
