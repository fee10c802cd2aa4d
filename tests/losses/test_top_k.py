"""The loss of a cached teacher is that of probabilities summed over buckets, class by class."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dkl.losses import ikl_loss
from dkl.losses import linear_top_k as linear_top_k_module
from dkl.losses.chunks import CountedRows
from dkl.losses.linear_top_k import linear_top_k_ikl_loss
from dkl.losses.top_k import top_k_ikl_loss
from tests.losses.test_linear import Recorder, assert_same, value_and_gradients
from tests.reference import decoupled_kl_reference, max_relative_error

N, H, V, K = 6, 4, 9, 3
MASK = torch.tensor([True, False, True, True, False, True])
LABELS = torch.tensor([2, 3, -100, 2, 1, -100])

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weights of terms": {"mse_weight": 3.0, "ce_weight": 0.25},
    "temperature": {"temperature": 2.0},
    "temperatures": {"temperature": 0.5, "weight_temperature": 3.0},
    "gamma": {"gamma": 0.4},
    "gamma 0": {"gamma": 0.0},
    "no asymmetry broken": {"break_asymmetry": False},
    "weights": {"normalization": "weights", "gamma": 0.4, "mask": MASK},
    "weights, denominator": {"normalization": "weights", "denominator": 2.5, "num_items": 3.0},
    "mask": {"mask": MASK},
    "labels": {"labels": LABELS},
    "num_items": {"num_items": torch.tensor(3.5)},
    "sum": {"reduction": "sum", "mask": MASK},
    "none": {"reduction": "none", "labels": LABELS, "mask": MASK},
}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale, softcap": {"input_logit_scale": 0.5, "input_softcap": 2.0},
}


def make_tensors(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Return hidden, weight and bias of the student, and the teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, H), (V, H), (V,), (N, V)]
    *student, teacher = (
        torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes
    )
    return student, 2 * teacher


def cached(teacher: Tensor, temperature: float = 1.0, k: int = K) -> tuple[Tensor, Tensor]:
    top = (teacher / temperature).log_softmax(-1).topk(k)
    return top.values, top.indices


def naive_buckets(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return T log of the probability mass of every bucket, class by class."""
    probs = (logits / temperature).softmax(1)
    rows = []
    for row, listed in zip(probs, indices.tolist(), strict=True):
        rest = [row[j] for j in range(len(row)) if j not in listed]
        rows.append(torch.stack([*(row[j] for j in listed), torch.stack(rest).sum()]))
    return temperature * torch.stack(rows).log()


def naive_loss(logits: Tensor, teacher: Tensor, options: dict[str, Any], k: int = K) -> Tensor:
    temperature = options.get("temperature", 1.0)
    _, indices = cached(teacher, temperature, k)
    return decoupled_kl_reference(
        naive_buckets(logits, indices, temperature),
        naive_buckets(teacher, indices, temperature),
        **options,
    )


def head_logits(tensors: list[Tensor], input_logit_scale: float = 1.0, input_softcap: Any = None):
    logits = input_logit_scale * (tensors[0] @ tensors[1].T + tensors[2])
    return logits if input_softcap is None else input_softcap * (logits / input_softcap).tanh()


def linear_loss(tensors: list[Tensor], *teacher: Tensor, **options: Any) -> Any:
    hidden, weight, bias = tensors
    return linear_top_k_ikl_loss(hidden, weight, *teacher, input_bias=bias, **options)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_loss_of_buckets(case: dict[str, Any], backend: str) -> None:
    _, teacher = make_tensors()
    logits = teacher.flip(0) / 3
    top = cached(teacher, case.get("temperature", 1.0))
    upstream = torch.linspace(0.5, 2.0, N).double() if case.get("reduction") == "none" else 2.5
    expected = value_and_gradients(lambda t: naive_loss(t[0], teacher, case), [logits], upstream)
    ours = value_and_gradients(
        lambda t: top_k_ikl_loss(t[0], *top, backend=backend, **case), [logits], upstream
    )
    assert_same(ours, expected, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_linear_equals_the_loss_of_buckets(
    case: dict[str, Any], head: dict[str, Any], chunk_size: int | None
) -> None:
    student, teacher = make_tensors()
    top = cached(teacher, case.get("temperature", 1.0))
    upstream = torch.linspace(0.5, 2.0, N).double() if case.get("reduction") == "none" else 2.5
    expected = value_and_gradients(
        lambda t: naive_loss(head_logits(t, **head), teacher, case), student, upstream
    )
    ours = value_and_gradients(
        lambda t: linear_loss(t, *top, chunk_size=chunk_size, **case, **head), student, upstream
    )
    assert_same(ours, expected, 1e-12)
    reference = value_and_gradients(
        lambda t: linear_loss(t, *top, backend="reference", **case, **head), student, upstream
    )
    assert_same(reference, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 4.0, "weight_temperature": 3.0},
        {"gamma": 0.0},
        {"gamma": 0.5, "normalization": "weights"},
        {"reduction": "none"},
    ],
)
def test_all_classes_listed_is_the_dense_loss(options: dict[str, Any], dtype: torch.dtype) -> None:
    student, teacher = make_tensors(dtype)
    top = cached(teacher, options.get("temperature", 1.0), V)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    expected = value_and_gradients(
        lambda t: ikl_loss(head_logits(t), teacher, backend="reference", **options), student
    )
    for backend in ("auto", "reference"):
        dense = value_and_gradients(
            lambda t, b=backend: top_k_ikl_loss(head_logits(t), *top, backend=b, **options), student
        )
        linear = value_and_gradients(
            lambda t, b=backend: linear_loss(t, *top, backend=b, **options), student
        )
        assert_same(dense, expected, tolerance)
        assert_same(linear, expected, tolerance)


def test_sequences() -> None:
    student, teacher = make_tensors()
    values, indices = cached(teacher)
    hidden, weight, bias = student
    hidden, values, indices = (x.reshape(2, 3, -1) for x in (hidden, values, indices))
    options = {"mask": MASK.reshape(2, 3), "labels": LABELS.reshape(2, 3), "reduction": "none"}
    tail = torch.log1p(-values.exp().sum(-1))
    linear = linear_loss([hidden, weight, bias], values, indices, **options)
    dense = top_k_ikl_loss(
        hidden @ weight.T + bias, values, indices, target_tail_log_prob=tail, **options
    )
    expected = naive_loss(
        head_logits(student), teacher, {"mask": MASK, "labels": LABELS, "reduction": "none"}
    )
    for ours in (linear, dense):
        assert ours.shape == (2, 3)
        torch.testing.assert_close(ours.reshape(-1), expected, rtol=1e-12, atol=1e-14)


def test_parts() -> None:
    student, teacher = make_tensors()
    student[0].requires_grad_()
    top = cached(teacher)
    options = {"gamma": 0.5, "normalization": "weights", "mask": MASK}
    for loss, parts in (
        linear_loss(student, *top, return_parts=True, mse_weight=2.0, **options),
        top_k_ikl_loss(head_logits(student), *top, return_parts=True, mse_weight=2.0, **options),
    ):
        terms = [
            naive_loss(head_logits(student), teacher, options | {"mse_weight": a, "ce_weight": b})
            for a, b in ((1.0, 0.0), (0.0, 1.0))
        ]
        torch.testing.assert_close(list(parts), [x.detach() for x in terms], rtol=1e-12, atol=0)
        torch.testing.assert_close(loss, 2.0 * terms[0] + terms[1], rtol=1e-12, atol=0)
        assert not any(part.requires_grad for part in parts)


# Buckets without probability.


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_padding_is_as_if_not_listed(gamma: float, backend: str) -> None:
    student, teacher = make_tensors()
    logits = head_logits(student)
    values, indices = cached(teacher)
    nothing = torch.full((N, 2), -torch.inf, dtype=torch.float64)
    padded = torch.cat([values, nothing], 1), torch.cat([indices, indices[:, 1:]], 1)
    # The number of buckets counts where weights sum to it: none may come from padding.
    for options in ({"gamma": gamma}, {"gamma": gamma, "normalization": "weights"}):
        expected = value_and_gradients(
            lambda t, kw=options: naive_loss(t[0], teacher, kw), [logits]
        )
        ours = value_and_gradients(
            lambda t, kw=options: top_k_ikl_loss(t[0], *padded, backend=backend, **kw), [logits]
        )
        assert_same(ours, expected, 1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("by", ["sum", "tail"])
def test_teacher_without_remainder(by: str, gamma: float, backend: str) -> None:
    """Its rest has neither weight nor soft label; the student's is pushed down all the same."""
    student, teacher = make_tensors()
    _, indices = cached(teacher)
    values = teacher.gather(1, indices).log_softmax(1)
    tail = torch.full((N,), -torch.inf, dtype=torch.float64)
    options = {"target_tail_log_prob": tail} if by == "tail" else {}
    if by == "sum":
        values = values + 1e-9  # a sum above one, by rounding

    def naive(t: list[Tensor]) -> Tensor:
        buckets = naive_buckets(t[0], indices, 1.0)
        listed = buckets[:, :K]
        mse = decoupled_kl_reference(listed, values, gamma=gamma, ce_weight=0.0)
        log_probs = buckets.log_softmax(1)[:, :K]
        return mse - (values.exp() * log_probs).sum(1).mean()

    logits = head_logits(student)
    expected = value_and_gradients(naive, [logits])
    ours = value_and_gradients(
        lambda t: top_k_ikl_loss(t[0], values, indices, gamma=gamma, backend=backend, **options),
        [logits],
    )
    assert_same(ours, expected, 1e-12 if by == "tail" else 1e-7)


def test_vanishing_remainder_is_continuous() -> None:
    _, teacher = make_tensors()
    logits = teacher.flip(1) / 2
    _, indices = cached(teacher)
    listed = teacher.gather(1, indices).log_softmax(1)

    def loss(rest: float) -> Tensor:
        values = listed + torch.log1p(torch.tensor(-rest, dtype=torch.float64))
        tail = torch.full((N,), rest, dtype=torch.float64).log()
        return top_k_ikl_loss(logits, values, indices, target_tail_log_prob=tail)

    assert (loss(1e-12) - loss(0.0)).abs() < 1e-8


def test_student_remainder_does_not_cancel() -> None:
    """1 - sum of the listed probabilities is 0 in float32; the rest's own sum is exact."""
    teacher = torch.tensor([[3.0, 2.0, 0.0, 0.0, -1.0]])
    logits = torch.tensor([[30.0, 29.0, 0.0, 1.0, 2.0]])
    top = cached(teacher, k=2)
    ours = value_and_gradients(lambda t: top_k_ikl_loss(t[0], *top), [logits])
    expected = value_and_gradients(
        lambda t: naive_loss(t[0], teacher.double(), {}, k=2), [logits.double()]
    )
    assert_same(ours, expected, 1e-5)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size: float) -> None:
    student, teacher = make_tensors()
    logits = head_logits(student)
    for values, indices in (cached(teacher), cached(teacher, k=V)):
        padded = values.clone()
        padded[:, -1] = -torch.inf
        for log_probs in (values, padded):
            plain, shifted = (
                value_and_gradients(
                    lambda t, top=(log_probs, indices): top_k_ikl_loss(t[0], *top), [x]
                )
                for x in (logits, logits + size)
            )
            assert_same(shifted, plain, 1e-9)
        wide = torch.zeros(N, V).index_fill(1, torch.tensor([0, 4]), size).requires_grad_()
        loss = top_k_ikl_loss(wide, values, indices)
        loss.backward()
        assert loss.isfinite()
        assert wide.grad is not None
        assert wide.grad.isfinite().all()


def test_given_remainder_replaces_the_computed_one() -> None:
    """Where little remains, it is lost in the rounding of what is listed."""
    student, teacher = make_tensors()
    logits = head_logits(student)
    values, indices = cached(6 * teacher)
    exact = torch.log1p(-values.exp().sum(1))
    rounded = values.to(torch.float16).double()
    losses = [
        top_k_ikl_loss(logits, x, indices, target_tail_log_prob=tail, gamma=0.5)
        for x, tail in ((values, None), (values, exact), (rounded, None), (rounded, exact))
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert 10 * (losses[3] - losses[0]).abs() < (losses[2] - losses[0]).abs()


# Rows that do not count, dtypes, memory.


@pytest.mark.parametrize("form", ["dense", "linear", "linear, rows dropped"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_that_do_not_count_may_hold_anything(
    backend: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = make_tensors()
    values, indices = cached(teacher)
    expected = value_and_gradients(
        lambda t: naive_loss(head_logits(t), teacher, {"mask": MASK}), student
    )
    student[0][~MASK], values[~MASK], indices[~MASK] = torch.nan, torch.nan, -1
    tail = torch.log1p(-values.exp().sum(1))
    options: dict[str, Any] = {"mask": MASK, "backend": backend}
    if form == "dense":

        def ours(t: list[Tensor]) -> Tensor:
            hidden = t[0].masked_fill(~MASK[:, None], 0.0)
            logits = head_logits([hidden, *t[1:]]).masked_fill(~MASK[:, None], torch.nan)
            return top_k_ikl_loss(logits, values, indices, target_tail_log_prob=tail, **options)

    else:
        if form != "linear":
            chosen = CountedRows(torch.Size([N]), MASK, None)
            monkeypatch.setattr(linear_top_k_module, "choose_rows", lambda *_: chosen)

        def ours(t: list[Tensor]) -> Tensor:
            loss: Tensor = linear_loss(
                t, values, indices, target_tail_log_prob=tail, chunk_size=2, **options
            )
            return loss

    assert_same(value_and_gradients(ours, student), expected, 1e-12)


def test_nothing_counts() -> None:
    student, teacher = make_tensors()
    top = cached(teacher)
    mask = torch.zeros(N, dtype=torch.bool)
    for loss in (
        lambda t: linear_loss(t, *top, mask=mask),
        lambda t: linear_loss([t[0][:0], *t[1:]], top[0][:0], top[1][:0]),
        lambda t: top_k_ikl_loss(head_logits(t), *top, mask=mask),
    ):
        for value in value_and_gradients(loss, student):
            assert value.eq(0).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)],
)
@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
def test_dtypes(indices_dtype: torch.dtype, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = make_tensors(dtype)
    values, indices = cached(teacher.double())
    exact = [x.double() for x in student]
    expected = value_and_gradients(lambda t: top_k_ikl_loss(head_logits(t), values, indices), exact)
    options: dict[str, Any] = {"chunk_size": 2}
    top = values.float(), indices.to(indices_dtype)
    linear = value_and_gradients(lambda t: linear_loss(t, *top, **options), student)
    assert linear[0].dtype == torch.float32
    assert all(x.dtype == dtype for x in linear[1:])
    assert_same(linear, expected, tolerance)
    dense = value_and_gradients(lambda t: top_k_ikl_loss(head_logits(t), *top), student)
    assert_same(dense, expected, tolerance)


def test_autocast() -> None:
    student, teacher = make_tensors(torch.float32)
    top = cached(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        dense = value_and_gradients(
            lambda t: top_k_ikl_loss(torch.nn.functional.linear(*t), *top), student
        )
        linear = value_and_gradients(lambda t: linear_loss(t, *top, chunk_size=4), student)
    assert max_relative_error(linear[0], dense[0]) < 1e-5
    assert_same(linear, dense, 0.03)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_form_never_holds_all_logits(reduction: str) -> None:
    rows, vocabulary = 64, 100
    hidden, weight = torch.randn(rows, 4), torch.randn(vocabulary, 4)
    top = torch.randn(rows, vocabulary).log_softmax(1).topk(8)

    def largest(**options: Any) -> int:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with Recorder() as recorder:
            loss = linear_top_k_ikl_loss(
                *leaves, top.values, top.indices, reduction=reduction, **options
            )
            loss.sum().backward()
        return recorder.largest

    assert largest(backend="reference") >= rows * vocabulary
    assert largest(chunk_size=4) <= rows * 9  # the teacher's buckets are there anyway


def test_derivatives() -> None:
    student, teacher = make_tensors()
    top = cached(teacher)
    inputs = [x.requires_grad_() for x in student]
    assert torch.autograd.gradcheck(lambda *t: linear_loss(list(t), *top, chunk_size=4), inputs)
    logits = head_logits([x.detach() for x in student]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: top_k_ikl_loss(x, *top), logits)
    every = cached(teacher, k=V)
    for values, indices in (top, every):
        assert torch.autograd.gradgradcheck(
            lambda x, v=values, i=indices: top_k_ikl_loss(x, v, i, backend="reference"), logits
        )
    for loss in (linear_loss(inputs, *top), top_k_ikl_loss(head_logits(inputs), *top)):
        with pytest.raises(RuntimeError, match="backend='reference'"):
            torch.autograd.grad(loss, inputs[1], create_graph=True)


def test_micro_batches_add_up() -> None:
    student, teacher = make_tensors()
    values, indices = cached(teacher)
    expected = value_and_gradients(
        lambda t: linear_loss(t, values, indices, labels=LABELS), student
    )
    leaves = [x.clone().requires_grad_() for x in student]
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 6)):
        loss = linear_loss(
            [leaves[0][rows], *leaves[1:]],
            values[rows],
            indices[rows],
            labels=LABELS[rows],
            num_items=(LABELS != -100).sum(),
        )
        loss.backward()
        total += loss.detach()
    assert_same([total, *(x.grad for x in leaves)], expected, 1e-12)


# Errors.


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "logits instead": ({"target_log_probs": torch.ones(N, K)}, "must be log-probabilities"),
    "not a number": ({"target_log_probs": torch.full((N, K), torch.nan)}, "log-probabilities"),
    "over the k": (
        {"target_tail_log_prob": torch.zeros(N), "target_log_probs": torch.full((N, K), -1.1)},
        "to one exactly together",
    ),
    "class too large": ({"target_indices": torch.full((N, K), V)}, r"classes in \[0, 9\)"),
    "class below zero": ({"target_indices": torch.full((N, K), -1)}, r"classes in \[0, 9\)"),
    "other k": ({"target_indices": torch.zeros(N, K + 1).long()}, r"\[\.\.\., k\]"),
    "other rows": ({"target_log_probs": torch.full((N + 1, K), -9.0)}, r"\[\.\.\., k\]"),
    "k above V": (
        {
            "target_log_probs": torch.full((N, V + 1), -9.0),
            "target_indices": torch.zeros(N, V + 1).long(),
        },
        r"k must be in \[1, 9\]",
    ),
    "probabilities of integers": ({"target_log_probs": torch.zeros(N, K).long()}, "floating"),
    "floating indices": ({"target_indices": torch.zeros(N, K)}, "integers"),
    "tail shape": ({"target_tail_log_prob": torch.zeros(N, 1)}, "one number per row"),
    "gradient": (
        {"target_log_probs": torch.full((N, K), -9.0, requires_grad=True)},
        "gets no gradient",
    ),
    "temperature": ({"temperature": 0.0}, "temperature must be finite and > 0"),
    "weight_temperature": ({"weight_temperature": -1.0}, "weight_temperature must be finite"),
    "gamma": ({"gamma": -1.0}, "gamma must be"),
    "mask": ({"mask": torch.ones(N, 1, dtype=torch.bool)}, "mask must have one entry"),
    "ignore_index": ({"ignore_index": 1}, "labels too"),
    "num_items": ({"num_items": 2.0, "reduction": "none"}, "num_items"),
    "backend": ({"backend": "liger"}, "backend must be one of"),
}


@pytest.mark.parametrize("form", ["dense", "linear"])
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_teach(change: dict[str, Any], message: str, form: str) -> None:
    student, teacher = make_tensors(torch.float32)
    values, indices = cached(teacher)
    options = {"target_log_probs": values, "target_indices": indices, **change}
    if form == "dense":
        loss, inputs = top_k_ikl_loss, (head_logits(student),)
    else:
        loss, inputs = linear_top_k_ikl_loss, (student[0], student[1])
    with pytest.raises(ValueError, match=message):
        loss(*inputs, **options)


def test_errors_of_each_form() -> None:
    student, teacher = make_tensors(torch.float32)
    top = cached(teacher)
    with pytest.raises(ValueError, match="classes last"):
        top_k_ikl_loss(torch.zeros(V), *top)
    with pytest.raises(ValueError, match="chunk_size"):
        linear_loss(student, *top, chunk_size=0)
    with pytest.raises(ValueError, match="input_weight"):
        linear_loss([student[0], student[1].T, student[2]], *top)
