"""Counter-based noise: a pure function of seed, stream, step, sample, call and column.

A stateful generator would tie the noise of a sample to the samples drawn before it, so that
splitting a batch over processes or accumulation steps would change the trajectory. Here every
number is the hash of its coordinates, computed in wrap-around int64 arithmetic, which has the same
bits on every device.

Source of the hash: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

import hashlib

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MANTISSA_BITS = 24


def _signed(value: int) -> int:
    """Reinterpret the low 64 bits of an integer as a signed int64."""
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_integer(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & _MASK
    return value ^ (value >> 31)


def _xor_shifted_(values: Tensor, bits: int) -> Tensor:
    """XOR with the logical right shift; ``>>`` on int64 drags the sign along, hence the mask."""
    return values.bitwise_xor_((values >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _mix_(values: Tensor) -> Tensor:
    _xor_shifted_(values, 30).mul_(_signed(_MULTIPLIER_1))
    _xor_shifted_(values, 27).mul_(_signed(_MULTIPLIER_2))
    return _xor_shifted_(values, 31)


def _part_value(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return part


def hash_indices(indices: Tensor, *key: int | str) -> Tensor:
    """Hash integers under a key.

    Args:
        indices: int64 tensor of any shape.
        key: integers and names, in order; every part matters.

    Returns:
        int64 tensor of the same shape, all 64 bits well mixed.

    Example:
        >>> import torch
        >>> first = hash_indices(torch.arange(3), 0, "order")
        >>> second = hash_indices(torch.arange(3), 1, "order")
        >>> bool((first == second).any())
        False
    """
    folded = 0
    for part in key:
        folded = _mix_integer((folded + _GOLDEN) ^ _mix_integer(_part_value(part)))
    return _mix_((indices + 1).mul_(_signed(_GOLDEN)).add_(_signed(folded)))


class SampleNoise:
    """Uniform numbers for the samples of a batch: ``noise(k)`` gives fresh [B, k] in [0, 1).

    Two objects with the same arguments give the same numbers in the same order of calls, whatever
    the other rows of the batch are. Values have 24 bits, so float32 and float64 hold the same ones.

    Args:
        seed: seed of the run.
        stream: name of what the noise is for; streams are independent of each other.
        step: optimiser step.
        indices: [B] int64, positions of the samples in the training data.
        dtype: float32 or float64.

    Raises:
        ValueError: for any other dtype.

    Example:
        >>> import torch
        >>> noise = SampleNoise(0, "augment", 7, torch.tensor([3, 8]))
        >>> first, second = noise(4), noise(4)
        >>> first.shape, bool((first == second).any())
        (torch.Size([2, 4]), False)
        >>> alone = SampleNoise(0, "augment", 7, torch.tensor([8]))
        >>> bool((alone(4) == first[1:]).all())
        True
    """

    def __init__(
        self,
        seed: int,
        stream: int | str,
        step: int,
        indices: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"noise is drawn in float32 or float64, not {dtype}: cast what you get"
            )
        self._rows_B1 = hash_indices(indices.to(torch.int64), seed, stream, step).unsqueeze(1)
        self._dtype = dtype
        self._num_calls = 0

    def __call__(self, num_columns: int) -> Tensor:
        """Return fresh uniform numbers of shape [B, num_columns]."""
        self._num_calls += 1
        # Each row and call starts a SplitMix64 sequence of its own; the columns walk along it.
        start_B1 = _mix_(self._rows_B1 ^ _signed(_mix_integer(self._num_calls)))
        columns_K = torch.arange(1, num_columns + 1, device=start_B1.device)
        bits_BK = _mix_(start_B1 + columns_K.mul_(_signed(_GOLDEN)))
        shift = 64 - _MANTISSA_BITS
        top_BK = (bits_BK >> shift).bitwise_and_((1 << _MANTISSA_BITS) - 1)
        return top_BK.to(self._dtype).mul_(2.0**-_MANTISSA_BITS)
