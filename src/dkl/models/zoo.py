"""Models by name."""

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from dkl.models.cifar_resnet import CifarResNet
from dkl.models.classifier import check_positive
from dkl.models.convnet import convnet_small
from dkl.models.mobilenet import MobileNetV1, mobilenet_v2_half
from dkl.models.normalization import add_normalization
from dkl.models.preact_resnet import preact_resnet10, preact_resnet18
from dkl.models.resnet import resnet18_cifar, resnet50_cifar
from dkl.models.shufflenet import shufflenet_v1, shufflenet_v2
from dkl.models.vgg import VGG
from dkl.models.wide_resnet import WideResNet
from dkl.models.wide_resnet_silu import WideResNetSiLU

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "convnet_small": convnet_small,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2_half": mobilenet_v2_half,
    "preact_resnet10": preact_resnet10,
    "preact_resnet18": preact_resnet18,
    **{
        f"resnet{depth}": partial(CifarResNet, depth=depth, multiplier=1)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "resnet8x4": partial(CifarResNet, depth=8, multiplier=4),
    "resnet32x4": partial(CifarResNet, depth=32, multiplier=4),
    "resnet18_cifar": resnet18_cifar,
    "resnet50_cifar": resnet50_cifar,
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2": shufflenet_v2,
    **{f"vgg{depth}": partial(VGG, depth=depth) for depth in (8, 11, 13, 16, 19)},
}
# Any wrn_D_K and wrn_D_K_silu can be built; these are the ones of the literature's tables.
_LISTED_WIDE_RESNETS = (
    "wrn_16_1", "wrn_16_2", "wrn_16_4", "wrn_28_10", "wrn_34_10", "wrn_34_20", "wrn_40_1",
    "wrn_40_2", "wrn_70_16", "wrn_28_10_silu", "wrn_70_16_silu",
)  # fmt: skip
_WIDE_RESNET = re.compile(r"wrn_(\d+)_(\d+)(_silu)?")
_LOOKS_LIKE_TIMM = re.compile(
    r"(timm/|resnet|resnext|wide_resnet|seresne|res2ne|regnet|rexnet|repvgg|vgg|densenet|dpn"
    r"|inception|xception|efficientnet|tf_|mobilenet|mnasnet|ghostnet|lcnet|hrnet|darknet|dla"
    r"|cspres|nfnet|convnext|convmixer|mixer|vit_|deit|beit|swin|cait|coat|crossvit|pit_|pvt"
    r"|maxvit|maxxvit|edgenext|fastvit|mobilevit|eva|levit|poolformer|volo|xcit|hiera|davit)"
)


def list_models() -> list[str]:
    """Return names that ``create_model`` builds without timm, sorted.

    Beside the listed ``wrn_D_K`` and ``wrn_D_K_silu`` (the family trained on generated data), every
    other depth D = 6 n + 4 and every width K can be built.

    Example:
        >>> "wrn_34_10" in list_models()
        True
    """
    return sorted([*_BUILDERS, *_LISTED_WIDE_RESNETS])


def create_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a classifier whose call ``model(images)`` returns logits [N, num_classes].

    Names of this package come first (``list_models()``, any ``wrn_D_K`` and ``wrn_D_K_silu``);
    others, and all that begin with ``timm/``, go to timm when it is installed. So ``vgg11`` is the
    network for small images and ``timm/vgg11`` that for ImageNet. The ResNets of ImageNet are
    timm's: ``timm/resnet18``, ``timm/resnet34`` and ``timm/resnet50`` have names and shapes of
    torchvision's weights, which ``load_checkpoint`` reads into them, and compute the same.

    Args:
        name: such as ``preact_resnet18``, ``wrn_34_10``, ``timm/resnet26`` or ``resnet26``.
        num_classes: number of logits.
        in_channels: channels of the images.
        mean: ``in_channels`` numbers; with ``std``, normalisation is built into the call, so that
            the model takes images in [0, 1]. Neither is saved with the weights.
        std: ``in_channels`` positive numbers.
        **kwargs: options of the model, such as ``width``, ``dropout``, ``strides``,
            ``batch_norm_momentum`` or timm's ``pretrained``.

    Returns:
        The model, with ``num_classes``, ``in_chans``, ``num_features``, ``forward_features`` and
        ``forward_head`` as timm's models have them.

    Raises:
        ValueError: unknown name or option, or a number out of its range.

    Example:
        >>> import torch
        >>> model = create_model("convnet_small", 10, in_channels=1, mean=[0.3], std=[0.4])
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_positive("num_classes", num_classes)
    check_positive("in_channels", in_channels)
    if (mean is None) != (std is None):
        given, needed = ("std", "mean") if mean is None else ("mean", "std")
        raise ValueError(f"normalisation needs mean and std; got {given} without {needed}")
    builder = _own_builder(name)
    if builder is None:
        model = _create_timm_model(name, num_classes, in_channels, **kwargs)
    else:
        _check_options(name, builder, kwargs)
        model = builder(num_classes, in_channels, **kwargs)
    if mean is not None and std is not None:
        add_normalization(model, mean, std, in_channels)
    return model


def _own_builder(name: str) -> Callable[..., nn.Module] | None:
    if match := _WIDE_RESNET.fullmatch(name):
        family = WideResNetSiLU if match[3] else WideResNet
        return partial(family, depth=int(match[1]), width=int(match[2]))
    return _BUILDERS.get(name)


def _check_options(name: str, builder: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    parameters = inspect.signature(builder).parameters.values()
    fixed = builder.keywords if isinstance(builder, partial) else {}
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in fixed]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )


def _create_timm_model(name: str, num_classes: int, in_channels: int, **kwargs: Any) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ValueError(_unknown(name, list_models(), timm_is_missing=True)) from None
    timm_name = name.removeprefix("timm/")
    if not timm.is_model(timm_name):
        raise ValueError(_unknown(name, [*list_models(), *timm.list_models()]))
    try:
        created: Any = timm.create_model(
            timm_name, num_classes=num_classes, in_chans=in_channels, **kwargs
        )
    except TypeError as error:
        raise ValueError(f"timm cannot build {timm_name} with {kwargs}: {error}") from error
    if not hasattr(created, "in_chans"):
        created.in_chans = in_channels
    model: nn.Module = created
    return model


def _unknown(name: str, known: list[str], timm_is_missing: bool = False) -> str:
    message = f"unknown model {name!r}"
    wanted = name.removeprefix("timm/").lower()
    if nearest := difflib.get_close_matches(wanted, known, n=3):
        message += f"; did you mean {' or '.join(nearest)}?"
    else:
        message += (
            "; there are "
            + ", ".join(list_models())
            + ", any wrn_D_K and wrn_D_K_silu, and timm's models"
        )
    if timm_is_missing and _LOOKS_LIKE_TIMM.match(name):
        message += "; it looks like a timm model, and timm is missing: pip install timm"
    return message
