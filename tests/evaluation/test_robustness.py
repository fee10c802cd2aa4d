"""PGD, CW and the curve over the radius."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from dkl.evaluation import (
    StateMismatchError,
    auto_attack,
    epsilon_sweep,
    pgd_robust,
    predict_logits,
)
from dkl.evaluation.noise import SampleDraw


def run(problem, **settings):
    settings = {"eps": 0.1, "num_steps": 10, **settings}
    return pgd_robust(problem.model, problem.images, problem.labels, **settings)


def clean(problem):
    return predict_logits(problem.model, problem.images).argmax(1) == problem.labels


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", "25/255"), ("L2", 0.5)])
def test_flags_lie_between_clean_and_auto_attack(digits, objective, norm, eps):
    robust = run(digits, objective=objective, norm=norm, eps=eps, num_steps=20)
    strong = auto_attack(
        digits.model, digits.images, digits.labels, norm=norm, eps=eps, version="fast"
    )
    assert robust.dtype == torch.bool
    assert not (robust & ~clean(digits)).any()
    assert strong.robust.sum() <= robust.sum() < clean(digits).sum()
    assert (robust != strong.robust).sum() <= 5


def test_linear_models_have_an_exact_answer():
    """Two classes and a linear model: robust where the margin exceeds eps times the L1 norm."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    nn.init.normal_(model[1].weight, generator=generator)
    # Pixels away from 0 and 1, so that the range cuts nothing off.
    images = 0.3 + 0.4 * torch.rand(200, 1, 3, 3, generator=generator)
    model[1].bias = nn.Parameter(-(images.mean(0).flatten() @ model[1].weight.T).detach())
    logits = model(images).detach()
    labels = logits.argmax(1)
    difference = model[1].weight.detach()[0] - model[1].weight.detach()[1]
    margin = (logits[:, 0] - logits[:, 1]).abs()
    for norm, dual in (("Linf", difference.abs().sum()), ("L2", difference.norm())):
        # Half of the samples are nearer to the boundary than this.
        eps = (margin / dual).sort().values[99:101].mean().item()
        exact = margin > eps * dual
        assert exact.sum() == 100
        for objective in ("ce", "margin"):
            found = pgd_robust(
                model, images, labels, eps=eps, norm=norm, num_steps=30, objective=objective
            )
            assert torch.equal(found, exact)


def test_clean_mistakes_are_not_robust_even_without_effect(digits):
    assert torch.equal(run(digits, eps=1e-6), clean(digits))
    assert not clean(digits).all()


def test_finished_images_are_judged(digits, monkeypatch):
    """A success that leaves the ball is an error, not a number."""
    from dkl.attacks import PGDSettings

    monkeypatch.setattr(PGDSettings, "attack", lambda *_args: 1 - digits.images[:5])
    labels = digits.model(digits.images[:5]).argmax(1)
    with pytest.raises(ValueError, match="outside of the ball"):
        pgd_robust(digits.model, digits.images[:5], labels, eps=0.1)
    monkeypatch.setattr(PGDSettings, "attack", lambda *_args: digits.images[:5])
    assert pgd_robust(digits.model, digits.images[:5], labels, eps=0.1).all()


def test_restarts_only_take_away(digits):
    once = run(digits, num_steps=2)
    often = run(digits, num_steps=2, num_restarts=5)
    assert not (often & ~once).any()


def test_more_steps_break_more(digits):
    assert run(digits, num_steps=20).sum() < run(digits, num_steps=1).sum()


def test_flags_do_not_depend_on_the_batches(digits):
    whole = run(digits, eps=0.11, num_steps=3)
    assert torch.equal(run(digits, eps=0.11, num_steps=3, batch_size=7), whole)
    halves = [
        pgd_robust(
            digits.model,
            digits.images[part],
            digits.labels[part],
            eps=0.11,
            num_steps=3,
            sample_ids=torch.arange(100)[part],
        )
        for part in (slice(0, 37), slice(37, 100))
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_noise_belongs_to_samples():
    cpu = torch.device("cpu")
    ids = torch.tensor([4, 9, 2])
    draw, part = SampleDraw(0, ids, 0, cpu), SampleDraw(0, ids[1:], 0, cpu)
    first = draw(50)
    assert first.shape == (3, 50)
    assert 0 <= first.min() < first.max() < 1
    assert torch.equal(first[1:], part(50))
    assert not torch.equal(draw(50), first)
    assert not torch.equal(SampleDraw(1, ids, 0, cpu)(50), first)
    assert not torch.equal(SampleDraw(0, ids, 1, cpu)(50), first)
    assert not torch.equal(first[0], first[1])


def test_surroundings_are_restored(digits):
    model = digits.model.train()
    state = torch.get_rng_state()
    run(digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_half_logits_are_attacked_in_float32(digits):
    class Half(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images).bfloat16()

    robust = pgd_robust(Half(digits.model), digits.images, digits.labels, eps=0.1, num_steps=10)
    assert (robust != run(digits)).sum() <= 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, r"8/255\?"),
        ({"eps": 0}, "positive"),
        ({"num_steps": 0}, "num_steps"),
        ({"step_size": 0.0}, "stand still"),
        ({"step_size": 2}, r"2/255\?"),
        ({"objective": "dlr"}, '"margin"'),
        ({"random_start": "normal"}, "gaussian"),
        ({"num_restarts": 0}, "num_restarts"),
        ({"num_restarts": 2, "random_start": "none"}, "random start"),
        ({"norm": "L1"}, "AutoAttack"),
        ({"norm": "L0"}, "L0"),
        ({"norm": "L2", "eps": 128}, "divided by 255"),
        ({"sample_ids": torch.arange(3)}, "100 integers"),
    ],
)
def test_settings_that_make_no_sense(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        run(digits, **settings)


def test_progress_and_every_stopping_point(digits, tmp_path):
    """An attack that was stopped goes on and attacks nothing twice."""
    states = []
    straight = run(digits, batch_size=25, progress=states.append)
    done = [state.num_done for state in states]
    assert done == [25, 50, 75, int(clean(digits).sum())]
    assert [state.attack for state in states] == ["pgd-10"] * 4
    assert states[-1].num_robust == int(straight.sum())
    for stop in range(1, 5):
        seen, folder = [], tmp_path / str(stop)

        def count(state, seen=seen, stop=stop):
            seen.append(state)
            if len(seen) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(digits, batch_size=25, state_dir=folder, progress=count)
        saved = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert len(saved) == stop + 2  # and the manifest and the clean flags
        assert torch.equal(run(digits, batch_size=25, state_dir=folder), straight)
        assert all(path.stat().st_mtime_ns == time for path, time in saved.items())


@pytest.mark.parametrize(
    "changed",
    [{"eps": 0.11}, {"num_steps": 11}, {"objective": "margin"}, {"seed": 1}, {"num_restarts": 2}],
)
def test_a_state_of_another_attack_is_refused(digits, tmp_path, changed):
    problem = digits.take(10)
    run(problem, state_dir=tmp_path)
    with pytest.raises(StateMismatchError, match=next(iter(changed))):
        run(problem, state_dir=tmp_path, **changed)
    with torch.no_grad():
        problem.model[1].bias[0] += 1
    with pytest.raises(StateMismatchError, match="weights"):
        run(problem, state_dir=tmp_path)


@pytest.mark.parametrize("attack", ["pgd", "cw", "auto_attack_fast"])
def test_sweep_never_rises_and_keeps_the_order(digits, attack):
    problem = digits.take(40)
    epsilons = [0.15, 0.0, "0.05", 0.1]
    sweep = epsilon_sweep(
        problem.model, problem.images, problem.labels, epsilons, attack=attack, batch_size=16
    )
    assert sweep.epsilons == (0.15, 0.0, 0.05, 0.1)
    assert torch.equal(sweep.robust[1], clean(problem))
    order = [1, 2, 3, 0]
    for smaller, larger in pairwise(order):
        assert not (sweep.robust[larger] & ~sweep.robust[smaller]).any()
    accuracies = sweep.robust_accuracy
    assert accuracies[1] > accuracies[3] > accuracies[0]
    assert accuracies == tuple(sweep.robust.double().mean(1).tolist())


def test_sweep_agrees_with_single_evaluations_but_for_what_is_known_broken(digits):
    sweep = epsilon_sweep(digits.model, digits.images, digits.labels, [0.05, 0.1], num_steps=10)
    small, large = run(digits, eps=0.05), run(digits, eps=0.1)
    assert torch.equal(sweep.robust[0], small)
    assert torch.equal(sweep.robust[1], small & large)


def test_sweep_attacks_only_survivors(digits, monkeypatch):
    import dkl.evaluation.sweep as module

    attacked = []
    original = module.pgd_robust

    def counted(model, images, labels, **settings):
        attacked.append(len(images))
        return original(model, images, labels, **settings)

    monkeypatch.setattr(module, "pgd_robust", counted)
    sweep = epsilon_sweep(digits.model, digits.images, digits.labels, [0.1, 0.05, 0.9, 0.95])
    assert attacked == [
        int(clean(digits).sum()),
        int(sweep.robust[1].sum()),
        int(sweep.robust[0].sum()),
    ]
    assert sweep.robust_accuracy[2:] == (0.0, 0.0)


def test_sweep_takes_what_is_known(digits, monkeypatch):
    """Flags that are known are not found again, and count at every larger radius."""
    import dkl.evaluation.sweep as module

    attacked = []
    original = module.pgd_robust

    def noted(model, images, labels, **settings):
        attacked.append(settings["eps"])
        return original(model, images, labels, **settings)

    data = (digits.model, digits.images, digits.labels)
    whole = epsilon_sweep(*data, [0.0, 0.05, 0.1, 0.15], num_steps=5)
    monkeypatch.setattr(module, "pgd_robust", noted)
    flags = dict(zip(whole.epsilons, whole.robust, strict=True))
    known = {radius: flags[radius] for radius in (0.0, 0.05, 0.1)}
    last = epsilon_sweep(*data, [0.15], num_steps=5, known=known)
    assert torch.equal(last.robust[0], whole.robust[3])
    assert attacked == [0.15]
    # A stronger attack's flags at one radius: what it broke stays broken.
    nothing = torch.zeros(100, dtype=torch.bool)
    strong = epsilon_sweep(*data, [0.05, 0.1, 0.15], num_steps=5, known={0.1: nothing})
    assert torch.equal(strong.robust[0], whole.robust[1])
    assert not strong.robust[1:].any()
    with pytest.raises(ValueError, match=r"\[100\]"):
        epsilon_sweep(*data, [0.1], known={0.1: nothing[:3]})


@pytest.mark.parametrize("attack", ["pgd", "auto_attack_fast"])
@pytest.mark.usefixtures("quick_attacks")
def test_sweep_goes_on_where_it_was_cut_short(digits, tmp_path, attack):
    problem = digits.take(40)
    data = (problem.model, problem.images, problem.labels, [0.05, 0.12])
    options = {"attack": attack, "batch_size": 10}
    straight = epsilon_sweep(*data, **options)
    seen = []

    def stop(state):
        seen.append(state)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        epsilon_sweep(*data, state_dir=tmp_path, progress=stop, **options)
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert torch.equal(epsilon_sweep(*data, state_dir=tmp_path, **options).robust, straight.robust)
    assert all(path.stat().st_mtime_ns == time for path, time in saved.items())
    assert {path.name for path in tmp_path.iterdir()} == {"eps_0.05", "eps_0.12"}


def test_steps_of_a_sweep_follow_the_radius(digits):
    data = (digits.model, digits.images, digits.labels)
    sweep = epsilon_sweep(*data, [0.05, 0.1], num_steps=3, relative_step=0.5)
    small = run(digits, eps=0.05, num_steps=3, step_size=0.025)
    large = run(digits, eps=0.1, num_steps=3, step_size=0.05)
    assert torch.equal(sweep.robust, torch.stack([small, small & large]))
    assert not torch.equal(sweep.robust, epsilon_sweep(*data, [0.05, 0.1], num_steps=3).robust)


@pytest.mark.usefixtures("quick_attacks")
def test_sweep_under_l1_is_for_auto_attack(digits):
    problem = digits.take(30)
    data = (problem.model, problem.images, problem.labels, [1.0, 3.0])
    sweep = epsilon_sweep(*data, norm="L1", attack="auto_attack_fast")
    assert sweep.robust_accuracy[0] > sweep.robust_accuracy[1]
    with pytest.raises(ValueError, match="AutoAttack"):
        epsilon_sweep(*data, norm="L1")


def test_sweep_settings_that_make_no_sense(digits):
    data = (digits.model, digits.images, digits.labels)
    with pytest.raises(ValueError, match="relative_step"):
        epsilon_sweep(*data, [0.1], relative_step=0.0)
    with pytest.raises(ValueError, match="chooses its own steps"):
        epsilon_sweep(*data, [0.1], attack="auto_attack_fast", relative_step=0.2)
    with pytest.raises(ValueError, match="at least one radius"):
        epsilon_sweep(*data, [])
    with pytest.raises(ValueError, match=r"8/255\?"):
        epsilon_sweep(*data, [0.1, 8])
    with pytest.raises(ValueError, match="auto_attack_fast"):
        epsilon_sweep(*data, [0.1], attack="fab")
    with pytest.raises(ValueError, match="chooses its own steps"):
        epsilon_sweep(*data, [0.1], attack="auto_attack", num_steps=5)
