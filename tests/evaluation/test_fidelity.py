"""Agreement with a teacher and divergence from it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.evaluation import Fidelity, fidelity, model_fidelity


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 200, 7, generator=generator)).double()
    return student, teacher


def test_both_by_their_definitions(pair):
    student, teacher = pair
    found = fidelity(student, teacher)
    assert found.agreement == float((student.argmax(1) == teacher.argmax(1)).double().mean())
    expected = F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert found.kl == pytest.approx(float(expected), rel=1e-12)
    assert fidelity(teacher, student).kl != pytest.approx(found.kl, rel=1e-3)


def test_the_divergence_starts_at_the_teacher():
    # KL(teacher || student) = 0.5 log(0.5 / 0.9) + 0.5 log(0.5 / 0.1)
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)
    assert fidelity(student, teacher).kl == pytest.approx(expected, rel=1e-6)


def test_a_model_agrees_with_itself(pair):
    student, _ = pair
    assert fidelity(student, student) == Fidelity(1.0, 0.0)
    # Shifted logits are the same prediction; scaled ones agree, and are another.
    shifted = fidelity(student + 300, student)
    assert shifted.agreement == 1.0
    assert shifted.kl == pytest.approx(0, abs=1e-12)
    scaled = fidelity(0.5 * student, student)
    assert scaled.agreement == 1.0
    assert scaled.kl > 0.01
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(10, 1, 2, 2)
    assert model_fidelity(model, model, images, batch_size=3) == Fidelity(1.0, 0.0)


def test_two_models_are_shown_the_same_images():
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2))
    images = torch.rand(10, 1, 2, 2)
    with torch.no_grad():
        expected = fidelity(first(images), second(images))
    found = model_fidelity(first, second, images, batch_size=4)
    assert found.agreement == expected.agreement
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert first.training


def test_far_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert fidelity(student, teacher) == Fidelity(0.0, 2e4)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), "same samples and classes"),
        (torch.zeros(2, 2), torch.zeros(3, 2), "same samples and classes"),
        (torch.zeros(0, 2), torch.zeros(0, 2), "N >= 1"),
        (torch.zeros(3), torch.zeros(3), r"\[N, C\]"),
        (torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2), "student hold NaN"),
        (torch.zeros(1, 2), torch.tensor([[0.0, math.inf]]), "teacher hold NaN"),
        (torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), "floating point"),
    ],
)
def test_what_cannot_be_compared_is_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        fidelity(student, teacher)
