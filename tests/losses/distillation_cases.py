"""Every distillation loss with features or logits that suit it, for the tests that hold for all.

B samples. A case makes tensors of the student and of the teacher, and calls the loss with them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkl.losses import (
    attention_transfer_loss,
    crd_loss,
    dist_loss,
    dkd_loss,
    hcl_loss,
    hint_loss,
    ofd_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
    vid_loss,
)

Shapes = Sequence[tuple[int, ...]]


class Case(NamedTuple):
    """A loss.

    Args:
        student: shapes of the student's tensors without B.
        teacher: those of the teacher's.
        loss: called with the lists of tensors and options.
        couples: whether a sample's value depends on the other samples.
        at_equality: bound of the loss and gradient of equal sides; None where they are not zero.
    """

    student: Shapes
    teacher: Shapes
    loss: Callable[..., Tensor]
    couples: bool = False
    at_equality: float | None = 1e-14


def dkd(s: Sequence[Tensor], t: Sequence[Tensor], **options: Any) -> Tensor:
    """Take the teacher's decisions for labels, so that they follow the samples about."""
    labels = t[0].detach().argmax(1)
    return dkd_loss(*s, *t, labels, alpha=0.7, beta=8.0, temperature=2.0, **options)


def ofd(s: Sequence[Tensor], t: Sequence[Tensor], **options: Any) -> Tensor:
    margins = [torch.linspace(-1.5, -0.1, map.shape[1]) for map in s]
    return ofd_loss(s, t, margins, **options)


def vid(s: Sequence[Tensor], t: Sequence[Tensor], **options: Any) -> Tensor:
    return vid_loss(s[0], t[0], torch.linspace(-1.0, 1.0, s[0].shape[1]), **options)


def crd(s: Sequence[Tensor], t: Sequence[Tensor], **options: Any) -> Tensor:
    return crd_loss(*s, *t, num_samples=50, log_normalizer=3.0, temperature=0.5, **options)


def crd_arguments(s: Sequence[Tensor], t: Sequence[Tensor], **options: Any) -> Tensor:
    return crd((s[0],), (t[0], s[1]), **options)


MAPS = [(3, 8, 8), (5, 4, 4)]
LOGITS = [(7,)]
CASES: dict[str, Case] = {
    "dkd": Case(LOGITS, LOGITS, dkd),
    # The epsilons that belong to DIST and PKT leave a little at equality.
    "dist": Case(
        LOGITS, LOGITS, lambda s, t, **o: dist_loss(*s, *t, beta=0.7, **o), True, at_equality=1e-4
    ),
    "at": Case(MAPS, [(2, 4, 8), (6, 4, 4)], attention_transfer_loss),
    "hint": Case([(3, 5, 5)], [(3, 5, 5)], lambda s, t, **o: hint_loss(*s, *t, **o)),
    # Where the teacher's response is under the margin, an equal student is still pushed there.
    "ofd": Case(MAPS, [(3, 8, 8), (5, 8, 8)], ofd, at_equality=None),
    "hcl": Case(MAPS, MAPS, hcl_loss),
    "vid": Case([(3, 4, 4)], [(3, 4, 4)], vid, at_equality=None),
    "rkd_distance": Case(
        [(4,)], [(6,)], lambda s, t, **o: rkd_distance_loss(*s, *t, **o), couples=True
    ),
    "rkd_angle": Case([(4,)], [(6,)], lambda s, t, **o: rkd_angle_loss(*s, *t, **o), couples=True),
    "rkd_angle_chunks": Case(
        [(4,)], [(6,)], lambda s, t, **o: rkd_angle_loss(*s, *t, chunk_size=2, **o), couples=True
    ),
    "sp": Case(
        [(3, 4, 4)],
        [(2, 2, 2)],
        lambda s, t, **o: similarity_preserving_loss(*s, *t, **o),
        couples=True,
    ),
    "pkt": Case([(4,)], [(6,)], lambda s, t, **o: pkt_loss(*s, *t, **o), True, at_equality=1e-7),
    "crd": Case([(6,), (9,)], [(6,)], crd_arguments, at_equality=None),
}


def tensors(
    shapes: Shapes, batch: int, seed: int, scale: float = 1.5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return leaves with a gradient, one per shape."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]
    return [(scale * values).to(dtype).requires_grad_() for values in made]


def sides(case: Case, batch: int = 6, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return tensors of the student and of the teacher."""
    return tensors(case.student, batch, 1, **options), tensors(case.teacher, batch, 2, **options)
