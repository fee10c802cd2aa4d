"""Replace F.kl_div in a plain PyTorch loop: a small student of a larger teacher, on real digits.

Runs on a CPU in seconds: ``python examples/replace_kl_div.py``. Needs scikit-learn for the digits.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dkl

NUM_CLASSES, BATCH_SIZE = 10, 64


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, teacher: nn.Module | None):
    """Train on labels, and on the teacher's logits where there is one."""
    images, labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    statistics = dkl.ClassStatistics(NUM_CLASSES)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            x, y = images[batch], labels[batch]
            student_logits = model(x)
            loss = F.cross_entropy(student_logits, y)
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(x)
                # Before, with T = 4:
                #   F.kl_div(F.log_softmax(student_logits / T, 1),
                #            F.softmax(teacher_logits / T, 1), reduction="batchmean") * T**2
                loss = loss + dkl.ikl_loss(
                    student_logits,
                    teacher_logits,
                    class_table=statistics.table,
                    labels=y,
                    mse_weight=0.5,
                    temperature=4.0,
                )
                statistics.update(teacher_logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        statistics.commit()  # the next epoch weighs the classes by what this one saw


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images that the model gets right."""
    images, labels = data
    return (model(images).argmax(1) == labels).float().mean().item()


def mlp(width: int) -> nn.Module:
    """Return a network of one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


def main() -> None:
    """Train the teacher, then the student; print what they get right before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train_data, test_data = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    teacher, student = mlp(256), mlp(16)
    train(teacher, train_data, 2 * epochs, teacher=None)
    before = accuracy(student, test_data)
    train(student, train_data, epochs, teacher=teacher)
    print(f"teacher {accuracy(teacher, test_data):.3f}")
    print(f"student {before:.3f} before, {accuracy(student, test_data):.3f} after")


if __name__ == "__main__":
    main()
