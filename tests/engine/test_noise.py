"""Counter-based noise: a function of its coordinates alone, and statistically sound."""

import pytest
import torch

from dkl.engine.noise import SampleNoise, _mix_, _mix_integer, _signed, hash_indices

INDICES = torch.arange(2000)


def draw(k: int, seed: int = 0, stream: str = "s", step: int = 0, calls: int = 1) -> torch.Tensor:
    noise = SampleNoise(seed, stream, step, INDICES, torch.float64)
    for _ in range(calls):
        values = noise(k)
    return values


def test_known_answer_of_splitmix64() -> None:
    # First output of the reference generator seeded with 0.
    assert _mix_integer(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    values = torch.tensor([_signed(0x9E3779B97F4A7C15)])
    assert _mix_(values).item() == _signed(0xE220A8397B1DCDAF)


def test_tensor_and_integer_arithmetic_agree() -> None:
    numbers = torch.randint(-(2**63), 2**63 - 1, (1000,))
    expected = [_signed(_mix_integer(int(n))) for n in numbers]
    assert _mix_(numbers.clone()).tolist() == expected


def test_rows_do_not_depend_on_the_rest_of_the_batch() -> None:
    whole = SampleNoise(3, "augment", 5, INDICES)
    parts = [SampleNoise(3, "augment", 5, part) for part in INDICES.split(333)]
    for k in (1, 7):
        assert torch.equal(whole(k), torch.cat([part(k) for part in parts]))


def test_columns_do_not_depend_on_their_number() -> None:
    assert torch.equal(draw(3), draw(10)[:, :3])


def test_both_dtypes_hold_the_same_numbers() -> None:
    single, double = SampleNoise(0, "s", 0, INDICES), SampleNoise(0, "s", 0, INDICES, torch.float64)
    values = single(5)
    assert values.dtype == torch.float32
    assert torch.equal(values.double(), double(5))


@pytest.mark.parametrize("change", [{"seed": 1}, {"stream": "t"}, {"step": 1}, {"calls": 2}])
def test_every_coordinate_gives_independent_numbers(change: dict) -> None:
    first, second = draw(50), draw(50, **change)
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert correlation.abs() < 4 / first.numel() ** 0.5
    assert (first == second).double().mean() < 1e-5


def test_uniform_in_unit_interval() -> None:
    values = draw(500)
    assert values.min() >= 0
    assert values.max() < 1
    observed = torch.histc(values, bins=256, min=0, max=1)
    expected = values.numel() / 256
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert 255 - 5 * (2 * 255) ** 0.5 < chi_square < 255 + 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("dim", [0, 1])
def test_neighbours_are_independent(dim: int) -> None:
    cells = (draw(500) * 16).long()
    length = cells.shape[dim] - 1
    pairs = cells.narrow(dim, 0, length) * 16 + cells.narrow(dim, 1, length)
    observed = torch.bincount(pairs.flatten(), minlength=256)
    expected = pairs.numel() / 256
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 5 * (2 * 255) ** 0.5


def test_every_bit_is_fair() -> None:
    integers = (draw(500) * 2**24).long()
    tolerance = 5 * 0.5 / integers.numel() ** 0.5
    for bit in range(24):
        assert abs((integers >> bit & 1).double().mean().item() - 0.5) < tolerance


def test_hash_keys_are_ordered() -> None:
    assert not torch.equal(hash_indices(INDICES, 1, 2), hash_indices(INDICES, 2, 1))


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        SampleNoise(0, "s", 0, INDICES, torch.float16)
