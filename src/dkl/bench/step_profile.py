"""Where the time of a training step goes: CPU time by kind of work and by phase of the step.

The profiler's events nest. Scopes opened here tell which part of the step an event belongs to, and
a backward node follows its forward operation, whose sequence number it shares.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from dkl.engine.settings import LoopSettings
from dkl.engine.setup import Training
from dkl.engine.step import TrainingStep, WeightPerturbation
from dkl.methods.protocol import Batch, Method, StepContext, StepOutput

KINDS = (
    "convolution forward",
    "convolution backward",
    "batch norm",
    "other layers",
    "loss",
    "optimiser",
    "awp",
    "other",
)
"""awp: what is done to the weights; its forward and backward passes are layers and loss."""

PHASES = ("prepare", "direction", "update")
"""Attack or teacher; the pass that finds the weight perturbation; everything else."""

Shares = Mapping[tuple[str, str], float]
"""(phase, kind) -> share of the step's CPU time; the shares add up to one."""

_SCOPE = "dkl: "
_BACKWARD = "autograd::engine::evaluate_function: "


def profile_step(
    training: Training,
    settings: LoopSettings,
    perturbation: WeightPerturbation | None,
    networks: Sequence[nn.Module],
    take_step: Callable[[TrainingStep], object],
) -> Shares:
    """Profile one training step on the CPU.

    Args:
        training: the objects of a run, on the CPU, the model not compiled; it is trained one step.
        settings: of the loop.
        perturbation: AWP, or None.
        networks: the model, and a teacher where there is one: what counts as layers.
        take_step: runs the given step once.

    Returns:
        The shares of all phases and kinds.

    Raises:
        ValueError: the run is not on the CPU, where alone the shares mean time.
    """
    if training.device.type != "cpu":
        raise ValueError(f"a step is profiled on the CPU; this run is on {training.device}")
    recorded = replace(training, method=cast(Method, _RecordedMethod(training.method)))
    awp = None if perturbation is None else _RecordedPerturbation(perturbation)
    step = TrainingStep(recorded, settings, awp)
    with ExitStack() as hooks:
        for network in networks:
            hooks.enter_context(_recorded_calls(network))
        hooks.enter_context(_recorded_objective(training.method))
        with profile(activities=[ProfilerActivity.CPU]) as profiler, _scope("step"):
            take_step(step)
    return _shares(profiler.events() or [])


def _scope(name: str) -> AbstractContextManager[Any]:
    scope: AbstractContextManager[Any] = record_function(_SCOPE + name)
    return scope


class _RecordedMethod:
    """Opens a scope around the two parts of a method that a step calls."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def prepare(self, model: nn.Module, batch: Batch, context: StepContext) -> Batch:
        """Do what the method does."""
        with _scope("prepare"):
            return self._method.prepare(model, batch, context)

    def loss(self, model: nn.Module, batch: Batch, context: StepContext) -> StepOutput:
        """Do what the method does."""
        with _scope("loss"):
            return self._method.loss(model, batch, context)


class _RecordedPerturbation:
    """Opens scopes around what a weight perturbation does, and around its direction pass."""

    def __init__(self, perturbation: WeightPerturbation) -> None:
        self._perturbation = perturbation
        self.start_epoch = perturbation.start_epoch
        self.step_inside = perturbation.step_inside

    @contextmanager
    def perturbed(self, model: nn.Module, compute_gradients: Callable[[], None]) -> Iterator[None]:
        """Do what the perturbation does."""

        def direction() -> None:
            with _scope("direction"):
                compute_gradients()

        with ExitStack() as stack:
            with _scope("awp"):
                stack.enter_context(self._perturbation.perturbed(model, direction))
            yield
            with _scope("awp"):
                stack.close()


@contextmanager
def _recorded_calls(network: nn.Module) -> Iterator[None]:
    open_calls: list[AbstractContextManager[Any]] = []

    def enter(*_: object) -> None:
        open_calls.append(_scope("layers"))
        open_calls[-1].__enter__()

    def leave(*_: object) -> None:
        open_calls.pop().__exit__(None, None, None)

    first = network.register_forward_pre_hook(enter, prepend=True)
    last = network.register_forward_hook(leave)
    try:
        yield
    finally:
        first.remove()
        last.remove()


@contextmanager
def _recorded_objective(method: Method) -> Iterator[None]:
    """Count what an attack maximises as loss."""
    inner = getattr(method, "inner", None)
    if inner is None:
        yield
        return

    def recorded(*arguments: Any) -> Any:
        with _scope("loss"):
            return inner(*arguments)

    vars(method)["inner"] = recorded
    try:
        yield
    finally:
        vars(method)["inner"] = inner


def _path(event: Any) -> list[str]:
    """Return the names of an event and of all around it, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _innermost_scope(path: Sequence[str]) -> str:
    return next((n.removeprefix(_SCOPE) for n in path if n.startswith(_SCOPE)), "")


def _forward_scopes(events: Sequence[Any]) -> dict[int, str]:
    """Return the scope of each forward operation that has a backward node, by sequence number.

    Operations without a node carry the number of the next one that has: the last one counts.
    """
    ordered = sorted(events, key=lambda event: event.time_range.start)
    return {
        event.sequence_nr: _innermost_scope(_path(event))
        for event in ordered
        if event.sequence_nr >= 0
        and not event.name.startswith(_BACKWARD)
        # Nodes themselves are recorded a second time, without the engine's prefix.
        and not any(name.startswith(_BACKWARD) for name in _path(event))
    }


def _kind(event: Any, forward_scopes: Mapping[int, str]) -> str:
    path = _path(event)
    if any(name.startswith("Optimizer.") for name in path):
        return "optimiser"
    scope = _innermost_scope(path)
    node, around = _backward_node(event)
    if node is not None:
        scope, path = forward_scopes.get(node.sequence_nr, ""), around
    else:
        path = path[: next(i for i, n in enumerate([*path, _SCOPE]) if n.startswith(_SCOPE))]
    if scope in ("loss", "awp"):
        return scope
    if scope != "layers":
        return "other"
    names = [name.lower() for name in path]
    if any("convolution" in name for name in names):
        return "convolution forward" if node is None else "convolution backward"
    is_norm = any("batch_norm" in name or "batchnorm" in name for name in names)
    return "batch norm" if is_norm else "other layers"


def _backward_node(event: Any) -> tuple[Any, list[str]]:
    """Return the backward node that an event is part of, and the names up to it; or None."""
    names = []
    while event is not None:
        names.append(event.name)
        if event.name.startswith(_BACKWARD):
            return event, names
        event = event.cpu_parent
    return None, []


def _phase(path: Sequence[str]) -> str:
    scopes = [name.removeprefix(_SCOPE) for name in path if name.startswith(_SCOPE)]
    if "prepare" in scopes:
        return "prepare"
    return "direction" if "direction" in scopes or "awp" in scopes else "update"


def _shares(events: Sequence[Any]) -> Shares:
    forward_scopes = _forward_scopes(events)
    micros: Counter[tuple[str, str]] = Counter()
    for event in events:
        path = _path(event)
        if path[-1] == _SCOPE + "step":
            micros[_phase(path), _kind(event, forward_scopes)] += event.self_cpu_time_total
    total = sum(micros.values())
    if total <= 0:
        raise RuntimeError("the profiler recorded nothing; is another profiler running?")
    return {(phase, kind): micros[phase, kind] / total for phase in PHASES for kind in KINDS}
