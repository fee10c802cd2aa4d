"""Image data: in memory and on disk, batch sources, augmentation of whole batches.

``import dkl.data`` needs torch alone; what reads and writes npz files or a teacher cache, and what
mixes or balances, is imported on first use and needs numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dkl.data.augmentation import basic_augment, compose, make_augment
from dkl.data.auto_augment import auto_augment
from dkl.data.cutmix import cutmix
from dkl.data.cutout import cutout
from dkl.data.dataset_source import DatasetSource
from dkl.data.draws import Augment, Draw
from dkl.data.image_lists import ImageList, read_image_list
from dkl.data.images import ImageData
from dkl.data.loading import DATASETS, load_data
from dkl.data.long_tailed import class_sizes, group_accuracies, long_tailed, shot_groups
from dkl.data.lookup import DatasetNotFoundError
from dkl.data.mixup import mixup, mixup_or_cutmix
from dkl.data.splits import split_validation

if TYPE_CHECKING:
    from dkl.data.carmon import convert_carmon
    from dkl.data.class_balanced import ClassBalancedSource
    from dkl.data.file_datasets import FILE_DATASETS, FileSplits, load_image_files
    from dkl.data.generated import GeneratedImages
    from dkl.data.image_decoding import BrokenImageError, Decoding
    from dkl.data.images_on_disk import ImageFiles
    from dkl.data.mixing import MixedSource
    from dkl.data.npz_files import convert_npz, write_npz
    from dkl.data.teacher_cache import TeacherCache
    from dkl.data.teacher_chunks import TeacherCacheError
    from dkl.data.teacher_rows import TopKRows

__all__ = [
    "DATASETS",
    "FILE_DATASETS",
    "Augment",
    "BrokenImageError",
    "ClassBalancedSource",
    "DatasetNotFoundError",
    "DatasetSource",
    "Decoding",
    "Draw",
    "FileSplits",
    "GeneratedImages",
    "ImageData",
    "ImageFiles",
    "ImageList",
    "MixedSource",
    "TeacherCache",
    "TeacherCacheError",
    "TopKRows",
    "auto_augment",
    "basic_augment",
    "class_sizes",
    "compose",
    "convert_carmon",
    "convert_npz",
    "cutmix",
    "cutout",
    "group_accuracies",
    "load_data",
    "load_image_files",
    "long_tailed",
    "make_augment",
    "mixup",
    "mixup_or_cutmix",
    "read_image_list",
    "shot_groups",
    "split_validation",
    "write_npz",
]

_MODULES_WITH_NUMPY = {
    "BrokenImageError": "image_decoding",
    "Decoding": "image_decoding",
    "FILE_DATASETS": "file_datasets",
    "FileSplits": "file_datasets",
    "ImageFiles": "images_on_disk",
    "load_image_files": "file_datasets",
    "ClassBalancedSource": "class_balanced",
    "GeneratedImages": "generated",
    "MixedSource": "mixing",
    "TeacherCache": "teacher_cache",
    "TeacherCacheError": "teacher_chunks",
    "TopKRows": "teacher_rows",
    "convert_carmon": "carmon",
    "convert_npz": "npz_files",
    "write_npz": "npz_files",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES_WITH_NUMPY:
        raise AttributeError(f"module 'dkl.data' has no attribute {name!r}")
    try:
        module = import_module(f"dkl.data.{_MODULES_WITH_NUMPY[name]}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"dkl.data.{name} needs {error.name}; install it by: pip install 'dkl[train]'"
        ) from error
    return getattr(module, name)
