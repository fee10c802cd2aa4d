"""Everything one training run works with, placed on its device."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dkl.engine.averaging import AverageSettings, WeightAverage
from dkl.engine.batch_norm import require_batch_norm, set_momentum, without_decay
from dkl.engine.processes import copy_from_first
from dkl.engine.settings import LoopSettings
from dkl.methods.protocol import Method

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""Parameters, or a list of parameter groups, to an optimiser."""


@dataclass
class Training:
    """The objects of a run.

    Args:
        accelerator: devices, processes, precision.
        model: the plain model; its state dict is what checkpoints hold.
        wrapped: the model as losses call it; synchronises gradients over processes.
        method: the training method.
        method_module: the same object, seen as the module that holds its state.
        method_parameters: trainable parameters of the method that are not the model's.
        optimizer: over the parameters of model and method.
        average: averaged weights, or None.
    """

    accelerator: Accelerator
    model: nn.Module
    wrapped: nn.Module
    method: Method
    method_module: nn.Module
    method_parameters: list[nn.Parameter]
    optimizer: Any
    average: WeightAverage | None

    @property
    def device(self) -> torch.device:
        """Return the training device of this process."""
        return cast(torch.device, self.accelerator.device)

    @property
    def evaluated_model(self) -> nn.Module:
        """Return the model that is validated: the averaged one if there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def scaler(self) -> Any:
        """Return the gradient scaler of fp16 training, or None."""
        return self.accelerator.scaler

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of model and method."""
        own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return own + self.method_parameters


def make_accelerator(settings: LoopSettings) -> Accelerator:
    """Return an accelerator for the settings.

    Raises:
        ValueError: if the device cannot do what they ask for.
    """
    # The state is shared by all accelerators of a process and would keep the precision of an
    # earlier run; the process group stays.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    # Accumulation is the loop's business, whatever the environment says.
    accelerator.gradient_accumulation_steps = 1
    device = accelerator.device
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU; use 'bf16' or 'no' on the CPU")
    if settings.batch_norm == "sync" and accelerator.num_processes > 1 and device.type == "cpu":
        raise ValueError("batch_norm='sync' needs GPUs; use batch_norm='local' on the CPU")
    return accelerator


def set_up(
    accelerator: Accelerator,
    method: Method,
    model: nn.Module,
    settings: LoopSettings,
    make_optimizer: MakeOptimizer,
    weight_average: AverageSettings | None,
) -> Training:
    """Seed the global generators, place model and method, and build what trains them.

    Every process ends up with the weights of the first one.

    Raises:
        ValueError: if the method is not a module, there is no batch-norm layer for a setting that
            needs one, or the optimiser does not take parameter groups where it has to.
    """
    if not isinstance(method, nn.Module):
        raise ValueError(
            f"a method must be an nn.Module, so that its state can be saved; got "
            f"{type(method).__name__}"
        )
    set_seed(settings.seed, device_specific=True)
    device = accelerator.device
    if settings.batch_norm == "sync" and accelerator.num_processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    model.to(device=device, dtype=settings.torch_dtype)
    method.to(device=device)
    if settings.dtype == "float64":
        method.to(dtype=torch.float64)
    for setting in ("batch_norm_momentum", "batch_norm_first_momentum"):
        if getattr(settings, setting) is not None:
            require_batch_norm(model, setting)
    if settings.batch_norm_momentum is not None:
        set_momentum(model, settings.batch_norm_momentum)
    copy_from_first(accelerator, model)
    copy_from_first(accelerator, method)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    average = WeightAverage(model, weight_average) if weight_average is not None else None
    if settings.compile_model:
        model.compile()
    training = Training(
        accelerator=accelerator,
        model=model,
        wrapped=_wrapped(accelerator, model),
        method=method,
        method_module=method,
        method_parameters=_own_parameters(method, model),
        optimizer=None,
        average=average,
    )
    optimizer = _make_optimizer(training, settings, make_optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    training.optimizer = accelerator.prepare_optimizer(optimizer)
    return training


def _make_optimizer(
    training: Training, settings: LoopSettings, make_optimizer: MakeOptimizer
) -> torch.optim.Optimizer:
    parameters = training.trained_parameters()
    if settings.decay_batch_norm:
        return make_optimizer(parameters)
    groups, spared = without_decay(parameters, training.model, training.method_module)
    needed = (
        "decay_batch_norm=False needs make_optimizer to pass on the list of parameter groups that "
        "it is given, as torch's optimisers take it"
    )
    try:
        optimizer = make_optimizer(groups)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{needed}; it failed with: {error}") from error
    made = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if any(made.get(key, {}).get("weight_decay") != 0 for key in spared):
        raise ValueError(
            f"{needed}; the optimiser it made decays batch-norm parameters, or leaves them out"
        )
    return optimizer


def _own_parameters(method: nn.Module, model: nn.Module) -> list[nn.Parameter]:
    models = {id(parameter) for parameter in model.parameters()}
    return [p for p in method.parameters() if p.requires_grad and id(p) not in models]


def _wrapped(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    if accelerator.num_processes == 1:
        return model
    device = accelerator.device
    # Buffers are not broadcast at every forward: that would change them between the two forwards of
    # one loss, and the second would invalidate the graph of the first. PyTorch 2.14 renamed the
    # option; the new one still broadcasts once, here, where all processes have the same buffers.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, **options
    )
