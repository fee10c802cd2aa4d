"""Published teachers on disk: which are there, and whether each fits its network."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dkl.models import CheckpointError, create_model, load_checkpoint
from dkl.models.teachers import PUBLISHED_TEACHERS, PublishedTeacher

logger = logging.getLogger(__name__)

__all__ = ["PUBLISHED_TEACHERS", "PublishedTeacher", "TeacherCheck", "check_teachers"]


@dataclass(frozen=True)
class TeacherCheck:
    """What was found of one teacher.

    Args:
        teacher: which one.
        found: "fits", "wrong" (there, and not what its network needs) or "absent".
        message: why it is wrong; empty otherwise.
    """

    teacher: PublishedTeacher
    found: Literal["fits", "wrong", "absent"]
    message: str = ""


def check_teachers(folder: Path) -> list[TeacherCheck]:
    """Load each published teacher that is in a folder into its network, every name and shape.

    Args:
        folder: of the files; recipes look in ``teachers`` where the command is run.

    Returns:
        One check for each known teacher, in order.

    Raises:
        ValueError: there is no such folder, or a network needs timm, and timm is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     {check.found for check in check_teachers(Path(folder))}
        {'absent'}
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder: make it and put the files into it that `dkl teachers list` "
            "names, under the paths given there"
        )
    return [_check(teacher, folder / teacher.file) for teacher in PUBLISHED_TEACHERS]


def _check(teacher: PublishedTeacher, file: Path) -> TeacherCheck:
    if not file.is_file():
        return TeacherCheck(teacher, "absent")
    logger.info("loading %s", file)
    model = create_model(
        teacher.architecture, teacher.num_classes, mean=teacher.mean, std=teacher.std
    )
    try:
        load_checkpoint(model, file)
    except CheckpointError as error:
        return TeacherCheck(teacher, "wrong", str(error))
    return TeacherCheck(teacher, "fits")
