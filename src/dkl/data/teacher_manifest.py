"""What a teacher cache is of: its settings, and the fingerprint of teacher, data, augmentation."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkl.data.teacher_chunks import TeacherCacheError, is_leftover

MANIFEST = "manifest.json"
FORMAT = 1

_SETTINGS = ("format", "num_samples", "num_classes", "top_k", "dtype", "temperature", "fingerprint")
_SHOWN = 60  # characters of a value in a message


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the settings that a cache was made with.

    Raises:
        TeacherCacheError: there is no cache, or its manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TeacherCacheError(
            f"{folder} holds no teacher cache: there is no {MANIFEST}. Give the folder of one, or "
            f"write one first."
        ) from error
    except ValueError as error:
        raise TeacherCacheError(
            f"{path} cannot be read ({error}). Delete the folder to write the cache afresh."
        ) from error
    if not isinstance(found, dict) or set(found) != set(_SETTINGS) or found["format"] != FORMAT:
        raise TeacherCacheError(
            f"{path} is not of format {FORMAT}, which this version reads. Name another folder, or "
            f"delete this one to write the cache afresh."
        )
    return found


def make_manifest(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Make a cache's folder, or take up one with the same settings.

    Raises:
        TeacherCacheError: the folder holds something else.
        ValueError: the settings are not made of what JSON knows.
    """
    text = _text(wanted)
    if folder.exists() and not folder.is_dir():
        raise TeacherCacheError(f"{folder} is a file; a teacher cache needs a folder of its own.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    others = {one.name for one in folder.iterdir() if not is_leftover(one.name)} - {MANIFEST}
    # Looked for last: another process that makes the same cache may have come first.
    if not path.exists():
        if others:
            raise TeacherCacheError(
                f"{folder} has no {MANIFEST} but holds {', '.join(sorted(others)[:3])}: it is no "
                f"teacher cache. Name a new or empty folder."
            )
        _write(path, text)
    found = read_manifest(folder)
    refuse_differences(folder, found, wanted)
    return found


def refuse_differences(
    folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> None:
    """Compare a cache's settings with those that are wanted.

    Raises:
        TeacherCacheError: naming every setting that differs, and both values.
    """
    wanted = json.loads(_text(wanted))
    differing = list(_differences(found, wanted, prefix))
    if differing:
        raise TeacherCacheError(
            f"the teacher cache in {folder} is of something else: {'; '.join(differing)}. Its "
            f"log-probabilities would be wrong here. Name another folder, or delete this one to "
            f"write the cache afresh."
        )


def identity_of(manifest: Mapping[str, Any]) -> bytes:
    """Return 32 bytes that tell caches with different settings apart."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).digest()


def _text(settings: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(settings), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the fingerprint must be made of texts, finite numbers, booleans, None, lists and "
            f"mappings with texts as keys; {error}."
        ) from error


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for name in sorted(found.keys() | wanted.keys()):
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            problems += _differences(there, here, f"{prefix}{name}.")
        elif name not in found or name not in wanted or there != here:
            there_text = _shown(there) if name in found else "nothing"
            here_text = _shown(here) if name in wanted else "nothing"
            problems.append(f"{prefix}{name} is {there_text} there and {here_text} here")
    return problems


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:12]}..."


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
