"""Training on a second, differently augmented view of every image beside the basic one.

Both views go through the network in one batch, [basic; second], and so through one batch-norm. With
n samples, g the weight of the second view and r the robust loss of a view, the step minimises

    CE over all 2n images  +  mean r(basic)  +  g mean r(second)

(the AutoAugment form of IKL-AT, arXiv 2305.13948, where g is 0.3, and 0.5 in GKL-AT).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dkl.methods.protocol import Batch

SECOND_VIEW = "view_1"


def views_of(batch: Batch, *, with_second: bool) -> list[Batch]:
    """Return the batch, and its second view as a batch of its own where that is wanted.

    The second view has the labels of the images: mixing (CutMix) is done to the basic view alone.

    Args:
        batch: with the second view in ``extras["view_1"]``.
        with_second: whether the method trains on it.

    Returns:
        One or two batches of the same samples.

    Raises:
        ValueError: no second view, or one of another shape.
    """
    if not with_second:
        return [batch]
    second = batch.extras.get(SECOND_VIEW)
    if second is None:
        raise ValueError(
            "second_view_weight needs a second view of every image, and the batch has none. Give "
            "the data one further view (data.views), or set second_view_weight to None"
        )
    if second.shape != batch.images.shape:
        raise ValueError(
            f"the second view must have the shape of the images, {list(batch.images.shape)}; "
            f"got {list(second.shape)}"
        )
    return [batch, replace(batch, images=second, targets=None)]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors one after the other in dim 0; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


def combine_views(
    terms_of_views: Sequence[Mapping[str, Tensor]], second_view_weight: float | None
) -> Mapping[str, Tensor]:
    """Return the terms of a step over all views.

    Args:
        terms_of_views: "clean_ce" and "robust" of each view, shares of the step's means.
        second_view_weight: g >= 0; None where there is one view.

    Returns:
        The mean of the cross-entropies, and robust(basic) + g robust(second).

    Example:
        >>> one, two = ({"clean_ce": torch.tensor(c), "robust": torch.tensor(2.0)} for c in (1., 3))
        >>> combine_views([one, two], 0.5)
        {'clean_ce': tensor(2.), 'robust': tensor(3.)}
    """
    if second_view_weight is None:
        return terms_of_views[0]
    basic, second = terms_of_views
    return {
        "clean_ce": (basic["clean_ce"] + second["clean_ce"]) / 2,
        "robust": basic["robust"] + second_view_weight * second["robust"],
    }
