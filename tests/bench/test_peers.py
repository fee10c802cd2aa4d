import pytest
import torch
import torch.nn.functional as F

from dkl import ikl_loss
from dkl.bench.peers import (
    EXPANDED,
    KL,
    KL_COMPILED,
    KL_LIGER,
    PAIRWISE,
    eager_kl,
    find_loss,
    liger_losses,
    method_names,
)

SHAPES = [(1, 1), (3, 2), (5, 17), (4, 100)]


def loss_and_gradients(loss, input_NC, target_NC):
    pair = [x.clone().requires_grad_() for x in (input_NC, target_NC)]
    value = loss(*pair)
    gradients = torch.autograd.grad(value, pair, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [PAIRWISE, EXPANDED, "ikl, auto"])
def test_forms_of_ikl_are_the_same_loss(method, shape):
    generator = torch.Generator().manual_seed(shape[1])
    logits = [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    found = loss_and_gradients(find_loss(method), *logits)
    expected = loss_and_gradients(lambda n, m: ikl_loss(n, m, backend="reference"), *logits)
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-10, atol=1e-12)


def test_the_baseline_is_kl():
    input_NC, target_NC = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    target_probs = F.softmax(target_NC, 1)
    by_hand = (target_probs * (target_probs.log() - F.log_softmax(input_NC, 1))).sum() / 6
    torch.testing.assert_close(eager_kl(input_NC, target_NC), by_hand)
    assert find_loss(KL) is eager_kl


def names(shape, **changes):
    options = {
        "backends": ("auto", "reference"),
        "device": "cpu",
        "item_size": 4,
        "target_grad": False,
        "compile": True,
    }
    return method_names(shape, **{**options, **changes})


def test_methods_of_a_case():
    assert names((128, 10)) == [
        KL,
        KL_COMPILED,
        PAIRWISE,
        EXPANDED,
        "ikl, auto",
        "ikl, reference",
    ]
    assert KL_COMPILED not in names((128, 10), compile=False)


@pytest.mark.parametrize(
    ("shape", "item_size", "fits"),
    [
        ((64, 1000), 4, True),
        ((64, 1000), 8, False),
        ((512, 1000), 4, False),
        ((1, 32000), 4, False),
    ],
)
def test_the_pairwise_form_is_measured_where_it_fits(shape, item_size, fits):
    assert (PAIRWISE in names(shape, item_size=item_size)) == fits


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="no benchmark method 'kl, magic'"):
        find_loss("kl, magic")
    with pytest.raises(ValueError, match="backend"):
        find_loss("ikl, magic")(torch.zeros(1, 2), torch.zeros(1, 2))


def test_liger_is_optional_and_its_conventions_are_met(monkeypatch, tmp_path):
    monkeypatch.setattr("dkl.bench.peers.find_spec", lambda name: None)
    assert liger_losses() == {}
    with pytest.raises(ValueError, match=KL_LIGER):
        find_loss(KL_LIGER)
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    # Stand-ins with the packages' argument conventions: log-probabilities in, KL's target not.
    (package / "kl_div.py").write_text(
        "import torch\n\nclass LigerKLDIVLoss(torch.nn.KLDivLoss):\n"
        "    def __init__(self, reduction):\n        super().__init__(reduction=reduction)\n"
    )
    (package / "jsd.py").write_text(
        "class LigerJSD:\n    def __init__(self, beta):\n        self.beta = beta\n"
        "    def __call__(self, log_q, log_p):\n"
        "        m = (log_q.exp() + log_p.exp()) / 2\n"
        "        kl = [(x.exp() * (x - m.log())).sum() for x in (log_q, log_p)]\n"
        "        return self.beta * sum(kl) / len(log_q)\n"
    )
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    from dkl import jsd_loss

    input_NC, target_NC = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    kl, jsd = liger_losses().values()
    torch.testing.assert_close(kl(input_NC, target_NC), eager_kl(input_NC, target_NC))
    torch.testing.assert_close(jsd(input_NC, target_NC), jsd_loss(input_NC, target_NC))
    assert KL_LIGER in names((8, 8), device="cuda")
    assert KL_LIGER not in names((8, 8), device="cuda", target_grad=True)
    assert KL_LIGER not in names((8, 8))
