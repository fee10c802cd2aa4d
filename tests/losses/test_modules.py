"""Modules are their functions with the options set."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dkl.losses import (
    DKLLoss,
    GKLLoss,
    IKLLoss,
    JSDLoss,
    KLLoss,
    ReverseKLLoss,
    dkl_loss,
    from_authors,
    gkl_loss,
    ikl_loss,
    jsd_loss,
    kl_loss,
    reverse_kl_loss,
)

DECOUPLED: list[tuple[type[nn.Module], Callable[..., Any]]] = [
    (DKLLoss, dkl_loss),
    (IKLLoss, ikl_loss),
    (GKLLoss, gkl_loss),
]
DIVERGENCES: list[tuple[type[nn.Module], Callable[..., Any]]] = [
    (KLLoss, kl_loss),
    (ReverseKLLoss, reverse_kl_loss),
    (JSDLoss, jsd_loss),
]
GENERATOR = torch.Generator().manual_seed(0)
INPUT, TARGET = (3 * torch.randn(6, 5, generator=GENERATOR) for _ in range(2))
TABLE = torch.rand(5, 5, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, -100, 4, 4])
MASK = torch.tensor([True, True, False, True, True, True])


@pytest.mark.parametrize(("module", "function"), DECOUPLED)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mse_weight": 8, "ce_weight": 3, "temperature": 4},
        {"gamma": 0.3, "detach_weights": False, "reduction": "sum"},
        {"reduction": "none", "ignore_index": 4, "backend": "reference"},
    ],
    ids=str,
)
def test_decoupled_modules(
    module: type[nn.Module], function: Callable[..., Any], options: dict[str, Any]
) -> None:
    loss = module(**options)
    calls: list[dict[str, Any]] = [
        {"labels": LABELS},
        {"labels": LABELS, "mask": MASK},
        {"labels": torch.tensor([0, 1, 2, 4, 3, 3]), "class_table": TABLE, "mask": MASK},
        {"labels": LABELS, "class_probs": TABLE[[0, 0, 1, 1, 2, 4]]},
    ]
    if options.get("reduction", "mean") == "mean":
        calls.append({"labels": LABELS, "num_items": 11})
    for call in calls:
        assert torch.equal(loss(INPUT, TARGET, **call), function(INPUT, TARGET, **call, **options))
    positional = loss(INPUT, TARGET, TABLE[[0, 0, 1, 1, 2, 4]], labels=LABELS)
    assert torch.equal(positional, loss(INPUT, TARGET, **calls[3]))


@pytest.mark.parametrize(("module", "function"), DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_divergence_modules(
    module: type[nn.Module], function: Callable[..., Tensor], reduction: str
) -> None:
    loss = module(temperature=4.0, reduction=reduction)
    expected = function(INPUT, TARGET, temperature=4.0, reduction=reduction)
    assert torch.equal(loss(INPUT, TARGET), expected)
    masked = function(INPUT, TARGET, temperature=4.0, reduction=reduction, mask=MASK)
    assert torch.equal(loss(INPUT, TARGET, MASK), masked)


def test_parts_and_shared_denominators() -> None:
    loss, parts = GKLLoss(return_parts=True)(INPUT, TARGET, denominator=2.0, num_items=9)
    expected = gkl_loss(INPUT, TARGET, denominator=2.0, num_items=9)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(parts.weighted_mse + parts.soft_cross_entropy, expected)


def test_repr_shows_the_settings() -> None:
    assert repr(GKLLoss(gamma=0.4, mse_weight=12)) == (
        "GKLLoss(gamma=0.4, mse_weight=12, return_parts=False)"
    )
    assert repr(KLLoss(temperature=4.0)) == "KLLoss(temperature=4.0, reduction='mean')"


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (IKLLoss, {"mse_weight": -1}, "mse_weight must be finite"),
        (IKLLoss, {"reduction": "batchmean"}, "'mean' here"),
        (IKLLoss, {"denominator": 3}, "pass denominator to the call"),
        (GKLLoss, {"labels": LABELS, "class_table": TABLE}, "pass class_table, labels to the call"),
        (GKLLoss, {"class_probs": TABLE}, "pass class_probs to the call"),
        (GKLLoss, {"normalization": "weights"}, "use ikl_loss"),
        (DKLLoss, {"break_asymmetry": False}, "use ikl_loss"),
        (DKLLoss, {"backend": "fused"}, "backend must be one of"),
        (KLLoss, {"temperature": 0}, "temperature must be finite and > 0"),
        (ReverseKLLoss, {"temperature": float("nan")}, "temperature must be finite and > 0"),
        (JSDLoss, {"reduction": "avg"}, "reduction must be"),
    ],
)
def test_wrong_options_are_found_when_the_module_is_made(
    module: type[nn.Module], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        module(**options)


@pytest.mark.parametrize("module", [module for module, _ in DECOUPLED + DIVERGENCES])
def test_modules_hold_no_state_and_can_be_copied(module: type[nn.Module]) -> None:
    loss = module(temperature=2.0)
    assert not loss.state_dict()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)
        assert torch.equal(twin(INPUT, TARGET), loss(INPUT, TARGET))


def test_authors_names() -> None:
    options = from_authors(alpha=4, beta=20, T=4, T2=100, gamma=0.3)
    assert options == {
        "ce_weight": 4,
        "mse_weight": 20,
        "temperature": 4,
        "weight_temperature": 100,
        "gamma": 0.3,
    }
    expected = gkl_loss(INPUT, TARGET, **options)
    assert torch.equal(GKLLoss(**options)(INPUT, TARGET), expected)
    # GI: the weights' temperature belongs to the class table and must not be given twice.
    assert "weight_temperature" not in from_authors(alpha=1, beta=1, T=4)


@pytest.mark.parametrize("backend", ["blocked", "compile", "triton"])
def test_a_backend_is_checked_when_it_is_used(backend: str) -> None:
    assert IKLLoss(backend=backend).options["backend"] == backend  # also where it cannot run
