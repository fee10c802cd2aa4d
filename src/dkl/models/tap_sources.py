"""Finding out where the feature maps of a network are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from dkl.models.tap_points import Tap, TapPoints, outputs_of

_STAGES = ("layer1", "layer2", "layer3", "layer4")


def find_tap_points(model: nn.Module, points: TapPoints | Sequence[str] | None = None) -> TapPoints:
    """Return where the feature maps of a model are.

    Args:
        model: a network without wrappers.
        points: places that are returned as they are; names of modules whose outputs are the maps;
            or None for what the model itself says, what a ResNet of timm or torchvision looks
            like, and timm's ``feature_info``, in this order.

    Returns:
        Places whose modules exist.

    Raises:
        ValueError: a module does not exist, or nothing says where the maps or the last linear
            layer are.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> find_tap_points(model, ["0"]).classifier
        '2'
    """
    found = _search(model, points)
    for place in (*found.maps, *found.pre_activations):
        submodule(model, place.module)
    for name in (found.classifier, *found.norms):
        if name is not None:
            submodule(model, name)
    return found


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return a module by its dotted name.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> submodule(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    try:
        if name:
            return model.get_submodule(name)
    except AttributeError:
        pass
    top = ", ".join(child for child, _ in model.named_children())
    raise ValueError(
        f"{type(model).__name__} has no module {name!r}; its modules are {top or 'none'} and "
        "those inside of them (model.named_modules())"
    )


def _search(model: nn.Module, points: TapPoints | Sequence[str] | None) -> TapPoints:
    if isinstance(points, TapPoints):
        return points
    if points is not None:
        if isinstance(points, str):
            raise ValueError(f"names of modules must be a list, such as [{points!r}]")
        return TapPoints(outputs_of(*points), _find_classifier(model))
    own: Callable[[], TapPoints] | None = getattr(model, "tap_points", None)
    if own is not None:
        return own()
    if _is_resnet(model):
        return _resnet_points(model)
    if info := getattr(model, "feature_info", None):
        return _timm_points(model, list(info))
    raise ValueError(
        f"the feature maps of {type(model).__name__} are not known; give the names of the modules "
        "that compute them, such as ['layer1', 'layer2'], or TapPoints"
    )


def _find_classifier(model: nn.Module) -> str:
    """Return the name of the last linear layer."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        names = [n for n, m in model.named_modules() if m is classifier]
        if names and not isinstance(classifier, nn.Identity):
            return str(names[0])
    else:
        names = [n for n, m in model.named_modules() if n and isinstance(m, nn.Linear)]
        if names:
            return str(names[-1])
    raise ValueError(
        f"the last linear layer of {type(model).__name__} is not known; name it: "
        "TapPoints(outputs_of('layer1', ...), classifier='...')"
    )


def _is_resnet(model: nn.Module) -> bool:
    """Tell the networks of timm and torchvision whose layers are named as in their ResNets."""
    parts = [getattr(model, name, None) for name in ("conv1", "bn1", "maxpool", "fc")]
    stages = [getattr(model, name, None) for name in _STAGES]
    return (
        all(isinstance(part, nn.Module) for part in parts)
        and all(isinstance(stage, nn.Sequential) and len(stage) > 0 for stage in stages)
        and all(_last_activation(stage[-1]) for stage in stages)  # type: ignore[index]
    )


def _last_activation(block: nn.Module) -> Tap | None:
    """Return where a residual block's sum goes into its activation."""
    for name in ("act3", "act2"):
        if isinstance(getattr(block, name, None), nn.Module):
            return Tap(name, "input")
    if isinstance(getattr(block, "relu", None), nn.Module):
        # torchvision's blocks use one module for all activations.
        return Tap("relu", "input", call="last")
    return None


def _resnet_points(model: nn.Module) -> TapPoints:
    # The input of the pooling after the stem, because one module computes it everywhere.
    stem = Tap("maxpool", "input")
    sums, norms = [], []
    for stage in _STAGES:
        blocks: Any = model.get_submodule(stage)
        last = f"{stage}.{len(blocks) - 1}"
        activation = _last_activation(blocks[-1])
        assert activation is not None  # _is_resnet looked at it
        sums.append(Tap(f"{last}.{activation.module}", "input", activation.call))
        has_third = isinstance(getattr(blocks[-1], "bn3", None), nn.Module)
        norms.append(f"{last}.{'bn3' if has_third else 'bn2'}")
    return TapPoints((stem, *outputs_of(*_STAGES)), "fc", (stem, *sums), (None, *norms))


def _timm_points(model: nn.Module, info: Sequence[dict[str, Any]]) -> TapPoints:
    places = []
    for entry in info:
        layout = _TimmLayout(
            entry["num_chs"],
            entry["reduction"],
            getattr(model, "num_prefix_tokens", 0) or 0,
            channels_last=str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"),
        )
        before = entry.get("hook_type") == "forward_pre"
        side: Literal["output", "input"] = "input" if before else "output"
        places.append(Tap(entry["module"], side, layout=layout))
    return TapPoints(tuple(places), _find_classifier(model))


@dataclass(frozen=True)
class _TimmLayout:
    """Make [N, C, H', W'] of what timm's networks compute: maps, channels last, or tokens.

    Args:
        channels: C, from ``feature_info``.
        reduction: height of the image over height of the map.
        num_prefix_tokens: tokens before those of the image (class, registers); blocks may run
            without them.
        channels_last: maps are [N, H', W', C].
    """

    channels: int
    reduction: int
    num_prefix_tokens: int
    channels_last: bool

    def __call__(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        if value.dim() == 4 and self.channels_last:
            return value.permute(0, 3, 1, 2)
        if value.dim() != 3:
            return value
        height, width = (length // self.reduction for length in size)
        num_tokens, channels = value.shape[1:]
        prefix = num_tokens - height * width
        if prefix not in (0, self.num_prefix_tokens) or channels != self.channels:
            raise ValueError(
                f"tokens of {height}x{width} patches with {self.channels} channels should be "
                f"[N, {height * width}, {self.channels}] after {self.num_prefix_tokens} others, "
                f"got {list(value.shape)}; give names of modules or TapPoints"
            )
        patches_NCL = value[:, prefix:].transpose(1, 2)
        return patches_NCL.reshape(len(value), channels, height, width)
