"""Values and gradients that the authors' implementations gave, in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dkl.losses import decoupled_kl_loss, from_authors, gkl_loss, ikl_loss, kl_loss
from tests.reference import decoupled_kl_reference, max_relative_error, value_and_gradients

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "losses.json").read_text())
KD_VALUES = json.loads((GOLDEN / "kd_losses.json").read_text())["logit"]
NORMALIZATION = {"batch": "rows", "weights": "weights"}


def load_case(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a case's tensors and the options of our loss that describe it."""
    with np.load(GOLDEN / "losses.npz") as archive:
        prefix = case["case"] + "_"
        names = [key for key in archive if key.startswith(prefix)]
        tensors = {name.removeprefix(prefix): torch.from_numpy(archive[name]) for name in names}
    options = {name: case[name] for name in ("mse_weight", "ce_weight", "temperature", "gamma")}
    options["normalization"] = NORMALIZATION[case["normalization"]]
    if case["weight_source"] == "class_table_rows":
        options["class_probs"] = tensors["class_probs"]
    else:
        options["weight_temperature"] = case["weight_temperature"]
    return tensors, options


def test_the_golden_file_has_all_its_cases() -> None:
    assert [case["case"] for case in CASES] == [f"c{index:02d}" for index in range(24)]


@pytest.mark.parametrize("function", [decoupled_kl_loss, decoupled_kl_reference])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['kind']}")
def test_loss_and_gradients_are_the_authors(
    case: dict[str, Any], function: Callable[..., Tensor]
) -> None:
    tensors, options = load_case(case)
    loss, (grad_input, grad_target) = value_and_gradients(
        lambda input, target: function(input, target, **options),
        (tensors["input"], tensors["target"]),
    )
    assert max_relative_error(loss, tensors["loss"]) < 1e-10
    # element by element, which is stricter than the error in the maximum norm
    torch.testing.assert_close(grad_input, tensors["grad_input"], rtol=1e-10, atol=1e-18)
    assert ("grad_target" in tensors) != case["target_detached"]
    if not case["target_detached"]:
        torch.testing.assert_close(grad_target, tensors["grad_target"], rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_a_table_gathered_by_labels_gives_the_same_as_its_rows(case: dict[str, Any]) -> None:
    tensors, options = load_case(case)
    if "class_probs" not in options:
        options["class_probs"] = tensors["class_probs"]
        del options["weight_temperature"]
    num_rows, num_classes = tensors["input"].shape
    labels = torch.arange(num_rows).flip(0)
    table = torch.full((num_classes, num_classes), float("nan"), dtype=torch.float64)
    table[labels] = tensors["class_probs"]
    pair = (tensors["input"], tensors["target"])
    expected, expected_grads = value_and_gradients(
        lambda input, target: decoupled_kl_loss(input, target, **options), pair
    )
    del options["class_probs"]
    loss, grads = value_and_gradients(
        lambda input, target: decoupled_kl_loss(
            input, target, class_table=table, labels=labels, **options
        ),
        pair,
    )
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, grads, expected_grads))


def kd_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return student logits, teacher logits and class weights of the file's closed form."""
    k = torch.arange(40, dtype=torch.float64).view(4, 10)
    table = torch.softmax(
        3 * torch.sin(2 + torch.arange(100, dtype=torch.float64).view(10, 10)), dim=1
    )
    return 4 * torch.cos(0.5 * k), 5 * torch.sin(1 + k), table[[0, 3, 7, 9]]


# The masked loss of FixMatch-IKL lets gradients into the weights and divides by all rows.
SEMI_SUPERVISED: dict[str, Any] = {
    "mask": torch.tensor([True, False, True, True]),
    "num_items": 4,
    "detach_weights": False,
}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
KD_LOSSES: dict[str, Loss] = {
    "kd_T4_times_T2": lambda s, t, cp: 16 * kl_loss(s, t, temperature=4),
    "kd_T1": lambda s, t, cp: kl_loss(s, t),
    "ikl_alpha1_beta8_T4_T2_100_samplewise": lambda s, t, cp: ikl_loss(
        s, t, **from_authors(alpha=1, beta=8, T=4, T2=100)
    ),
    "ikl_alpha1_beta0.5_T1_prior_cp": lambda s, t, cp: ikl_loss(
        s, t, cp, **from_authors(alpha=1, beta=0.5)
    ),
    "ikl_wmse_only_beta1_T2_1_samplewise": lambda s, t, cp: ikl_loss(s, t, ce_weight=0),
    "gkl_alpha1_beta16_gamma0.05_T4_prior_cp": lambda s, t, cp: gkl_loss(
        s, t, cp, **from_authors(alpha=1, beta=16, gamma=0.05, T=4)
    ),
    "gkl_alpha3_beta20_gamma0.3_T4_T2_4_samplewise": lambda s, t, cp: gkl_loss(
        s, t, **from_authors(alpha=3, beta=20, gamma=0.3, T=4, T2=4)
    ),
    "gkl_alpha1_beta0.5_gamma0.6_T1_prior_cp": lambda s, t, cp: gkl_loss(
        s, t, cp, **from_authors(alpha=1, beta=0.5, gamma=0.6)
    ),
    "gkl_alpha1_beta8_gamma0_T4_prior_cp": lambda s, t, cp: gkl_loss(
        s, t, cp, **from_authors(alpha=1, beta=8, gamma=0, T=4)
    ),
    "ssl_ikl_alpha1_beta0.1_T1_T2_1_mask1011": lambda s, t, cp: ikl_loss(
        s, t, mse_weight=0.1, **SEMI_SUPERVISED
    ),
    "ssl_ikl_alpha0.02_beta0.03_mask1011": lambda s, t, cp: ikl_loss(
        s, t, ce_weight=0.02, mse_weight=0.03, **SEMI_SUPERVISED
    ),
}


@pytest.mark.parametrize("name", KD_LOSSES)
def test_distillation_loss_and_gradient_norm(name: str) -> None:
    student, teacher, weights = kd_inputs()
    loss, (gradient,) = value_and_gradients(
        lambda s: KD_LOSSES[name](s, teacher, weights), (student,)
    )
    expected_loss, expected_norm = KD_VALUES[name]
    assert loss.item() == pytest.approx(expected_loss, rel=0, abs=1e-9)
    assert gradient.norm().item() == pytest.approx(expected_norm, rel=0, abs=1e-9)


def test_semi_supervised_gradient_of_the_weak_branch() -> None:
    student, teacher, weights = kd_inputs()
    strong_to_weak = KD_LOSSES["ssl_ikl_alpha1_beta0.1_T1_T2_1_mask1011"]
    _, (gradient,) = value_and_gradients(lambda t: strong_to_weak(student, t, weights), (teacher,))
    expected = KD_VALUES["ssl_ikl_alpha1_beta0.1_grad_wrt_weak_logits"][1]
    assert gradient.norm().item() == pytest.approx(expected, rel=0, abs=1e-9)


def test_no_kl_ikl_gkl_or_semi_supervised_value_is_left_out() -> None:
    other_methods = ("dkd", "dist")
    weak = {"ssl_ikl_alpha1_beta0.1_grad_wrt_weak_logits"}
    expected = {name for name in KD_VALUES if not name.startswith(other_methods)}
    assert set(KD_LOSSES) | weak == expected
