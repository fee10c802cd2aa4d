"""What the names in a file of weights say: wrappers around the network, layers that nobody uses.

Training codes wrap their networks (DataParallel, ``nn.Sequential``, torch.compile, classes that
normalise or attack), and each wrapper writes itself in front of every name or beside them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

# Wrappers leave these in front of every name; "module.0." comes from nn.Sequential in DataParallel
# and must be tried before "module.".
_PREFIXES = ("module.0.", "module.", "model.", "_orig_mod.")
_WRAPPERS = ("module", "0", "model", "_orig_mod")
_NORMALIZERS = ("normalizer", "normalize", "normalise")
_MEANS = ("mu", "mean", "new_mean")
_DEVIATIONS = ("sigma", "std", "new_std")

Statistic = Literal["mean", "std"]


@dataclass
class SortedEntries:
    """The entries of a file, by what they are for.

    Args:
        prefix: what was removed from the names of ``state``; "" for nothing.
        state: what the model has to load, under its own names.
        unused: names in the file that no forward pass uses.
        normalization: by name in the file, mean or deviation of the network's input, and which.
    """

    prefix: str
    state: dict[str, Tensor] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    normalization: dict[str, tuple[Statistic, Tensor]] = field(default_factory=dict)

    @property
    def left_out(self) -> list[str]:
        """Names in the file that the model does not load."""
        return [*self.unused, *self.normalization]


def sort_entries(weights: Mapping[str, Tensor], expected: Collection[str]) -> SortedEntries:
    """Sort the entries of a file for a model that expects certain names.

    A name that the model itself expects, as it stands or without the wrappers' prefix, is never
    taken for anything else.

    Args:
        weights: names and tensors as they are in the file.
        expected: names of the model's state dict.

    Example:
        >>> from torch import zeros
        >>> file = {"module.fc.bias": zeros(2), "module.sub_block1.layer.0.bn1.bias": zeros(2)}
        >>> entries = sort_entries(file, ["fc.bias"])
        >>> entries.prefix, entries.state, entries.unused
        ('module.', {'fc.bias': tensor([0., 0.])}, ['module.sub_block1.layer.0.bn1.bias'])
    """
    entries = SortedEntries(_wrappers_prefix(weights, expected))
    for name, value in weights.items():
        bare_name = name.removeprefix(entries.prefix)
        statistic = _statistic(name)
        if bare_name in expected:
            entries.state[bare_name] = value
        elif is_unused_layer(bare_name) or _belongs_to_attacker(name):
            entries.unused.append(name)
        elif statistic is not None:
            entries.normalization[name] = (statistic, value)
        else:
            entries.state[bare_name] = value
    return entries


def is_unused_layer(name: str) -> bool:
    """Tell layers that published files carry although evaluation does not use them.

    ``sub_block1`` (TRADES and its successors) is a part of no forward pass; ``*_auto`` are the
    auxiliary batch-norm layers (see ``dkl.models.dual_batch_norm``).

    Example:
        >>> is_unused_layer("block1.layer.0.bn1_auto.weight"), is_unused_layer("auto.weight")
        (True, False)
    """
    return any(part == "sub_block1" or part.endswith("_auto") for part in name.split("."))


def _wrappers_prefix(names: Collection[str], expected: Collection[str]) -> str:
    """Find the longest chain of wrappers around the network; none where names fit as they are.

    Beside the network a wrapper may hold its normalisation and an attacker, nothing else.
    """
    prefix = ""
    while not any(name.removeprefix(prefix) in expected for name in names):
        for candidate in _PREFIXES:
            inside = [name for name in names if name.startswith(prefix + candidate)]
            if inside and len(inside) + _count_companions(names, prefix + candidate) == len(names):
                prefix += candidate
                break
        else:
            break
    return prefix


def _count_companions(names: Collection[str], prefix: str) -> int:
    outside = (name for name in names if not name.startswith(prefix))
    return sum(_belongs_to_attacker(name) or _statistic(name) is not None for name in outside)


def _inside_wrappers(name: str) -> list[str]:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts.pop(0)
    return parts


def _belongs_to_attacker(name: str) -> bool:
    """Tell the copies of model and normalisation in the attacker of MadryLab's robustness."""
    return _inside_wrappers(name)[0] == "attacker"


def _statistic(name: str) -> Statistic | None:
    """Tell mean and deviation of the input in RobustBench's classes and in normalising wrappers."""
    *holder, last = _inside_wrappers(name)
    if holder and (len(holder) > 1 or holder[0] not in _NORMALIZERS):
        return None
    return "mean" if last in _MEANS else "std" if last in _DEVIATIONS else None
