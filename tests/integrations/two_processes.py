"""One of two processes under torchrun: train on a half of every batch and report.

Arguments: timm, lightning or transformers; a folder that both share.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dkl.cli.processes import leave
from tests.integrations.tiny import PlainNet, data


def with_timm(folder: Path) -> dict[str, Any]:
    """Three epochs of two batches; this process has every other sample."""
    from dkl.integrations.timm import IKLDistillationTask

    dist.init_process_group("gloo")
    task = IKLDistillationTask(PlainNet(1), PlainNet(2), steps_per_epoch=2, verbose=False)
    task.prepare_distributed()
    parameters = task.get_trainable_module().parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for epoch in range(3):
        task.train()
        for step in range(2):
            images, labels = data(8, seed=10 * epoch + step)
            mine = slice(dist.get_rank(), None, 2)
            optimizer.zero_grad()
            task(images[mine], labels[mine])["loss"].backward()
            optimizer.step()
    return {
        "table": task.distillation.statistics.table,
        "student": task.get_checkpoint_state()["state_dict"],
    }


def with_lightning(folder: Path) -> dict[str, Any]:
    """The run of the test of one process, on two, with a checkpoint in the second epoch."""
    from tests.integrations.test_lightning import ModelCheckpoint, fit, make_module

    module = make_module(PlainNet(1), PlainNet(2))
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5)
    options = {"callbacks": [keep], "enable_checkpointing": True}
    fit(module, folder, max_epochs=3, batch_size=4, devices=2, strategy="ddp", **options)
    return {"table": module.loss.statistics.table, "student": module.student.state_dict()}


def with_transformers(folder: Path) -> dict[str, Any]:
    """The run of the test of one process, on two, with a checkpoint in the second epoch."""
    from tests.integrations.test_transformers import make_trainer

    saving = {"save_strategy": "steps", "save_steps": 5}
    trainer = make_trainer(folder, per_device_train_batch_size=4, **saving)
    trainer.train()
    return {
        "table": trainer.distillation.statistics.table,
        "student": trainer.model.state_dict(),
    }


def main() -> None:
    """Work and save the report."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    work = {"timm": with_timm, "lightning": with_lightning, "transformers": with_transformers}
    report = work[name](folder)
    torch.save(report, folder / f"rank_{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main()
