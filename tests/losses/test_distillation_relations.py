"""RKD, SP and PKT against their definitions, in float64, and at their edges."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dkl.losses import (
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)


def features(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def assert_same(ours, expected, leaf):
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaf)[0],
        torch.autograd.grad(expected.sum(), leaf)[0],
        rtol=1e-9,
        atol=1e-13,
    )


def huber(difference):
    size = difference.abs()
    return torch.where(size < 1, 0.5 * difference**2, size - 0.5)


def distances_by_hand(x):
    pairs = {(i, j): (x[i] - x[j]).norm() for i, j in itertools.permutations(range(len(x)), 2)}
    mean = sum(pairs.values()) / len(pairs)
    return {pair: distance / mean for pair, distance in pairs.items()}


def test_distance_loss_is_its_formula():
    student, teacher = features(5, 3, seed=1, scale=4.0), features(5, 7, seed=2).detach()
    ours, theirs = distances_by_hand(student), distances_by_hand(teacher)
    rows = [sum(huber(ours[i, j] - theirs[i, j]) for j in range(5) if j != i) / 5 for i in range(5)]
    assert_same(rkd_distance_loss(student, teacher, reduction="none"), torch.stack(rows), student)


def angles_by_hand(x, j):
    """Return the cosines at the anchor j for all (i, k)."""
    zero = torch.zeros_like(x[j])
    arms = [zero if i == j else (x[i] - x[j]) / (x[i] - x[j]).norm() for i in range(len(x))]
    return torch.stack([torch.stack([(a * b).sum() for b in arms]) for a in arms])


def test_angle_loss_is_its_formula():
    student, teacher = features(5, 3, seed=1), features(5, 7, seed=2).detach()
    rows = [
        huber(angles_by_hand(student, j) - angles_by_hand(teacher, j)).sum() / 25 for j in range(5)
    ]
    assert_same(rkd_angle_loss(student, teacher, reduction="none"), torch.stack(rows), student)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_relations_survive_motion_and_scaling(loss):
    student, teacher = features(6, 4, seed=1), features(6, 4, seed=2)
    rotation = torch.linalg.qr(features(4, 4, seed=3).detach()).Q
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(3 * student @ rotation + 7, teacher), expected)
    torch.testing.assert_close(loss(student, 0.2 * teacher @ rotation - 1), expected)
    assert loss(5 * teacher @ rotation + 2, teacher) < 1e-20


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 6, 7, 8, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_of_anchors_change_nothing(chunk_size, reduction):
    student, teacher = features(7, 3, seed=1), features(7, 5, seed=2)
    mask = torch.tensor([True, True, False, True, True, True, False])
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    for options in ({}, {"mask": mask}):
        whole = rkd_angle_loss(student, teacher, chunk_size=7, reduction=reduction, **options)
        parts = rkd_angle_loss(
            student, teacher, chunk_size=chunk_size, reduction=reduction, **options
        )
        torch.testing.assert_close(parts, whole, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(
            torch.autograd.grad((parts * weights).sum(), student)[0],
            torch.autograd.grad((whole * weights).sum(), student)[0],
            rtol=1e-13,
            atol=1e-15,
        )


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize(("chunk_size", "anchors"), [(4, 4), (40, 40)])
def test_memory_of_angles_is_that_of_a_chunk(chunk_size, anchors):
    student, teacher = features(40, 3, seed=1), features(40, 5, seed=2)
    kept = []
    with (
        _Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        rkd_angle_loss(student, teacher, chunk_size=chunk_size).backward()
    assert largest.elements == anchors * 40 * 40
    saved = sum({x.data_ptr(): x.numel() for x in kept}.values())
    if chunk_size == 40:
        assert saved >= 40**3
    else:
        assert saved < 40**2  # what a chunk needs for its gradients is computed again


def test_the_default_chunk_bounds_the_largest_tensor(monkeypatch):
    monkeypatch.setattr("dkl.losses.relational._CHUNK_ELEMENTS", 3 * 20 * 30)
    student, teacher = features(20, 4, seed=1), features(20, 30, seed=2)
    with _Largest() as largest:
        loss = rkd_angle_loss(student, teacher)
        loss.backward()
    assert largest.elements == 3 * 20 * 30
    torch.testing.assert_close(loss, rkd_angle_loss(student, teacher, chunk_size=20))
    wide, narrow = features(20, 1000, seed=1), features(20, 2, seed=2)
    with _Largest() as largest:  # one anchor at least
        rkd_angle_loss(wide, narrow).backward()
    assert largest.elements == 20 * 1000


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_samples_that_coincide_have_finite_gradients(dtype):
    student = features(5, 3, seed=1).detach()
    student[3] = student[1]
    student = student.to(dtype).requires_grad_()
    teacher = features(5, 4, seed=2)
    for loss in (
        rkd_distance_loss(student, teacher),
        rkd_angle_loss(student, teacher),
        rkd_angle_loss(student, teacher, chunk_size=2),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert 1e-4 < gradient.abs().max() < 10


def test_coincident_pairs_count_in_the_mean_distance():
    student = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    # the student's distances are 1e-6, 1 and 1, over their mean of 2/3
    ours = [1.5e-6, 1.5, 1.5]
    theirs = [0.75, 0.75, 1.5]
    pairs = [0.5 * (a - b) ** 2 for a, b in zip(ours, theirs, strict=True)]
    expected = 2 * sum(pairs) / 9
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_a_collapsed_student_has_all_its_distances_equal():
    teacher = features(5, 3, seed=1)
    student = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
    loss = rkd_distance_loss(student, teacher)
    expected = sum(huber(1 - distance) for distance in distances_by_hand(teacher).values()) / 25
    torch.testing.assert_close(loss, expected)
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_close_samples_far_away_keep_their_distance():
    """Through products of float32 features the distances would be rounding noise."""
    student, teacher = features(6, 4, seed=1).detach().float(), features(6, 4, seed=2).float()
    student = (student * 1024).round() / 1024
    moved = student + 1000.0
    assert torch.equal(moved - 1000.0, student)
    for loss in (rkd_distance_loss, rkd_angle_loss):
        torch.testing.assert_close(
            loss(moved, teacher), loss(student, teacher), rtol=1e-5, atol=1e-8
        )


def similarities_by_hand(x):
    gram = x.flatten(1) @ x.flatten(1).T
    return gram / gram.norm(dim=1, keepdim=True)


def test_similarity_preserving_is_its_formula():
    student, teacher = features(5, 3, 4, 4, seed=1), features(5, 2, 2, 2, seed=2).detach()
    difference = similarities_by_hand(student) - similarities_by_hand(teacher)
    ours = similarity_preserving_loss(student, teacher, reduction="none")
    assert_same(ours, difference.pow(2).sum(1) / 5, student)
    torch.testing.assert_close(similarity_preserving_loss(-3 * student, teacher), ours.mean())


def test_a_dead_sample_is_similar_to_none():
    student = features(4, 3, seed=1).detach()
    student[2] = 0
    student.requires_grad_()
    loss = similarity_preserving_loss(student, features(4, 3, seed=2))
    assert torch.autograd.grad(loss, student)[0].abs().max() < 10


def neighbours_by_hand(x):
    similarity = (F.cosine_similarity(x[:, None], x[None], dim=2) + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def test_pkt_is_a_divergence_of_neighbours():
    student, teacher = features(6, 3, seed=1), features(6, 5, seed=2).detach()
    q, p = neighbours_by_hand(student), neighbours_by_hand(teacher)
    expected = F.kl_div(q.log(), p, reduction="none").mean(1)
    ours = pkt_loss(student, teacher, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # but for the epsilons
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student)[0],
        torch.autograd.grad(expected.sum(), student)[0],
        rtol=0,
        atol=1e-5,
    )


def test_opposite_samples_do_not_take_pkt_below_its_domain():
    """In float32 some of their cosines are below -1 by more than the epsilon."""
    for seed in range(100):
        direction = features(1, 64, seed=seed, scale=1e3).detach().float()
        student = torch.cat([direction, -direction]).requires_grad_()
        loss = pkt_loss(student, features(2, 3, seed=2).float())
        assert loss > 0
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss, pkt_loss])
def test_only_rows_of_features_are_accepted(loss):
    with pytest.raises(ValueError, match=r"must both be \[B, D\] .* got input \[2, 3, 4, 4\]"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3))


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_a_chunk_has_anchors(chunk_size):
    with pytest.raises(ValueError, match=f"number of anchors >= 1 or None, got {chunk_size}"):
        rkd_angle_loss(torch.zeros(2, 3), torch.zeros(2, 3), chunk_size=chunk_size)
