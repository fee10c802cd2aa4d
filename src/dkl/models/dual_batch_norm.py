"""A second set of batch-norm layers, for views whose statistics are not those of the images.

Training on strongly augmented views beside the plain ones (DAJAT, Addepalli et al. 2022) keeps the
statistics and the scales of both apart: views pass through the auxiliary layers, plain images,
evaluation and deployment through the base ones. Beside every batch-norm layer ``x`` there is
``x_auto``, so weights are called ``bn1.weight`` and ``bn1_auto.weight``.

Which set is used is a flag of each switchable layer. Whoever switches needs no import::

    for module in model.modules():
        if hasattr(module, "uses_auxiliary"):
            module.uses_auxiliary = True
"""

import copy
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

AUXILIARY_SUFFIX = "_auto"
# They hand their input to every child in order, or count their children: an additional one would
# change what they do.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Switchable(_BatchNorm):
    """A batch-norm layer that hands its input to another one while ``uses_auxiliary`` is True."""

    uses_auxiliary: bool
    # In a tuple, because a module as an attribute would become a child and be saved twice.
    _auxiliary: tuple[_BatchNorm]

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the set of statistics, scales and shifts that is switched on."""
        if self.uses_auxiliary:
            outputs: Tensor = self._auxiliary[0](input)
            return outputs
        return super().forward(input)


class DualBatchNorm1d(_Switchable, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with a switch; made by ``add_dual_batch_norm``."""


class DualBatchNorm2d(_Switchable, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with a switch; made by ``add_dual_batch_norm``."""


class DualBatchNorm3d(_Switchable, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with a switch; made by ``add_dual_batch_norm``."""


_DUAL: dict[type[nn.Module], type[_Switchable]] = {
    nn.BatchNorm1d: DualBatchNorm1d,
    nn.BatchNorm2d: DualBatchNorm2d,
    nn.BatchNorm3d: DualBatchNorm3d,
}


def add_dual_batch_norm(model: ModuleT) -> ModuleT:
    """Give every batch-norm layer a sibling with the same values, and a switch between the two.

    A layer ``bn1`` of a block gets ``bn1_auto`` in the same block. Where layers are numbered in an
    ``nn.Sequential`` or ``nn.ModuleList``, the sibling belongs to the module around it and carries
    the number: ``shortcut.1`` gets ``shortcut_1_auto``. Names, values and objects of the model's
    own parameters stay what they are. The base layers are in use until ``uses_auxiliary`` of the
    switchable ones is set to True.

    Args:
        model: any model with torch's batch-norm layers; changed in place.

    Returns:
        The model itself.

    Raises:
        ValueError: the model has no batch-norm, has siblings already, has a batch-norm of a kind
            that cannot be switched, or no module in which a sibling can be put.

    Example:
        >>> from dkl.models import create_model
        >>> model = add_dual_batch_norm(create_model("wrn_10_1", 10))
        >>> [name for name, _ in model.named_parameters() if name.startswith("bn1")]
        ['bn1.weight', 'bn1.bias', 'bn1_auto.weight', 'bn1_auto.bias']
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no batch-norm layer, so there is nothing to double; "
            "choose a model that has"
        )
    if any(hasattr(layer, "uses_auxiliary") for _, layer in found):
        raise ValueError("the model has auxiliary batch-norm layers already")
    # All places before the first change, so that a refused model is as it was.
    places = [_place_of_sibling(model, name, layer) for name, layer in found]
    for (_, layer), (owner, sibling_name) in zip(found, places, strict=True):
        auxiliary = copy.deepcopy(layer)
        owner.add_module(sibling_name, auxiliary)
        # The layer stays the same object, with its tensors and hooks, wherever it is used.
        layer.__class__ = _DUAL[type(layer)]
        switchable = cast(_Switchable, layer)
        switchable.uses_auxiliary = False
        switchable._auxiliary = (auxiliary,)
    return model


def _place_of_sibling(model: nn.Module, name: str, layer: _BatchNorm) -> tuple[nn.Module, str]:
    """Return the module that a layer's sibling is put into, and its name there."""
    if type(layer) not in _DUAL:
        known = ", ".join(kind.__name__ for kind in _DUAL)
        raise ValueError(
            f"{name or 'the model'} is a {type(layer).__name__}; only {known} can be doubled"
        )
    parts = name.split(".")
    for length in reversed(range(len(parts))):
        owner = model.get_submodule(".".join(parts[:length]))
        sibling = "_".join(parts[length:]) + AUXILIARY_SUFFIX
        if owner is layer or isinstance(owner, _CONTAINERS):
            continue
        if hasattr(owner, sibling):
            raise ValueError(f"{name} cannot be doubled: {sibling} exists beside it")
        return owner, sibling
    raise ValueError(
        f"{name or 'the model'} stands in nothing but {type(model).__name__}, where a sibling "
        "would become a step of its own; put the layers into an nn.Module with a forward method"
    )
