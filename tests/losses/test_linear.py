"""The chunked loss of two linear heads is the dense loss of their logits, whatever the chunks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dkl.losses import decoupled_kl_loss
from dkl.losses import linear as linear_module
from dkl.losses.chunks import CountedRows, rows_per_chunk
from dkl.losses.linear import linear_ikl_loss
from tests.reference import decoupled_kl_reference, max_relative_error

N, H, V = 7, 5, 11
NAMES = (
    "input_hidden",
    "input_weight",
    "input_bias",
    "target_hidden",
    "target_weight",
    "target_bias",
)
MASK = torch.tensor([True, False, True, True, False, True, True])
LABELS = torch.tensor([2, 3, -100, 2, 1, -100, 0])

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no bias": {"without": ("input_bias", "target_bias")},
    "one bias": {"without": ("target_bias",)},
    "no asymmetry broken": {"break_asymmetry": False},
    "weights of terms": {"mse_weight": 3.0, "ce_weight": 0.25},
    "no mse": {"mse_weight": 0.0},
    "temperatures": {"temperature": 2.0, "weight_temperature": 5.0},
    "gamma": {"gamma": 0.4},
    "gamma 0": {"gamma": 0.0},
    "weights": {"normalization": "weights"},
    "weights, gamma": {"normalization": "weights", "gamma": 0.4, "weight_temperature": 3.0},
    "weights, denominator": {"normalization": "weights", "gamma": 0.4, "denominator": 2.5},
    "weights, num_items": {"normalization": "weights", "num_items": 9.0},
    "weights, mask": {"normalization": "weights", "gamma": 0.3, "mask": MASK},
    "scale": {"input_logit_scale": 0.3, "target_logit_scale": 1.7},
    "softcap": {"input_softcap": 2.0, "target_softcap": 3.0},
    "scale, softcap": {"input_softcap": 1.0, "input_logit_scale": 0.5, "target_logit_scale": 2.0},
    "mask": {"mask": MASK},
    "labels": {"labels": LABELS},
    "labels, ignore_index": {"labels": LABELS, "ignore_index": 2},
    "mask, labels": {"mask": MASK, "labels": LABELS},
    "num_items": {"num_items": 3.5},
    "num_items tensor": {"num_items": torch.tensor(3.5), "mask": MASK},
}
HEAD_OPTIONS = ("input_softcap", "target_softcap", "input_logit_scale", "target_logit_scale")


def make_tensors(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (N,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, H), (V, H), (V,), (*rows, H + 1), (V, H + 1), (V,)]
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor, scale: float, cap: Any) -> Tensor:
    logits = scale * (hidden.reshape(-1, hidden.shape[-1]) @ weight.T + bias)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def naive_loss(tensors: list[Tensor], case: dict[str, Any], **more: Any) -> Tensor:
    options = {**case, **more}
    without = options.pop("without", ())
    caps = [options.pop(name, None) for name in HEAD_OPTIONS[:2]]
    scales = [options.pop(name, 1.0) for name in HEAD_OPTIONS[2:]]
    tensors = [0 * x if n in without else x for n, x in zip(NAMES, tensors, strict=True)]
    for name in ("mask", "labels"):
        if name in options:
            options[name] = options[name].reshape(-1)
    return decoupled_kl_reference(
        logits_of(*tensors[:3], scales[0], caps[0]),
        logits_of(*tensors[3:], scales[1], caps[1]),
        **options,
    )


def our_loss(tensors: list[Tensor], case: dict[str, Any], **more: Any) -> Any:
    options = {**case, **more}
    without = options.pop("without", ())
    arguments = dict(zip(NAMES, tensors, strict=True))
    return linear_ikl_loss(**{k: v for k, v in arguments.items() if k not in without}, **options)


def value_and_gradients(
    loss: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor | float = 1.0
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(leaves)
    upstream = torch.as_tensor(upstream, dtype=value.dtype).expand(value.shape)
    gradients = torch.autograd.grad(value, leaves, upstream, materialize_grads=True)
    return [value.detach(), *gradients]


def assert_same(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for our, other in zip(ours, expected, strict=True):
        assert our.shape == other.shape
        assert max_relative_error(our, other) <= tolerance


@pytest.mark.parametrize("chunk_size", [1, 3, N, None])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_definition(case: dict[str, Any], chunk_size: int | None) -> None:
    tensors = make_tensors()
    expected = value_and_gradients(lambda t: naive_loss(t, case), tensors, 2.5)
    ours = value_and_gradients(lambda t: our_loss(t, case, chunk_size=chunk_size), tensors, 2.5)
    assert_same(ours, expected, 1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("case", ["defaults", "scale, softcap", "weights, mask", "mask, labels"])
def test_reductions(case: str, reduction: str) -> None:
    tensors, upstream = make_tensors(), torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    more = {"reduction": reduction}
    expected = value_and_gradients(
        lambda t: naive_loss(t, CASES[case], **more),
        tensors,
        upstream if reduction == "none" else 2,
    )
    for chunk_size in (2, None):
        ours = value_and_gradients(
            lambda t, size=chunk_size: our_loss(t, CASES[case], chunk_size=size, **more),
            tensors,
            upstream if reduction == "none" else 2,
        )
        assert_same(ours, expected, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sequences_have_one_row_per_token(reduction: str) -> None:
    rows, case = (2, 3), {"mask": MASK[:6].reshape(2, 3), "labels": LABELS[:6].reshape(2, 3)}
    tensors = make_tensors(rows=rows)
    flat = [x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x for x in tensors]
    ours = value_and_gradients(lambda t: our_loss(t, case, reduction=reduction), tensors)
    expected = value_and_gradients(lambda t: naive_loss(t, case, reduction=reduction), flat)
    assert ours[0].shape == (rows if reduction == "none" else ())
    assert_same([x.reshape(y.shape) for x, y in zip(ours, expected, strict=True)], expected, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalization", ["rows", "weights"])
def test_parts(normalization: str, reduction: str) -> None:
    tensors = [x.requires_grad_() for x in make_tensors()]
    options = {"normalization": normalization, "gamma": 0.5, "mask": MASK, "reduction": reduction}
    loss, parts = our_loss(tensors, options, return_parts=True, mse_weight=2.0, ce_weight=3.0)
    terms = [naive_loss(tensors, options, mse_weight=a, ce_weight=1.0 - a) for a in (1.0, 0.0)]
    torch.testing.assert_close(list(parts), [x.detach() for x in terms], rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, 2.0 * terms[0] + 3.0 * terms[1], rtol=1e-12, atol=0)
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("options", [{}, {"normalization": "weights", "gamma": 0.5}])
def test_rows_of_a_device_are_dropped_without_picking(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make_tensors()
    expected = value_and_gradients(lambda t: our_loss(t, options, mask=MASK), tensors)
    monkeypatch.setattr(
        linear_module, "choose_rows", lambda *_: CountedRows(torch.Size([N]), MASK, None)
    )
    for index in (0, 3):
        tensors[index][~MASK] = torch.nan
    ours = value_and_gradients(lambda t: our_loss(t, options, chunk_size=3), tensors)
    assert_same(ours, expected, 1e-12)
    rows = our_loss(tensors, options, reduction="none")
    assert rows[~MASK].eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_do_not_count_reach_nothing(reduction: str, backend: str, bad: float) -> None:
    tensors = make_tensors()
    kept = [x[MASK] if i in (0, 3) else x for i, x in enumerate(tensors)]
    expected = value_and_gradients(lambda t: our_loss(t, {}).sum(), kept)
    for index in (0, 3):
        tensors[index][~MASK] = bad
    options = {"mask": MASK, "reduction": reduction, "backend": backend, "chunk_size": 2}
    upstream = 1.0 if reduction == "mean" else 1.0 / int(MASK.sum())
    ours = value_and_gradients(lambda t: our_loss(t, options), tensors, upstream)
    for index in (1, 4):
        assert ours[index][~MASK].eq(0).all()
        ours[index] = ours[index][MASK]
    assert_same(ours[1:], expected[1:], 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("how", ["no rows", "mask"])
@pytest.mark.parametrize("normalization", ["rows", "weights"])
def test_nothing_counts(normalization: str, how: str, reduction: str) -> None:
    tensors = make_tensors(rows=(0,) if how == "no rows" else (N,))
    mask = torch.zeros(tensors[0].shape[0], dtype=torch.bool)
    options = {"mask": mask, "normalization": normalization, "gamma": 0.5, "reduction": reduction}
    for value in value_and_gradients(lambda t: our_loss(t, options), tensors):
        assert value.eq(0).all()


@pytest.mark.parametrize("needed", range(6))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_only_where_required(reduction: str, needed: int) -> None:
    tensors = make_tensors()
    expected = value_and_gradients(lambda t: naive_loss(t, {}, reduction=reduction), tensors)
    tensors[needed].requires_grad_()
    loss = our_loss(tensors, {}, reduction=reduction, chunk_size=4)
    loss.sum().backward()
    for index, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (index == needed)
    assert max_relative_error(tensors[needed].grad, expected[1 + needed]) <= 1e-12


def test_no_gradient_without_grad_mode() -> None:
    tensors = [x.requires_grad_() for x in make_tensors()]
    with torch.no_grad(), Recorder() as recorder:
        loss = our_loss(tensors, {})
    assert not loss.requires_grad
    assert (V, H) not in recorder.shapes  # no gradient of the weight was made


def test_one_weight_for_both_heads() -> None:
    hidden, weight, _, other, *_ = make_tensors()
    other = other[:, :H]

    def tied(t: list[Tensor]) -> Tensor:
        return linear_ikl_loss(t[0], t[1], t[2], t[1], chunk_size=2)

    def naive(t: list[Tensor]) -> Tensor:
        return decoupled_kl_reference(t[0] @ t[1].T, t[2] @ t[1].T)

    tensors = [hidden, weight, other]
    assert_same(value_and_gradients(tied, tensors), value_and_gradients(naive, tensors), 1e-12)


# The backward pass.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 2.5])
def test_retained_graph_gives_the_same_again(upstream: float, reduction: str) -> None:
    tensors = [x.requires_grad_() for x in make_tensors()]
    loss = upstream * our_loss(tensors, {}, reduction=reduction).sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    copies = [x.clone() for x in first]
    for count in (1, 2, 3):
        loss.backward(retain_graph=True)
        for tensor, copy in zip(tensors, copies, strict=True):
            torch.testing.assert_close(tensor.grad, count * copy)
    assert all(torch.equal(x, y) for x, y in zip(first, copies, strict=True))


def test_gradcheck() -> None:
    hidden, weight, bias, *target = make_tensors()
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    for reduction in ("mean", "none"):
        options = {"chunk_size": 3, "input_softcap": 4.0, "reduction": reduction}
        assert torch.autograd.gradcheck(
            lambda *t, kw=options: our_loss([*t, *target], kw), inputs, fast_mode=True
        )


def test_target_gradcheck() -> None:
    *inputs, hidden, weight, bias = make_tensors()
    # gamma = 0 makes the weights, and ce_weight = 0 the soft label, no function of the target.
    options = {"chunk_size": 3, "gamma": 0.0, "ce_weight": 0.0, "target_softcap": 2.0}
    targets = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: our_loss([*inputs, *t], options), targets)


def test_second_derivative_needs_the_reference() -> None:
    tensors = [x.requires_grad_() for x in make_tensors()]
    loss = our_loss(tensors, {})
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(loss, tensors[0], create_graph=True)
    hidden = tensors[0]
    rest = [x.detach() for x in tensors[1:]]
    assert torch.autograd.gradgradcheck(
        lambda h: our_loss([h, *rest], {"backend": "reference"}), hidden
    )


def test_micro_batches_add_up() -> None:
    options = {"normalization": "weights", "gamma": 0.5, "labels": LABELS, "mse_weight": 4.0}
    tensors = make_tensors()
    expected = value_and_gradients(lambda t: our_loss(t, options), tensors)
    target = logits_of(*tensors[3:], 1.0, None)
    counted = LABELS != -100
    denominator = (target.softmax(1) ** 0.5).sum(1).square()[counted].sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        part = [x[rows] if i in (0, 3) else x for i, x in enumerate(leaves)]
        loss = our_loss(
            part,
            options | {"labels": LABELS[rows]},
            num_items=counted.sum(),
            denominator=denominator,
        )
        loss.backward()
        total += loss.detach()
    assert_same([total, *(x.grad for x in leaves)], expected, 1e-12)


# Precision.


def exact_dense(tensors: list[Tensor], **options: Any) -> Tensor:
    logits = [logits_of(*x, 1.0, None) for x in (tensors[:3], tensors[3:])]
    return decoupled_kl_loss(*logits, backend="reference", **options)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes(reduction: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors = make_tensors(dtype)
    expected = value_and_gradients(
        lambda t: exact_dense(t, reduction=reduction), [x.double() for x in tensors]
    )
    ours = value_and_gradients(lambda t: our_loss(t, {"reduction": reduction}), tensors)
    assert ours[0].dtype == torch.float32
    assert all(x.dtype == dtype for x in ours[1:])
    assert_same(ours, expected, tolerance)


def test_heads_of_different_dtypes() -> None:
    tensors = make_tensors()
    mixed = [x.to(torch.float32 if i < 3 else torch.bfloat16) for i, x in enumerate(tensors)]
    expected = value_and_gradients(exact_dense, [x.double() for x in mixed])
    ours = value_and_gradients(lambda t: our_loss(t, {}), mixed)
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in mixed]
    assert_same(ours, expected, 0.03)


def test_bfloat16_weights_sum_up_in_float32() -> None:
    """A sum of 1024 rounded numbers that all have one sign would stop growing in bfloat16."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, dtype=torch.bfloat16).requires_grad_()
    target = torch.tensor([[3.0], [0.0], [0.0], [0.0]], dtype=torch.bfloat16)
    loss = linear_ikl_loss(hidden, weight, hidden, target, mse_weight=0.0, chunk_size=1)
    loss.backward()
    expected = 0.25 - target.double().softmax(0)
    assert max_relative_error(weight.grad, expected) < 0.01


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_wait_for_the_loss_scale(reduction: str) -> None:
    tensors, num_items = make_tensors(torch.float16), 2.0**24
    exact = [x.double() for x in tensors]
    expected = value_and_gradients(lambda t: exact_dense(t, reduction="sum"), exact)
    if reduction == "mean":
        upstream: Any = 2.0**20
        ours = value_and_gradients(
            lambda t: our_loss(t, {"num_items": num_items}), tensors, upstream
        )
    else:
        upstream = torch.full((N,), 2.0**-4)
        ours = value_and_gradients(lambda t: our_loss(t, {"reduction": "none"}), tensors, upstream)
    assert_same(ours[1:], [x / 16 for x in expected[1:]], 0.004)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_that_of_linear(reduction: str) -> None:
    tensors = make_tensors(torch.float32)

    def dense(t: list[Tensor]) -> Tensor:
        return decoupled_kl_loss(
            F.linear(t[0], t[1], t[2]), F.linear(t[3], t[4], t[5]), reduction=reduction
        )

    def ours(t: list[Tensor]) -> Tensor:
        loss: Tensor = our_loss(t, {"reduction": reduction, "chunk_size": 3})
        return loss

    exact = value_and_gradients(dense, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = value_and_gradients(dense, tensors), value_and_gradients(ours, tensors)
    assert all(x.dtype == torch.float32 for x in found)
    # The logits are the same bfloat16 numbers; float32 products would miss them by far more.
    assert (
        max_relative_error(found[0], expected[0]) < 1e-5 < max_relative_error(exact[0], expected[0])
    )
    assert_same(found, expected, 0.03)


def test_backward_may_leave_autocast() -> None:
    tensors = [x.requires_grad_() for x in make_tensors(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = our_loss(tensors, {"reduction": "none"})
        other = our_loss(tensors, {"reduction": "sum"})
    gradients = [torch.autograd.grad(x.sum(), tensors) for x in (inside, other)]
    assert_same(list(gradients[0]), list(gradients[1]), 0.01)


# Memory.


class Recorder(TorchDispatchMode):
    """Records the shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
                self.largest = max(self.largest, value.numel())
        return found


def largest_tensor(rows: int, vocabulary: int, **options: Any) -> int:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 4), (vocabulary, 4), (rows, 3), (vocabulary, 3)]
    tensors = [torch.randn(x, generator=generator).requires_grad_() for x in shapes]
    with Recorder() as recorder:
        linear_ikl_loss(*tensors, **options).sum().backward()
    return recorder.largest


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_whole(reduction: str) -> None:
    rows, vocabulary = 64, 100
    options = {"reduction": reduction, "normalization": "weights", "gamma": 0.5}
    assert largest_tensor(rows, vocabulary, backend="reference", **options) >= rows * vocabulary
    assert largest_tensor(rows, vocabulary, chunk_size=8, **options) <= 8 * vocabulary


def test_rows_that_do_not_count_cost_nothing_on_the_cpu() -> None:
    mask = torch.zeros(64, dtype=torch.bool)
    mask[[3, 50]] = True
    assert largest_tensor(64, 100, mask=mask) <= 4 * 100


@pytest.mark.parametrize("vocabulary", [100, 32_000, 1_000_000])
@pytest.mark.parametrize("features", [64, 512, 4096])
def test_default_chunks_are_bounded_and_equal(features: int, vocabulary: int) -> None:
    hidden = torch.empty(1, features).expand(2048, features)
    size = rows_per_chunk(hidden, vocabulary, None)
    assert 1 <= size <= 2048
    assert size * vocabulary <= max(2**23, features * vocabulary)
    assert 2048 % size == 0 or size - 2048 % size < 2048 / size
    assert rows_per_chunk(hidden, vocabulary, 10_000) == 2048


# Other ways to call it.


def test_backends_agree() -> None:
    tensors = make_tensors()
    for case in ("weights, gamma", "scale, softcap", "mask, labels"):
        options = CASES[case]
        expected = value_and_gradients(
            lambda t, kw=options: our_loss(t, kw, backend="reference"), tensors
        )
        for backend in ("auto", "blocked"):
            ours = value_and_gradients(
                lambda t, kw=options, b=backend: our_loss(t, kw, backend=b), tensors
            )
            assert_same(ours, expected, 1e-12)


def test_compiled_callers_get_the_same() -> None:
    tensors = make_tensors()

    def doubled(t: list[Tensor]) -> Tensor:
        loss: Tensor = our_loss(t, {"chunk_size": 3, "mask": MASK})
        return 2 * loss

    expected = value_and_gradients(doubled, tensors)
    compiled = torch.compile(doubled, backend="aot_eager")
    assert_same(value_and_gradients(compiled, tensors), expected, 1e-12)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": (
        {"target_weight": torch.zeros(V + 2, H + 1), "target_bias": None},
        r"weight\[:11\]",
    ),
    "rows": ({"target_hidden": torch.zeros(N + 1, H + 1)}, "the same rows"),
    "features": ({"input_hidden": torch.zeros(N, H + 1)}, r"nn.Linear\(H, V\)"),
    "vector": ({"input_hidden": torch.zeros(H)}, r"\[N, H\] or \[B, T, H\]"),
    "labels as hidden": ({"input_hidden": torch.zeros(N, H).long()}, "floating-point"),
    "list": ({"target_weight": [1.0]}, "floating-point tensor, got list"),
    "bias": ({"target_bias": torch.zeros(V + 1)}, r"target_bias must be \[V\] = \[11\]"),
    "dtype": ({"input_weight": torch.zeros(V, H).half()}, "one dtype"),
    "no classes": (
        {"input_weight": torch.zeros(0, H), "target_weight": torch.zeros(0, H + 1)},
        "a class and a feature",
    ),
    "scale": ({"input_logit_scale": 0.0}, "input_logit_scale must be finite and > 0"),
    "softcap": ({"target_softcap": -1.0}, "target_softcap must be finite and > 0"),
    "chunk_size": ({"chunk_size": 0}, "chunk_size must be"),
    "mask shape": ({"mask": torch.ones(N + 1, dtype=torch.bool)}, "mask must have one entry"),
    "mask dtype": ({"mask": torch.ones(N)}, "mask must be bool"),
    "labels": ({"labels": torch.zeros(N)}, "labels must be integers"),
    "ignore_index": ({"ignore_index": 3}, "labels too"),
    "temperature": ({"temperature": 0.0}, "temperature must be finite and > 0"),
    "gamma": ({"gamma": -1.0}, "gamma must be"),
    "reduction": ({"reduction": "batchmean"}, "reduction must be"),
    "normalization": ({"normalization": "none"}, "normalization must be"),
    "denominator": ({"denominator": 2.0}, "num_items"),
    "num_items": ({"num_items": 2.0, "reduction": "sum"}, "num_items"),
    "backend": ({"backend": "liger"}, "backend must be one of"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_teach(change: dict[str, Any], message: str) -> None:
    arguments = dict(zip(NAMES, make_tensors(torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_ikl_loss(**{**arguments, **change})
