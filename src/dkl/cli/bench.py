"""Commands that measure speed and memory: bench losses, linear, train, evaluate."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from dkl.cli.bench_output import check_places, measure
from dkl.cli.output import say
from dkl.cli.training import AsJson

if TYPE_CHECKING:
    from dkl.bench import BenchRow

T = TypeVar("T")

Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the rows there, one JSON per line.")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Save the figures as PNG files there.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Small sizes and few rounds: shows that it works.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="Timings of each method. (default: 15)")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of torch on the CPU. (default: torch's own)")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random data.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="all|auto|none",
        help="Whose peak memory to measure; auto: of baseline and backend auto. "
        "(default: all; with --quick auto)",
    ),
]

_QUICK_ROUNDS = 3


def bench_losses(
    shapes: Annotated[
        str | None,
        typer.Option(metavar="NxC,NxC", help="Rows and classes, instead of the usual cases."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    rounds: Rounds = None,
    threads: Threads = None,
    seed: Seed = 0,
    backends: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Backends of ikl_loss, instead of all."),
    ] = None,
    target_grad: Annotated[
        bool, typer.Option("--target-grad", help="Also with a target that needs a gradient.")
    ] = False,
    compile: Annotated[
        bool | None,
        typer.Option(help="Compiled KL, backend compile. (default: yes; with --quick no)"),
    ] = None,
    sweep: Annotated[
        bool, typer.Option(help="Time per element against the number of classes.")
    ] = True,
    memory: Memory = None,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time IKL against KL and against IKL's published forms, and measure peak memory."""
    check_places(out, plot)
    from dkl.bench import settings as sizes
    from dkl.bench.losses import run

    default_shapes = sizes.QUICK_SHAPES if quick else sizes.SHAPES
    swept = sizes.QUICK_SWEEP_CLASSES if quick else sizes.SWEEP_CLASSES
    settings = _as_usage(
        lambda: sizes.LossSettings(
            shapes=default_shapes if shapes is None else _parse_shapes(shapes),
            dtype=dtype,
            device=device,
            rounds=_rounds(rounds, quick),
            threads=threads,
            seed=seed,
            backends=None
            if backends is None
            else _parse_names(backends, sizes.known_backends(), "--backends"),
            target_grad=target_grad,
            compile=not quick if compile is None else compile,
            sweep_classes=swept if sweep else (),
            sweep_elements=sizes.QUICK_SWEEP_ELEMENTS if quick else None,
            copy_bytes=sizes.QUICK_COPY_BYTES if quick else None,
            memory=memory or ("auto" if quick else "all"),
        )
    )
    measure(lambda: run(settings, _tell), as_json, out, plot)


def bench_linear(
    rows: Annotated[int | None, typer.Option(min=1, help="N, tokens. (default: 2048)")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="H, width. (default: 512)")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=1, help="V, classes. (default: 32000)")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    rounds: Rounds = None,
    threads: Threads = None,
    seed: Seed = 0,
    memory: Memory = None,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time a linear head with IKL in chunks against dense logits, and measure peak memory."""
    check_places(out, plot)
    from dkl.bench import settings as sizes
    from dkl.bench.linear import run

    small = sizes.QUICK_LINEAR if quick else sizes.LINEAR
    settings = _as_usage(
        lambda: sizes.LinearSettings(
            num_rows=rows or small[0],
            num_hidden=hidden or small[1],
            num_classes=vocabulary or small[2],
            dtype=dtype,
            device=device,
            rounds=_rounds(rounds, quick),
            threads=threads,
            seed=seed,
            memory=memory or ("auto" if quick else "all"),
        )
    )
    measure(lambda: run(settings, _tell), as_json, out, plot)


def bench_train(
    cases: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="ikl_at, ikl_at_awp, ikl_kd. (default: all)"),
    ] = None,
    options: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Also time our step with these: contiguous, channels_last, compile, bf16.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Samples of a step. (default: 64; with --quick 8)")
    ] = None,
    channels_last: Annotated[bool, typer.Option(help="Memory format of our step.")] = True,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timings of each step. (default: 5)")
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time training steps against the same steps as published scripts take them.

    Both give the same parameters after the step, which is checked first.
    """
    check_places(out, plot)
    from dkl.bench import train
    from dkl.bench.train_sides import CASES

    chosen = CASES if cases is None else _parse_names(cases, CASES, "--cases")
    given = () if options is None else _parse_names(options, train.OPTIONS, "--options")

    def run() -> "list[BenchRow]":
        return train.run(
            cases=chosen,
            quick=quick,
            rounds=rounds or (2 if quick else 5),
            batch_size=batch_size,
            channels_last=channels_last,
            options=given,
            seed=seed,
            threads=threads,
            progress=_tell,
        )

    measure(run, as_json, out, plot, details=train.share_table)


def bench_evaluate(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", exists=True, help="Run folder or checkpoint. (default: train one now)"
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Test images. (default: 100; with --quick 16)")
    ] = None,
    epsilon: Annotated[
        str | None, typer.Option(help="Radius such as 8/255. (default: the recipe's)")
    ] = None,
    version: Annotated[
        Literal["standard", "fast"] | None,
        typer.Option(help="Attacks. (default: standard; with --quick fast)"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch. (default: the recipe's)")
    ] = None,
    channels_last: Annotated[bool, typer.Option(help="Also in this memory format.")] = True,
    device: Device = "cpu",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timings of each evaluation. (default: 2)")
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: AsJson = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time AutoAttack in our loop against the package's own.

    Both find the same flag for every image, which is checked.
    """
    check_places(out, plot)
    from dkl.bench import evaluate
    from dkl.bench.settings import check_device

    _as_usage(lambda: check_device(device))

    def run() -> "list[BenchRow]":
        return evaluate.run(
            quick=quick,
            rounds=rounds or 2,
            num_images=images,
            seed=seed,
            checkpoint=checkpoint,
            epsilon=epsilon,
            version=version,
            batch_size=batch_size,
            channels_last=channels_last,
            threads=threads,
            device=device,
            progress=_tell,
        )

    measure(run, as_json, out, plot)


def _rounds(rounds: int | None, quick: bool) -> int:
    return rounds or (_QUICK_ROUNDS if quick else 15)


def _tell(message: str) -> None:
    say(f"Measuring {message}", "dim")


def _as_usage(make: Callable[[], T]) -> T:
    """Tell a bad setting as bad usage: exit code 2."""
    try:
        return make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes = []
    for word in text.split(","):
        numbers = word.strip().lower().split("x")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            message = f"needs rows x classes such as 128x10,512x1000; got {text!r}"
            raise typer.BadParameter(message, param_hint="--shapes")
        shapes.append((int(numbers[0]), int(numbers[1])))
    return tuple(shapes)


def _parse_names(text: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in known:
            message = f"knows {', '.join(known)}; got {name!r}"
            raise typer.BadParameter(message, param_hint=option)
    return names
