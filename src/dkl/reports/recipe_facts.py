"""What a recipe says about a measured number: data, network, epochs, augmentation."""

from collections.abc import Iterator, Mapping
from typing import Any

from dkl.reports.published import AugmentationClass

_EPOCH_SECTIONS = ("training", "train")


def setting(recipe: Mapping[str, Any], path: str) -> Any:
    """Return a nested setting, None where a recipe does not have it.

    Example:
        >>> setting({"model": {"name": "wrn_34_10"}}, "model.name"), setting({}, "model.name")
        ('wrn_34_10', None)
    """
    value: Any = recipe
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def dataset(recipe: Mapping[str, Any]) -> str:
    """Name the data, with the number of training images where the recipe limits it.

    Example:
        >>> dataset({"data": {"name": "fashion_mnist", "train_limit": 20000}})
        'fashion_mnist (20000 training images)'
    """
    name = str(setting(recipe, "data.name") or "data not stated")
    limit = setting(recipe, "data.train_limit")
    return name if limit is None else f"{name} ({limit} training images)"


def network(recipe: Mapping[str, Any]) -> str:
    """Name the network with its own settings.

    Example:
        >>> network({"model": {"name": "convnet_small", "kwargs": {"width": 16}}})
        'convnet_small (width 16)'
    """
    name = str(setting(recipe, "model.name") or "model not stated")
    extra = setting(recipe, "model.kwargs")
    if not isinstance(extra, Mapping) or not extra:
        return name
    return f"{name} ({', '.join(f'{key} {value}' for key, value in extra.items())})"


def num_epochs(recipe: Mapping[str, Any]) -> int | None:
    """Return the length of training, None where the recipe does not say it."""
    for section in _EPOCH_SECTIONS:
        for key in ("epochs", "num_epochs"):
            value = setting(recipe, f"{section}.{key}")
            if isinstance(value, int):
                return value
    return None


def augmentation_class(recipe: Mapping[str, Any]) -> AugmentationClass:
    """Sort a recipe into the classes of the paper's figure 2.

    Args:
        recipe: a resolved recipe; absent keys count as not used.

    Returns:
        "generated" with images beside the real ones, else "autoaugment" where the training images
        or one of their views go through AutoAugment, else "basic".

    Example:
        >>> augmentation_class({"data": {"views": [{"auto_augment": True}]}})
        'autoaugment'
    """
    if setting(recipe, "data.generated"):
        return "generated"
    if any(view.get("auto_augment") for view in _augmentations(recipe)):
        return "autoaugment"
    return "basic"


def _augmentations(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    views = setting(recipe, "data.views")
    several = views if isinstance(views, (list, tuple)) else [views]
    for one in (setting(recipe, "data.augment"), *several):
        if isinstance(one, Mapping):
            yield one
