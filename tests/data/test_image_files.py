"""Images in files: the formats, exactness of what is drawn, and what is refused."""

import multiprocessing
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dkl.data import (
    BrokenImageError,
    ClassBalancedSource,
    DatasetNotFoundError,
    Decoding,
    ImageFiles,
    load_image_files,
    split_validation,
)
from tests.data.image_trees import CLASSES, add, write_lists, write_shards, write_tree

SMALL = {"image_size": 16, "resize": 20, "workers": 0}
STRONG = {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_lists(write_tree(tmp_path_factory.mktemp("images") / "tree", train=5))


def load(folder: Path, name: str = "image_folder", seed: int = 0, **decoding):
    return load_image_files(
        name, folder=folder, decoding=Decoding(**{**SMALL, **decoding}), seed=seed
    )


def drawn(data: ImageFiles, *, epoch: int = 0, batch: int = 4):
    order = data.epoch_order(seed=0, epoch=epoch)
    return list(data.batches(list(order.split(batch)), "cpu"))


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def names(data: ImageFiles) -> list[str]:
    return [data.store.name(sample) for sample in data.samples.tolist()]


def test_a_folder_is_what_torchvision_reads(tree):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    splits = load(tree)
    transform = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor()])
    reader = ImageFolder(tree / "val")
    theirs = {
        path: (transform(image), label)
        for (path, label), (image, _) in zip(reader.samples, reader, strict=True)
    }
    assert splits.test.class_names == CLASSES == tuple(reader.classes)
    own = splits.test.in_memory(torch.arange(len(splits.test)))
    assert len(own) == len(theirs) == 6
    for row, sample in enumerate(splits.test.samples.tolist()):
        pixels, label = theirs[splits.test.store.place(sample)]
        assert torch.equal(own.images[row], pixels)
        assert int(own.labels[row]) == label


@pytest.mark.parametrize("decoding", [{}, STRONG, {"repeats": 3}], ids=["plain", "strong", "rep"])
def test_batches_do_not_depend_on_workers_or_their_size(tree, decoding):
    alone = load(tree, **decoding).train
    state = torch.get_rng_state()
    wanted = drawn(alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(wanted, drawn(load(tree, workers=2, prefetch=1, **decoding).train))
    one_by_one = drawn(alone, batch=1)
    assert torch.equal(torch.cat([b[0] for b in wanted]), torch.cat([b[0] for b in one_by_one]))


def test_every_epoch_has_every_image_once_and_augments_it_anew(tree):
    data = load(tree).train
    first, second = (data.epoch_order(seed=0, epoch=epoch) for epoch in (0, 1))
    assert sorted((first % len(data)).tolist()) == sorted((second % len(data)).tolist())
    assert set(first.tolist()).isdisjoint(second.tolist())
    assert not torch.equal(first % len(data), second % len(data))
    (images, _), (again, _) = (
        next(data.batches([torch.tensor([3 + epoch * len(data)])], "cpu")) for epoch in (0, 1)
    )
    assert not torch.equal(images, again)
    other = next(load(tree, seed=1).train.batches([torch.tensor([3])], "cpu"))[0]
    assert not torch.equal(images, other)


def test_a_resumed_epoch_goes_on_alike(tree):
    data = load(tree, **STRONG).train
    order = data.epoch_order(seed=0, epoch=2).split(4)
    whole = list(data.batches(list(order), "cpu"))
    assert same(whole[2:], list(load(tree, **STRONG).train.batches(list(order[2:]), "cpu")))


def test_workers_leave_signals_to_the_process_that_trains(tree):
    data = load(tree, workers=2, prefetch=1, **STRONG).train
    order = data.epoch_order(seed=0, epoch=0).split(2)
    stream = data.batches(list(order), "cpu")
    seen = [next(stream), next(stream)]  # both workers are at work
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    seen += stream
    assert same(seen, list(load(tree, **STRONG).train.batches(list(order), "cpu")))


def test_repeated_augmentation_draws_fewer_images_several_times(tree):
    data = load(tree, repeats=3).train
    order = data.epoch_order(seed=0, epoch=4)
    assert len(order) == len(set(order.tolist())) == len(data)
    samples = (order % len(data)).reshape(-1, 3)
    assert (samples == samples[:, :1]).all()
    assert len(samples[:, 0].unique()) == len(data) // 3


def test_class_balanced_draws_are_augmented_one_by_one(tree):
    data = load(tree, name="imagenet_lt").train
    source = ClassBalancedSource(data, samples_per_epoch=30)
    order = source.epoch_order(seed=0, epoch=1)
    assert len(set(order.tolist())) == 30
    assert data.labels[order % len(data)].bincount().tolist() == [10, 10, 10]


def test_shards_give_the_images_of_the_folder(tree, tmp_path):
    shards = load(write_shards(tree, tmp_path / "shards"), "webdataset", **STRONG)
    folder = load(tree, **STRONG)
    assert same(drawn(folder.train), drawn(shards.train))
    everything = torch.arange(6)
    assert torch.equal(
        folder.test.in_memory(everything).images, shards.test.in_memory(everything).images
    )
    assert shards.train.store.name(0) == "000000.jpg"


def test_lists_of_imagenet_lt(tree):
    splits = load(tree, "imagenet_lt")
    assert torch.bincount(splits.train.labels).tolist() == [4, 3, 2]
    assert splits.validation is not None
    assert torch.bincount(splits.validation.labels).tolist() == [1, 1, 1]
    assert torch.bincount(splits.test.labels).tolist() == [2, 2, 2]
    assert set(names(splits.train)).isdisjoint(names(splits.validation))
    assert splits.train.augmented
    assert not splits.validation.augmented


def test_a_held_out_part_is_that_of_images_in_memory(tree):
    data = load(tree).train
    train, held_out = split_validation(data, 0.2, seed=0)
    assert torch.bincount(held_out.labels).tolist() == [1, 1, 1]
    assert sorted(names(train) + names(held_out)) == sorted(names(data))


def test_the_first_images_are_of_all_classes(tree):
    labels = load(tree).train.labels
    assert len(labels[:8].unique()) == len(CLASSES)


def test_gray_and_palette_images_become_rgb(tmp_path):
    root = write_tree(tmp_path, train=1, val=1)
    gray = np.arange(900, dtype=np.uint32).reshape(30, 30).astype(np.uint8)
    Image.fromarray(gray).save(root / "train" / "n01" / "gray.png")
    Image.fromarray(gray).convert("P").save(root / "train" / "n02" / "palette.png")
    data = load(root).train
    assert len(data) == 5
    assert all(images.shape[1:] == (3, 16, 16) for images, _ in drawn(data))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_broken_image_is_named(tree, tmp_path, workers, damage):
    root = shutil.copytree(tree, tmp_path / "copy")
    file = root / "train" / "n02" / "train_1_3.JPEG"
    content = file.read_bytes()
    file.write_bytes(
        {"truncated": content[: len(content) // 2], "text": b"no", "empty": b""}[damage]
    )
    with pytest.raises(BrokenImageError, match=r"n02/train_1_3\.JPEG cannot be decoded"):
        drawn(load(root, workers=workers).train)


def test_an_image_that_vanished_is_named(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "copy")
    data = load(root).train
    (root / "train" / "n03" / "train_2_0.JPEG").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"train_2_0\.JPEG is not there any more"):
        drawn(data)


def test_the_fingerprint_tells_images_labels_and_decoding(tree, tmp_path):
    data = load(tree).test
    assert data.fingerprint() == load(tree, workers=3).test.fingerprint()
    copied = shutil.copytree(tree, tmp_path / "elsewhere")
    assert data.fingerprint() == load(copied).test.fingerprint()
    others = [data.subset(torch.arange(5)), load(tree, resize=24).test, load(tree).train]
    (copied / "val" / "n01" / "val_0_0.JPEG").write_bytes(b"something else")
    others.append(load(copied).test)
    assert len({one.fingerprint() for one in (data, *others)}) == 5


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        ("image_folder", lambda root: None, r"not there: the folder .* data\.folder=DIR"),
        ("image_folder", lambda root: root.mkdir(), r"train does not exist.*train/CLASS"),
        (
            "image_folder",
            lambda root: (root / "train").mkdir(parents=True),
            "no folders of classes",
        ),
        ("imagenet", write_tree, r"imagenet has 1000 classes, and .* has 3 .*image_folder"),
        ("imagenet_lt", write_tree, r"ImageNet_LT_train\.txt does not exist"),
        ("webdataset", write_tree, r"no shards train-\*\.tar"),
    ],
)
def test_what_is_missing_is_said(tmp_path, name, prepare, message):
    root = tmp_path / "data"
    prepare(root)
    with pytest.raises(ValueError, match=message):
        load(root, name)


def test_without_a_folder_the_usual_place_is_read(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match=r"dkl/webdataset does not exist"):
        load_image_files("webdataset")
    (tmp_path / "dkl").mkdir()
    (tmp_path / "dkl" / "imagenet").symlink_to(tree)
    assert len(load_image_files("imagenet_lt").train) == 9


def test_images_without_class_folders_are_explained(tmp_path):
    root = write_tree(tmp_path)
    for file in list((root / "val").rglob("*.JPEG")):
        file.rename(root / "val" / file.name)
    shutil.rmtree(root / "val" / "n01")
    shutil.rmtree(root / "val" / "n02")
    shutil.rmtree(root / "val" / "n03")
    with pytest.raises(ValueError, match=r"without folders of classes.*sort them"):
        load(root)


def test_classes_of_both_parts_must_fit(tmp_path):
    root = write_tree(tmp_path)
    os.rename(root / "val" / "n02", root / "val" / "n99")  # noqa: PTH104 - a folder
    with pytest.raises(ValueError, match=r"val has 1 classes that .*train lacks: n99"):
        load(root)
    (root / "val" / "n99").rename(root / "val" / "n02")
    for file in (root / "train" / "n03").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"1 folders of classes in .* hold no images: n03"):
        load(root)


def shard(root: Path, name: str, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(root / name, mode) as archive:
        for member, content in members.items():
            add(archive, member, content)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x"}, r"has a\.jpg but no label for it: a\.cls"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"a\.cls must hold a class number; got 'cat'"),
        ({"a.txt": b"x"}, "no images were found in 1 shards"),
        ({"a.jpg": b"x", "a.cls": b"0", "b.jpg": b"x", "b.cls": b"2"}, "none of class 1"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path, members, message):
    shard(tmp_path, "train-0.tar", members)
    shard(tmp_path, "val-0.tar", {"a.jpg": b"x", "a.cls": b"0"})
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "webdataset")


@pytest.mark.parametrize("mode", ["gzip", "cut"])
def test_shards_that_are_no_plain_tar_files_are_refused(tree, tmp_path, mode):
    root = write_shards(tree, tmp_path / "shards")
    file = root / "train-0001.tar"
    if mode == "gzip":
        shard(root, file.name, {"a.jpg": b"x", "a.cls": b"0"}, "w:gz")
    else:
        file.write_bytes(file.read_bytes()[: 512 * 4])
    with pytest.raises(ValueError, match=r"train-0001\.tar cannot be read as an uncompressed tar"):
        load(root, "webdataset")


def test_settings_of_decoding_are_checked():
    with pytest.raises(ValueError, match=r"resize must be .*; scale must be .*; rand_augment"):
        Decoding(image_size=64, resize=32, scale=(0.9, 0.1), rand_augment="31")
    with pytest.raises(ValueError, match=r"repeats must be at least 1.*workers must be at least 0"):
        Decoding(repeats=0, workers=-1)
