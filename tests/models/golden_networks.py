"""The weights and images with which the golden values of the networks were computed."""

import json
import math
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1] / "golden"
ROBUST = json.loads((FOLDER / "robust_architectures.json").read_text())
DISTILLATION = json.loads((FOLDER / "architectures.json").read_text())
# The rest have the same names here and there.
NAMES = {
    "ResNet18": "resnet18_cifar",
    "ResNet50": "resnet50_cifar",
    "MobileNetV2": "mobilenet_v2_half",
    "ShuffleV1": "shufflenet_v1",
    "ShuffleV2": "shufflenet_v2",
}
DISTILLATION_NAMES = {
    name: NAMES.get(name, name) for name in DISTILLATION if not name.startswith("_")
}


def fill(model):
    """Give a model the weights that the golden probes were computed with (see ``_about``)."""
    for position, (name, value) in enumerate(model.state_dict().items()):
        if not value.is_floating_point():
            continue
        flat = torch.arange(value.numel(), dtype=torch.float64)
        wave = torch.sin(12.9898 * flat + 78.233 * position) * 43758.5453
        noise = 2 * (wave - wave.floor()) - 1
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            noise = 1 + 0.2 * noise
        elif value.dim() == 1:
            noise = 0.05 * noise
        else:
            noise = noise * math.sqrt(3 / value[0].numel())
        value.copy_(noise.view_as(value))
    return model.double().eval()


def probe_images():
    # The sine in float64: in float32 its argument of up to 80 would be off by 4e-6.
    flat = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    return torch.sin(0.013 * flat).float().view(2, 3, 32, 32).double()
