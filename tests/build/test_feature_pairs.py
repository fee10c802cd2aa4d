"""Methods on features fit every pair of the paper's tables, with the published extra parameters."""

import pytest
import torch

from dkl import methods
from dkl.build import feature_pair
from dkl.models import create_model, tap_norms

# Trained beside the student by FitNet, OFD and ReviewKD in the reference implementation, which
# cannot run OFD on the pairs without a number.
PAIRS = {
    ("resnet56", "resnet20"): (1_120, 5_600, 114_278),
    ("resnet110", "resnet32"): (1_120, 5_600, 114_278),
    ("resnet32x4", "resnet8x4"): (16_768, 86_912, 1_808_774),
    ("wrn_40_2", "wrn_16_2"): (4_288, 21_952, 453_830),
    ("wrn_40_2", "wrn_40_1"): (2_240, 11_200, 216_006),
    ("vgg13", "vgg8"): (66_304, 609_024, 9_847_560),
    ("resnet32x4", "shufflenet_v1"): (983_424, None, 4_607_366),
    ("resnet32x4", "shufflenet_v2"): (475_520, 156_800, 4_195_718),
    ("wrn_40_2", "shufflenet_v1"): (491_712, None, 2_984_646),
    ("vgg13", "mobilenet_v2_half"): (4_864, None, 9_640_712),
    ("resnet50_cifar", "mobilenet_v2_half"): (132_608, None, 27_933_192),
}


def own_parameters(method: torch.nn.Module) -> int:
    return sum(one.numel() for one in method.parameters() if one.requires_grad)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_extra_parameters_are_the_published_ones(names: tuple[str, str]) -> None:
    with torch.device("meta"):
        teacher, student = (create_model(name, 100) for name in names)
        pair = feature_pair(student, teacher, (3, 32, 32))
        built = (
            methods.fitnet(teacher, pair),
            methods.ofd(teacher, pair, tap_norms(teacher)),
            methods.reviewkd(teacher, pair),
        )
    for method, expected in zip(built, PAIRS[names], strict=True):
        assert own_parameters(method) == expected or expected is None
    assert own_parameters(methods.attention_transfer(teacher, pair)) == 0
    assert own_parameters(methods.rkd(teacher, pair)) == 0


@pytest.mark.parametrize(
    "names", [("timm/resnet34", "timm/resnet18"), ("timm/resnet50", "mobilenet_v1")], ids="-".join
)
def test_pairs_of_imagenet(names: tuple[str, str]) -> None:
    with torch.device("meta"):
        teacher, student = (create_model(name, 1000) for name in names)
        pair = feature_pair(student, teacher, (3, 224, 224))
        methods.ofd(teacher, pair, tap_norms(teacher))
        review = methods.reviewkd(teacher, pair, pre_activations=True)
        methods.attention_transfer(teacher, pair)
    assert pair.stages().student == pair.student.maps[1:]
    assert len(review.comparison.fusions) == 5


# The families whose taps differ most, with real numbers: no shape goes wrong in a step.
@pytest.mark.parametrize(
    "names",
    [("resnet8x4", "shufflenet_v1"), ("vgg8", "mobilenet_v2_half"), ("wrn_10_1", "shufflenet_v2")],
    ids="-".join,
)
def test_a_step_on_two_families(names: tuple[str, str]) -> None:
    teacher, student = (create_model(name, 10) for name in names)
    pair = feature_pair(student, teacher, (3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    labels, mask = torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool)
    batch = methods.Batch(images, labels, mask, torch.arange(2))
    context = methods.StepContext(0, 1, 0, torch.tensor(2), labels, 1.0, lambda k: torch.rand(2, k))
    built = {
        "ofd": methods.ofd(teacher, pair, tap_norms(teacher)),
        "reviewkd": methods.reviewkd(teacher, pair),
        "at": methods.attention_transfer(teacher, pair),
        "fitnet": methods.fitnet(teacher, pair),
        "crd": methods.crd(teacher, pair, torch.arange(6) % 3, num_negatives=4),
    }
    for name, method in built.items():
        prepared = method.prepare(student.train(), batch, context)
        output = method.loss(student, prepared, context)
        output.loss.backward()
        assert output.loss.isfinite(), name
        assert output.parts["loss"] > 0, name
