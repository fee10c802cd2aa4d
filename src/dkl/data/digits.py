"""The 1797 real handwritten digits that come with scikit-learn; nothing is downloaded."""

import torch

from dkl.data.images import ImageData
from dkl.data.splits import every_nth_of_each_class


def load_digits() -> tuple[ImageData, ImageData]:
    """Return scikit-learn's bundled digits, 1x8x8, as a training and a test set.

    Pixels 0 to 16 become round(value * 255 / 16), the tie at 8 going to 128. The test set is the
    5th, 10th, 15th, ... sample of each digit in scikit-learn's order, a rule without a random
    generator. Writers appear in both sets.

    Returns:
        (train, test): 1442 and 355 images.

    Example:
        >>> load_digits()
        (ImageData(1442 images of 1x8x8, 10 classes), ImageData(355 images of 1x8x8, 10 classes))
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    pixels_NHW = torch.from_numpy(bunch.images)
    images = (pixels_NHW * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    data = ImageData(images, labels, 10, tuple("0123456789"))
    in_test = every_nth_of_each_class(labels, data.num_classes, n=5)
    return data.subset((~in_test).nonzero().flatten()), data.subset(in_test.nonzero().flatten())
