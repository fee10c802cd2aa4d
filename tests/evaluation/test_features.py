"""Class margins and per-class accuracy."""

import pytest
import torch

from dkl.evaluation import class_counts, class_margins, per_class_accuracy


def by_hand(logits, labels, num_classes):
    """The definition, one class at a time."""
    margins = []
    for label in range(num_classes):
        mean = logits[labels == label].softmax(1).mean(0)
        others = [mean[k] for k in range(num_classes) if k != label]
        margins.append(mean[label] - max(others))
    return torch.stack(margins)


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(60, 5, generator=generator, dtype=torch.float64)
    return logits, torch.arange(60) % 5


def test_margins_follow_the_definition(sample):
    logits, labels = sample
    torch.testing.assert_close(class_margins(logits, labels, 5), by_hand(logits, labels, 5))
    assert class_margins(logits.float(), labels, 5).dtype == torch.float32


def test_margins_do_not_depend_on_order_or_shift(sample):
    logits, labels = sample
    expected = class_margins(logits, labels, 5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(class_margins(logits[order], labels[order], 5), expected)
    torch.testing.assert_close(class_margins(logits + 7.0, labels, 5), expected)
    classes = torch.tensor([2, 0, 1, 4, 3])
    renamed = class_margins(logits[:, classes], torch.argsort(classes)[labels], 5)
    torch.testing.assert_close(renamed, expected[classes])


def test_extremes():
    logits = 1e4 * torch.eye(3)
    torch.testing.assert_close(class_margins(logits, torch.arange(3), 3), torch.ones(3))
    wrong = torch.tensor([1, 2, 0])
    torch.testing.assert_close(class_margins(logits, wrong, 3), -torch.ones(3))
    assert per_class_accuracy(logits, wrong, 3).sum() == 0


def test_classes_without_samples_have_a_stated_value(sample):
    logits, labels = sample
    present = labels != 3
    margins = class_margins(logits[present], labels[present], 5)
    assert margins[3] == 0
    assert margins.isfinite().all()
    others = [0, 1, 2, 4]
    torch.testing.assert_close(margins[others], by_hand(logits, labels, 5)[others])
    assert class_margins(logits[present], labels[present], 5, missing=-9.0)[3] == -9
    assert per_class_accuracy(logits[present], labels[present], 5)[3] == 0
    assert class_counts(labels[present], 5).tolist() == [12, 12, 12, 0, 12]
    assert class_margins(logits[:0], labels[:0], 5).tolist() == [0] * 5


def test_per_class_accuracy_averages_to_the_accuracy(sample):
    logits, labels = sample
    per_class = per_class_accuracy(logits, labels, 5)
    hits = (logits.argmax(1) == labels).float()
    torch.testing.assert_close((per_class * class_counts(labels, 5)).sum() / 60, hits.mean())
    assert per_class[2] == hits[labels == 2].mean()


@pytest.mark.parametrize("function", [class_margins, per_class_accuracy])
def test_bad_shapes(function, sample):
    logits, labels = sample
    for bad_logits, bad_labels, num_classes, message in [
        (logits, labels, 6, r"\[N, 6\]"),
        (logits[0], labels, 5, r"\[N, 5\]"),
        (logits.long(), labels, 5, "floating point"),
        (logits, labels[:9], 5, "9 labels"),
        (logits, labels + 1, 5, r"\[0, 5\)"),
        (logits, labels.float(), 5, "integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(bad_logits, bad_labels, num_classes)
    with pytest.raises(ValueError, match="another class"):
        class_margins(torch.zeros(3, 1), torch.zeros(3).long(), 1)
