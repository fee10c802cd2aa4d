"""Tiny data sets of image files, in the formats that the real ones have."""

import io
import tarfile
from pathlib import Path

import torch
from PIL import Image

CLASSES = ("n01", "n02", "n03")


def jpeg(seed: int, size: tuple[int, int] = (40, 48)) -> bytes:
    """Return a JPEG of smooth colours; every seed has its own."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(1, 3, 3, 3, generator=generator)
    pixels = torch.nn.functional.interpolate(corners, size, mode="bilinear")[0]
    image = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
    target = io.BytesIO()
    image.save(target, "JPEG", quality=95)
    return target.getvalue()


def names_of(part: str, per_class: int) -> list[tuple[str, int]]:
    """Return the path of each image below the part, and its label."""
    return [
        (f"{name}/{part}_{label}_{number}.JPEG", label)
        for label, name in enumerate(CLASSES)
        for number in range(per_class)
    ]


def write_tree(root: Path, train: int = 4, val: int = 2) -> Path:
    """Write train/CLASS/*.JPEG and val/CLASS/*.JPEG, images of many sizes."""
    for part, per_class in (("train", train), ("val", val)):
        for number, (name, _) in enumerate(names_of(part, per_class)):
            file = root / part / name
            file.parent.mkdir(parents=True, exist_ok=True)
            size = (40 + number % 3, 48 - number % 5)
            file.write_bytes(jpeg(1000 * (part == "val") + number, size))
    return root


def write_lists(root: Path) -> Path:
    """Write ImageNet-LT's lists for a tree: 4, 3 and 2 training images, one each for validation."""
    names = names_of("train", 5)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name, label in names:
        number = int(name.removesuffix(".JPEG").rpartition("_")[2])
        if number < 4 - label:
            lines["train"].append(f"train/{name} {label}")
        elif number == 4:
            lines["val"].append(f"train/{name} {label}")
    lines["test"] = [f"val/{name} {label}" for name, label in names_of("val", 2)]
    for part, rows in lines.items():
        (root / f"ImageNet_LT_{part}.txt").write_text("\n".join(rows) + "\n")
    return root


def write_shards(tree: Path, root: Path, per_shard: int = 5) -> Path:
    """Write the images of a tree as WebDataset's shards, in the tree's order."""
    root.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        files = sorted((tree / part).rglob("*.JPEG"))
        for number, start in enumerate(range(0, len(files), per_shard)):
            with tarfile.open(root / f"{part}-{number:04d}.tar", "w") as archive:
                for place, file in enumerate(files[start : start + per_shard], start):
                    label = CLASSES.index(file.parent.name)
                    key = f"{place:06d}"
                    add(archive, f"{key}.cls", str(label).encode())
                    add(archive, f"{key}.json", b"{}")
                    add(archive, f"{key}.jpg", file.read_bytes())
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
