"""CRD against its definition, in float64, and at its edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from dkl.losses import crd_log_normalizer, crd_loss

N, K, T = 60, 9, 0.07


def embeddings(seed):
    """Return anchors, positives and the embeddings of negatives, all of length one."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 6), (5, 6), (5, K, 6))
    ]
    anchors, positives, negatives = (F.normalize(x, dim=-1) for x in made)
    return anchors.requires_grad_(), positives, negatives


def similarities(anchors, negatives):
    return torch.einsum("bd,bkd->bk", anchors, negatives)


def crd_by_hand(anchors, positives, negatives, z):
    rows = []
    noise = K / N
    for u, v, others in zip(anchors, positives, negatives, strict=True):
        positive = ((u * v).sum() / T).exp() / z
        row = (positive / (positive + noise + 1e-7)).log()
        for w in others:
            negative = ((u * w).sum() / T).exp() / z
            row = row + (noise / (negative + noise + 1e-7)).log()
        rows.append(-row)
    return torch.stack(rows)


def test_crd_is_its_formula():
    anchors, positives, negatives = embeddings(seed=1)
    z = 5e4
    expected = crd_by_hand(anchors, positives, negatives, z)
    ours = crd_loss(
        anchors,
        positives,
        similarities(anchors, negatives),
        num_samples=N,
        log_normalizer=math.log(z),
        reduction="none",
    )
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), anchors)[0],
        torch.autograd.grad(expected.sum(), anchors)[0],
        rtol=1e-10,
        atol=1e-12,
    )


def test_the_normalizer_is_the_mean_score_times_the_number_of_samples():
    anchors, positives, negatives = embeddings(seed=2)
    scores = torch.cat(
        [(anchors * positives).sum(1, keepdim=True), similarities(anchors, negatives)], 1
    )
    expected = math.log((scores / T).exp().mean().item() * N)
    found = crd_log_normalizer(anchors, positives, scores[:, 1:], num_samples=N)
    assert not found.requires_grad
    assert found.item() == pytest.approx(expected, rel=1e-12)
    loss = crd_loss(anchors, positives, scores[:, 1:], num_samples=N, log_normalizer=found)
    by_hand = crd_by_hand(anchors, positives, negatives, math.exp(expected))
    torch.testing.assert_close(loss, by_hand.mean())


def test_the_normalizer_leaves_out_what_does_not_count():
    anchors, positives, negatives = embeddings(seed=3)
    pairs = similarities(anchors, negatives).detach()
    kept = torch.tensor([True, False, True, True, False])
    expected = crd_log_normalizer(anchors[kept], positives[kept], pairs[kept], num_samples=N)
    positives[~kept] = math.nan
    pairs[~kept] = math.inf
    found = crd_log_normalizer(anchors, positives, pairs, num_samples=N, mask=kept)
    torch.testing.assert_close(found, expected)
    none = crd_log_normalizer(anchors, positives, pairs, num_samples=N, mask=kept & False)
    assert none.item() == pytest.approx(math.log(N))


def test_a_similar_positive_and_distant_negatives_lose_less():
    anchors, _, negatives = embeddings(seed=4)
    pairs = similarities(anchors, negatives)
    options = {"num_samples": N, "log_normalizer": 12.0}
    near, far = (crd_loss(anchors, sign * anchors, pairs, **options) for sign in (1, -1))
    assert near < far
    assert crd_loss(anchors, anchors, pairs - 0.3, **options) < near
    (gradient,) = torch.autograd.grad(near, pairs)
    assert (gradient > 0).all()


@pytest.mark.parametrize("similarity", [-1e4, 1e4])
def test_scores_that_overflow_stay_finite_in_log_space(similarity):
    """exp(1e4 / 0.07) has 62000 digits; its logarithm is the loss."""
    anchor = torch.ones(1, 1, requires_grad=True)
    pairs = torch.full((1, 3), -similarity, requires_grad=True)
    loss = crd_loss(
        anchor, torch.full((1, 1), similarity), pairs, num_samples=10, log_normalizer=0.0
    )
    gradients = torch.autograd.grad(loss, (anchor, pairs))
    assert all(x.isfinite().all() for x in (loss, *gradients))
    if similarity > 0:  # all is as it should be, up to the 1e-7 in the denominators
        assert loss.item() == pytest.approx(0.0, abs=1e-5)
    else:
        assert loss.item() == pytest.approx(4e4 / 0.07, rel=1e-4)
