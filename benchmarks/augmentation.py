"""Speed of augmenting whole batches against transforms of single samples in a DataLoader.

    python benchmarks/augmentation.py [--json] [--rounds 7] [--num-images 10000] [--threads 2]

One epoch of each system gives float batches in [0, 1], padded by 4, cropped and mirrored, from the
same synthetic uint8 images in memory. The systems take turns within each round, so that a busy
machine disturbs all of them; ratios are taken within rounds. Workers are started before the clock
(persistent_workers), which favours them.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dkl.data import ImageData, basic_augment

SHAPES = ((1, 28, 28), (3, 32, 32))
PADDING = 4
System = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Row:
    """Images per second of one system on one shape, and how often slower it is than batches.

    Medians over the rounds; spreads are the smallest and the largest round.
    """

    system: str
    shape: str
    images_per_second: float
    images_per_second_spread: tuple[float, float]
    batch_speedup: float
    batch_speedup_spread: tuple[float, float]


class TransformedSamples(Dataset[Tensor]):
    """Single samples through torchvision's v2 transforms, from tensors or from PIL images."""

    def __init__(self, images_NCHW: Tensor, from_pil: bool) -> None:
        self.images: list[Any] = list(images_NCHW)
        steps: list[Any] = [
            v2.RandomCrop(images_NCHW.shape[2:], PADDING),
            v2.RandomHorizontalFlip(),
        ]
        if from_pil:
            self.images = [v2.functional.to_pil_image(image) for image in self.images]
            steps.append(v2.PILToTensor())
        self.transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.transform(self.images[index])
        return image


def whole_batches(images_NCHW: Tensor, batch_size: int) -> System:
    num = images_NCHW.shape[0]
    data = ImageData(images_NCHW, torch.zeros(num, dtype=torch.int64), 1, ("any",))
    augment = basic_augment(PADDING)

    def epoch() -> Iterator[Tensor]:
        index_batches = torch.split(torch.randperm(num), batch_size)
        for images, _ in data.batches(index_batches, "cpu"):
            uniform = partial(torch.rand, images.shape[0])
            yield augment(images.float() / 255, uniform)

    return epoch


def single_samples(images_NCHW: Tensor, batch_size: int, workers: int, from_pil: bool) -> System:
    loader = DataLoader(
        TransformedSamples(images_NCHW, from_pil),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: iter(loader)


def measure(shape: tuple[int, int, int], num: int, batch_size: int, rounds: int) -> list[Row]:
    images = torch.randint(0, 256, (num, *shape), dtype=torch.uint8)
    systems: dict[str, System] = {"whole batches": whole_batches(images, batch_size)}
    for workers in (0, 2):
        for kind in ("tensor", "PIL"):
            name = f"single {kind} samples, {workers} workers"
            systems[name] = single_samples(images, batch_size, workers, kind == "PIL")
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, system in systems.items():
            start = time.perf_counter()
            seen = sum(batch.shape[0] for batch in system())
            seconds = time.perf_counter() - start
            if seen != num:
                raise RuntimeError(f"{name} gave {seen} of {num} images")
            if number:  # the first round warms up and starts the workers
                rates[name].append(num / seconds)
    return [row(name, shape, rates[name], rates["whole batches"]) for name in systems]


def row(name: str, shape: tuple[int, ...], own: list[float], batches: list[float]) -> Row:
    ratios = [fast / slow for fast, slow in zip(batches, own, strict=True)]
    return Row(
        system=name,
        shape="x".join(map(str, shape)),
        images_per_second=statistics.median(own),
        images_per_second_spread=(min(own), max(own)),
        batch_speedup=statistics.median(ratios),
        batch_speedup_spread=(min(ratios), max(ratios)),
    )


def machine(threads: int) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def print_table(report: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(", ".join(f"{key} {value}" for key, value in report["settings"].items()))
    print("medians over the rounds (smallest to largest)\n")
    print(f"{'images':9}{'system':32}{'images/s':>30}{'batches are faster by':>30}")
    for entry in report["rows"]:
        low, high = entry["images_per_second_spread"]
        rate = f"{entry['images_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"
        low, high = entry["batch_speedup_spread"]
        ratio = f"{entry['batch_speedup']:.1f}x ({low:.1f} to {high:.1f})"
        print(f"{entry['shape']:9}{entry['system']:32}{rate:>30}{ratio:>30}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-images", type=int, default=10000, help="images in an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the main process")
    options = parser.parse_args()
    if min(options.rounds, options.num_images, options.batch_size, options.threads) < 1:
        sys.exit("rounds, num-images, batch-size and threads must be 1 or more")
    torch.set_num_threads(options.threads)
    about = machine(options.threads)
    rows = [
        asdict(entry)
        for shape in SHAPES
        for entry in measure(shape, options.num_images, options.batch_size, options.rounds)
    ]
    settings = {
        "rounds": options.rounds,
        "num_images": options.num_images,
        "batch_size": options.batch_size,
        "padding": PADDING,
    }
    report = {"machine": about, "settings": settings, "rows": rows}
    if options.json:
        print(json.dumps(report))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
