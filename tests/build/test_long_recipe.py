"""What long recipes need beside a method: LAMB, mixup beside CutMix, BCE, their schedules."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import records, same_weights, small, use_few_digits
from torch import nn

from dkl.build import train_recipe
from dkl.build.objects import build_mix, build_optimizer, build_schedule
from dkl.config import AugmentSettings, Cosine, Lamb, RecipeError, load_recipe
from dkl.data import mixup_or_cutmix

MIXED = "data.augment={padding: 1, cutmix: 0.5, mixup: 0.5, mixup_alpha: 0.1}"
LAMB = "optimizer={kind: lamb, lr: 0.005}"
LONG = (LAMB, MIXED, "method.hard_loss=bce", "training.decay_batch_norm=false")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_digits(monkeypatch)


@pytest.mark.parametrize("name", ["digits_kd", "digits_ikl_kd"])
def test_a_long_recipe_in_small(name: str, tmp_path: Path) -> None:
    first, again, other = (tmp_path / part for part in ("first", "again", "other"))
    recipe = small(name, *LONG, "method.teacher.recipe=digits_natural")
    train_recipe(recipe, first)
    taught = ["method.teacher.recipe=null", f"method.teacher.run={first / 'teacher'}"]
    train_recipe(small(name, *LONG, *taught), again)
    assert same_weights(first, again)
    assert any("hard_bce" in str(row) for row in records(first))
    assert not any("hard_ce" in str(row) for row in records(first))
    plain = [change for change in LONG if change != MIXED]
    train_recipe(small(name, *plain, *taught), other)
    assert not same_weights(first, other)


def test_lamb_takes_the_steps_of_timm() -> None:
    lamb = pytest.importorskip("timm.optim.lamb").Lamb
    settings = Lamb(kind="lamb", lr=0.01, weight_decay=0.02)
    results = []
    for make in (
        build_optimizer(settings),
        partial(lamb, lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.02, max_grad_norm=1.0),
    ):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = make(layer.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        results.append(layer.weight.detach())
    assert torch.equal(*results)
    start = nn.Linear(3, 2)
    assert not torch.equal(results[0], start.weight)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim.lamb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dkl\[timm\]'"):
        build_optimizer(Lamb(kind="lamb", lr=0.01))


def test_settings_become_one_function_that_mixes() -> None:
    settings = AugmentSettings(padding=0, flip=False, cutmix=0.2, mixup=0.5, mixup_alpha=0.3)
    mix = build_mix(settings)
    assert isinstance(mix, partial)
    assert mix.func is mixup_or_cutmix
    assert mix.keywords == {"mixup_probability": 0.5, "cutmix_probability": 0.2, "alpha": 0.3}
    assert build_mix(AugmentSettings()) is None


@pytest.mark.parametrize(
    ("augment", "key", "message"),
    [
        ("{mixup: 0.6, cutmix: 0.5}", "data.augment.mixup", "together at most 1; got 0.6 and 0.5"),
        ("{mixup_alpha: 0.2}", "data.augment.mixup_alpha", "would be ignored"),
        ("{mixup: 0.5, mixup_alpha: 2}", "data.augment.mixup_alpha", "less than or equal to 1"),
    ],
)
def test_impossible_mixing_is_refused(augment: str, key: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits_kd", [f"data.augment={augment}"])
    found = [(name, text) for name, text in caught.value.problems if name.startswith(key)]
    assert found
    assert message in found[0][1]


REASONS = {
    "fashion_mnist_dkd_small": "tells one label from the other classes",
    "fashion_mnist_crd_small": "contrasts an image with memories of whole images",
    "fashion_mnist_gkl_kd_small": "the denominator of GKL with class weights needs plain labels",
    "fashion_mnist_mart_small": "has no form for mixed labels",
}


@pytest.mark.parametrize(
    "kind", ["kd", "jsd_kd", "dkd", "dist", "ikl_kd", "gkl_kd", "at", "fitnet", "rkd", "crd", "ofd",
             "reviewkd", "mart"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_which_methods_take_mixed_labels(kind: str, key: str) -> None:
    name = f"fashion_mnist_{kind}_small"
    override = f"data.augment={{padding: 2, {key}: 0.5}}"
    if name not in REASONS:
        assert load_recipe(name, [override]).data.augment is not None
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, [override])
    assert dict(caught.value.problems)[f"data.augment.{key}"].find(REASONS[name]) >= 0


def test_gkl_without_class_weights_takes_mixed_labels() -> None:
    overrides = ["data.augment={padding: 2, mixup: 0.5}", "method.class_weights=false"]
    assert load_recipe("fashion_mnist_gkl_kd_small", overrides).method.gamma >= 0


def test_a_cosine_after_its_warmup_is_the_published_one_of_imagenet_lt() -> None:
    settings = Cosine(kind="cosine", after_warmup=True, per_epoch=True, warmup_epochs=10)
    schedule = build_schedule(settings, 90)
    cosine = build_schedule(Cosine(kind="cosine", per_epoch=True), 80)
    for epoch in range(90):
        wanted = (epoch + 1) / 10 if epoch < 10 else cosine(epoch - 10)
        assert schedule(epoch) == schedule(epoch + 0.9) == pytest.approx(wanted)
    smooth = build_schedule(settings.model_copy(update={"per_epoch": False}), 90)
    assert (smooth(0), smooth(5), smooth(10), smooth(50)) == pytest.approx((0, 0.5, 1, 0.5))
    with pytest.raises(RecipeError, match="would be ignored: warmup_epochs is 0"):
        load_recipe("digits_kd", ["schedule={kind: cosine, after_warmup: true}"])
