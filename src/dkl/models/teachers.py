"""Published teachers: which file each is, where it comes from, and what it reaches.

Nothing is downloaded here: a file is put into a folder by whoever wants it, and
``dkl teachers check`` says whether it is the one that a recipe expects.
"""

from dataclasses import dataclass

_MDISTILLER = (
    "cifar_teachers.tar of the release `checkpoints` of github.com/megvii-research/mdistiller; "
    "unpack it in the folder"
)
_TORCHVISION = "download.pytorch.org/models/{file} (torchvision's {weights})"
_CIFAR_MEAN, _CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PublishedTeacher:
    """A file of weights that recipes use as a teacher.

    Args:
        name: of the teacher.
        architecture: name for ``dkl.models.create_model``.
        dataset: what it was trained on.
        num_classes: of the dataset.
        image_size: pixels on a side.
        mean: its normalisation.
        std: likewise.
        top1: published accuracy in percent.
        file: path inside the folder of teachers.
        format: what the file holds.
        source: where it comes from.
    """

    name: str
    architecture: str
    dataset: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    top1: float
    file: str
    format: str
    source: str


def _cifar(name: str, top1: float, folder: str = "") -> PublishedTeacher:
    return PublishedTeacher(
        name=f"{name}, CIFAR-100",
        architecture=name,
        dataset="cifar100",
        num_classes=100,
        image_size=32,
        mean=_CIFAR_MEAN,
        std=_CIFAR_STD,
        top1=top1,
        file=f"cifar_teachers/{folder or name}_vanilla/ckpt_epoch_240.pth",
        format="torch file with epoch, model, accuracy, optimizer",
        source=_MDISTILLER,
    )


def _torchvision(name: str, top1: float, file: str, weights: str) -> PublishedTeacher:
    return PublishedTeacher(
        name=f"{name}, ImageNet",
        architecture=f"timm/{name}",
        dataset="imagenet",
        num_classes=1000,
        image_size=224,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        top1=top1,
        file=file,
        format="torch file of a state dict",
        source=_TORCHVISION.format(file=file, weights=weights),
    )


PUBLISHED_TEACHERS: tuple[PublishedTeacher, ...] = (
    _cifar("resnet56", 72.34),
    _cifar("resnet110", 74.31),
    _cifar("resnet32x4", 79.42),
    _cifar("wrn_40_2", 75.61),
    _cifar("vgg13", 74.64),
    _cifar("resnet50_cifar", 79.34, folder="ResNet50"),
    _torchvision("resnet34", 73.31, "resnet34-b627a593.pth", "ResNet34_Weights.IMAGENET1K_V1"),
    _torchvision("resnet50", 76.13, "resnet50-0676ba61.pth", "ResNet50_Weights.IMAGENET1K_V1"),
    PublishedTeacher(
        name="BEiTv2-L, ImageNet",
        architecture="timm/beitv2_large_patch16_224",
        dataset="imagenet",
        num_classes=1000,
        image_size=224,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        top1=88.39,
        file="beitv2_large_patch16_224.in1k_ft_in22k_in1k.safetensors",
        format="safetensors file of a state dict",
        source="model.safetensors of huggingface.co/timm/"
        "beitv2_large_patch16_224.in1k_ft_in22k_in1k, renamed",
    ),
)
"""In the order of the paper's tables. They expect images in [0, 1], normalised by mean and std."""
