import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkl.attacks import (
    PGDSettings,
    ThreatModel,
    attack_mode,
    cross_entropy_objective,
    margin_objective,
    pgd_attack,
)

LINF = ThreatModel("Linf", 0.1)
L2 = ThreatModel("L2", 0.5)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    ).to(dtype)
    with torch.no_grad():
        model[1].running_mean.uniform_(-0.1, 0.1)
        model[1].running_var.uniform_(0.05, 0.15)
        model[6].weight.mul_(10)
    return model


def make_batch(num_images=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(num_images, 3, 8, 8, generator=generator).to(dtype)
    return images, torch.randint(4, (num_images,), generator=generator)


def keyed_draw(indices, seed=0):
    """Uniform rows that depend on the sample and the call only."""
    calls = iter(range(1000))

    def draw(k):
        call = next(calls)
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed(seed + 1000 * call + index)
            rows.append(torch.rand(k, generator=generator))
        return torch.stack(rows)

    return draw


def assert_allowed(threat, adversarial, clean, slack=1e-6):
    order = float("inf") if threat.norm == "Linf" else 2
    lengths = torch.linalg.vector_norm((adversarial - clean).flatten(1), order, dim=1)
    assert (lengths <= threat.eps + slack).all()
    assert ((adversarial >= 0) & (adversarial <= 1)).all()


@pytest.mark.parametrize(
    "threat", [LINF, L2, ThreatModel("Linf", 0), ThreatModel("L2", 0)], ids=str
)
@pytest.mark.parametrize("random_start", ["none", "uniform", "gaussian"])
@pytest.mark.parametrize("batch_norm", ["eval", "train", "batch-stats"])
def test_stays_allowed_and_raises_the_objective(threat, random_start, batch_norm):
    model = make_model()
    images, labels = make_batch()
    before = images.clone()
    adversarial = pgd_attack(
        model,
        images,
        cross_entropy_objective(labels),
        threat=threat,
        num_steps=5,
        step_size=threat.eps / 2,
        random_start=random_start,
        batch_norm=batch_norm,
    )
    assert torch.equal(images, before)
    assert not adversarial.requires_grad
    assert_allowed(threat, adversarial, images)
    if threat.eps == 0:
        assert torch.equal(adversarial, images)
        return
    with attack_mode(model, "eval" if batch_norm == "eval" else "batch-stats"):
        clean_loss = F.cross_entropy(model(images), labels)
        assert F.cross_entropy(model(adversarial), labels) > clean_loss + 0.1


def test_equals_a_hand_written_sign_gradient_loop():
    model = make_model(torch.float64).eval()
    images, labels = make_batch(dtype=torch.float64)
    x = images.clone()
    for _ in range(7):
        x.requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        x = x.detach() + 0.03 * torch.sign(x.grad)
        x = torch.min(torch.max(x, images - 0.1), images + 0.1).clamp(0, 1)
    model.zero_grad()
    settings = PGDSettings(LINF, 7, 0.03)
    adversarial = settings.attack(model, images, cross_entropy_objective(labels))
    torch.testing.assert_close(adversarial, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_sum_mean_and_per_sample_objectives_agree(threat):
    model = make_model(torch.float64)
    images, labels = make_batch(dtype=torch.float64)
    results = [
        PGDSettings(threat, 4, 0.1).attack(
            model,
            images,
            lambda logits, reduction=reduction: F.cross_entropy(
                logits, labels, reduction=reduction
            ),
        )
        for reduction in ("none", "sum", "mean")
    ]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_linf_optimum_of_a_linear_model():
    torch.manual_seed(0)
    model = nn.Linear(20, 2).double()
    images, labels = torch.rand(8, 20).double(), torch.randint(2, (8,))
    rows = model.weight.detach()
    ascent = rows[1 - labels] - rows[labels]
    expected = (images + 0.1 * ascent.sign()).clamp(0, 1)
    for objective in (cross_entropy_objective(labels), margin_objective(labels)):
        for random_start in ("none", "uniform", "gaussian"):
            adversarial = pgd_attack(
                model,
                images,
                objective,
                threat=LINF,
                num_steps=5,
                step_size="51/255",
                random_start=random_start,
            )
            torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-12)


def test_l2_optimum_of_a_linear_model():
    torch.manual_seed(0)
    model = nn.Linear(20, 2).double()
    images = 0.4 + 0.2 * torch.rand(8, 20).double()
    labels = torch.randint(2, (8,))
    rows = model.weight.detach()
    ascent = rows[1 - labels] - rows[labels]
    # Radius 0.3 keeps every pixel inside [0, 1], so that the ball alone decides.
    expected = images + 0.3 * ascent / ascent.norm(dim=1, keepdim=True)
    for random_start, tolerance in (("none", 1e-12), ("uniform", 1e-6)):
        adversarial = pgd_attack(
            model,
            images,
            margin_objective(labels),
            threat=ThreatModel("L2", 0.3),
            num_steps=200,
            step_size=0.3,
            random_start=random_start,
        )
        torch.testing.assert_close(adversarial, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch_norm", ["eval", "train", "batch-stats"])
def test_one_forward_pass_per_step(batch_norm):
    model = make_model()
    images, labels = make_batch()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    PGDSettings(LINF, 6, 0.02, "uniform", batch_norm).attack(
        model, images, cross_entropy_objective(labels)
    )
    assert len(passes) == 6


def test_clean_logits_are_computed_once_and_closed_over():
    model = make_model()
    images, _ = make_batch()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    with attack_mode(model):
        clean_logits = model(images).detach()
        adversarial = PGDSettings(LINF, 4, 0.03, "gaussian").attack(
            model, images, lambda logits: (logits - clean_logits).square().sum(dim=1)
        )
    assert len(passes) == 5
    assert_allowed(LINF, adversarial, images)


def test_parameters_and_their_gradients_are_left_alone():
    model = make_model().train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.full_like(model[3].weight, 7.0)
    weights = [parameter.clone() for parameter in model.parameters()]
    images, labels = make_batch()
    PGDSettings(LINF, 3, 0.05).attack(model, images, cross_entropy_objective(labels))
    assert all(map(torch.equal, weights, model.parameters()))
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    assert (model[3].weight.grad == 7.0).all()
    assert all(p.grad is None for p in model.parameters() if p is not model[3].weight)
    assert model.training


@pytest.mark.parametrize("batch_norm", ["eval", "batch-stats"])
def test_modes_and_buffers_are_restored_when_the_objective_raises(batch_norm):
    model = make_model().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    images, _ = make_batch()

    def objective(logits):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), attack_mode(model, batch_norm):
        PGDSettings(LINF, 3, 0.05, "none", batch_norm).attack(model, images, objective)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model[1].track_running_stats
    assert all(map(torch.equal, buffers, model.buffers()))


def test_train_mode_counts_one_batch_norm_update_per_step():
    model = make_model()
    images, labels = make_batch()
    PGDSettings(LINF, 3, 0.05, "none", "train").attack(
        model, images, cross_entropy_objective(labels)
    )
    assert model[1].num_batches_tracked == 3


def test_batch_stats_finds_what_train_finds():
    images, labels = make_batch()
    results = [
        PGDSettings(LINF, 3, 0.05, "none", mode).attack(
            make_model(), images, cross_entropy_objective(labels)
        )
        for mode in ("train", "batch-stats", "eval")
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("random_start", ["uniform", "gaussian"])
def test_samples_do_not_depend_on_their_batch(threat, random_start):
    model = make_model(torch.float64)
    images, labels = make_batch(dtype=torch.float64)

    def attack(indices):
        return PGDSettings(threat, 4, 0.05, random_start).attack(
            model,
            images[indices],
            cross_entropy_objective(labels[indices]),
            keyed_draw(indices),
        )

    whole = attack([0, 1, 2, 3, 4, 5])
    for part in ([0, 1], [3], [5, 2, 4]):
        torch.testing.assert_close(attack(part), whole[part], rtol=0, atol=1e-9)


def test_without_draws_torchs_generator_decides():
    model = make_model()
    images, labels = make_batch()
    settings = PGDSettings(LINF, 1, 0.01, "uniform")
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(settings.attack(model, images, cross_entropy_objective(labels)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("random_start", ["none", "uniform", "gaussian"])
def test_dtype_and_memory_format_are_kept(dtype, threat, random_start):
    model = make_model(dtype).to(memory_format=torch.channels_last)
    images, labels = make_batch(dtype=dtype)
    settings = PGDSettings(threat, 2, 0.05, random_start)
    objective = cross_entropy_objective(labels)
    draw_indices = range(len(images))
    plain = settings.attack(model, images, objective, keyed_draw(draw_indices))
    last = settings.attack(
        model,
        images.to(memory_format=torch.channels_last),
        objective,
        keyed_draw(draw_indices),
    )
    assert plain.dtype == last.dtype == dtype
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_bfloat16_autocast(threat):
    model = make_model()
    images, labels = make_batch(16)
    settings = PGDSettings(threat, 5, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = settings.attack(model, images, cross_entropy_objective(labels))
    assert adversarial.dtype == torch.float32
    assert_allowed(threat, adversarial, images)
    model.eval()
    exact = settings.attack(model, images, cross_entropy_objective(labels))
    losses = [F.cross_entropy(model(x), labels).item() for x in (images, adversarial, exact)]
    assert losses[1] - losses[0] > 0.9 * (losses[2] - losses[0])


def test_works_inside_no_grad_and_on_images_that_require_grad():
    model = make_model()
    images, labels = make_batch()
    objective = cross_entropy_objective(labels)
    expected = PGDSettings(LINF, 2, 0.05).attack(model, images, objective)
    with torch.no_grad():
        assert torch.equal(PGDSettings(LINF, 2, 0.05).attack(model, images, objective), expected)
    images.requires_grad_(True)
    adversarial = PGDSettings(LINF, 2, 0.05).attack(model, images, objective)
    assert torch.equal(adversarial, expected)
    assert images.grad is None
    assert not adversarial.requires_grad


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_samples_without_gradient_stay_and_others_move(threat):
    images = torch.rand(4, 5)
    counts = torch.tensor([0.0, 1.0, 0.0, 1.0])
    adversarial = PGDSettings(threat, 3, 0.05).attack(
        nn.Linear(5, 3), images, lambda logits: logits[:, 0] * counts
    )
    assert torch.equal(adversarial[[0, 2]], images[[0, 2]])
    assert adversarial.isfinite().all()
    assert (adversarial[[1, 3]] != images[[1, 3]]).any(dim=1).all()


def test_empty_batch_without_forward_pass():
    def forbidden(images):
        raise AssertionError

    model = nn.Linear(3, 2)
    model.forward = forbidden
    labels = torch.zeros(0, dtype=torch.int64)
    adversarial = PGDSettings(LINF, 2, 0.1).attack(
        model, torch.zeros(0, 3), cross_entropy_objective(labels)
    )
    assert adversarial.shape == (0, 3)


def test_margin_against_its_definition():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 6), torch.randint(6, (20,))
    values = margin_objective(labels)(logits)
    for row, label, value in zip(logits, labels, values, strict=True):
        others = [row[j].item() for j in range(6) if j != label]
        assert value.item() == pytest.approx(max(others) - row[label].item(), abs=1e-6)
    assert torch.equal(values > 0, logits.argmax(dim=1) != labels)
    with pytest.raises(ValueError, match="at least two classes"):
        margin_objective(torch.tensor([0]))(torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps has to be a whole number, at least 1; got 0"),
        ({"num_steps": 2.0}, "num_steps has to be a whole number"),
        ({"step_size": 2}, r"step_size has to be in \[0, 1\].*Did you mean 2/255\?"),
        ({"step_size": "fast"}, "expected a finite number"),
        ({"step_size": -0.1}, "step_size has to be at least 0"),
        ({"random_start": True}, "random_start has to be"),
        ({"batch_norm": "frozen"}, "batch_norm has to be"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    settings = {"threat": LINF, "num_steps": 2, "step_size": 0.05}
    with pytest.raises(ValueError, match=message):
        PGDSettings(**{**settings, **changes})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), "Divide uint8 images by 255"),
        (torch.zeros(3), r"shape \[N, ...\]"),
        (torch.tensor([[0.0, 255.0]]), "got values from 0 to 255"),
        (torch.tensor([[-1.8, 0.5]]), "Put normalisation inside the model"),
        (torch.tensor([[float("nan"), 0.5]]), r"images have to be in \[0, 1\]"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        PGDSettings(LINF, 1, 0.05).attack(nn.Linear(2, 2), images, lambda logits: logits.sum())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda logits: logits, r"return 4 values, one per image.*got shape \(4, 2\)"),
        (lambda logits: logits.detach().sum(), "does not depend on the images"),
        (lambda logits: torch.ones(4, requires_grad=True) * 2, "does not depend on the images"),
    ],
)
def test_bad_objectives_are_refused(objective, message):
    with pytest.raises(ValueError, match=message):
        PGDSettings(LINF, 1, 0.05).attack(nn.Linear(3, 2), torch.rand(4, 3), objective)


def test_models_that_return_no_tensor_are_refused():
    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(ValueError, match=r"returns logits as a tensor; got tuple"):
        PGDSettings(LINF, 1, 0.05).attack(Pair(), torch.rand(2, 3), lambda logits: logits.sum())


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        PGDSettings(LINF, 1, 0.05).attack(nn.Linear(3, 2), torch.rand(2, 3), torch.sum)
