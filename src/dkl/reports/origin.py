"""Where a number comes from: settings hash, versions, commit, device and time."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

_REQUIRED = ("dkl", "torch")
_OPTIONAL = ("torchvision", "accelerate", "pyautoattack")
NOT_SETTINGS = ("seed", "seeds", "out", "description", "tuning", "trackers")
# Where things lie, not what they are: another path to the same data or teacher changes no result.
PLACES = ("data.folder", "data.download", "method.teacher.run")


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what decides a result, as canonical JSON.

    Seed, paths, description, trackers and search ranges are left out: runs that differ in these
    alone have the same hash.

    Args:
        settings: a resolved recipe; JSON types only, keys are strings.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: a value that JSON cannot hold.

    Example:
        >>> first = settings_hash({"name": "digits_kd", "epochs": 40, "seed": 0, "out": "runs/a"})
        >>> first == settings_hash({"seed": 1, "epochs": 40, "name": "digits_kd"})
        True
        >>> first == settings_hash({"name": "digits_kd", "epochs": 41})
        False
    """
    kept = _without_places(
        {key: value for key, value in settings.items() if key not in NOT_SETTINGS}
    )
    try:
        canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings must hold JSON values only (mappings, lists, strings, finite numbers, "
            f"booleans, null), but {error}; convert paths, dates and enums to strings first"
        ) from error
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_places(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without_places(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if f"{prefix}{key}" not in PLACES
    }


def provenance(settings: Mapping[str, Any], *, device: str | None = None) -> dict[str, Any]:
    """Describe settings, software, machine and time; the keys are fields of ``ResultRow``.

    Args:
        settings: the resolved recipe.
        device: torch's name of the device the work ran on ("cpu", "cuda", "cuda:1"); None means the
            GPU where torch sees one and else the CPU.

    Returns:
        ``settings_hash``, ``versions`` (dkl, torch, python, and torchvision, accelerate and
        pyautoattack where installed), ``commit`` (of a dkl checkout, "-dirty" appended where files
        differ from it; None for an installed package), ``device`` and ``time`` (ISO, UTC).

    Raises:
        ValueError: settings that JSON cannot hold.

    Example:
        >>> sorted(provenance({"name": "digits_kd"}))
        ['commit', 'device', 'settings_hash', 'time', 'versions']
    """
    return {
        "settings_hash": settings_hash(settings),
        "versions": _versions(),
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "device": _describe_device(device),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in (*_REQUIRED, *_OPTIONAL):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package in _REQUIRED:  # used from a source folder on sys.path
                versions[package] = "not installed"
    return versions


def _commit(package: Path) -> str | None:
    # A site-packages folder may lie inside somebody else's repository: only a checkout whose
    # src/dkl is this very package counts.
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or (Path(top) / "src" / "dkl").resolve() != package:
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    # A git hook that runs this sets GIT_DIR and the like, which point at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None


def _describe_device(device: str | None) -> str:
    import torch

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind == "cuda":
        return f"GPU, {torch.cuda.get_device_name(name)}"
    if kind != "cpu":
        return name
    return f"CPU, {torch.get_num_threads()} threads, {_cpu_model()}"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown model"
