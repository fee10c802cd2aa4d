"""Where files of a data set are looked for, and how they are fetched when that is allowed."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


class DatasetNotFoundError(FileNotFoundError, ValueError):
    """The files of a data set are in none of the places looked at, or could not be fetched.

    Example:
        >>> issubclass(DatasetNotFoundError, ValueError)
        True
    """


@dataclass(frozen=True)
class DatasetFiles(Generic[Found]):
    """What the search for one data set needs to know.

    Args:
        title: the data set's name for messages.
        layout: name of the folder that a download makes.
        locate: returns the files in a folder, or None where they are not complete.
        fetch: downloads into a folder and leaves ``layout`` in it; raises RuntimeError or OSError.
        advice: how to get the data, for messages.
        system_folders: further folders, such as a Linux distribution's.
    """

    title: str
    layout: str
    locate: Callable[[Path], Found | None]
    fetch: Callable[[Path], None]
    advice: str
    system_folders: Sequence[Path] = ()


def cache_folder() -> Path:
    """Return the folder for downloads: ``dkl`` in $XDG_CACHE_HOME, or in ~/.cache.

    Example:
        >>> cache_folder().name
        'dkl'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dkl"


def find_or_download(files: DatasetFiles[Found], folder: Path | None, download: bool) -> Found:
    """Return the first complete copy: in ``folder``, a system folder, the cache, or downloaded.

    A copy from elsewhere than the given folder is announced as a warning.

    Args:
        files: the data set.
        folder: the user's folder; downloads go there too. None: the cache folder.
        download: whether fetching is allowed where nothing is found.

    Returns:
        What ``files.locate`` found.

    Raises:
        DatasetNotFoundError: nothing found and no download allowed, or the download failed.
    """
    if folder is not None and not folder.is_dir() and not download:
        raise DatasetNotFoundError(f"the data folder {folder} does not exist. {files.advice}")
    places = [*files.system_folders, cache_folder()]
    if folder is not None:
        places.insert(0, folder)
    for place in places:
        found = files.locate(place)
        if found is not None:
            elsewhere = folder is not None and place != folder
            level = logging.WARNING if elsewhere else logging.INFO
            note = f" (it is not in {folder})" if elsewhere else ""
            logger.log(level, "reading %s from %s%s", files.title, place, note)
            return found
    if not download:
        looked_in = ", ".join(str(place) for place in places)
        raise DatasetNotFoundError(
            f"{files.title} was not found; looked in {looked_in}. {files.advice}"
        )
    return _download(files, folder or cache_folder())


def _download(files: DatasetFiles[Found], target: Path) -> Found:
    destination = target / files.layout
    if destination.exists():
        raise DatasetNotFoundError(
            f"{destination} exists but does not hold all of {files.title}; move it away so that a "
            f"download cannot mix with it. {files.advice}"
        )
    logger.info("downloading %s into %s", files.title, target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Moved into place only when complete: a killed download is never read.
        with tempfile.TemporaryDirectory(dir=target, prefix=".downloading-") as scratch:
            files.fetch(Path(scratch))
            try:
                (Path(scratch) / files.layout).rename(destination)
            except OSError:
                if not destination.is_dir():
                    raise
                # Another process was faster: its copy is read.
    except (RuntimeError, OSError, HTTPException) as error:
        raise DatasetNotFoundError(
            f"{files.title} could not be downloaded into {target}: {error}. {files.advice}"
        ) from error
    found = files.locate(target)
    if found is None:
        raise DatasetNotFoundError(
            f"the download of {files.title} into {target} is not complete. {files.advice}"
        )
    return found
