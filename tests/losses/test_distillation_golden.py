"""Every distillation loss gives the value and gradient norm of the reference implementations.

Published factors (T^2, the weights of RKD's terms, 1e-3 of OFD) are written out in the calls.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from dkl.losses import (
    attention_transfer_loss,
    crd_loss,
    dist_loss,
    dkd_loss,
    hcl_loss,
    ofd_loss,
    ofd_margins,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
    vid_loss,
)
from tests.losses.test_golden import KD_LOSSES, kd_inputs

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "kd_losses.json").read_text(encoding="utf-8")
)
LABELS = torch.tensor([0, 3, 7, 9])
ROUNDED = {"rel": 0, "abs": 1e-9}

LOGIT_LOSSES = {
    "dkd_a1_b8_T4": lambda s, t: 16 * dkd_loss(s, t, LABELS, alpha=1.0, beta=8.0, temperature=4.0),
    "dkd_a1_b0.5_T1": lambda s, t: dkd_loss(s, t, LABELS, alpha=1.0, beta=0.5),
    "dist_b1_g1_tau1": dist_loss,
    "dist_b1_g1_tau4": lambda s, t: 16 * dist_loss(s, t, temperature=4.0),
    "rkd_25_50_on_logits": lambda s, t: 25 * rkd_distance_loss(s, t) + 50 * rkd_angle_loss(s, t),
    "pkt_on_logits": pkt_loss,
}


def wave(function, step, *shape):
    return function(step * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


FS, FT = wave(torch.cos, 0.07, 4, 6, 8, 8), wave(torch.sin, 0.1, 4, 6, 8, 8)
FT4 = wave(torch.sin, 0.1, 4, 5, 4, 4)


def crd_of_scores():
    """Return CRD of given scores: exp(log P) with T = Z = 1 and embeddings of one number."""
    log_scores = wave(torch.sin, 1.0, 4, 6).sigmoid().log()
    positive, negatives = log_scores[:, :1], log_scores[:, 1:]
    options = {"num_samples": 100, "log_normalizer": 0.0, "temperature": 1.0}
    return crd_loss(positive, torch.ones(4, 1), negatives, **options)


FEATURE_LOSSES = {
    "at_p2_fs_ft": lambda: attention_transfer_loss([FS], [FT]),
    "at_p2_fs_ft4": lambda: attention_transfer_loss([FS], [FT4]),
    "sp_fs_ft": lambda: similarity_preserving_loss(FS, FT),
    "ofd_feat_loss_fs_ft_margin_minus0.5": lambda: ofd_loss([FS], [FT], [torch.full((6,), -0.5)]),
    "reviewkd_hcl_[fs,0.5fs]_[ft,ft]": lambda: hcl_loss([FS, 0.5 * FS], [FT, FT]),
    "reviewkd_hcl_1x1_corner_of_fs_ft": lambda: hcl_loss([FS[..., :1, :1]], [FT[..., :1, :1]]),
    "crd_contrast_loss_n100_x=sigmoid(sin(arange(24))).view(4,6)": crd_of_scores,
    # its trained scale is the one whose softplus, plus 1e-5, is a variance of 5
    "vid_identity_regressor_log_scale5_eps1e-5": lambda: vid_loss(
        FS, FT, torch.full((6,), math.log(5.0), dtype=torch.float64)
    ),
}
MARGINS = "ofd_margins_for_bn_w_b_(1,0)(.5,.3)(2,-1)(.1,2)"


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_loss_of_logits_and_its_gradient_norm(name):
    student, teacher, _ = kd_inputs()
    student.requires_grad_()
    loss = LOGIT_LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    expected, norm = (GOLDEN["logit"] | GOLDEN["relation_and_feature"])[name]
    assert loss.item() == pytest.approx(expected, **ROUNDED)
    assert gradient.norm().item() == pytest.approx(norm, **ROUNDED)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_loss_of_features(name):
    expected = GOLDEN["relation_and_feature"][name]
    assert FEATURE_LOSSES[name]().item() == pytest.approx(expected, **ROUNDED)


def test_margins():
    weight, bias = torch.tensor([[1, 0], [0.5, 0.3], [2, -1], [0.1, 2]], dtype=torch.float64).T
    expected = GOLDEN["relation_and_feature"][MARGINS]
    assert ofd_margins(weight, bias).tolist() == pytest.approx(expected, rel=0, abs=1e-8)


def test_no_value_of_the_file_is_left_out():
    ours = {*LOGIT_LOSSES, *FEATURE_LOSSES, MARGINS, *KD_LOSSES}
    ours.add("ssl_ikl_alpha1_beta0.1_grad_wrt_weak_logits")  # has its own test beside KD_LOSSES
    assert ours == {*GOLDEN["logit"], *GOLDEN["relation_and_feature"]}
