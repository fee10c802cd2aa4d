"""Features before the last layer, and how compact they are."""

import pytest
import torch
from sklearn.metrics import silhouette_score
from torch import nn

from dkl.evaluation import compactness, penultimate_features
from dkl.models import create_model


@pytest.mark.parametrize("name", ["convnet_small", "preact_resnet10", "wrn_10_1"])
def test_features_are_what_the_head_pools(name):
    model = create_model(name, 5, in_channels=3, mean=[0.4] * 3, std=[0.2] * 3).train()
    images = torch.rand(7, 3, 8, 8)
    features = penultimate_features(model, images, batch_size=3)
    assert model.training
    model.eval()
    normalised = (images - 0.4) / 0.2
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(normalised), pre_logits=True)
        logits = model.get_classifier()(features)
        torch.testing.assert_close(logits, model(images))
    torch.testing.assert_close(features, expected)
    assert features.shape == (7, model.num_features)


def test_timm_models_have_features():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=4).eval()
    images = torch.rand(2, 3, 32, 32)
    features = penultimate_features(model, images)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, expected)


def test_uint8_images_and_named_layers(digits):
    pixels = (digits.images * 255).round().to(torch.uint8)
    found = penultimate_features(digits.model, pixels, classifier=digits.model[3])
    assert torch.equal(found, torch.relu(digits.model[1]((pixels.float() / 255).flatten(1))))
    assert not digits.model[3]._forward_pre_hooks


def test_models_without_a_known_last_layer_are_refused(digits):
    with pytest.raises(ValueError, match=r"get_classifier\(\)"):
        penultimate_features(digits.model, digits.images)

    class TwoHeads(nn.Module):
        def get_classifier(self):
            return nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(ValueError, match="tuple"):
        penultimate_features(TwoHeads(), digits.images)
    unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="called 0 times"):
        penultimate_features(digits.model, digits.images, classifier=unused)
    with pytest.raises(ValueError, match="one vector per image"):
        penultimate_features(digits.model, digits.images, classifier=digits.model[0])
    assert not digits.model[0]._forward_pre_hooks


@pytest.fixture
def cloud():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    labels[labels == 3] = 7  # a gap in the labels
    centres = 2 * torch.randn(8, 5, generator=generator)
    return centres[labels] + torch.randn(60, 5, generator=generator), labels


def test_silhouette_is_that_of_scikit_learn(cloud):
    features, labels = cloud
    expected = silhouette_score(features.double().numpy(), labels.numpy())
    assert compactness(features, labels).silhouette == pytest.approx(expected, abs=1e-12)
    lonely = labels.clone()
    lonely[5] = 5  # a class of one
    expected = silhouette_score(features.double().numpy(), lonely.numpy())
    assert compactness(features, lonely).silhouette == pytest.approx(expected, abs=1e-12)


def test_the_ratio_follows_the_definition(cloud):
    features, labels = cloud
    points = features.double()
    means = {k: points[labels == k].mean(0) for k in (0, 1, 2, 7)}
    intra = sum((points[i] - means[int(labels[i])]).norm() for i in range(60)) / 60
    pairs = [(0, 1), (0, 2), (0, 7), (1, 2), (1, 7), (2, 7)]
    inter = sum((means[k] - means[m]).norm() for k, m in pairs) / 6
    assert compactness(features, labels).intra_inter_ratio == pytest.approx(float(intra / inter))


def test_measures_do_not_depend_on_place_scale_and_order(cloud):
    features, labels = cloud
    expected = compactness(features.double(), labels)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    moved = compactness(3.0 * features[order].double() + 100.0, labels[order])
    assert moved.intra_inter_ratio == pytest.approx(expected.intra_inter_ratio, rel=1e-9)
    assert moved.silhouette == pytest.approx(expected.silhouette, rel=1e-9)


def test_closer_classes_are_less_compact(cloud):
    features, labels = cloud
    near, far = compactness(features, labels), compactness(features + 9 * labels[:, None], labels)
    assert far.intra_inter_ratio < near.intra_inter_ratio
    assert far.silhouette > near.silhouette


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(4), torch.tensor([0, 1, 0, 1]), r"\[N, D\]"),
        (torch.zeros(4, 2).long(), torch.tensor([0, 1, 0, 1]), "floating point"),
        (torch.zeros(4, 2), torch.tensor([0, 1]), "4 integer"),
        (torch.rand(4, 2), torch.tensor([1, 1, 1, 1]), "at least two"),
        (torch.rand(4, 2), torch.tensor([0, -1, 0, 1]), "at least 0"),
        (torch.rand(0, 2), torch.zeros(0).long(), "at least two"),
        (torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]), "finite"),
        (torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), "coincide"),
    ],
)
def test_what_has_no_compactness(features, labels, message):
    with pytest.raises(ValueError, match=message):
        compactness(features, labels)
