"""The guards around AutoAttack."""

import logging
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dkl.evaluation import AttackProgress, auto_attack
from dkl.evaluation.auto_attack_phases import plan_phases

MODULE = "dkl.evaluation.auto_attack"

pytestmark = pytest.mark.usefixtures("quick_attacks")


def run(problem, **settings):
    settings = {"eps": 0.1, "version": "fast", **settings}
    return auto_attack(problem.model, problem.images, problem.labels, **settings)


@pytest.fixture
def fake_attacks(monkeypatch):
    """Replace the package's attacks: (function of images and labels) -> adversarial images."""

    def install(attack):
        monkeypatch.setattr(sys.modules[MODULE], "build_attack", lambda *_a, **_k: attack)

    return install


class WithNorm(nn.Module):
    """A convolutional network with state that an evaluation must leave alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(36, 10)

    def forward(self, images):
        return self.head(self.drop(torch.relu(self.norm(self.conv(images)))).flatten(1))


class Wrapped(nn.Module):
    """Applies a function to the logits of another model."""

    def __init__(self, model, change):
        super().__init__()
        self.model = model
        self.change = change

    def forward(self, images):
        return self.change(self.model(images))


def test_records_and_result_agree(digits):
    problem = digits.take(40)
    result = run(problem, version="standard", eps=0.12, batch_size=16)
    names = [record.name for record in result.attacks]
    assert names == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [record.n_targets for record in result.attacks] == [None, 9, 9, None]
    assert [record.n_restarts for record in result.attacks] == [1, 1, 1, 1]
    left = result.clean_correct.clone()
    for record in result.attacks:
        assert record.num_attacked == int(left.sum())
        assert not (record.broken & ~left).any()
        left &= ~record.broken
        assert record.robust_accuracy == pytest.approx(left.double().mean().item())
        assert record.seconds >= 0
    assert torch.equal(left, result.robust)
    assert result.robust_accuracy == result.attacks[-1].robust_accuracy
    assert result.clean_accuracy == result.clean_correct.double().mean().item()
    assert (result.predictions[result.robust] == problem.labels[result.robust]).all()
    assert (result.predictions[~result.robust] != problem.labels[~result.robust]).all()
    assert result.standard
    assert result.notes == ()
    assert (result.version, result.norm, result.eps) == ("standard", "Linf", 0.12)
    assert (result.seed, result.batch_size, result.num_classes) == (0, 16, 10)
    assert result.adversarial is None


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "25/255"), ("L2", 0.5), ("L1", 2.0)])
def test_adversarial_images_prove_the_flags(digits, norm, eps):
    problem = digits.take(40)
    result = run(problem, eps=eps, norm=norm, return_adversarial=True)
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    sizes = (result.adversarial - problem.images).double().flatten(1).norm(order, dim=1)
    assert (sizes <= result.eps + (1e-6 if norm != "L1" else 1e-5)).all()
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1
    assert torch.equal(problem.model(result.adversarial).argmax(1), result.predictions)
    assert (sizes > 0).sum() == sum(int(record.broken.sum()) for record in result.attacks) > 0


def test_uint8_and_channels_last_and_int32_labels_change_nothing(digits):
    pixels = (digits.images[:20] * 255).round().to(torch.uint8)
    floats = pixels.float() / 255
    expected = auto_attack(digits.model, floats, digits.labels[:20], eps=0.1, version="fast")
    assert 0 < expected.robust.sum() < 20
    strided = floats.repeat(1, 3, 1, 1).to(memory_format=torch.channels_last)[:, :1]
    for images in (pixels, strided):
        result = auto_attack(
            digits.model, images, digits.labels[:20].int(), eps=0.1, version="fast"
        )
        assert torch.equal(result.robust, expected.robust)


@pytest.mark.parametrize(
    ("version", "num_classes", "names", "targets", "standard"),
    [
        ("standard", 2, ["apgd-ce", "fab", "square"], [None, None, None], False),
        ("standard", 3, ["apgd-ce", "fab", "square"], [None, None, None], False),
        ("standard", 4, ["apgd-ce", "apgd-t", "fab-t", "square"], [None, 3, 3, None], False),
        ("standard", 5, ["apgd-ce", "apgd-t", "fab-t", "square"], [None, 4, 4, None], False),
        ("standard", 9, ["apgd-ce", "apgd-t", "fab-t", "square"], [None, 8, 8, None], False),
        ("standard", 10, ["apgd-ce", "apgd-t", "fab-t", "square"], [None, 9, 9, None], True),
        ("standard", 100, ["apgd-ce", "apgd-t", "fab-t", "square"], [None, 9, 9, None], True),
        ("fast", 3, ["apgd-ce"], [None], False),
        ("fast", 5, ["apgd-ce", "apgd-t"], [None, 4], False),
        ("fast", 10, ["apgd-ce", "apgd-t"], [None, 9], True),
    ],
)
def test_class_rules(version, num_classes, names, targets, standard):
    plan = plan_phases(version, num_classes)
    assert [phase.name for phase in plan.phases] == names
    assert [phase.n_targets for phase in plan.phases] == targets
    assert plan.changed is not standard
    assert bool(plan.notes) is not standard


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5])
def test_few_classes_run_and_say_so(make_problem, caplog, num_classes):
    problem = make_problem(num_classes, 12)
    with caplog.at_level(logging.WARNING, logger="dkl"):
        result = run(problem, version="standard", eps=0.15)
    assert not result.standard
    assert f"{num_classes} classes" in result.notes[0]
    assert result.notes[0] in caplog.messages
    assert result.num_classes == num_classes


def test_fast_is_not_called_standard(digits):
    result = run(digits.take(4))
    assert not result.standard
    assert result.version == "fast"


def test_an_attack_without_samples_is_recorded(digits):
    result = run(digits.take(10), eps=0.9)
    assert result.robust_accuracy == 0
    assert result.attacks[1].num_attacked == 0
    wrong = (digits.model(digits.images[:10]).argmax(1) + 1) % 10
    hopeless = auto_attack(digits.model, digits.images[:10], wrong, eps=0.1, version="fast")
    assert not hopeless.clean_correct.any()
    assert not hopeless.robust.any()


def test_images_outside_of_the_ball_or_range_do_not_count(digits, fake_attacks, caplog):
    problem = digits.take(30)

    def too_far(images, labels):
        return (images + 0.4 * torch.where(images < 0.5, 1, -1)).clamp(0, 1)

    fake_attacks(too_far)
    with caplog.at_level(logging.WARNING, logger="dkl"):
        result = run(problem, eps=0.1)
    assert torch.equal(result.robust, result.clean_correct)
    assert any("outside of the ball" in note for note in result.notes)
    assert any("outside of the ball" in message for message in caplog.messages)
    assert (run(problem, eps=0.5).robust.sum() < result.robust.sum()).item()

    fake_attacks(lambda images, labels: images - 0.09)  # in the ball, below the range
    assert torch.equal(run(problem, eps=0.1).robust, result.clean_correct)
    fake_attacks(lambda images, labels: images * float("nan"))
    assert torch.equal(run(problem, eps=0.1).robust, result.clean_correct)


def test_a_claimed_success_is_judged_by_the_model(digits, fake_attacks):
    fake_attacks(lambda images, labels: images)
    result = run(digits.take(20))
    assert torch.equal(result.robust, result.clean_correct)


def test_nan_logits_on_adversarial_images_are_no_success_of_the_model(digits, fake_attacks):
    def nan_where_marked(logits, images):
        return torch.where((images[:, 0, 0, :1] == 0.05), torch.nan, logits)

    class Fragile(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return nan_where_marked(self.model(images), images)

    def mark(images, labels):
        marked = images.clone()
        marked[:, 0, 0, 0] = 0.05
        return marked

    fake_attacks(mark)
    result = auto_attack(
        Fragile(digits.model), digits.images[:20], digits.labels[:20], eps=0.1, version="fast"
    )
    assert result.clean_correct.any()
    assert not result.robust.any()
    assert any("NaN or infinite" in note for note in result.notes)


def test_surroundings_are_restored(digits):
    model = WithNorm().train()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    weight_grad = torch.ones_like(model.head.weight)
    model.head.weight.grad = weight_grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    def tracer(frame, event, arg):
        return None

    original = sys.gettrace()
    sys.settrace(tracer)
    try:
        labels = model.eval()(digits.images[:6]).argmax(1)
        model.train()
        model.norm.eval()
        auto_attack(model, digits.images[:6], labels, eps=0.05, version="standard")
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(original)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert model.head.weight.grad is weight_grad
    assert torch.equal(weight_grad, torch.ones_like(weight_grad))
    assert all(p.grad is None for p in model.parameters() if p is not model.head.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_surroundings_are_restored_after_an_error(digits):
    model = digits.model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def stop(_progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(digits.take(10), progress=stop)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_train_mode_is_not_attacked(digits):
    """A dropout that would change every prediction is off while the model is evaluated."""
    model = nn.Sequential(nn.Dropout(0.9), *digits.model).train()
    expected = run(digits.take(20))
    result = auto_attack(model, digits.images[:20], digits.labels[:20], eps=0.1, version="fast")
    assert torch.equal(result.robust, expected.robust)
    assert result.notes == ()


def test_autocast_is_off_and_half_logits_become_float(digits):
    problem = digits.take(10)
    expected = run(problem, version="standard")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(problem, version="standard").robust, expected.robust)
    half = Wrapped(digits.model, lambda logits: logits.bfloat16())
    result = auto_attack(half, problem.images, problem.labels, eps=0.1, version="standard")
    assert result.robust.shape == (10,)


@pytest.mark.filterwarnings("error")
def test_logits_that_share_memory_are_copied():
    """Square writes into the logits, which one value stands for in all columns here."""

    class Shared(nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3)).unsqueeze(1).expand(-1, 3)

    result = auto_attack(Shared(), torch.full((3, 1, 5, 5), 0.5), torch.zeros(3).int(), eps=0.1)
    assert result.robust.all()


def test_models_that_cannot_take_an_empty_batch():
    """Square asks for the logits of no images when every margin is exactly zero."""
    sizes = []

    class NoEmpty(nn.Module):
        def forward(self, images):
            if len(images) == 0:
                raise RuntimeError("an empty batch")
            sizes.append(len(images))
            return 0 * images.flatten(1)[:, :2]

    result = auto_attack(NoEmpty(), torch.full((3, 1, 5, 5), 0.5), torch.zeros(3).int(), eps=0.1)
    # A tie goes to the first class.
    assert result.robust.all()
    assert sizes[-1] == 3


def test_progress_counts_up(digits):
    seen: list[AttackProgress] = []
    result = run(digits.take(30), batch_size=10, progress=seen.append)
    first = [step for step in seen if step.attack == "apgd-ce"]
    assert [step.num_done for step in first] == [10, 20, first[-1].num_attacked]
    assert all(step.num_attacks == 2 and step.num_samples == 30 for step in seen)
    robust = [step.num_robust for step in seen]
    assert robust == sorted(robust, reverse=True)
    assert robust[-1] == int(result.robust.sum())


def test_seed_decides(digits):
    problem = digits.take(40)
    runs = [run(problem, seed=seed, return_adversarial=True).adversarial for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_missing_package_names_the_extra(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r'pip install "dkl\[robust\]"'):
        run(digits.take(2))


def test_other_version_of_the_package_is_noted(digits, monkeypatch):
    import pyautoattack

    monkeypatch.setattr(pyautoattack, "__version__", "0.3.0")
    result = run(digits.take(2))
    assert result.package_version == "0.3.0"
    assert any("tested is 0.2.0" in note for note in result.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: (logits, logits), "got a tuple"),
        (lambda logits: {"logits": logits}, "got a dict"),
        (lambda logits: logits[:, :, None], r"shape \[4, 10, 1\]"),
        (lambda logits: logits.argmax(1), r"shape \[4\]"),
        (lambda logits: logits * torch.nan, "4 of 4 clean images are NaN"),
        (lambda logits: logits[:, :1], "at least 2 classes"),
        (lambda logits: logits[:, :2], "the model has 2 logits"),
        (lambda logits: logits.detach(), "differentiably"),
    ],
)
def test_model_outputs_that_cannot_be_judged(digits, change, message):
    labels = torch.tensor([0, 1, 2, 3]) if message != "at least 2 classes" else torch.zeros(4).int()
    with pytest.raises(ValueError, match=message):
        auto_attack(
            Wrapped(digits.model, change), digits.images[:4], labels, eps=0.1, version="fast"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, r"8/255\?"),
        ({"eps": 1}, r"1/255\?"),
        ({"eps": "8"}, r"8/255\?"),
        ({"eps": 0}, "positive"),
        ({"eps": -0.1}, "at least 0"),
        ({"eps": "much"}, "8/255"),
        ({"norm": "L0"}, "L0"),
        ({"norm": "L2", "eps": 20}, r"divided by 255.*20/255"),
        ({"norm": "L1", "eps": 64}, "holds every image of 64 pixels"),
        ({"version": "plus"}, '"standard", "fast" or "square"'),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_sense(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        run(digits.take(2), **settings)


def test_large_radii_are_fine_under_l2(digits):
    assert run(digits.take(4), eps=3.0, norm="L2").robust_accuracy == 0


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("version", ["standard", "square"])
def test_tiny_images_have_no_square_under_l2_and_l1(norm, version):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images, labels = torch.rand(2, 1, 4, 4), torch.zeros(2).long()
    with pytest.raises(ValueError, match="at least 5 x 5"):
        auto_attack(model, images, labels, eps=0.1, norm=norm, version=version)


@pytest.mark.parametrize(
    ("version", "num_classes", "targets", "standard"),
    [
        ("standard", 3, [None, None, None], False),
        ("standard", 5, [None, 4, 4, None], False),
        ("standard", 8, [None, 5, 7, None], False),
        ("standard", 10, [None, 5, 9, None], True),
        ("fast", 8, [None, 5], True),
    ],
)
def test_class_rules_under_l1(version, num_classes, targets, standard):
    plan = plan_phases(version, num_classes, "L1")
    assert [phase.n_targets for phase in plan.phases] == targets
    assert plan.phases[0].n_restarts == 5
    assert [phase.shrinks_radius for phase in plan.phases] == [
        phase.name.startswith("apgd") for phase in plan.phases
    ]
    assert plan.changed is not standard


def test_square_alone_starts_from_the_clean_images(digits):
    problem = digits.take(40)
    result = run(problem, version="square", eps=0.15)
    assert [record.name for record in result.attacks] == ["square"]
    assert result.attacks[0].num_attacked == int(result.clean_correct.sum())
    assert 0 < result.robust.sum() < result.clean_correct.sum()
    assert not result.standard
    # That it breaks much says nothing about gradient attacks, which did not run.
    assert result.notes == ()


def test_square_needs_no_gradients(digits):
    blind = Wrapped(digits.model, lambda logits: logits.detach())
    problem = digits.take(20)
    result = auto_attack(blind, problem.images, problem.labels, eps=0.15, version="square")
    assert torch.equal(result.robust, run(problem, version="square", eps=0.15).robust)


def test_time_left_follows_the_pace():
    assert AttackProgress("a", 0, 1, 0, 9, 9, 9, 0.0).seconds_left is None
    assert AttackProgress("a", 0, 1, 9, 9, 3, 9, 5.0).seconds_left == 0
