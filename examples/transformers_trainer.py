"""IKL with Hugging Face's Trainer: a tiny ViT learns real digits from a larger one.

Runs on a CPU in seconds: ``python examples/transformers_trainer.py``. Needs ``pip install
"dkl[transformers]"`` and scikit-learn for the digits; both models start from random weights.
"""

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from dkl.integrations.distillation import DistillationLoss
from dkl.integrations.transformers import IKLDistillationTrainer


def make_model(width: int, depth: int) -> ViTForImageClassification:
    """Return a vision transformer for 8x8 images of digits."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * width,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def accuracy(prediction) -> dict[str, float]:
    """Return the share of images that the model gets right."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    """Train the teacher, then the student; print what they get right before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 16 - 0.5, dtype=torch.float32)[:, None]
    pairs = zip(images, digits.target.tolist(), strict=True)
    samples = [{"pixel_values": image, "labels": label} for image, label in pairs]
    data = {"train_dataset": samples[:1400], "eval_dataset": samples[1400:]}

    def arguments(num_epochs: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=folder,
            num_train_epochs=num_epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=400,
            learning_rate=3e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        teacher, student = make_model(width=48, depth=2), make_model(width=32, depth=1)
        first = Trainer(teacher, arguments(2 * epochs), compute_metrics=accuracy, **data)
        first.train()
        teacher_accuracy = first.evaluate()["eval_accuracy"]
        loss = DistillationLoss(num_classes=10, mse_weight=0.5, temperature=4.0)
        options = {"teacher": teacher, "loss": loss, "compute_metrics": accuracy, **data}
        second = IKLDistillationTrainer(student, arguments(epochs), **options)
        before = second.evaluate()["eval_accuracy"]
        second.train()
        after = second.evaluate()["eval_accuracy"]
    print(f"teacher {teacher_accuracy:.3f}")
    print(f"student {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
