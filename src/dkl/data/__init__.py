"""Image data: uint8 images held in memory, batch sources, augmentation of whole batches."""

from dkl.data.augmentation import Augment, Draw, basic_augment
from dkl.data.dataset_source import DatasetSource
from dkl.data.images import ImageData
from dkl.data.loading import DATASETS, load_data
from dkl.data.lookup import DatasetNotFoundError
from dkl.data.splits import split_validation

__all__ = [
    "DATASETS",
    "Augment",
    "DatasetNotFoundError",
    "DatasetSource",
    "Draw",
    "ImageData",
    "basic_augment",
    "load_data",
    "split_validation",
]
