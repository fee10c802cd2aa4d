"""Reading the feature maps of a network while it computes its logits.

Hooks on the named modules see the values of one call of the model and are removed after it. So the
call itself stays what it is: built-in normalisation, DistributedDataParallel and autocast act as
ever, and the network needs no second forward method. Where a network's maps are is said by

- its method ``tap_points()``; every network of this package has it, and yours may;
- the shape of a ResNet of timm or torchvision, or timm's ``feature_info``;
- names of modules that you give.

Shapes in names: N images, C channels, H x W pixels, D pooled features, K classes.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dkl.models.tap_points import Tap, TapPoints
from dkl.models.tap_sources import find_tap_points, submodule

Points = TapPoints | Sequence[str] | None

# torch numbers all hooks by one counter, which two threads could read at the same time.
_changing_hooks = threading.Lock()


class FeatureMaps(NamedTuple):
    """What one call of a model computed.

    In the networks of this package, and in ResNets of timm and torchvision, the first map and the
    first pre-activation are the stem's.

    Args:
        maps: feature maps [N, C, H', W'], from the first to the last.
        pre_activations: the maps before their activation, as many as ``maps``; empty where they are
            not known.
        pooled: [N, D], the input of the last linear layer.
        logits: [N, K].
    """

    maps: list[Tensor]
    pre_activations: list[Tensor]
    pooled: Tensor
    logits: Tensor


class TapShapes(NamedTuple):
    """Sizes of ``FeatureMaps`` for one size of image.

    Args:
        maps: (C, H', W') of each map.
        pre_activations: (C, H', W') of each pre-activation.
        num_features: D.
        num_classes: K.
    """

    maps: list[tuple[int, int, int]]
    pre_activations: list[tuple[int, int, int]]
    num_features: int
    num_classes: int


def feature_maps(model: nn.Module, images_NCHW: Tensor, points: Points = None) -> FeatureMaps:
    """Call a model and return its feature maps, pooled features and logits.

    Gradients flow through all of them. Several threads may do this with one model at a time. A
    function that calls this may be compiled, with a break of its graph here.

    Args:
        model: a classifier, or one in DistributedDataParallel.
        images_NCHW: [N, C, H, W], what the model is called with.
        points: where to look; None for what the model says; or names of modules whose outputs are
            the maps, as ``model.named_modules()`` of the bare model has them.

    Returns:
        The values of this call.

    Raises:
        ValueError: the places are not known or do not exist, a module there did not run or ran more
            than once, its value is no feature map or was changed in place afterwards, or the model
            is compiled or in DataParallel.

    Example:
        >>> from dkl.models import create_model
        >>> model = create_model("resnet8", 10)
        >>> features = feature_maps(model, torch.rand(2, 3, 32, 32))
        >>> [tuple(map_NCHW.shape[1:]) for map_NCHW in features.maps]
        [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
        >>> tuple(features.pooled.shape), tuple(features.logits.shape)
        ((2, 64), (2, 10))
    """
    if torch.compiler.is_compiling():  # hooks of one call cannot be part of a graph
        disable: Any = torch.compiler.disable
        features: FeatureMaps = disable(_feature_maps)(model, images_NCHW, points)
        return features
    return _feature_maps(model, images_NCHW, points)


def tap_shapes(
    model: nn.Module, image_shape: tuple[int, int, int], points: Points = None
) -> TapShapes:
    """Return the sizes of a model's feature maps, found by one run on a black image.

    The run is in evaluation mode and without gradients, so that nothing of the model changes; a
    compiled model runs uncompiled. It works on device meta.

    Args:
        model: as for ``feature_maps``; it may be compiled.
        image_shape: (C, H, W).
        points: as for ``feature_maps``.

    Returns:
        The sizes.

    Raises:
        ValueError: as for ``feature_maps``.

    Example:
        >>> from dkl.models import create_model
        >>> shapes = tap_shapes(create_model("shufflenet_v2", 10), (3, 32, 32))
        >>> shapes.maps[-1], shapes.num_features, shapes.num_classes
        ((464, 4, 4), 1024, 10)
    """
    bare = _bare(model, compiled_too=True)
    like = next(bare.parameters(), torch.empty(0))
    image_1CHW = torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device)
    compiled = any(_is_compiled(module) for module in bare.modules())
    # Only where it is needed, because it loads the compiler.
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with _evaluation(bare), torch.no_grad(), eager:
        features = _tapped_call(bare, bare, image_1CHW, points)
    return TapShapes(
        [_chw(map_NCHW) for map_NCHW in features.maps],
        [_chw(map_NCHW) for map_NCHW in features.pre_activations],
        features.pooled.shape[1],
        features.logits.shape[1],
    )


def tap_norms(model: nn.Module, points: Points = None) -> list[nn.Module | None]:
    """Return the batch-norm layers that the pre-activations come from.

    Scale and shift of such a layer say how the pre-activations are distributed (OFD's margins). In
    a residual network it is the last layer of the branch, whose shortcut is left out of account.

    Args:
        model: as for ``feature_maps``.
        points: as for ``feature_maps``.

    Returns:
        One entry per pre-activation, None where there is no such layer; empty where they are not
        known.

    Raises:
        ValueError: the places are not known or do not exist.

    Example:
        >>> from dkl.models import create_model
        >>> tap_norms(create_model("wrn_10_1", 10))[1:]  # doctest: +ELLIPSIS
        [BatchNorm2d(16, ...), BatchNorm2d(32, ...), BatchNorm2d(64, ...)]
    """
    bare = _bare(model, compiled_too=True)
    names = find_tap_points(bare, points).norms
    return [None if name is None else submodule(bare, name) for name in names]


def _feature_maps(model: nn.Module, images_NCHW: Tensor, points: Points) -> FeatureMaps:
    return _tapped_call(model, _bare(model), images_NCHW, points)


def _tapped_call(
    model: nn.Module, bare: nn.Module, images_NCHW: Tensor, points: Points
) -> FeatureMaps:
    found = find_tap_points(bare, points)
    classifier = Tap(found.classifier, "input")
    places = (*found.maps, *found.pre_activations, classifier)
    with _Recorder(bare, places) as recorder:
        logits_NK = model(images_NCHW)
    if not isinstance(logits_NK, Tensor) or logits_NK.dim() != 2:
        what = list(logits_NK.shape) if isinstance(logits_NK, Tensor) else type(logits_NK).__name__
        raise ValueError(
            f"{type(bare).__name__} must return logits [N, K] to read its features, got {what}"
        )
    pooled_ND = recorder.value(classifier)
    if pooled_ND.dim() == 4 and pooled_ND.shape[2:] == (1, 1):
        pooled_ND = pooled_ND.flatten(1)
    if pooled_ND.dim() != 2:
        raise ValueError(
            f"the input of the classifier {found.classifier!r} must be pooled features [N, D], got "
            f"{list(pooled_ND.shape)}; give TapPoints(..., classifier=) the last linear layer"
        )
    size = (images_NCHW.shape[-2], images_NCHW.shape[-1])
    return FeatureMaps(
        [_as_map(recorder.value(tap), tap, size) for tap in found.maps],
        [_as_map(recorder.value(tap), tap, size) for tap in found.pre_activations],
        pooled_ND,
        logits_NK,
    )


def _as_map(value: Tensor, tap: Tap, size: tuple[int, int]) -> Tensor:
    map_NCHW = value if tap.layout is None else tap.layout(value, size)
    if map_NCHW.dim() != 4:
        raise ValueError(
            f"a feature map must be [N, C, H, W]; the {tap.side} of {tap.module!r} is "
            f"{list(map_NCHW.shape)}; choose another module, or give Tap(..., layout=) a function "
            "that makes a map of it"
        )
    return map_NCHW


def _chw(map_NCHW: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = map_NCHW.shape
    return channels, height, width


def _bare(model: nn.Module, *, compiled_too: bool = False) -> nn.Module:
    """Return the network inside DistributedDataParallel, and refuse what hooks cannot see into."""
    while True:
        if isinstance(model, DataParallel):
            raise ValueError(
                "feature maps cannot be read in nn.DataParallel, whose copies run on several "
                "devices; use DistributedDataParallel"
            )
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif compiled_too and hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    if not compiled_too:
        for name, module in model.named_modules():
            if _is_compiled(module):
                raise ValueError(
                    f"{f'the module {name!r} of the model' if name else 'the model'} is compiled, "
                    "and its compiled code does not call the hooks that read feature maps; leave "
                    "it uncompiled (compile: false) for methods that use features"
                )
    return model


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Recorder:
    """Hooks that keep what passes through the places while the context lasts.

    Hooks belong to the module and not to the call, so those of one thread also run in the calls of
    others; they keep nothing there.
    """

    def __init__(self, model: nn.Module, places: Sequence[Tap]) -> None:
        self._model = model
        # Several taps may look at one place.
        self._places = {(tap.module, tap.side): submodule(model, tap.module) for tap in places}
        self._several = {(tap.module, tap.side) for tap in places if tap.call == "last"}
        self._values: dict[tuple[str, str], Tensor] = {}
        self._versions: dict[tuple[str, str], int] = {}
        self._runs: dict[tuple[str, str], int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "_Recorder":
        self._thread = threading.get_ident()
        with _changing_hooks:
            for place, module in self._places.items():
                self._handles.append(self._hook(place, module))
        return self

    def __exit__(self, *exception: object) -> None:
        with _changing_hooks:
            for handle in self._handles:
                handle.remove()

    def value(self, tap: Tap) -> Tensor:
        """Return what was kept, if it still is what it was."""
        place = (tap.module, tap.side)
        runs = self._runs.get(place, 0)
        if runs == 0:
            raise ValueError(
                f"the module {tap.module!r} did not run in this call of the model, so its "
                f"{tap.side} is not known; choose a module that runs"
            )
        if runs > 1 and place not in self._several:
            raise ValueError(
                f"the module {tap.module!r} ran {runs} times in this call of the model; choose a "
                'module that runs once, or Tap(..., call="last") for its last run'
            )
        value = self._values[place]
        if not value.is_inference() and value._version != self._versions[place]:
            raise ValueError(
                f"the {tap.side} of the module {tap.module!r} was changed in place by a later "
                "layer; tap that layer, or give it inplace=False"
            )
        return value

    def _hook(self, place: tuple[str, str], module: nn.Module) -> Any:
        if place[1] == "output":
            return module.register_forward_hook(
                lambda _module, _inputs, output: self._keep(place, output)
            )
        overwritten = bool(getattr(module, "inplace", False))

        def keep_input(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            value = inputs[0] if inputs else None
            if overwritten and isinstance(value, Tensor):
                value = value.clone()  # before the module itself changes it
            self._keep(place, value)

        return module.register_forward_pre_hook(keep_input)

    def _keep(self, place: tuple[str, str], value: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the {place[1]} of the module {place[0]!r} must be a tensor to be a feature map, "
                f"got {type(value).__name__}; choose another module"
            )
        self._runs[place] = self._runs.get(place, 0) + 1
        # Tensors of inference mode do not count their changes, so a copy keeps the value.
        self._values[place] = value.clone() if value.is_inference() else value
        self._versions[place] = 0 if value.is_inference() else value._version
