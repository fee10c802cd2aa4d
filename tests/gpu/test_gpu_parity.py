"""The Triton backend on a GPU: parity at real sizes, no synchronisation, CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import dkl
from dkl.losses.row_kernel import NO_WEIGHTS, RowOptions, RowWeights
from tests.losses.triton_cases import (
    CASES,
    CHECKS,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    run_case,
    wrong_in_case,
    wrong_in_check,
)
from tests.reference import max_relative_error, value_and_gradients

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and PyTorch finds none"
)

DEVICE = "cuda"
# Exponentials and divisions are off by two units in the last place there, not by half of one.
SLACK = 4.0


@pytest.fixture(autouse=True)
def backend_runs() -> None:
    triton_kernels = pytest.importorskip("dkl.losses.triton_kernels", exc_type=ImportError)
    available, reason = triton_kernels.is_available(torch.device(DEVICE))
    if not available:
        pytest.skip(reason)


def random_pair(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [
        (scale * torch.randn(shape, generator=generator, device=DEVICE)).to(dtype) for _ in range(2)
    ]


def check_parity(
    pair: list[Tensor], loss: Callable[..., Any] = dkl.ikl_loss, **options: Any
) -> None:
    """Compare the backend with the reference formula in float64, both on the device."""
    dtype = pair[0].dtype
    ours, gradients = value_and_gradients(
        lambda n, m: loss(n, m, backend="triton", **options), pair
    )
    exact, expected = value_and_gradients(
        lambda n, m: loss(n, m, backend="reference", **options), [x.double() for x in pair]
    )
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert max_relative_error(ours, exact) < SLACK * LOSS_TOLERANCE[dtype]
    for gradient, target in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert max_relative_error(gradient, target) < SLACK * GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_pairwise_formula(name: str) -> None:
    case = CASES[name]
    assert not wrong_in_case(case, run_case(case, DEVICE), SLACK)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    assert not wrong_in_check(name, CHECKS[name](DEVICE), SLACK)


@pytest.mark.parametrize("dtype", LOSS_TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(8192, 100), (1024, 1000), (2048, 1271), (512, 32_000), (4, 21, 128, 128)], ids=str
)
def test_parity_at_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_parity(random_pair(shape, dtype))


def test_parity_with_the_vocabulary_of_a_language_model() -> None:
    check_parity(random_pair((64, 128_256), torch.bfloat16), mse_weight=8, weight_temperature=4)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("normalization", ["rows", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parity_of_gkl_with_a_class_table(gamma: float, normalization: str, reduction: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    labels = torch.randint(1000, (256,), generator=generator, device=DEVICE)
    labels[::5] = -100
    pair = random_pair((256, 1000), torch.float32)
    for logits in pair:
        logits[labels < 0] = float("nan")
    check_parity(
        pair,
        dkl.decoupled_kl_loss,
        class_table=torch.rand(1000, 1000, generator=generator, device=DEVICE).softmax(1),
        labels=labels,
        gamma=gamma,
        normalization=normalization,
        reduction=reduction,
        temperature=2.0,
    )


@pytest.mark.parametrize("dtype", LOSS_TOLERANCE, ids=str)
@pytest.mark.parametrize("num_classes", [10, 1000, 20_000])
def test_gradients_vanish_where_input_equals_target(num_classes: int, dtype: torch.dtype) -> None:
    logits, _ = random_pair((64, num_classes), dtype)
    _, gradients = value_and_gradients(
        lambda n, m: dkl.ikl_loss(n, m, backend="triton"), [logits, logits]
    )
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_auto_is_triton() -> None:
    pair = random_pair((32, 1000), torch.float32)
    ours, expected = (
        value_and_gradients(lambda n, m, b=b: dkl.ikl_loss(n, m, backend=b), pair)
        for b in ("auto", "triton")
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_gradient_scaler_loses_nothing_in_float16() -> None:
    # Divided by the number of rows, these gradients would underflow before they are scaled.
    pair = random_pair((4096, 100), torch.float16, scale=0.1)
    _, ours = value_and_gradients(
        lambda n, m: dkl.ikl_loss(n, m, backend="triton"), pair, upstream=65536.0
    )
    _, expected = value_and_gradients(
        lambda n, m: dkl.ikl_loss(n, m, backend="reference"), [x.double() for x in pair], 65536.0
    )
    for gradient, target in zip(ours, expected, strict=True):
        assert max_relative_error(gradient, target) < 2e-3


# No waiting for the device.


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


OPTIONS: dict[str, dict[str, Any]] = {
    "ikl": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "masked": {"mask": True},
    "gkl": {"normalization": "weights", "gamma": 0.4},
    "num_items": {"num_items": True},
}


def on_device(options: dict[str, Any], num_rows: int) -> dict[str, Any]:
    options = dict(options)
    if "mask" in options:
        options["mask"] = torch.arange(num_rows, device=DEVICE) % 3 != 1
    if "num_items" in options:
        options["num_items"] = torch.full((), 7.0, device=DEVICE)
    return options


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(16, 100), (512, 1000)], ids=str)
def test_nothing_waits_for_the_device(name: str, shape: tuple[int, int]) -> None:
    pair = [x.requires_grad_() for x in random_pair(shape, torch.float32)]
    options = on_device(OPTIONS[name], shape[0])

    def step() -> None:
        loss = dkl.decoupled_kl_loss(*pair, backend="triton", **options)
        loss.sum().backward()

    step()  # compiles
    with no_synchronisation():
        step()


@pytest.mark.parametrize("tensors", [False, True])
def test_kernel_waits_for_nothing_and_reads_scales_when_it_runs(tensors: bool) -> None:
    from dkl.losses.triton_kernels import decoupled_rows, scale_gradient_, weight_sums

    input, target = random_pair((64, 1000), torch.float32)
    scales = [torch.full((), x, device=DEVICE) if tensors else x for x in (0.5, 2.0)]
    upstream = torch.ones((), device=DEVICE)
    counted_N = torch.arange(64, device=DEVICE) % 3 != 1
    options = RowOptions(gamma=0.4)

    def run() -> Tensor:
        result = decoupled_rows(
            input, target, NO_WEIGHTS, counted_N, (scales[0], scales[1]), options, (True, True)
        )
        weight_sums(target, NO_WEIGHTS, counted_N, options)
        assert result.input_gradient is not None
        return scale_gradient_(result.input_gradient, upstream)

    run()
    with no_synchronisation():
        first = run()
    if tensors:
        upstream.fill_(2.0)
        torch.testing.assert_close(run(), 2 * first, rtol=0, atol=0)
        upstream.fill_(1.0)
        for scale in scales:
            scale.mul_(2.0)
        torch.testing.assert_close(run(), 2 * first, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(16, 100), (256, 20_000)], ids=str)
def test_runs_in_a_cuda_graph(shape: tuple[int, int]) -> None:
    pair = [x.requires_grad_() for x in random_pair(shape, torch.float32)]

    def step() -> list[Tensor]:
        loss = dkl.ikl_loss(*pair, backend="triton")
        return [loss, *torch.autograd.grad(loss, pair)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for logits, new in zip(pair, random_pair(shape, torch.float32, seed=1), strict=True):
            logits.copy_(new)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


# Memory.


def test_nothing_but_the_gradients_is_allocated() -> None:
    pair = [x.requires_grad_() for x in random_pair((512, 32_000), torch.bfloat16)]
    dkl.ikl_loss(*pair, backend="triton")  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = dkl.ikl_loss(*pair, backend="triton")
    loss.backward()
    gradients = sum(x.numel() * x.element_size() for x in pair)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * gradients


def test_more_elements_than_32_bits_count() -> None:
    shape = (17_000, 128_256)
    needed = 5 * 2 * shape[0] * shape[1]
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    from dkl.losses.triton_kernels import decoupled_rows

    pair = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2)]
    ours = decoupled_rows(*pair, NO_WEIGHTS, None, (1.0, 1.0), RowOptions(), (True, True))
    for rows in (slice(0, 2), slice(16_740, 16_750), slice(-2, None)):  # 2**31 is in row 16744
        part = [x[rows].clone() for x in pair]
        expected = decoupled_rows(*part, NO_WEIGHTS, None, (1.0, 1.0), RowOptions(), (True, True))
        for name, whole, few in zip(ours._fields, ours, expected, strict=True):
            assert torch.equal(whole[rows], few), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_device_of_the_logits() -> None:
    pair = [x.to("cuda:1") for x in random_pair((32, 1000), torch.float32)]
    with torch.cuda.device(0):
        check_parity(pair)


def test_table_rows_are_gathered_on_the_way() -> None:
    from dkl.losses.triton_kernels import decoupled_rows

    generator = torch.Generator(DEVICE).manual_seed(0)
    table = torch.rand(5000, 5000, generator=generator, device=DEVICE)
    labels_N = torch.randint(5000, (4096,), generator=generator, device=DEVICE)
    weights = RowWeights(class_table=table, labels_N=labels_N)
    input, target = random_pair((4096, 5000), torch.bfloat16)

    def run() -> Any:
        return decoupled_rows(input, target, weights, None, (1.0, 1.0), RowOptions(), (True, False))

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    gradient = result.input_gradient
    assert torch.cuda.max_memory_allocated() - before < 1.05 * gradient.numel() * 2
    given = decoupled_rows(
        input,
        target,
        RowWeights(table[labels_N]),
        None,
        (1.0, 1.0),
        RowOptions(),
        (True, False),
    )
    torch.testing.assert_close(result, given, rtol=0, atol=0)
