"""IKL in Lightning: a LightningModule whose callback commits the class statistics, on real digits.

Runs on a CPU in seconds: ``python examples/lightning_module.py``. Needs ``pip install
"dkl[lightning]"`` and scikit-learn for the digits.
"""

import argparse
from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dkl.integrations.distillation import DistillationLoss
from dkl.integrations.lightning import DistillationModule

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def mlp(width: int) -> nn.Module:
    """Return a network of one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def fit(
    student: nn.Module, teacher: nn.Module, loaders: list[DataLoader], epochs: int, weight: float
) -> tuple[float, float]:
    """Train the student; return its accuracy before and after."""
    loss = DistillationLoss(num_classes=10, mse_weight=0.5, temperature=4.0)
    module = DistillationModule(student, teacher, loss, SGD, distill_weight=weight)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (before,) = trainer.validate(module, loaders[1], verbose=False)
    trainer.fit(module, *loaders)
    (after,) = trainer.validate(module, loaders[1], verbose=False)
    return before["val_accuracy"], after["val_accuracy"]


def main() -> None:
    """Train the teacher, then the student; print what they get right before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train_data = TensorDataset(images[:1400], labels[:1400])
    test_data = TensorDataset(images[1400:], labels[1400:])
    loaders = [
        DataLoader(train_data, batch_size=64, shuffle=True),
        DataLoader(test_data, batch_size=400),
    ]
    teacher, student = mlp(256), mlp(16)
    # At weight 0 the labels alone train; the teacher's own teacher has no say.
    _, teacher_accuracy = fit(teacher, mlp(1), loaders, 2 * epochs, weight=0.0)
    before, after = fit(student, teacher, loaders, epochs, weight=1.0)
    print(f"teacher {teacher_accuracy:.3f}")
    print(f"student {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
