"""IKL in a timm training task: a tiny ResNet of timm learns real digits from another.

Runs on a CPU in seconds: ``python examples/timm_task.py``. Needs ``pip install "dkl[timm]"`` and
scikit-learn for the digits. docs/integrations.md has the lines for timm's own train script.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask, TrainingTask
from timm.utils import random_seed
from torch import Tensor, nn

from dkl.integrations.timm import IKLDistillationTask

BATCH_SIZE = 64


def train(task: TrainingTask, data: tuple[Tensor, Tensor], epochs: int) -> None:
    """Train any task of timm on mixed images."""
    images, labels = data
    mixup = Mixup(mixup_alpha=0.1, num_classes=10, label_smoothing=0.0)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        task.train()
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            if len(batch) % 2 == 0:  # mixup pairs the images
                loss = task(*mixup(images[batch], labels[batch]))["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@torch.no_grad()
def accuracy(task: TrainingTask, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images that the task's model gets right."""
    model = task.get_eval_model().eval()
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def make_model() -> nn.Module:
    """Return the smallest ResNet of timm, with random weights."""
    return timm.create_model("test_resnet", num_classes=10, in_chans=3)


def main() -> None:
    """Train the teacher, then the student; print what they get right before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    random_seed(0)  # mixup draws from numpy
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1) - 0.5
    labels = torch.tensor(digits.target)
    train_data, test_data = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])

    teacher = ClassificationTask(make_model(), SoftTargetCrossEntropy(), verbose=False)
    train(teacher, train_data, 2 * epochs)
    student = IKLDistillationTask(
        make_model(),
        teacher.get_eval_model(),
        SoftTargetCrossEntropy(),
        mse_weight=0.5,
        temperature=4.0,
        verbose=False,
    )
    before = accuracy(student, test_data)
    train(student, train_data, epochs)
    print(f"teacher {accuracy(teacher, test_data):.3f}")
    print(f"student {before:.3f} before, {accuracy(student, test_data):.3f} after")


if __name__ == "__main__":
    main()
