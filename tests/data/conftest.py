"""No test of the readers may find, or write, data of the person who runs it."""

from pathlib import Path

import pytest

from dkl.data import fashion_mnist


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point cache and system folders into a temporary folder, which it returns."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    return tmp_path
