"""CIFAR: tiny files in the published format, rewritten ones, and hostile ones."""

import hashlib
import os
import pickle
import pickletools
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets as torchvision_datasets

from dkl.data import DatasetNotFoundError, load_data
from dkl.data.cifar_pickle import read_cifar_pickle

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
BATCHES = {
    "cifar10": [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
    "cifar100": ["train", "test"],
}
META = {"cifar10": "batches.meta", "cifar100": "meta"}


def python2_pickle(value: Any) -> bytes:
    """Pickle as Python 2 did in protocol 2, like the published files: text is bytes."""

    def save(item: Any) -> bytes:
        if isinstance(item, dict):
            pairs = b"".join(save(key) + save(entry) for key, entry in item.items())
            return b"}(" + pairs + b"u"
        if isinstance(item, list):
            return b"](" + b"".join(save(entry) for entry in item) + b"e"
        if isinstance(item, int):
            return b"J" + struct.pack("<i", item)
        if isinstance(item, str):
            return save(item.encode("latin1"))
        if isinstance(item, bytes):
            return b"T" + struct.pack("<i", len(item)) + item
        assert item.dtype == np.uint8
        reconstruct = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01bt" + b"R"
        )
        shape = b"(" + b"".join(save(int(n)) for n in item.shape) + b"t"
        minus_one = b"J\xff\xff\xff\xff"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNN" + 2 * minus_one + b"K\0tb"
        return reconstruct + b"(K\x01" + shape + dtype + b"\x89" + save(item.tobytes()) + b"tb"

    return b"\x80\x02" + save(value) + b"."


WRITERS = {
    "python 2": python2_pickle,
    "protocol 2": lambda value: pickle.dumps(value, protocol=2),
    "protocol 4": lambda value: pickle.dumps(value, protocol=4),
    "protocol 5": lambda value: pickle.dumps(value, protocol=5),
}


def content(name: str) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    num_classes = int(name.removeprefix("cifar"))
    files: dict[str, dict[str, Any]] = {}
    for batch in BATCHES[name]:
        labels = rng.integers(0, num_classes, 4).tolist()
        files[batch] = {
            "batch_label": batch,
            "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
            "filenames": [f"image_{number}.png" for number in range(4)],
            **({"labels": labels} if name == "cifar10" else {"fine_labels": labels}),
            **({} if name == "cifar10" else {"coarse_labels": [0, 1, 2, 3]}),
        }
    names_key = "label_names" if name == "cifar10" else "fine_label_names"
    files[META[name]] = {names_key: [f"class {number}" for number in range(num_classes)]}
    return files


def write(folder: Path, name: str, writer: str = "python 2") -> dict[str, dict[str, Any]]:
    folder.mkdir(parents=True)
    files = content(name)
    for file, value in files.items():
        (folder / file).write_bytes(WRITERS[writer](value))
    return files


def check(folder: Path | None, name: str, files: dict[str, dict[str, Any]]) -> None:
    loaded = load_data(name, folder=folder)
    key = "labels" if name == "cifar10" else "fine_labels"
    for data, batches in zip(loaded, (BATCHES[name][:-1], BATCHES[name][-1:]), strict=True):
        pixels = np.concatenate([files[batch]["data"] for batch in batches])
        assert np.array_equal(data.images.numpy(), pixels.reshape(-1, 3, 32, 32))
        assert data.labels.tolist() == [label for batch in batches for label in files[batch][key]]
        assert data.num_classes == int(name.removeprefix("cifar"))
        assert data.class_names[:2] == ("class 0", "class 1")


def test_the_python_2_writer_writes_what_pickle_and_numpy_read() -> None:
    value = content("cifar10")["data_batch_1"]
    raw = python2_pickle(value)
    assert {op.name for op, _, _ in pickletools.genops(raw)} >= {"BINSTRING", "GLOBAL", "BUILD"}
    back = pickle.loads(raw, encoding="latin1")
    assert np.array_equal(back.pop("data"), value.pop("data"))
    assert back == value


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("writer", sorted(WRITERS))
@pytest.mark.parametrize("direct", [False, True])
def test_files_in_a_folder(empty_machine: Path, name: str, writer: str, direct: bool) -> None:
    base = empty_machine / "mine" / FOLDERS[name]
    files = write(base, name, writer)
    check(base if direct else base.parent, name, files)


def test_missing_files_say_where_and_how(empty_machine: Path) -> None:
    write(empty_machine / FOLDERS["cifar100"], "cifar100")
    with pytest.raises(DatasetNotFoundError, match="CIFAR-10 was not found; looked in") as caught:
        load_data("cifar10", folder=empty_machine)
    for part in (str(empty_machine), str(empty_machine / "cache" / "dkl"), "download=True"):
        assert part in str(caught.value)
    assert not (empty_machine / "cache").exists()


@dataclass
class Server:
    """A server on this machine with a tiny archive, and the paths asked of it."""

    asked: list[str]
    files: dict[str, dict[str, Any]]


@pytest.fixture
def serve(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Let torchvision download a tiny archive from this machine, its checksum adapted."""
    folder = empty_machine / "server"
    server = Server([], {})

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            server.asked.append(self.path)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(name: str, md5: str | None = None) -> Server:
        server.files.update(write(folder / FOLDERS[name], name))
        archive = folder / "archive.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder / FOLDERS[name], FOLDERS[name])
        published = getattr(torchvision_datasets, name.upper())
        address = f"http://127.0.0.1:{http.server_port}/{archive.name}"
        monkeypatch.setattr(published, "url", address)
        true_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(published, "tgz_md5", md5 or true_md5)
        return server

    yield start
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_download_happens_once_and_only_when_asked(
    empty_machine: Path, name: str, serve: Callable[..., Server]
) -> None:
    server = serve(name)
    with pytest.raises(DatasetNotFoundError):
        load_data(name)
    assert not server.asked
    load_data(name, download=True)
    num_asked = len(server.asked)
    assert num_asked > 0
    load_data(name, download=True)
    check(None, name, server.files)
    assert len(server.asked) == num_asked
    assert [path.name for path in (empty_machine / "cache" / "dkl").iterdir()] == [FOLDERS[name]]


@pytest.mark.parametrize("fault", ["checksum", "address"])
def test_a_failed_download_leaves_nothing(
    empty_machine: Path,
    fault: str,
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve("cifar10", "0" * 32 if fault == "checksum" else None)
    if fault == "address":
        published = torchvision_datasets.CIFAR10
        monkeypatch.setattr(published, "url", f"{published.url}.missing")
    with pytest.raises(DatasetNotFoundError, match=r"could not be downloaded.*Three ways"):
        load_data("cifar10", download=True)
    assert not list((empty_machine / "cache" / "dkl").iterdir())


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_does_not_run(empty_machine: Path) -> None:
    base = empty_machine / FOLDERS["cifar10"]
    files = write(base, "cifar10")
    marker = empty_machine / "ran"
    bomb = pickle.dumps({**files["data_batch_3"], "extra": Bomb(marker)})
    (base / "data_batch_3").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"data_batch_3 .*refused to load (posix|nt).mkdir"):
        load_data("cifar10", folder=empty_machine)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # the bomb is a real one


@pytest.mark.parametrize(
    "stream",
    [
        b"cbuiltins\neval\n(Vopen('ran', 'w')\ntR.",
        b"c__builtin__\neval\n(Vopen('ran', 'w')\ntR.",
        b"cnumpy\nload\n(Vx.npy\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04\x8c\x07_codecs\x8c\x06decode\x93.",
        b"cdkl.data.cifar_pickle\npickle\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.mkdir\x93.",
    ],
)
def test_names_outside_the_table_are_refused(
    tmp_path: Path, stream: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(stream)
    with pytest.raises(ValueError, match="refused to load"):
        read_cifar_pickle(tmp_path / "batch")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.float32), "must be uint8; got dtype 'f4'"),
        (np.zeros((2, 3), dtype=object), "must be uint8; got dtype 'O8'"),
        (np.zeros((2, 3), dtype=np.uint8, order="F"), "row order"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_other_arrays_are_refused(tmp_path: Path, array: Any, message: str, protocol: int) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": array}, protocol=protocol))
    with pytest.raises(ValueError, match=message):
        read_cifar_pickle(tmp_path / "batch")


def test_a_shape_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    raw = python2_pickle({"data": np.zeros((4, 7), dtype=np.uint8)})
    huge = raw.replace(b"J\x04\0\0\0J\x07\0\0\0", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f")
    assert huge != raw
    (tmp_path / "batch").write_bytes(huge)
    with pytest.raises(ValueError, match="cannot have 28 bytes"):
        read_cifar_pickle(tmp_path / "batch")


def test_damaged_bytes_give_one_kind_of_error(tmp_path: Path) -> None:
    raw = python2_pickle(content("cifar10")["test_batch"])
    path = tmp_path / "batch"
    generator = torch.Generator().manual_seed(0)
    num_refused = 0
    for cut in torch.randint(0, len(raw), (40,), generator=generator).tolist():
        path.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match=r"not a CIFAR file"):
            read_cifar_pickle(path)
    for place in torch.randint(0, 300, (300,), generator=generator).tolist():
        flipped = bytes([*raw[:place], raw[place] ^ 0x55, *raw[place + 1 :]])
        path.write_bytes(flipped)
        try:
            read_cifar_pickle(path)
        except ValueError:
            num_refused += 1
    assert num_refused > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((4, 3071), dtype=np.uint8)}, "rows of 3072 pixels"),
        ({"labels": [0, 1]}, "as many integers"),
        ({"labels": ["cat"] * 4}, "as many integers"),
        ({"labels": [0, 1, 2, 10]}, "lie in 0 to 9"),
    ],
)
def test_batches_that_do_not_fit_are_explained(
    empty_machine: Path, change: dict[str, Any], message: str
) -> None:
    base = empty_machine / FOLDERS["cifar10"]
    files = write(base, "cifar10")
    (base / "test_batch").write_bytes(python2_pickle({**files["test_batch"], **change}))
    with pytest.raises(ValueError, match=message):
        load_data("cifar10", folder=empty_machine)


def test_a_meta_file_without_the_names_is_explained(empty_machine: Path) -> None:
    base = empty_machine / FOLDERS["cifar10"]
    write(base, "cifar10")
    (base / "batches.meta").write_bytes(python2_pickle({"label_names": ["cat"]}))
    with pytest.raises(ValueError, match=r"10 names under 'label_names'; got \['cat'\]"):
        load_data("cifar10", folder=empty_machine)
    (base / "batches.meta").write_bytes(python2_pickle([1]))
    with pytest.raises(ValueError, match="must hold a dictionary; got list"):
        load_data("cifar10", folder=empty_machine)
