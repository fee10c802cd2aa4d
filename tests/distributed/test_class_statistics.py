"""Two processes collect the same class table as one, under a model in DistributedDataParallel."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.class_statistics_worker import collect, resume

WORKER = Path(__file__).with_name("class_statistics_worker.py")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


def run_workers(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Run the worker in ``world_size`` processes and return their reports."""
    folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world_size), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the reports of this process alone, of the first of two and of the second of two."""
    root = tmp_path_factory.mktemp("class_statistics")
    alone = collect(0, 1, root)
    alone["resumed"] = resume(0, 1, root)
    return [alone, *run_workers(2, root / "two")]


def test_tables_of_all_epochs_equal_those_of_one_process(reports: list[dict[str, Any]]) -> None:
    alone, first, second = (report["tables"] for report in reports)
    assert len(alone) == 3
    for expected, ours, other in zip(alone, first, second, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
        assert torch.equal(ours, other)
    assert not torch.allclose(alone[0], alone[1])


def test_a_class_absent_in_all_processes_keeps_its_row(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert torch.equal(report["tables"][0][3], report["tables"][2][3])


def test_consolidate_moves_the_sums_to_the_first_process(reports: list[dict[str, Any]]) -> None:
    alone, first, second = (report["consolidated"] for report in reports)
    for name in ("table", "sums", "counts"):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-13, atol=0)
    assert first["counts"].sum() == 10  # padded duplicates do not count
    assert not second["sums"].any()
    assert not second["counts"].any()
    assert all(report["idempotent"] for report in reports)


def test_a_checkpoint_in_mid_epoch_resumes_in_every_process(reports: list[dict[str, Any]]) -> None:
    expected = reports[0]["tables"][1]
    for report in reports:
        torch.testing.assert_close(report["resumed"], expected, rtol=1e-13, atol=0)
