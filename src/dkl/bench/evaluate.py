"""``dkl bench evaluate``: our AutoAttack loop against the evaluation of the package it drives.

Both get the same trained model, images and seed, and have to find the same flag and the same
prediction for every sample: what is timed is two ways to one result. See ``evaluate_sides``.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dkl import config
from dkl.bench.evaluate_sides import (
    Finding,
    Subject,
    check_same,
    load_subject,
    our_evaluation,
    package_evaluation,
)
from dkl.bench.evaluate_workers import Workers, workers
from dkl.bench.rows import BenchRow
from dkl.bench.settings import check_device
from dkl.bench.steps import torch_threads
from dkl.bench.timing import Timing, interleaved, ratios, time_rows
from dkl.build.training import train_recipe
from dkl.engine.randomness import preserved_rng
from dkl.evaluation import AutoAttackResult
from dkl.evaluation.auto_attack_phases import Version, load_package
from dkl.reports.origin import provenance

TABLE = "evaluate"
PACKAGE = "pyautoattack"
OURS = "dkl"
CHANNELS_LAST = ", channels_last"

RECIPE = "digits_trades"
# Trained until a part of the images withstands the attacks: where everything breaks at once, both
# sides are done before they have begun.
TRAINING = ("training.best_metric=null", "evaluation.validation_attack_steps=0", "trackers=[]")
FULL_TRAINING = (*TRAINING, "training.epochs=10")
QUICK_TRAINING = (
    *TRAINING,
    "training.epochs=6",
    "model.kwargs.width=8",
    "evaluation.eps=0.1",
)
NUM_IMAGES = 100
QUICK_IMAGES = 16

Progress = Callable[[str], None]
MakeRow = Callable[..., BenchRow]


def run(
    *,
    quick: bool = False,
    rounds: int = 2,
    num_images: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    epsilon: float | str | None = None,
    version: Version | None = None,
    batch_size: int | None = None,
    channels_last: bool = True,
    processes: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[BenchRow]:
    """Evaluate one model with the package and with our loop, in turns, and compare.

    Args:
        quick: a tiny model, few images and the two APGD attacks alone, to see that it works.
        rounds: timings of each side, after one untimed evaluation.
        num_images: N, the first test images. (default: 100; with ``quick`` 16)
        seed: of the attacks, and of the training where there is no ``checkpoint``.
        checkpoint: a run folder of ``dkl train`` or one of its checkpoints; None trains
            ``digits_trades`` for some epochs first.
        epsilon: the radius; None: what the recipe says.
        version: "standard" or "fast". (default: standard; with ``quick`` fast)
        batch_size: of the attacks; None: what the recipe says.
        channels_last: run both sides with convolutions in this memory format as well; not with
            ``quick``.
        processes: more than one: let so many processes, among which the threads are divided, share
            an evaluation as well. They share batches: ``batch_size`` has to leave some for each.
        threads: of PyTorch; as many as it has by default.
        device: "cpu" or "cuda".
        progress: told what is being done.

    Returns:
        "time" of each side, with its ratio to the package; "flags_differing" and
        "predictions_differing" from the package in the same memory format, 0;
        "flags_differing_from_contiguous" of channels_last, whose rounding differs;
        "robust_accuracy"; "share" of our time by attack.

    Raises:
        FlagMismatchError: a sample for which the two sides disagree.
        ImportError: when pyautoattack is not installed.
        ValueError: settings that do not fit.
    """
    load_package()
    check_device(device)
    tell = progress or (lambda _: None)
    with torch_threads(threads), preserved_rng(torch.device(device)):
        with _trained(checkpoint, seed, quick, tell) as path:
            subject = load_subject(
                path,
                num_images=num_images or (QUICK_IMAGES if quick else NUM_IMAGES),
                version=version or ("fast" if quick else "standard"),
                seed=seed,
                epsilon=epsilon,
                batch_size=batch_size,
                device=device,
            )
        bench = EvaluateBench(subject, channels_last=channels_last and not quick)
        with contextlib.ExitStack() as stack:
            if processes > 1:
                bench.add_workers(stack.enter_context(workers(subject, processes)), processes)
            tell(f"{bench.case}: {', '.join(bench.functions)}")
            return bench.rows(rounds)


@contextlib.contextmanager
def _trained(checkpoint: Path | None, seed: int, quick: bool, tell: Progress) -> Iterator[Path]:
    """Give the checkpoint, or a run that is trained now and thrown away afterwards."""
    if checkpoint is not None:
        yield checkpoint
        return
    changes = [*(QUICK_TRAINING if quick else FULL_TRAINING), f"seed={seed}"]
    recipe = config.load_recipe(RECIPE, changes)
    tell(f"nothing yet: training {RECIPE} for {recipe.training.epochs} epochs")
    with tempfile.TemporaryDirectory() as folder:
        train_recipe(recipe, Path(folder) / "run")
        yield Path(folder) / "run"


class EvaluateBench:
    """Times two sides, each in one or two memory formats, on a model.

    Args:
        subject: the model and what is done to it.
        channels_last: also in this memory format, where the model has convolutions.
    """

    def __init__(self, subject: Subject, *, channels_last: bool = True) -> None:
        self.subject = subject
        self.found: dict[str, Finding] = {}
        self.results: dict[str, AutoAttackResult] = {}
        self.functions: dict[str, Callable[[], None]] = {}
        self.peers: dict[str, str] = {}
        self._add_pair("", subject)
        if channels_last and subject.has_convolutions():
            self._add_pair(CHANNELS_LAST, subject.channels_last())

    def _add_pair(self, suffix: str, subject: Subject) -> None:
        package, ours = f"{PACKAGE}{suffix}", f"{OURS}{suffix}"
        self.functions[package] = lambda: self._enter(package, package_evaluation(subject))
        self.functions[ours] = lambda: self._enter_result(ours, our_evaluation(subject))
        self.peers[ours] = package

    def add_workers(self, team: Workers, count: int) -> None:
        """Let processes that hold the same subject take part."""
        name = f"{OURS}, {count} processes"
        self.functions[name] = lambda: self._enter(name, team.evaluate())
        self.peers[name] = PACKAGE

    @property
    def case(self) -> str:
        """What is evaluated, in words."""
        shape = "x".join(map(str, self.subject.images.shape[1:]))
        return (
            f"{self.subject.settings['recipe']['name']}, {len(self.subject.images)} images "
            f"{shape}, {self.subject.version} AutoAttack"
        )

    def rows(self, rounds: int) -> list[BenchRow]:
        """Evaluate with each side once and then ``rounds`` times, compare each time, and report."""
        device = self.subject.images.device.type
        timings = interleaved(self.functions, warmup=0, rounds=rounds, device=device)
        settings = self._settings()
        origin = provenance(settings, device=device)
        fields: dict[str, Any] = {
            "table": TABLE,
            "case": self.case,
            "settings": settings,
            "origin": origin,
        }
        row = partial(BenchRow, **fields)
        return [
            *time_rows(timings, baseline=PACKAGE, **fields),
            *self._format_rows(timings, row),
            *self._finding_rows(row),
            *self._share_rows(row),
        ]

    def _format_rows(self, timings: Mapping[str, Timing], row: MakeRow) -> list[BenchRow]:
        """Compare channels_last with the package in that format, and with contiguous images."""
        ours, package = f"{OURS}{CHANNELS_LAST}", f"{PACKAGE}{CHANNELS_LAST}"
        if ours not in timings:
            return []
        median, low, high = ratios(timings, package)[ours]
        ratio = row(
            method=ours,
            metric="ratio_to_package_in_this_format",
            unit="ratio",
            value=median,
            low=low,
            high=high,
            repeats=len(timings[ours].seconds),
        )
        apart = float(self.found[ours].differences(self.found[OURS])["flags"])
        metric = "flags_differing_from_contiguous"
        return [ratio, row(method=ours, metric=metric, unit="samples", value=apart)]

    def _finding_rows(self, row: MakeRow) -> list[BenchRow]:
        """Say what each side found, and how ours differs from the package: not at all."""
        rows = []
        for ours, package in self.peers.items():
            for what, count in self.found[ours].differences(self.found[package]).items():
                metric = f"{what}_differing"
                rows.append(row(method=ours, metric=metric, unit="samples", value=float(count)))
        for name, finding in self.found.items():
            value = finding.robust_accuracy
            rows.append(row(method=name, metric="robust_accuracy", unit="share", value=value))
        return rows

    def _share_rows(self, row: MakeRow) -> list[BenchRow]:
        """Say where our time goes, attack by attack, in the last evaluation."""
        return [
            row(
                method=f"{name}: {record.name}",
                metric="share",
                unit="share",
                value=record.seconds / result.seconds if result.seconds else 0.0,
            )
            for name, result in self.results.items()
            for record in result.attacks
        ]

    def _enter_result(self, name: str, result: AutoAttackResult) -> None:
        self.results[name] = result
        self._enter(name, Finding(result.robust, result.predictions))

    def _enter(self, name: str, finding: Finding) -> None:
        """Keep a finding; it has to agree with the last of the same side and with the package's."""
        for other in (name, self.peers.get(name)):
            if other in self.found:
                check_same(self.found[other], finding, what=f"{other} and {name}")
        self.found[name] = finding

    def _settings(self) -> dict[str, Any]:
        subject, result = self.subject, self.results[OURS]
        return {
            **subject.settings,
            "num_images": len(subject.images),
            "eps": subject.eps,
            "norm": subject.norm,
            "version": subject.version,
            "batch_size": subject.batch_size,
            "seed": subject.seed,
            "threads": torch.get_num_threads(),
            "device": subject.images.device.type,
            "dtype": "float32",
            "package_version": result.package_version,
            "clean_accuracy": result.clean_accuracy,
            "attacks": [record.name for record in result.attacks],
        }
