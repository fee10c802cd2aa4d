"""The two sides of a training step that is timed: `dkl.train`'s own, and the published scripts'.

Both sides start from one model, images, class table and noise. Where scripts differ in what updates
running statistics of batch-norm, the compared one does as ours: the attack runs in eval mode, the
direction pass of AWP leaves the model's statistics alone (the scripts' second model keeps its own),
and the update pass forwards adversarial images first, then clean ones.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dkl import methods
from dkl.attacks import AdversarialWeightPerturbation, PGDSettings, ThreatModel
from dkl.attacks.noise import gaussian_noise
from dkl.bench.step_profile import Shares, profile_step
from dkl.bench.straightforward import AdversarialScript, DistillationScript, StepNumbers
from dkl.engine.averaging import AverageSettings
from dkl.engine.batches import make_batch
from dkl.engine.noise import SampleNoise
from dkl.engine.plan import MicroBatchPlan
from dkl.engine.settings import LoopSettings
from dkl.engine.setup import make_accelerator, set_up
from dkl.engine.step import TrainingStep
from dkl.methods.protocol import Batch
from dkl.models import create_model

CASES = ("ikl_at", "ikl_at_awp", "ikl_kd")
Kind = Literal["ikl_at", "ikl_kd", "kd"]

OURS = "dkl"
PLAIN_KD = "dkl, plain KD"
BASELINE = "straightforward"
IMAGE_GRADIENTS = "straightforward, image gradients"
OPTIONS: dict[str, dict[str, Any]] = {
    "contiguous": {"channels_last": False},
    "channels_last": {"channels_last": True},
    "compile": {"compile_model": True},
    "bf16": {"mixed_precision": "bf16"},
}
"""Settings of the loop under which our step can be timed as well."""

_MEAN, _STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100


def our_settings(options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what our side changes in the loop's settings, by the name in its rows.

    Args:
        options: further settings to time, from ``OPTIONS``, beside our side as it is.

    Raises:
        ValueError: an unknown option.

    Example:
        >>> our_settings(["bf16"])
        {'dkl': {}, 'dkl, bf16': {'mixed_precision': 'bf16'}}
    """
    if unknown := [option for option in options if option not in OPTIONS]:
        raise ValueError(f"an option is one of {', '.join(OPTIONS)}; got {', '.join(unknown)}")
    # In the order of OPTIONS: the accelerator's precision is a setting of the process, bf16 last.
    chosen = {f"{OURS}, {name}": OPTIONS[name] for name in OPTIONS if name in options}
    return {OURS: {}, **chosen}


@dataclass(frozen=True)
class Case:
    """What is trained, on what: networks by name, 3-channel images, numbers of the step."""

    name: str
    model: str
    teacher: str | None
    num_classes: int
    image_size: int
    batch_size: int
    numbers: StepNumbers

    @property
    def kind(self) -> Kind:
        """Return the method that is timed."""
        return "ikl_at" if self.teacher is None else "ikl_kd"

    def describe(self) -> str:
        """Return what a row calls this case."""
        size, teacher = self.image_size, f" from {self.teacher}" if self.teacher else ""
        shape = f"[{self.batch_size}, 3, {size}, {size}]"
        return f"{self.name}: {self.model}{teacher}, {shape}, {self.num_classes} classes"


@dataclass(frozen=True)
class Problem:
    """What both sides start from; never changed, each side takes copies."""

    model: nn.Module
    teacher: nn.Module | None
    images: Tensor
    labels: Tensor  # [B]
    table: Tensor  # [C, C]


@dataclass(frozen=True)
class StepState:
    """What a step changes: name -> tensor, copies in float64 on the CPU."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    class_sums: dict[str, Tensor]
    average: dict[str, Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, class_sums: Tensor | None = None, average: nn.Module | None = None
    ) -> "StepState":
        """Copy the state out of a model, its class statistics and its average."""

        def copied(named: Any) -> dict[str, Tensor]:
            return {
                name: value.detach().to("cpu", torch.float64, copy=True)
                for name, value in named
                if value is not None
            }

        return cls(
            parameters=copied(model.named_parameters()),
            buffers=copied(model.named_buffers()),
            class_sums=copied([("sums", class_sums)]),
            average=copied([] if average is None else average.named_parameters()),
        )


def make_case(name: str, *, quick: bool, batch_size: int | None = None) -> Case:
    """Return a case by its name, in full size or in one that takes a moment.

    Args:
        name: one of ``CASES``.
        quick: WRN-10-1, 10 classes, 16x16 images, 8 samples, 2 steps of the attack.
        batch_size: instead of 64 (8).

    Raises:
        ValueError: unknown name, or no samples.

    Example:
        >>> make_case("ikl_kd", quick=False).describe()
        'ikl_kd: wrn_16_2 from wrn_40_2, [64, 3, 32, 32], 100 classes'
    """
    if name not in CASES:
        raise ValueError(f"a case is one of {', '.join(CASES)}; got {name!r}")
    if batch_size is not None and batch_size < 2:
        raise ValueError(f"batch-norm needs a batch_size of at least 2; got {batch_size}")
    if name == "ikl_kd":
        # CIFAR-100, wrn_40_2 to wrn_16_2, with class weights as the paper describes them.
        numbers = StepNumbers(
            mse_weight=12.0, ce_weight=3.0, temperature=4.0, learning_rate=0.05,
            awp_gamma=0.0, average_decay=0.0,
        )  # fmt: skip
        model, teacher = ("wrn_10_1", "wrn_10_2") if quick else ("wrn_16_2", "wrn_40_2")
    else:
        numbers = StepNumbers(
            awp_gamma=0.005 if name == "ikl_at_awp" else 0.0, num_steps=2 if quick else 5
        )
        model, teacher = "wrn_10_1" if quick else "wrn_16_4", None
    classes, image_size, samples = (10, 16, 8) if quick else (100, 32, 64)
    return Case(name, model, teacher, classes, image_size, batch_size or samples, numbers)


def make_problem(case: Case, seed: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Return random images, labels and class table, and networks with the images' statistics.

    Args:
        case: what is trained.
        seed: of everything random.
        dtype: of weights and images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = case.image_size
        images = torch.rand(case.batch_size, 3, size, size)
        labels_B = torch.randint(case.num_classes, (case.batch_size,))
        table_CC = torch.softmax(torch.randn(case.num_classes, case.num_classes), dim=1)
        networks = [
            _network(name, case.num_classes, images).to(dtype)
            for name in (case.model, case.teacher)
            if name is not None
        ]
    teacher = networks[1] if len(networks) > 1 else None
    return Problem(networks[0], teacher, images.to(dtype), labels_B, table_CC.to(dtype))


def _network(name: str, num_classes: int, images: Tensor) -> nn.Module:
    """Build a network whose running statistics fit the images, as if it had been trained a bit."""
    model = create_model(name, num_classes, mean=_MEAN, std=_STD)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


class OurStep:
    """A step as `dkl.train` takes it, set up by the engine itself.

    Args:
        problem: what to start from.
        numbers: of the step.
        kind: the method.
        settings: of the loop: memory format, precision, compilation, seed.
    """

    def __init__(
        self, problem: Problem, numbers: StepNumbers, kind: Kind, settings: LoopSettings
    ) -> None:
        self.settings = settings
        self.kind = kind
        teacher = copy.deepcopy(problem.teacher)
        self.networks = [] if teacher is None else [teacher]
        self.method = _make_method(kind, len(problem.table), numbers, teacher)
        self.perturbation = (
            AdversarialWeightPerturbation(numbers.awp_gamma) if numbers.awp_gamma > 0 else None
        )

        def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                parameters,
                lr=numbers.learning_rate,
                momentum=numbers.momentum,
                weight_decay=numbers.weight_decay,
            )

        decay = numbers.average_decay
        self.training = set_up(
            make_accelerator(settings),
            self.method,
            copy.deepcopy(problem.model),
            settings,
            make_optimizer,
            AverageSettings(decay) if decay > 0 else None,
        )
        self.training.model.train()
        self.networks.insert(0, self.training.model)
        if self.method.term is not None and self.method.term.statistics is not None:
            self.method.term.statistics.table.copy_(problem.table)
        self.batch = self._batch(problem)
        self._step = TrainingStep(self.training, settings, self.perturbation)
        self._count = 0
        self.adversarial: Tensor | None = None

    def _batch(self, problem: Problem) -> Batch:
        indices = torch.arange(len(problem.images))
        plan = MicroBatchPlan(indices, torch.ones_like(indices, dtype=torch.bool))
        return make_batch(
            plan,
            problem.images,
            problem.labels,
            settings=self.settings,
            augment=None,
            step=0,
            device=self.training.device,
        )

    def __call__(self) -> None:
        """Take a step, and update the average."""
        self.take(self._step)

    def take(self, step: TrainingStep) -> None:
        """Take a step with another ``TrainingStep`` over the same objects."""
        report = step.run([self.batch], epoch=0, step=self._count, num_items=len(self.batch.labels))
        self.adversarial = report.batches[0].extras.get("adversarial")
        self._count += 1
        if self.training.average is not None:
            self.training.average.update(self.training.model, progress=1.0)

    def state(self) -> StepState:
        """Return what the step changed."""
        term, average = self.method.term, self.training.average
        statistics = None if term is None else term.statistics
        return StepState.of(
            self.training.model,
            None if statistics is None else statistics.sums,
            None if average is None else average.model,
        )

    def profile(self) -> Shares:
        """Return where the time of a step goes."""
        return profile_step(
            self.training, self.settings, self.perturbation, self.networks, self.take
        )


def _make_method(
    kind: Kind, num_classes: int, numbers: StepNumbers, teacher: nn.Module | None
) -> methods.AdversarialTraining | methods.LogitDistillation:
    weights: dict[str, Any] = {
        "mse_weight": numbers.mse_weight,
        "ce_weight": numbers.ce_weight,
        "weight_temperature": numbers.weight_temperature,
    }
    if teacher is None:
        threat = ThreatModel("Linf", numbers.eps)
        attack = PGDSettings(threat, numbers.num_steps, numbers.step_size, "gaussian")
        return methods.ikl_at(attack, num_classes, **weights)
    if kind == "kd":
        return methods.kd(teacher, temperature=numbers.temperature)
    return methods.ikl_kd(teacher, num_classes, temperature=numbers.temperature, **weights)


class _LoopNoise:
    """The noise of our loop's attacks, step after step, for all samples in order."""

    def __init__(self, seed: int) -> None:
        self._seed, self._step = seed, 0

    def __call__(self, images: Tensor) -> Tensor:
        indices = torch.arange(len(images), device=images.device)
        draw = SampleNoise(self._seed, "prepare", self._step, indices, images.dtype)
        self._step += 1
        return gaussian_noise(images, draw)


class ScriptStep:
    """The same step as published scripts take it.

    Args:
        problem: what to start from.
        numbers: of the step.
        device: where it runs.
        parameter_gradients: see ``AdversarialScript``.
        seed: of our loop, whose noise the attacks then start with; None: torch's, as in scripts.
    """

    def __init__(
        self,
        problem: Problem,
        numbers: StepNumbers,
        *,
        device: torch.device,
        parameter_gradients: bool = True,
        seed: int | None = None,
    ) -> None:
        model = copy.deepcopy(problem.model).to(device)
        table_CC = problem.table.to(device)
        self.images, self.labels_B = problem.images.to(device), problem.labels.to(device)
        self.script: AdversarialScript | DistillationScript
        if problem.teacher is not None:
            teacher = copy.deepcopy(problem.teacher).to(device)
            self.script = DistillationScript(model, teacher, table_CC, numbers)
            return
        self.script = AdversarialScript(
            model,
            table_CC,
            numbers,
            parameter_gradients=parameter_gradients,
            noise=None if seed is None else _LoopNoise(seed),
        )

    def __call__(self) -> None:
        """Take a step, and update the average."""
        self.script(self.images, self.labels_B)

    def follow(self, adversarial: Tensor | None) -> float:
        """Take a step, but update from images that another attack found.

        Args:
            adversarial: those images; None where there is no attack.

        Returns:
            The share of pixels in which this side's own attack ended elsewhere.
        """
        if adversarial is None or isinstance(self.script, DistillationScript):
            self()
            return 0.0
        own = self.script.attack(self.images, self.labels_B)
        theirs = adversarial.to(own).contiguous()
        self.script.update(self.images, theirs, self.labels_B)
        # Rounding moves no pixel this far, the other sign of a gradient does.
        is_elsewhere = (own - theirs).abs() > self.script.numbers.step_size / 2
        return float(is_elsewhere.double().mean())

    def state(self) -> StepState:
        """Return what the step changed."""
        script = self.script
        return StepState.of(script.model, script.sums_CC, script.average)
