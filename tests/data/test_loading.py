"""Data sets by name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dkl.data
from dkl.data import DATASETS, load_data


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fashion-mnist", "did you mean 'fashion_mnist'"),
        ("FashionMNIST", "did you mean 'fashion_mnist'"),
        ("digit", "did you mean 'digits'"),
        ("CIFAR-10", "did you mean 'cifar10'"),
        ("cifar_100", "did you mean 'cifar100'"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        load_data(name)


def test_a_name_like_nothing_gets_the_list() -> None:
    with pytest.raises(ValueError, match=f"There are: {', '.join(DATASETS)}") as caught:
        load_data("imagenet22k")
    assert "did you mean" not in str(caught.value)


def test_digits_take_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Leave the folder out"):
        load_data("digits", folder=tmp_path)
    assert len(load_data("digits", download=True)[0]) == 1442


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"'digits' needs sklearn.*pip install 'dkl\[train\]'"):
        load_data("digits")


def test_importing_the_package_needs_torch_alone() -> None:
    # torch itself imports numpy where there is one; hiding it shows that ours does not need it.
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['numpy', 'PIL', 'sklearn', 'torchvision']));"
        "import dkl.data"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_what_needs_numpy_says_so() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['numpy', 'PIL', 'torchvision']))\n"
        "import dkl.data\n"
        "for name in ('GeneratedImages', 'MixedSource', 'convert_npz', 'auto_augment'):\n"
        "    try:\n"
        "        getattr(dkl.data, name)() and print('made', name)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert re.search(
            r"needs (numpy|torchvision); install it by: pip install 'dkl\[train\]'", line
        )
    with pytest.raises(AttributeError, match="no attribute 'GenerateImages'"):
        _ = dkl.data.GenerateImages
