"""Where the feature maps of a network can be read, by the names of its modules."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Layout = Callable[[Tensor, tuple[int, int]], Tensor]
"""``layout(value, (height, width) of the images)`` turns a module's output into [N, C, H', W']."""


@dataclass(frozen=True)
class Tap:
    """One place where a value is read.

    Args:
        module: dotted name of a module, as in ``named_modules()``.
        side: "output" for what the module returns, "input" for its first argument.
        call: "only" where the module runs once in a forward pass; "last" where it runs more often
            and the value of its last run is meant.
        layout: makes a map [N, C, H', W'] of the value where it is none (tokens); None leaves it.
    """

    module: str
    side: Literal["output", "input"] = "output"
    call: Literal["only", "last"] = "only"
    layout: Layout | None = None


@dataclass(frozen=True)
class TapPoints:
    """All places of a network where methods of distillation look.

    In the networks of this package, and in ResNets of timm and torchvision, the first map is that
    of the stem, and each further one is the output of a stage.

    Args:
        maps: feature maps [N, C, H', W'], from the first to the last.
        classifier: name of the last linear layer; its input are the pooled features.
        pre_activations: the maps before their activation; as many as ``maps``, or none.
        norms: for each pre-activation the batch-norm layer that it comes from, None where there is
            none; as many as ``pre_activations``, or none.

    Raises:
        ValueError: there is no map, or the numbers of places differ.

    Example:
        >>> points = TapPoints(outputs_of("conv1", "layer1"), classifier="fc")
        >>> points.maps[1].module
        'layer1'
    """

    maps: tuple[Tap, ...]
    classifier: str
    pre_activations: tuple[Tap, ...] = field(default=())
    norms: tuple[str | None, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.maps:
            raise ValueError("tap points need at least one module for a feature map, got none")
        for name, values, reference in (
            ("pre_activations", self.pre_activations, self.maps),
            ("norms", self.norms, self.pre_activations),
        ):
            if values and len(values) != len(reference):
                raise ValueError(
                    f"tap points need as many {name} as there are maps, or none; got "
                    f"{len(values)} for {len(reference)}"
                )


def outputs_of(*modules: str) -> tuple[Tap, ...]:
    """Return one tap on the output of each module.

    Example:
        >>> outputs_of("conv1")
        (Tap(module='conv1', side='output', call='only', layout=None),)
    """
    return tuple(Tap(module) for module in modules)
