"""Random numbers that are a pure function of a text, whatever the version of any library.

Source of the numbers: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

import hashlib
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
Bits = np.ndarray[Any, np.dtype[np.uint64]]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def random_bits(count: int, key: str) -> Bits:
    """Return the first numbers of the SplitMix64 sequence whose start is the hash of the key.

    Example:
        >>> bool((random_bits(4, "a")[:2] == random_bits(2, "a")).all())
        True
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    start = np.uint64(int.from_bytes(digest, "little"))
    values: Bits = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + start
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIER_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIER_2
    mixed: Bits = values ^ (values >> np.uint64(31))
    return mixed


def permutation(count: int, key: str) -> Integers:
    """Return the numbers 0 to ``count - 1`` in the random order that belongs to the key.

    Example:
        >>> sorted(permutation(4, "a").tolist())
        [0, 1, 2, 3]
    """
    return np.argsort(random_bits(count, key), kind="stable").astype(np.int64)
