"""What test_triton.py checks, run by itself in Triton's interpreter: a report of errors as JSON.

    TRITON_INTERPRET=1 python -m tests.losses.triton_cases report.json

Triton reads the variable when it is imported, hence a process of its own; test_triton.py imports
this module too, for the names of the cases, so that Triton is imported by the functions only.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dkl.losses.row_kernel import RowOptions, RowResult, RowWeights
from tests.reference import (
    decoupled_kl_reference,
    max_relative_error,
    rows_of,
    value_and_gradients,
)

SCALES = (0.7, 1.3)
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
SOURCES = ("softmax", "probs", "table")
Report = dict[str, Any]

# As in test_precision.py.
LOSS_TOLERANCE = {
    torch.float16: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float32: 2e-6,
    torch.float64: 1e-14,
}
GRADIENT_TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 3e-6,
    torch.float64: 2e-14,
}
CHECK_TOLERANCE = {"weight sums": 1e-6, "public functions": 3e-6, "constant difference": 1e-12}


@dataclass(frozen=True)
class Case:
    """One call of ``decoupled_rows``; the defaults are one tile and the loss of IKL."""

    shape: tuple[int, ...] = (5, 10)
    input_dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype = torch.float32
    logits: str = "normal"
    source: str = "softmax"
    weights_dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    weight_temperature: float = 1.0
    gamma: float = 1.0
    break_asymmetry: bool = True
    needs: tuple[bool, bool] = (True, True)
    masked: bool = False
    tensor_scales: bool = False
    upstream: bool = False
    layout: str = "contiguous"
    max_block: int | None = None

    @property
    def floors(self) -> tuple[float, float]:
        """What errors of the gradients are relative to, where the gradients are smaller than this.

        Gradients vanish for input close to target (q - p cancels), and where one class has all the
        weight; what remains is the rounding of what they are differences of.
        """
        one_class = self.logits in ("1e4", "rising") or self.gamma > 5
        return float(one_class or self.logits == "close"), float(one_class)

    @property
    def working_dtype(self) -> torch.dtype:
        double = torch.float64 in (self.input_dtype, self.target_dtype)
        return torch.float64 if double else torch.float32


def _cases() -> dict[str, Case]:
    plain, tiles = Case(masked=True), Case(masked=True, max_block=4)
    cases: dict[str, Case] = {}
    for case, dtype, source in product((plain, tiles), DTYPES, SOURCES):
        name = f"{str(dtype)[6:]} {source} tiles of {case.max_block}"
        cases[name] = replace(case, input_dtype=dtype, target_dtype=dtype, source=source)
    for first, second in product(DTYPES, DTYPES):
        if first != second:
            name = f"mixed {str(first)[6:]} {str(second)[6:]}"
            cases[name] = replace(plain, input_dtype=first, target_dtype=second)
    for dtype in DTYPES:
        cases[f"weights in {dtype}"] = replace(plain, source="table", weights_dtype=dtype)
    for size, block, dtype in product((1, 2, 1271), (None, 256), (torch.float32, torch.float64)):
        case = Case((3, size), dtype, dtype, max_block=block)
        cases[f"{size} classes {str(dtype)[6:]} tiles of {block}"] = case
    cases["1 class tiles of 1"] = Case((3, 1), max_block=1)
    cases["10 classes tiles of 1"] = Case((3, 10), max_block=1)
    for source, gamma, case in product(SOURCES, (0.0, 0.4, 1.0, 2.5), (plain, tiles)):
        name = f"{source} gamma {gamma} tiles of {case.max_block}"
        cases[name] = replace(case, source=source, gamma=gamma, temperature=2.0)
    for first, second, gamma in product((0.5, 4.0), (0.5, 3.0), (1.0, 0.4, 8.0)):
        options: Report = {"temperature": first, "weight_temperature": second, "gamma": gamma}
        cases[f"T {first} tau {second} gamma {gamma}"] = replace(tiles, **options)
        double: Report = {"input_dtype": torch.float64, "target_dtype": torch.float64}
        cases[f"T {first} tau {second} gamma {gamma} float64"] = replace(tiles, **options, **double)
    for needs, asymmetry, case in product(
        product((False, True), (False, True)), (False, True), (plain, tiles)
    ):
        name = f"needs {needs} BA {asymmetry} tiles of {case.max_block}"
        cases[name] = replace(case, needs=needs, break_asymmetry=asymmetry)
    for logits, source, case in product(
        ("1e4", "offset", "close"), SOURCES, (Case((6, 12)), Case((6, 12), max_block=4))
    ):
        name = f"logits {logits} {source} tiles of {case.max_block}"
        cases[name] = replace(case, logits=logits, source=source)
    cases["powers of 1e4"] = Case((6, 12), logits="1e4", gamma=0.4, max_block=4)
    cases["a class that all rows rise to"] = Case((6, 12), logits="rising", max_block=2)
    for layout, shape, source in product(
        ("rows apart", "turned"), ((5, 10), (2, 10, 6)), ("softmax", "probs", "table")
    ):
        cases[f"{layout} {len(shape)}d {source}"] = Case(shape, layout=layout, source=source)
    for source, dtype in product(SOURCES, (torch.float32, torch.bfloat16)):
        case = Case((2, 5, 7), dtype, dtype, source=source, masked=True)
        cases[f"map {source} {dtype}"] = case
        cases[f"map {source} {dtype} tiles of 2"] = replace(case, max_block=2)
    for case in (plain, replace(plain, shape=(2, 5, 7))):
        name = "" if len(case.shape) == 2 else "map "
        cases[f"{name}tensor scales"] = replace(case, tensor_scales=True)
        cases[f"{name}upstream"] = replace(case, upstream=True)
        cases[f"{name}tensor scales and upstream"] = replace(
            case, tensor_scales=True, upstream=True, break_asymmetry=False
        )
    return cases


CASES = _cases()


def wrong_in_case(case: Case, errors: Report, slack: float = 1.0) -> Report:
    """Return what is wrong in the report of a case."""
    # Exponents of hundreds, and differences of numbers of hundreds, are rounded accordingly.
    slack = slack if case.logits in ("normal", "close") else 5 * slack
    tolerances = {
        "mse": LOSS_TOLERANCE[case.working_dtype],
        "ce": LOSS_TOLERANCE[case.working_dtype],
        "input": GRADIENT_TOLERANCE[case.input_dtype],
        "target": GRADIENT_TOLERANCE[case.target_dtype],
    }
    wrong = {k: errors[k] for k, v in tolerances.items() if not errors[k] < slack * v}
    # Missing or unwanted, of a wrong shape or dtype, or not zero where a row does not count.
    return {**wrong, **dict.fromkeys(errors["wrong"], "not what was asked for")}


def wrong_in_check(name: str, errors: Report, slack: float = 1.0) -> Report:
    """Return what is wrong in the report of a check."""
    tolerance = slack * CHECK_TOLERANCE.get(name, 0.0)
    return {k: v for k, v in errors.items() if not v <= tolerance}


def _logits(case: Case, generator: torch.Generator, device: str = "cpu") -> list[Tensor]:
    def random() -> Tensor:
        return torch.randn(case.shape, generator=generator, dtype=torch.float64)

    input, target = 3 * random(), 3 * random()
    if case.logits == "1e4":
        input, target = (2e4 * torch.rand(case.shape, generator=generator) - 1e4 for _ in range(2))
    elif case.logits == "offset":
        input, target = random() - 300, random() + 300
    elif case.logits == "close":  # the difference is exact, and must stay so
        target = 5 * random().float().double()
        input = target + 1e-3 * random()
    elif case.logits == "rising":  # so that earlier tiles are rescaled to nothing
        ramp = torch.linspace(-200, 200, case.shape[1], dtype=torch.float64)
        input, target = input - ramp, target + ramp
    return [
        _laid_out(input.to(device, case.input_dtype), case),
        _laid_out(target.to(device, case.target_dtype), case),
    ]


def _laid_out(values: Tensor, case: Case) -> Tensor:
    if case.layout == "rows apart":
        wide = values.new_full((values.shape[0], 2, *values.shape[1:]), float("nan"))
        wide[:, 1] = values
        return wide[:, 1]
    if case.layout == "turned":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


def _weights(
    case: Case, generator: torch.Generator, device: str = "cpu"
) -> tuple[RowWeights, Report]:
    """Return the weights, with zeros among them, for the backend and for the reference."""
    num_classes = case.shape[1]
    row_shape = (case.shape[0], *case.shape[2:])
    if case.source == "probs":
        probs = torch.rand(case.shape, generator=generator).to(device, case.weights_dtype)
        probs[0] = 0
        probs[1, 0] = 0
        probs = _laid_out(probs, case)
        return RowWeights(probs), {"class_probs": probs}
    if case.source == "table":
        table = torch.rand((num_classes, num_classes), generator=generator)
        table = table.to(device, case.weights_dtype)
        table[0] = 0
        table = table.t() if case.layout == "turned" else table
        labels = torch.randint(num_classes, row_shape, generator=generator).to(device)
        given = RowWeights(class_table=table, labels_N=labels.reshape(-1))
        return given, {"class_table": table, "labels": labels}
    return RowWeights(), {}


def run_case(case: Case, device: str = "cpu") -> Report:
    """Return errors in the maximum norm against the pairwise formula in float64."""
    from dkl.losses.triton_kernels import decoupled_rows

    generator = torch.Generator().manual_seed(len(case.shape) + case.shape[1])
    pair = _logits(case, generator, device)
    weights, given = _weights(case, generator, device)
    row_shape = (case.shape[0], *case.shape[2:])
    num_rows = torch.Size(row_shape).numel()
    counted_N = None
    if case.masked:
        counted_N = torch.arange(num_rows, device=device) % 3 != 1
        given["mask"] = counted_N.reshape(row_shape)
        for values in (*pair, weights.class_probs):
            if values is not None:
                values.movedim(1, -1)[~given["mask"]] = float("nan")
        if weights.labels_N is not None:
            weights = weights._replace(labels_N=weights.labels_N.masked_fill(~counted_N, 0))
    upstream_N = torch.rand(num_rows, generator=generator).to(device) if case.upstream else None
    scales = [torch.tensor(x, device=device) if case.tensor_scales else x for x in SCALES]
    ours = decoupled_rows(
        pair[0],
        pair[1],
        weights,
        counted_N,
        (scales[0], scales[1]),
        RowOptions(case.temperature, case.weight_temperature, case.gamma, case.break_asymmetry),
        case.needs,
        upstream_N=upstream_N,
        max_block=case.max_block,
    )
    ours = RowResult(*(x if x is None else x.cpu() for x in ours))
    factor = 1.0 if upstream_N is None else upstream_N.cpu().double().reshape(row_shape)
    return _errors(
        case, ours, [x.cpu() for x in pair], {k: v.cpu() for k, v in given.items()}, factor
    )


def _errors(
    case: Case, ours: RowResult, pair: list[Tensor], given: Report, upstream: float | Tensor
) -> Report:
    def reference(input: Tensor, target: Tensor, mse_weight: float, ce_weight: float) -> Tensor:
        return decoupled_kl_reference(
            input,
            target,
            **given,
            mse_weight=mse_weight,
            ce_weight=ce_weight,
            temperature=case.temperature,
            weight_temperature=case.weight_temperature,
            gamma=case.gamma,
            break_asymmetry=case.break_asymmetry,
            reduction="none",
        )

    exact = [values.double() for values in pair]
    uncounted_N = ~given["mask"].reshape(-1) if case.masked else torch.zeros(1, dtype=torch.bool)
    _, gradients = value_and_gradients(lambda n, m: reference(n, m, *SCALES), exact, upstream)
    report: Report = {"wrong": []}
    for name, value_N, expected in (
        ("mse", ours.mse_N, reference(*exact, 1.0, 0.0)),
        ("ce", ours.ce_N, reference(*exact, 0.0, 1.0)),
    ):
        report[name] = max_relative_error(value_N, expected.reshape(-1))
        not_zero = case.masked and value_N[uncounted_N].count_nonzero() > 0
        report["wrong"] += [name] if value_N.dtype != case.working_dtype or not_zero else []
    for name, needed, values, gradient, expected, floor in zip(
        ("input", "target"), case.needs, pair, ours[2:], gradients, case.floors, strict=True
    ):
        report[name] = 0.0
        if gradient is None or not needed:
            report["wrong"] += [name] if needed or gradient is not None else []
            continue
        size = max(expected.abs().max().item(), floor)
        report[name] = (gradient.double() - expected).abs().max().item() / (size or 1.0)
        not_zero = case.masked and rows_of(gradient)[uncounted_N].count_nonzero() > 0
        same = gradient.dtype == values.dtype and gradient.shape == values.shape
        report["wrong"] += [] if same and not not_zero else [name]
    return report


def check_input_equal_to_target(device: str = "cpu") -> Report:
    """Weighted MSE and all gradients are zero, not only small."""
    report: Report = {}
    for dtype, block, source in product(DTYPES, (None, 4), SOURCES):
        generator = torch.Generator().manual_seed(0)
        case = Case(input_dtype=dtype, source=source)
        logits, _ = _logits(case, generator, device)
        weights, _ = _weights(case, generator, device)
        result = _both_gradients(logits, logits.clone(), weights, block)
        wrong = (result.mse_N, result.input_gradient, result.target_gradient)
        report[f"{dtype} {source} tiles of {block}"] = _largest(*wrong)
    return report


def check_constant_difference(device: str = "cpu") -> Report:
    """The weighted MSE does not see a shift: it has no value, and no gradient but rounding."""
    report: Report = {}
    for shift, block, source in product((7.25, 77.25), (None, 4), SOURCES):
        generator = torch.Generator().manual_seed(0)
        case = Case((5, 11), source=source)
        logits = (2**10 * _logits(case, generator, device)[0]).round() / 2**10  # so that d is exact
        weights, _ = _weights(case, generator, device)
        result = _both_gradients(logits, logits + shift, weights, block)
        report[f"{shift} {source} tiles of {block}"] = _largest(
            result.mse_N, result.target_gradient
        )
    return report


def _both_gradients(
    input: Tensor, target: Tensor, weights: RowWeights, block: int | None = None
) -> RowResult:
    from dkl.losses.triton_kernels import decoupled_rows

    options, needs = RowOptions(), (True, True)
    return decoupled_rows(input, target, weights, None, (1.0, 1.0), options, needs, max_block=block)


def _largest(*values: Tensor | None) -> float:
    return max(float("nan") if x is None else float(x.abs().max()) for x in values)


def check_no_rows(device: str = "cpu") -> Report:
    """Nothing is launched and everything is empty."""
    from dkl.losses.triton_kernels import scale_gradient_, weight_sums

    report: Report = {}
    for shape in ((0, 5), (0, 5, 3), (2, 5, 0)):
        logits, options = torch.zeros(shape, device=device), RowOptions(gamma=0.5)
        result = _both_gradients(logits, logits, RowWeights())
        sums_N = weight_sums(logits, RowWeights(), None, options)
        same = all(x is not None and x.shape == shape for x in result[2:])
        report[str(shape)] = (
            result.mse_N.numel() + result.ce_N.numel() + sums_N.numel() + (not same)
        )
        report[f"scaled {shape}"] = scale_gradient_(logits, logits.sum()).numel()
    return report


def check_unknown_labels(device: str = "cpu") -> Report:
    """Rows with a label that the table does not have are NaN, and only these."""
    from dkl.losses.triton_kernels import weight_sums

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 10, generator=generator).to(device)
    table = torch.rand(10, 10, generator=generator).to(device)
    labels_N = torch.tensor([0, 10, 9, -1, 2**40], device=device)
    weights = RowWeights(class_table=table, labels_N=labels_N)
    result = _both_gradients(logits, 2 * logits, weights)
    assert result.target_gradient is not None
    finite = {
        "values": result.mse_N.isfinite(),
        "gradients": result.target_gradient.isfinite().all(1),
        "sums": weight_sums(logits, weights, None, RowOptions()).isfinite(),
    }
    known = [True, False, True, False, False]
    return {name: float(value.tolist() != known) for name, value in finite.items()}


def check_weight_sums(device: str = "cpu") -> Report:
    """Sums of the powered weights against their definition, zero where a row does not count."""
    from dkl.losses.triton_kernels import weight_sums

    report: Report = {}
    for shape, source, gamma, block, masked in product(
        ((5, 10), (2, 5, 7)), SOURCES, (0.0, 0.4, 1.0, 2.5), (None, 4), (False, True)
    ):
        generator = torch.Generator().manual_seed(0)
        case = Case(shape, source=source)
        _, target = _logits(case, generator, device)
        weights, given = _weights(case, generator, device)
        powered = (rows_of(target) / 3).softmax(1)
        if source == "probs":
            powered = rows_of(given["class_probs"])
        elif source == "table":
            powered = given["class_table"].double()[given["labels"].reshape(-1)]
        expected = (powered**gamma).sum(1)
        counted_N = torch.arange(len(expected), device=device) % 3 != 1 if masked else None
        if counted_N is not None:
            expected = expected * counted_N
        options = RowOptions(weight_temperature=3.0, gamma=gamma)
        sums_N = weight_sums(target, weights, counted_N, options, max_block=block)
        report[f"{shape} {source} {gamma} {block} {masked}"] = max_relative_error(sums_N, expected)
    return report


def check_scale_gradient(device: str = "cpu") -> Report:
    """One number, one for each row, and every dtype; a one changes no bit."""
    from dkl.losses.triton_kernels import scale_gradient_

    report: Report = {}
    for dtype, shape in product(DTYPES, ((3, 5), (2, 5, 7), (3, 3000))):
        generator = torch.Generator().manual_seed(0)
        gradient = torch.randn(shape, generator=generator).to(device, dtype)
        rows = torch.rand(shape[0], generator=generator).to(device)
        rows_1 = rows.reshape(-1, *(1 for _ in shape[1:])).double()
        for name, upstream, factor in (
            ("one", rows.new_tensor(1.0), 1.0),
            ("half", rows.new_tensor(0.5).double(), 0.5),
            ("number", rows.new_tensor(2.5), 2.5),
            ("rows", rows, rows_1),
        ):
            ours = gradient.clone()
            same = scale_gradient_(ours, upstream) is ours
            error = max_relative_error(ours, gradient.double() * factor)
            tolerance = 0.0 if name in ("one", "half") else 2 * torch.finfo(dtype).eps
            report[f"{name} {dtype} {shape}"] = float(not same or error > tolerance)
    return report


def check_errors_teach(device: str = "cpu") -> Report:
    """Gradients that cannot be scaled in place, and upstream of a wrong shape."""
    from dkl.losses.triton_kernels import scale_gradient_

    report: Report = {}
    gradient = torch.ones(3, 5, device=device)
    for name, arguments in (
        ("contiguous", (gradient.t(), gradient.sum())),
        ("one number, or one for each row", (gradient, gradient[0])),
    ):
        report[name] = 1.0
        try:
            scale_gradient_(*arguments)
        except ValueError as error:
            report[name] = float(name not in str(error))
    return report


def check_public_functions(device: str = "cpu") -> Report:
    """The losses through this backend against the pairwise formula, gradients included."""
    import dkl

    report: Report = {}
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in product(((6, 5), (2, 5, 3)), (torch.float32, torch.float64)):
        pair = [3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        table = torch.rand(5, 5, generator=generator).to(dtype)
        labels = torch.randint(5, (shape[0], *shape[2:]), generator=generator)
        labels.view(-1)[1] = -100
        ikl: Report = {"temperature": 2.0, "mse_weight": 3.0}
        gkl: Report = {"gamma": 0.4, "normalization": "weights"}
        for name, options, upstream in (
            ("ikl", ikl, 1.0),
            ("ikl none", {**ikl, "reduction": "none"}, 1.5),
            ("gkl", {**gkl, "class_table": table, "labels": labels}, 0.3),
            ("dkl", {"break_asymmetry": False, "reduction": "sum"}, 1.0),
        ):
            there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
            ours, gradients = value_and_gradients(
                partial(dkl.decoupled_kl_loss, backend="triton", **there),
                [x.to(device) for x in pair],
                upstream,
            )
            exact, expected = value_and_gradients(
                partial(decoupled_kl_reference, **options), [x.double() for x in pair], upstream
            )
            errors = [max_relative_error(ours.cpu(), exact)]
            errors += map(max_relative_error, (x.cpu() for x in gradients), expected)
            report[f"{name} {shape} {dtype}"] = max(errors)
    return report


CHECKS: dict[str, Callable[..., Report]] = {
    "input equal to target": check_input_equal_to_target,
    "constant difference": check_constant_difference,
    "no rows": check_no_rows,
    "unknown labels": check_unknown_labels,
    "weight sums": check_weight_sums,
    "scale gradient": check_scale_gradient,
    "errors teach": check_errors_teach,
    "public functions": check_public_functions,
}


def main(path: str) -> None:
    """Run everything and write the report; an exception becomes the report of its case."""
    from dkl.losses.triton_kernels import is_available

    assert is_available(torch.device("cpu"))[0], "TRITON_INTERPRET=1 must be set"
    report: Report = {}
    for name, case in CASES.items():
        try:
            report[name] = run_case(case)
        except Exception as error:  # the parent names the case
            report[name] = {"error": repr(error)}
    for name, check in CHECKS.items():
        try:
            report[name] = check()
        except Exception as error:
            report[name] = {"error": repr(error)}
    part = Path(path).with_suffix(".part")
    part.write_text(json.dumps(report))
    part.replace(path)  # at once, because others wait for it


if __name__ == "__main__":
    main(sys.argv[1])
