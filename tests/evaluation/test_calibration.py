"""Calibration, on predictions whose numbers are worked out by hand."""

import math

import pytest
import torch

from dkl.evaluation import expected_calibration_error, negative_log_likelihood, reliability


def logits_of(*probabilities):
    """Return logits of two classes; class 0 has these probabilities."""
    first = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1).log()


def test_the_error_by_hand():
    # Five bins. (0.4, 0.6]: 0.55, 0.6, one right of two; (0.6, 0.8]: 0.7, wrong; (0.8, 1]: 0.9,
    # 0.95, 1 - 0.1, all right.
    logits = logits_of(0.55, 0.6, 0.7, 0.9, 0.95, 0.1)
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    found = reliability(logits, labels, num_bins=5)
    assert found.count.tolist() == [0, 0, 2, 1, 3]
    torch.testing.assert_close(
        found.confidence, torch.tensor([0, 0, 0.575, 0.7, 2.75 / 3], dtype=torch.float64)
    )
    assert found.accuracy.tolist() == [0, 0, 0.5, 0, 1]
    expected = (2 * 0.075 + 0.7 + 3 * (1 - 2.75 / 3)) / 6
    assert found.expected_calibration_error == pytest.approx(expected)
    assert expected_calibration_error(logits, labels, num_bins=5) == pytest.approx(expected)
    assert found.overconfidence == pytest.approx((0.15 + 0.7 + 2.75 - 3) / 6)


def test_the_upper_end_belongs_to_the_bin():
    # 0.5 and 0.75 are exact, and so are these logits of two and four classes.
    half = torch.zeros(1, 2)
    assert reliability(half, torch.tensor([0]), num_bins=2).count.tolist() == [1, 0]
    quarter = torch.zeros(1, 4)
    assert reliability(quarter, torch.tensor([0]), num_bins=4).count.tolist() == [1, 0, 0, 0]
    sure = torch.tensor([[1000.0, 0.0]])
    assert reliability(sure, torch.tensor([0]), num_bins=4).count.tolist() == [0, 0, 0, 1]


def test_calibrated_predictions_have_no_error_and_shifted_ones_do():
    # Confidence 0.8 is right four times of five, 0.6 three times of five.
    logits = logits_of(*[0.8] * 5, *[0.6] * 5)
    labels = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 1, 1])
    assert expected_calibration_error(logits, labels) == pytest.approx(0, abs=1e-12)
    assert reliability(2 * logits, labels).overconfidence > 0.05
    assert reliability(logits / 2, labels).overconfidence < -0.05
    for factor in (2.0, 0.5):
        assert expected_calibration_error(factor * logits, labels) > 0.05
        assert negative_log_likelihood(factor * logits, labels) > negative_log_likelihood(
            logits, labels
        )


def test_one_bin_is_the_gap_of_the_means_and_more_bins_never_less():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 10, generator=generator)
    labels = torch.randint(0, 10, (500,), generator=generator)
    confidence, predicted = logits.double().softmax(1).max(1)
    gap = abs(float(confidence.mean() - (predicted == labels).double().mean()))
    assert expected_calibration_error(logits, labels, num_bins=1) == pytest.approx(gap)
    # Every bin of 5 is made of three of 15: their gaps can only cancel.
    assert expected_calibration_error(logits, labels) >= expected_calibration_error(
        logits, labels, num_bins=5
    )
    assert reliability(logits, labels).count.sum() == 500


def test_likelihood_by_hand_and_for_extreme_logits():
    logits = logits_of(0.5, 0.25)
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert negative_log_likelihood(logits, torch.tensor([0, 1])) == pytest.approx(expected)
    far = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert negative_log_likelihood(far, torch.tensor([0, 1])) == 0.0
    assert negative_log_likelihood(far, torch.tensor([0, 0])) == pytest.approx(5e3)


@pytest.mark.parametrize("measure", [reliability, negative_log_likelihood])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"\[N, C\]"),
        (torch.zeros(0, 2), torch.zeros(0).long(), "N >= 1"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), "floating point"),
        (torch.zeros(3, 2), torch.zeros(2).long(), "3 rows.*2 labels"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), r"\[0, 2\)"),
        (torch.zeros(3, 2), torch.zeros(3), "integer class indices"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "NaN"),
    ],
)
def test_what_cannot_be_judged_is_refused(measure, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(logits, labels)


@pytest.mark.parametrize("num_bins", [0, 2.5, True])
def test_numbers_of_bins(num_bins):
    with pytest.raises(ValueError, match="num_bins"):
        reliability(torch.zeros(1, 2), torch.tensor([0]), num_bins=num_bins)
