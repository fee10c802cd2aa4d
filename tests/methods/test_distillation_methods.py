"""What every method of distillation must do, and the mistakes that each must not make."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl import losses, methods
from dkl.methods.features import FeaturePair
from dkl.models import feature_maps, tap_shapes
from tests.methods.conftest import (
    assert_parts_add_up,
    gradients_of,
    make_batch,
    make_context,
    mixed,
    padded,
    select,
)
from tests.methods.distillation_cases import (
    COUPLED,
    IMAGE_SHAPE,
    NAMES,
    NUM_CLASSES,
    OWN_BATCH_NORM,
    labels_of_data,
    make,
    networks,
)


def batch_of_data(num_samples: int = 8):
    batch = make_batch(num_samples)
    return replace(batch, labels=labels_of_data(64)[batch.indices])


def loss_of(method, model, batch, **changes):
    context = make_context(batch, **changes)
    return method.loss(model, method.prepare(model, batch, context), context)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_student_and_own_layers_alone(name: str) -> None:
    student, teacher = networks(batch_norm=True)
    method = make(name, student, teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    loss_of(method, student.train(), batch_of_data()).loss.backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        if key != "conv1.bias" and name not in ("rkd",):
            assert parameter.grad.abs().max() > 0, key
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    for parameter in teacher.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    # Neither its weights nor its running statistics move, whatever mode it is asked in.
    assert not teacher.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not any(key.startswith("teacher.") for key in method.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_teacher_answers_in_its_mode(name: str) -> None:
    student, teacher = networks()
    method = make(name, student, teacher).train()
    batch = batch_of_data()
    context = make_context(batch)
    first = method.prepare(student, batch, context).extras
    again = method.prepare(student, batch, make_context(batch)).extras
    answers = [key for key in first if key.startswith("teacher_")]
    assert answers
    assert all(not first[key].requires_grad for key in answers)
    single = select(batch, slice(0, 1))
    alone = method.prepare(student, single, make_context(single)).extras
    with torch.no_grad():
        eval_maps = feature_maps(teacher.eval(), batch.images)
    for key in answers:
        if name == "ofd":
            # Batch statistics: as published, a teacher in train mode.
            assert not torch.allclose(first[key][:1], alone[key])
        else:
            # Dropout or batch statistics would show in either.
            assert torch.equal(first[key], again[key])
            torch.testing.assert_close(first[key][:1], alone[key])
    if name == "ofd_eval":
        torch.testing.assert_close(first["teacher_feature_0"], eval_maps.pre_activations[1])


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_a_mean_over_samples(name: str) -> None:
    student, teacher = networks()
    batch = batch_of_data()
    twice = select(batch, torch.arange(8).repeat(2))
    one = loss_of(make(name, student, teacher), student, batch)
    two = loss_of(make(name, student, teacher), student, twice)
    # A pair of copies adds distances of zero; drawn negatives follow the sample.
    if name != "rkd":
        # DIST's definition has a small number that outweighs short vectors.
        rtol = 2e-3 if name == "dist" else 1e-6
        torch.testing.assert_close(two.loss, one.loss, rtol=rtol, atol=1e-9)
    assert two.counts == 2 * one.counts
    total = sum(value for key, value in one.parts.items() if key != "loss")
    torch.testing.assert_close(one.parts["loss"], total)
    torch.testing.assert_close(one.loss.detach() * 8, one.parts["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch_add_up_or_the_method_says_that_they_do_not(name: str) -> None:
    student, teacher = networks()
    method = make(name, student, teacher)
    assert method.couples_batch == (name in COUPLED)
    if name == "crd":  # its constants are those of the first whole step
        whole = batch_of_data()
        loss_of(method, student, whole)
    if name not in COUPLED:
        assert_parts_add_up(method, student, batch_of_data(), padded)


# Batch-norm of a method's own takes in every row, as the student's does.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN_BATCH_NORM])
def test_rows_that_do_not_count_may_hold_anything(name: str) -> None:
    student, teacher = networks()
    method = make(name, student, teacher)
    batch = batch_of_data()
    if name == "crd":
        loss_of(method, student, batch)
    longer = padded(batch)
    longer.images[-1] = 1e3
    for expected, found in zip(
        gradients_of(method, student, batch),
        gradients_of(method, student, longer, whole=batch),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dkd", "crd", "gkl_kd")])
def test_mixed_labels(name: str) -> None:
    student, teacher = networks()
    batch = mixed(batch_of_data())
    output = loss_of(make(name, student, teacher), student, batch)
    hard = F.cross_entropy(student(batch.images), batch.targets)
    factor = 0.1 if name == "kd" else 1.0
    torch.testing.assert_close(output.parts["hard_ce"] / 8, factor * hard.detach())


@pytest.mark.parametrize("name", ["dkd", "crd", "gkl_kd"])
def test_mixed_labels_are_refused_where_they_have_no_meaning(name: str) -> None:
    student, teacher = networks()
    with pytest.raises(ValueError, match="mix"):
        loss_of(make(name, student, teacher), student, mixed(batch_of_data()))


@pytest.mark.parametrize("name", ["dkd", "reviewkd"])
def test_warmup_grows_the_teachers_term(name: str) -> None:
    student, teacher = networks()
    batch = batch_of_data()
    key = "soft" if name == "dkd" else "feature"
    terms = [
        loss_of(make(name, student, teacher), student, batch, epoch=epoch).parts[key]
        for epoch in (0, 1, 2)
    ]
    torch.testing.assert_close(terms[0], terms[1] / 2)
    torch.testing.assert_close(terms[1], terms[2])


def test_terms_are_the_formulas() -> None:
    student, teacher = networks()
    batch = batch_of_data()
    z_s, z_t = student(batch.images).detach(), teacher(batch.images).detach()
    expected = {
        "kd": 0.9 * 16 * losses.kl_loss(z_s, z_t, temperature=4.0),
        "jsd_kd": 4 * losses.jsd_loss(z_s, z_t, temperature=2.0),
        "dkd": 0.5 * 16 * losses.dkd_loss(z_s, z_t, batch.labels, beta=2.0, temperature=4.0),
        "dist": 2 * 16 * losses.dist_loss(z_s, z_t, temperature=4.0),
    }
    for name, value in expected.items():
        soft = loss_of(make(name, student, teacher), student, batch).parts["soft"] / 8
        torch.testing.assert_close(soft, value)
    s, t = feature_maps(student, batch.images), feature_maps(teacher, batch.images)
    features = {
        "at": 50 * losses.attention_transfer_loss(s.maps[1:], t.maps[1:]),
        "rkd": 2 * losses.rkd_distance_loss(s.pooled, t.pooled)
        + 4 * losses.rkd_angle_loss(s.pooled, t.pooled),
    }
    for name, value in features.items():
        found = loss_of(make(name, student, teacher), student, batch).parts["feature"] / 8
        torch.testing.assert_close(found, value.detach())


def test_binary_cross_entropy_is_the_mean_over_classes() -> None:
    student, teacher = networks()
    batch = batch_of_data()
    method = methods.kd(teacher, hard_loss="bce", hard_weight=1.0)
    one_hot = F.one_hot(batch.labels, NUM_CLASSES).double()
    expected = F.binary_cross_entropy_with_logits(student(batch.images), one_hot)
    found = loss_of(method, student, batch).parts["hard_bce"] / 8
    torch.testing.assert_close(found, expected.detach())
    targets = mixed(batch)
    found = loss_of(method, student, targets).parts["hard_bce"] / 8
    expected = F.binary_cross_entropy_with_logits(student(batch.images), targets.targets)
    torch.testing.assert_close(found, expected.detach())


def pair_of(student: nn.Module, teacher: nn.Module) -> FeaturePair:
    shapes = (tap_shapes(network, IMAGE_SHAPE) for network in (student, teacher))
    return FeaturePair(feature_maps, feature_maps, *shapes)


def test_what_does_not_fit_is_refused_before_training() -> None:
    student, teacher = networks()
    pair = pair_of(student, teacher)
    with pytest.raises(ValueError, match="stage 7 needs a map"):
        methods.fitnet(teacher, pair, stage=7)
    with pytest.raises(ValueError, match="weight"):
        methods.attention_transfer(teacher, pair, weight=-1.0)
    with pytest.raises(ValueError, match="batch-norm layer before the activation"):
        methods.ofd(teacher, pair, [None, None, None])
    with pytest.raises(ValueError, match="one batch-norm layer for each of the 2"):
        methods.ofd(teacher, pair, [None, nn.BatchNorm2d(4)])
    with pytest.raises(ValueError, match="at least two classes"):
        methods.crd(teacher, pair, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="momentum in"):
        methods.crd(teacher, pair, labels_of_data(9), momentum=1.0)
    few = replace(pair, student=pair.student._replace(maps=pair.student.maps[:2]))
    with pytest.raises(ValueError, match="equally many stages"):
        methods.attention_transfer(teacher, few)
    unknown = replace(pair, teacher=pair.teacher._replace(pre_activations=[]))
    with pytest.raises(ValueError, match="maps before an activation"):
        methods.reviewkd(teacher, unknown)
    wide = replace(pair, student=pair.student._replace(maps=[(3, 3, 3)] * 3))
    with pytest.raises(ValueError, match="no layer leads"):
        methods.fitnet(teacher, wide, stage=1)
