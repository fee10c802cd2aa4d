"""Section ``method``: what is trained, one model per ``kind``."""

from typing import Annotated, Literal

from pydantic import Field

from dkl.config.adversarial import (
    DAJAT,
    GKLAT,
    IKLAT,
    LASAT,
    LBGAT,
    MART,
    PGDAT,
    TRADES,
    LabelSmoothing,
)
from dkl.config.base import Section
from dkl.config.distillation import (
    AT,
    CRD,
    DIST,
    DKD,
    GKLKD,
    IKLKD,
    JSDKD,
    KD,
    OFD,
    RKD,
    FitNet,
    ReviewKD,
)


class Natural(Section):
    """Cross-entropy on clean images."""

    kind: Literal["natural"]
    label_smoothing: LabelSmoothing = 0.0


MethodSettings = Annotated[
    Natural
    | PGDAT
    | TRADES
    | MART
    | LBGAT
    | LASAT
    | DAJAT
    | IKLAT
    | GKLAT
    | KD
    | JSDKD
    | DKD
    | DIST
    | IKLKD
    | GKLKD
    | AT
    | FitNet
    | RKD
    | CRD
    | OFD
    | ReviewKD,
    Field(discriminator="kind"),
]
