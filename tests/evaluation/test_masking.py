"""Models whose gradients mislead an attacker are found out; an honest one is not."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.attacks import PGDSettings, ThreatModel, cross_entropy_objective
from dkl.evaluation import auto_attack, masking, masking_checks, pgd_robust, predict_logits
from dkl.evaluation.state import StateMismatchError

NAMES = [
    "random_noise",
    "more_steps",
    "large_epsilon",
    "zero_gradients",
    "square",
    "randomised",
    "probabilities",
]

pytestmark = pytest.mark.usefixtures("quick_attacks")


class Wrapped(nn.Module):
    """Applies functions to the images and the logits of another model."""

    def __init__(self, model, change=lambda logits: logits, see=lambda images: images):
        super().__init__()
        self.model, self.change, self.see = model, change, see

    def forward(self, images):
        return self.change(self.model(self.see(images)))


class Quantised(torch.autograd.Function):
    """Rounds to whole multiples of a fifth, and says that this has no gradient."""

    @staticmethod
    def forward(ctx, images):
        return (images * 5).round() / 5

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


@pytest.fixture(scope="module")
def robust_model(train_problem):
    """The digits model, trained on for a moment under attack."""
    problem = train_problem(10)
    model = copy.deepcopy(problem.model)
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images[100:900]).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target[100:900]).long()
    attack = PGDSettings(ThreatModel("Linf", 0.1), 3, 0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        adversarial = attack.attack(model, images, cross_entropy_objective(labels))
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), labels).backward()
        optimizer.step()
    return model


def check(model, digits, **settings):
    found = masking_checks(model, digits.images, digits.labels, **{"eps": 0.1, **settings})
    assert [one.name for one in found] == NAMES
    return {one.name: one for one in found}


def failed(checks):
    return {name for name, one in checks.items() if not one.passed}


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5)])
def test_an_honest_model_passes(robust_model, digits, norm, eps):
    checks = check(robust_model, digits, norm=norm, eps=eps)
    assert failed(checks) == set(), [one.message for one in checks.values()]
    pgd = pgd_robust(robust_model, digits.images, digits.labels, eps=eps, norm=norm, num_steps=100)
    assert checks["random_noise"].expected == float(pgd.double().mean())
    assert checks["random_noise"].measured > checks["random_noise"].expected > 0.3
    assert checks["large_epsilon"].measured == 0
    assert checks["zero_gradients"].measured == 0
    assert checks["randomised"].measured == 0


def test_saturated_logits_fail(robust_model, digits, caplog):
    """With logits of many thousands, the cross entropy's gradient underflows to zero."""
    masked = Wrapped(robust_model, lambda logits: 1e4 * logits)
    with caplog.at_level(logging.WARNING, logger="dkl"):
        checks = check(masked, digits)
    assert {"zero_gradients", "random_noise"} <= failed(checks)
    assert checks["zero_gradients"].measured > 0.5
    assert any("zero_gradients failed" in message for message in caplog.messages)
    # The margin attack sees through it: Square finds nothing more.
    assert checks["square"].passed


def test_quantised_images_fail(robust_model, digits):
    masked = Wrapped(robust_model, see=Quantised.apply)
    checks = check(masked, digits, eps=0.15)
    assert {"zero_gradients", "random_noise", "large_epsilon", "square"} <= failed(checks)
    assert checks["zero_gradients"].measured == 1
    assert checks["large_epsilon"].measured > checks["large_epsilon"].expected
    assert checks["square"].measured > 0.05


def test_without_any_gradient_the_checks_still_come(robust_model, digits):
    """What an attack cannot do is a failed check, not an exception."""
    blind = Wrapped(robust_model, lambda logits: logits.detach())
    checks = check(blind, digits.take(20))
    assert {"random_noise", "more_steps", "large_epsilon", "square"} <= failed(checks)
    assert checks["more_steps"].measured is None
    assert "could not be run" in checks["more_steps"].message
    assert checks["zero_gradients"].measured == 1
    assert checks["randomised"].passed


def test_random_and_probability_outputs_fail(robust_model, digits):
    noisy = Wrapped(robust_model, lambda logits: logits + 0.1 * torch.randn_like(logits))
    assert "randomised" in failed(check(noisy, digits.take(20)))
    soft = Wrapped(robust_model, lambda logits: logits.softmax(1))
    checks = check(soft, digits.take(20))
    assert "probabilities" in failed(checks)
    assert "randomised" not in failed(checks)


def test_many_steps_that_gain_much_fail(robust_model, digits, monkeypatch):
    """An attack that needs its many steps has not converged."""
    monkeypatch.setattr(masking, "FEW_STEPS", 1)
    checks = check(robust_model, digits, eps=0.2)
    assert "more_steps" in failed(checks)
    assert checks["more_steps"].measured > 0.05


def test_flags_of_square_are_taken(robust_model, digits, monkeypatch):
    """Flags that Square has from the clean images stand for a run on what is left."""
    data = (robust_model, digits.images, digits.labels)
    whole = auto_attack(*data, eps=0.1, version="square").robust
    module = masking.MaskingAttacks
    monkeypatch.setattr(module, "square", lambda *_args: pytest.fail("Square ran again"))
    assert check(robust_model, digits, square=whole)["square"].passed
    nothing = torch.zeros_like(whole)
    checks = check(robust_model, digits, square=nothing)
    assert "square" in failed(checks)
    left = pgd_robust(*data, eps=0.1, num_steps=100)
    left &= pgd_robust(*data, eps=0.1, num_steps=100, objective="margin")
    assert checks["square"].measured == pytest.approx(float(left.double().mean()))


def test_checks_go_on_where_they_were_cut_short(robust_model, digits, tmp_path):
    straight = check(robust_model, digits.take(40), batch_size=20)
    seen = []

    def stop(state):
        seen.append(state.attack)
        if state.attack == "cw-100":
            raise KeyboardInterrupt

    options = {"batch_size": 20, "state_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        check(robust_model, digits.take(40), progress=stop, **options)
    assert {"noise", "pgd-10", "pgd-100", "gradients"} <= set(seen)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert check(robust_model, digits.take(40), **options) == straight
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    # A folder of other checks is no finding about the model.
    with pytest.raises(StateMismatchError):
        check(robust_model, digits.take(39), **options)


def test_surroundings_and_mode(robust_model, digits):
    model = copy.deepcopy(robust_model).train()
    state = torch.get_rng_state()
    check(model, digits.take(10))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, r"8/255\?"),
        ({"norm": "L1", "eps": 2.0}, "AutoAttack"),
        ({"square": torch.ones(3, dtype=torch.bool)}, r"\[100\]"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_make_no_sense(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        check(digits.model, digits, **settings)


def test_nan_logits_are_refused(digits):
    broken = Wrapped(digits.model, lambda logits: logits * torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        masking_checks(broken, digits.images, digits.labels, eps=0.1)
    assert predict_logits(digits.model, digits.images).isfinite().all()
