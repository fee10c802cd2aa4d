"""mixup, alone and beside CutMix: its distribution, its labels, and that batches may be split."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from dkl.data import cutmix, mixup, mixup_or_cutmix
from dkl.engine import SampleNoise

NUM = 4000


def noise(indices: Tensor, seed: int = 0) -> SampleNoise:
    return SampleNoise(seed, "mix", 5, indices)


def shares(alpha: float, num: int = NUM) -> Tensor:
    images = torch.zeros(num, 1, 1, 1, dtype=torch.float64)
    return mixup(images, images, noise(torch.arange(num)), alpha=alpha)[1]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.9, 1.0])
def test_lambda_has_the_beta_distribution(alpha: float) -> None:
    lam = shares(alpha).numpy()
    assert lam.min() >= 0
    assert lam.max() <= 1
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert stats.kstest(lam, stats.beta(alpha + 0.1, alpha + 0.1).cdf).pvalue < 0.01


def test_no_power_underflows() -> None:
    # Beta(alpha, alpha) is a fair coin in the limit; U^(1 / alpha) is far below what double holds.
    lam = shares(1e-3)
    assert not lam.isnan().any()
    assert ((lam < 1e-6) | (lam > 1 - 1e-6)).double().mean() > 0.95
    assert abs(lam.mean() - 0.5) < 0.03


def test_images_and_labels_are_mixed_by_the_same_share() -> None:
    images, partners = torch.zeros(50, 3, 4, 4), torch.ones(50, 3, 4, 4)
    mixed, share = mixup(images, partners, noise(torch.arange(50)), alpha=0.4)
    torch.testing.assert_close(1 - mixed, share[:, None, None, None].expand_as(mixed))
    assert share.dtype == torch.float32
    own, others = torch.rand(50, 3, 4, 4), torch.rand(50, 3, 4, 4)
    mixed, again = mixup(own, others, noise(torch.arange(50)), alpha=0.4)
    weight = share[:, None, None, None]
    torch.testing.assert_close(mixed, weight * own + (1 - weight) * others)
    assert torch.equal(again, share)


@pytest.mark.parametrize(("blend", "cut"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.5, 0.5)])
def test_each_sample_has_one_of_the_two_by_their_shares(blend: float, cut: float) -> None:
    images, partners = torch.zeros(NUM, 1, 8, 8), torch.ones(NUM, 1, 8, 8)
    mixed, share = mixup_or_cutmix(
        images,
        partners,
        noise(torch.arange(NUM)),
        mixup_probability=blend,
        cutmix_probability=cut,
        alpha=1.0,
    )
    torch.testing.assert_close(1 - mixed.mean((1, 2, 3)), share, atol=1e-5, rtol=0)
    is_cut = ((mixed == 0) | (mixed == 1)).flatten(1).all(1) & (share < 1)
    is_blended = (mixed.flatten(1) == mixed[:, 0, 0, :1]).all(1) & (share < 1) & (share > 0)
    assert not (is_cut & is_blended).any()
    # Of 64 pixels a CutMix box may be none at all, which is one in 64 of them and more.
    assert abs(is_blended.double().mean() - blend) < 0.03
    assert cut - 0.06 <= is_cut.double().mean() <= cut + 0.03
    assert (share == 1).sum() >= (1 - blend - cut - 0.03) * NUM


def test_only_cutmix_has_its_boxes() -> None:
    images, partners = torch.rand(9, 2, 6, 5), torch.rand(9, 2, 6, 5)
    uniform = torch.rand(9, 3)
    got = mixup_or_cutmix(
        images,
        partners,
        lambda k: {1: torch.zeros(9, 1), 3: uniform}.get(k, torch.rand(9, k)),
        mixup_probability=0.0,
        cutmix_probability=1.0,
    )
    expected = cutmix(images, partners, lambda k: torch.cat([uniform, torch.zeros(9, 1)], dim=1))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_cut_batch_is_the_whole_batch(dtype: torch.dtype) -> None:
    # At alpha 1 half of all pairs are rejected, so that rounds differ from sample to sample.
    images, partners = torch.rand(300, 1, 4, 4).to(dtype), torch.rand(300, 1, 4, 4).to(dtype)
    whole = mixup_or_cutmix(images, partners, noise(torch.arange(300)))
    parts = [
        mixup_or_cutmix(images[part], partners[part], noise(part))
        for part in torch.arange(300).split(7)
    ]
    for number, result in enumerate(whole):
        joined = torch.cat([part[number] for part in parts])
        # Vectors of other lengths take other instructions, whose last bits may differ.
        torch.testing.assert_close(joined, result, rtol=1e-12, atol=0)
    assert whole[0].dtype == dtype
    assert whole[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_later_round_does_not_depend_on_other_samples() -> None:
    calls: list[int] = []

    def stubborn(k: int) -> Tensor:
        """Reject the second sample's pairs in the first round."""
        calls.append(k)
        uniform = torch.full((2, k), 0.25)
        if calls.count(k) == 1 and k > 3:
            uniform[1] = 0.9
        return uniform

    images = torch.zeros(2, 1, 1, 1)
    _, share = mixup(images, images, stubborn, alpha=1.0)
    assert calls.count(32) == 2
    assert share.tolist() == [0.5, 0.5]


def test_a_draw_that_never_changes_ends_in_an_error() -> None:
    images = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="fresh uniform numbers at every call"):
        mixup(images, images, lambda k: torch.full((2, k), 0.9), alpha=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be above 0.*got 0.0"),
        ({"alpha": 1.5}, r"at most 1.*got 1.5"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"mixup_probability": 0.7}, r"together too; got \(0.7, 0.5\)"),
        ({"cutmix_probability": -0.1}, "must lie in 0 to 1"),
    ],
)
def test_bad_settings_are_explained(options: dict[str, float], message: str) -> None:
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        mixup_or_cutmix(images, images, noise(torch.arange(2)), **options)


def test_bad_images_are_explained() -> None:
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="shape and type of images"):
        mixup(images, images[:1], noise(torch.arange(2)))
    with pytest.raises(ValueError, match=r"got torch.uint8"):
        mixup(images.to(torch.uint8), images.to(torch.uint8), noise(torch.arange(2)))
