"""Features before the last layer, and how compact their classes are.

Shapes: N samples, B samples of a batch, C classes or channels, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dkl.evaluation.inputs import (
    check_batching,
    check_images,
    check_model,
    float_images,
    isolated,
    model_device,
)


def penultimate_features(
    model: nn.Module,
    images: Tensor,
    *,
    classifier: nn.Module | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Return what the last layer of a model is given, in evaluation mode and without gradients.

    Args:
        model: takes images, with any normalisation inside.
        images: [N, C, H, W], float32 in [0, 1] or uint8.
        classifier: the last layer, a module of the model that is called once in its forward; None
            asks ``model.get_classifier()``, as the models of this package and of timm have it.
        batch_size: images per forward pass.

    Returns:
        [N, D] float32 on the device of ``images``.

    Raises:
        ValueError: wrong images, a model whose last layer is not known, or a layer that is not
            given one vector per image.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 3))
        >>> penultimate_features(model, torch.ones(5, 1, 2, 2), classifier=model[2]).shape
        torch.Size([5, 4])
    """
    check_model(model)
    check_images(images)
    check_batching(batch_size, seed=0)
    layer = last_layer(model) if classifier is None else classifier
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    place = model_device(model, images.device)
    features_ND = []
    try:
        with isolated(model, place), torch.no_grad():
            for images_BCHW in torch.split(images, batch_size):
                seen.clear()
                model(float_images(images_BCHW.to(place)))
                features_ND.append(_one_vector_each(seen, len(images_BCHW)).to(images.device))
    finally:
        handle.remove()
    return torch.cat(features_ND)


def last_layer(model: nn.Module) -> nn.Module:
    """Return the layer that makes logits of features.

    Raises:
        ValueError: the model has no ``get_classifier()`` that returns one module.
    """
    get_classifier = getattr(model, "get_classifier", None)
    layer = get_classifier() if callable(get_classifier) else None
    if not isinstance(layer, nn.Module):
        found = "no such method" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"features need the last layer of {type(model).__name__}: give the model a method "
            f"get_classifier() that returns it, as timm's models have (found: {found}), or name "
            "it with classifier=..."
        )
    return layer


def _one_vector_each(seen: list[Tensor], num_images: int) -> Tensor:
    """Return the features [B, D] that a hook has seen in one forward pass."""
    if len(seen) != 1:
        raise ValueError(
            f"the last layer was called {len(seen)} times in one forward pass, where once is "
            "needed: is it the layer that makes the logits?"
        )
    features = seen[0]
    is_vector = features.ndim == 2 or (features.ndim == 4 and features.shape[2:] == (1, 1))
    if not is_vector or len(features) != num_images:
        raise ValueError(
            f"the last layer must be given one vector per image, [{num_images}, D], got "
            f"{list(features.shape)}."
        )
    return features.flatten(1).float()


@dataclass(frozen=True)
class Compactness:
    """How close the features of a class lie, compared with those of others.

    Args:
        intra_inter_ratio: mean distance of the samples to the mean of their class, divided by the
            mean distance between the means of two classes; lower is more compact.
        silhouette: mean silhouette coefficient (Rousseeuw, 1987), from -1 to 1; higher is more
            compact.
    """

    intra_inter_ratio: float
    silhouette: float


def compactness(features: Tensor, labels: Tensor) -> Compactness:
    """Measure how compact the classes are in feature space, by Euclidean distances.

    ``intra_inter_ratio = mean_i |f_i - m_{y_i}| / mean_{k < l} |m_k - m_l|`` with m_k the mean of
    class k. Silhouette of a sample: ``(b - a) / max(a, b)``, a its mean distance to the others of
    its class, b the smallest mean distance to those of another class; 0 in a class of one.

    Args:
        features: [N, D] floating point, finite.
        labels: [N] int64; at least two classes.

    Returns:
        Both measures, computed in float64.

    Raises:
        ValueError: shapes that do not fit, fewer than two classes, or class means that coincide.

    Example:
        >>> features = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> found = compactness(features, torch.tensor([0, 0, 1, 1]))
        >>> found.intra_inter_ratio, round(found.silhouette, 4)
        (0.1, 0.798)
    """
    _check_features(features, labels)
    points_ND = features.double()
    own_N = _class_positions(labels)
    onehot_NC = torch.nn.functional.one_hot(own_N).double()
    counts_C = onehot_NC.sum(dim=0)
    means_CD = (onehot_NC.T @ points_ND) / counts_C.unsqueeze(1)
    intra = torch.linalg.vector_norm(points_ND - means_CD[own_N], dim=1).mean()
    inter = torch.pdist(means_CD).mean()
    if float(inter) == 0.0:
        raise ValueError("the means of all classes coincide: the features say nothing of classes.")
    return Compactness(float(intra / inter), float(_silhouettes(points_ND, own_N, onehot_NC)))


def _class_positions(labels: Tensor) -> Tensor:
    """Return the labels renumbered from 0, without gaps: [N] int64."""
    present = torch.zeros(int(labels.max()) + 1, dtype=torch.int64, device=labels.device)
    present[labels] = 1
    return (present.cumsum(0) - 1)[labels]


def _silhouettes(points_ND: Tensor, own_N: Tensor, onehot_NC: Tensor) -> Tensor:
    """Return the mean silhouette coefficient."""
    # Differences and not the expanded square, which cancels for points that nearly coincide.
    distances_NN = torch.cdist(points_ND, points_ND, compute_mode="donot_use_mm_for_euclid_dist")
    counts_C = onehot_NC.sum(dim=0)
    sums_NC = distances_NN @ onehot_NC
    own_N1 = own_N.unsqueeze(1)
    # The distance of a sample to itself is zero and is not one of its class's others.
    others_N = counts_C[own_N] - 1
    within_N = sums_NC.gather(1, own_N1).squeeze(1) / others_N.clamp(min=1)
    between_NC = (sums_NC / counts_C).scatter(1, own_N1, torch.inf)
    nearest_N = between_NC.amin(dim=1)
    larger_N = torch.maximum(within_N, nearest_N)
    values_N = (nearest_N - within_N) / torch.where(larger_N == 0, 1.0, larger_N)
    return torch.where(others_N > 0, values_N, 0.0).mean()


def _check_features(features: Tensor, labels: Tensor) -> None:
    """Refuse what has no compactness."""
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point [N, D], got {features.dtype} {list(features.shape)}."
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(features)} integer class indices, one per row of features, got "
            f"{labels.dtype} {list(labels.shape)}."
        )
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels must be class indices of at least 0, got {int(labels.min())}.")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite. Check the weights (did training diverge?).")
    if len(labels) == 0 or int(labels.min()) == int(labels.max()):
        raise ValueError("compactness compares classes: give features of at least two.")
