"""A run's evaluated weights in the formats of others: RobustBench, safetensors, ONNX."""

import contextlib
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dkl import __version__, config
from dkl.build.model_info import Submission, describe_model
from dkl.build.objects import build_data
from dkl.build.runs import checkpoint_name, load_run_model, read_recipe, write_text
from dkl.models import save_weights
from dkl.models.dual_batch_norm import AUXILIARY_SUFFIX
from dkl.reports import read_run

logger = logging.getLogger(__name__)

ExportFormat = Literal["robustbench", "safetensors", "onnx"]
Tell = Callable[[str], None]
_CHANGEABLE = ("data.folder=", "data.download=")
# RobustBench looks for these anywhere in a name and cuts as many characters off its beginning.
_CUT_BY_ROBUSTBENCH = ("module.", "model.")


@dataclass(frozen=True)
class _Export:
    """What every format needs to know.

    Args:
        model: with the exported weights, in eval mode.
        state: names and tensors without auxiliary batch-norm layers.
        image_shape: (C, H, W) of the data.
        weights_hash: SHA-256 of the run's weights, as its results name it.
        checkpoint: "best", "last" or a folder's name.
    """

    run_dir: Path
    recipe: config.Recipe
    model: nn.Module
    state: dict[str, Tensor]
    image_shape: tuple[int, ...]
    num_classes: int
    weights_hash: str
    checkpoint: str

    @property
    def normalization(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation that are built into the model."""
        if not hasattr(self.model, "input_mean"):
            return None
        mean, std = (self.model.get_buffer(f"input_{name}").flatten() for name in ("mean", "std"))
        return mean.tolist(), std.tolist()

    @property
    def metadata(self) -> dict[str, str]:
        """What is needed to build the model again, and where the weights come from."""
        mean, std = self.normalization or (None, None)
        return {
            "recipe": self.recipe.name,
            "seed": str(self.recipe.seed),
            "checkpoint": self.checkpoint,
            "dataset": self.recipe.data.name,
            "model": self.recipe.model.name,
            "model_kwargs": json.dumps(self.recipe.model.kwargs),
            "num_classes": str(self.num_classes),
            "in_channels": str(self.image_shape[0]),
            "mean": json.dumps(mean),
            "std": json.dumps(std),
            "weights_hash": self.weights_hash,
            "dkl_version": __version__,
        }


def export_run(
    run: Path,
    *,
    format: ExportFormat,
    out: Path | None = None,
    which: str = "best",
    submission: Submission | None = None,
    data_overrides: list[str] | None = None,
    force: bool = False,
    tell: Tell | None = None,
) -> list[Path]:
    """Write the weights that evaluation uses, averaged ones if there are any, for others to load.

    - ``robustbench``: a flat state dict of float32 CPU tensors (.pt) that its strict loader takes,
      and the entry's model_info (.json) with the numbers that the run's results hold.
    - ``safetensors``: the weights in their own type, and in the header what builds the model again;
      ``dkl.models.load_checkpoint`` reads it.
    - ``onnx``: the network from images [N, C, H, W] in [0, 1] to logits, normalisation included,
      for batches of any size.

    Auxiliary batch-norm layers are left out. A file appears complete or not at all.

    Args:
        run: a run folder, or one of its checkpoints.
        format: see above.
        out: folder for the files; ``RUN/export`` if None.
        which: "best" or "last"; for a run.
        submission: what RobustBench asks and the run does not know; only for that format.
        data_overrides: ``data.folder=...`` and ``data.download=...``, where the data has moved.
        force: replace files that exist.
        tell: called with each note for people; None logs them as warnings.

    Returns:
        The files.

    Raises:
        ValueError: not a run, an unknown format, weights that the format cannot hold, or an option
            that would be ignored.
        FileExistsError: a file exists and ``force`` is False; nothing is written then.
        ModuleNotFoundError: the format needs a package that is not installed.
    """
    if format not in get_args(ExportFormat):
        raise ValueError(
            f"format must be one of {', '.join(get_args(ExportFormat))}; got {format!r}"
        )
    if submission is not None and format != "robustbench":
        raise ValueError(f"a submission belongs to format robustbench; {format} would ignore it")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"out is the folder for the files, and {out} is a file")
    if format == "onnx":
        _need_onnx()
    export = _load(run, which, data_overrides or [])
    notify = tell if tell is not None else logger.warning
    if left_out := len(export.model.state_dict()) - len(export.state):
        notify(f"left out {left_out} entries of auxiliary batch-norm layers")
    folder = export.run_dir / "export" if out is None else out
    if format == "robustbench":
        return _write_robustbench(export, folder, submission or Submission(), force, notify)
    path = folder / f"{export.recipe.name}.{format}"
    _refuse_existing([path], force)
    if format == "safetensors":
        save_weights(export.state, path, {"format": "pt", **export.metadata})
    else:
        _write_onnx(export, path)
    return [path]


def robustbench_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as RobustBench's loader needs them: float32 on the CPU, under plain names.

    Args:
        state: names and tensors of any float type and device.

    Returns:
        New tensors that share no memory; integers (batch-norm's counters) stay integers.

    Raises:
        ValueError: the loader would damage a name: it cuts "module." and "model." off, or as many
            characters, wherever in a name they stand.

    Example:
        >>> robustbench_state({"fc.bias": torch.ones(1, dtype=torch.float64)})
        {'fc.bias': tensor([1.])}
    """
    if damaged := [name for name in state if any(part in name for part in _CUT_BY_ROBUSTBENCH)]:
        raise ValueError(
            f"RobustBench cannot load {len(damaged)} of the names ({', '.join(damaged[:3])}): it "
            "cuts characters off every name in which 'module.' or 'model.' stands; rename those "
            "parts of the model, or use another format"
        )
    return {
        name: value.detach().to(
            device="cpu",
            dtype=torch.float32 if value.is_floating_point() else value.dtype,
            memory_format=torch.contiguous_format,
            copy=True,
        )
        for name, value in state.items()
    }


def _load(run: Path, which: str, overrides: list[str]) -> _Export:
    if settled := [text for text in overrides if not text.startswith(_CHANGEABLE)]:
        raise ValueError(
            f"training has settled {', '.join(settled)}; what may be changed for an export is "
            "data.folder and data.download"
        )
    run_dir, recipe = read_recipe(run)
    changed = config.override(recipe, overrides)
    data = build_data(changed.data, recipe.seed).train
    model, weights_hash = load_run_model(run, recipe, data, which)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not any(part.endswith(AUXILIARY_SUFFIX) for part in name.split("."))
    }
    return _Export(
        run_dir=run_dir,
        recipe=recipe,
        model=model,
        state=state,
        image_shape=data.image_shape,
        num_classes=data.num_classes,
        weights_hash=weights_hash,
        checkpoint=checkpoint_name(run_dir, run, which),
    )


def _write_robustbench(
    export: _Export, folder: Path, submission: Submission, force: bool, tell: Tell
) -> list[Path]:
    state = robustbench_state(export.state)
    results = read_run(export.run_dir).results
    info = describe_model(
        export.recipe, results, export.weights_hash, export.normalization, submission
    )
    weights_path, info_path = folder / f"{info.entry}.pt", folder / f"{info.entry}.json"
    _refuse_existing([weights_path, info_path], force)
    with _replacing(weights_path) as temporary:
        torch.save(state, temporary)
    write_text(info_path, json.dumps(info.fields, indent=2) + "\n")
    for note in info.notes:
        tell(note)
    return [weights_path, info_path]


class _ImagesToLogits(nn.Module):
    """Gives the input the name that it has in the ONNX file."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"exporting to ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def _write_onnx(export: _Export, path: Path) -> None:
    model = _ImagesToLogits(export.model).float().eval()
    # Two images, because a batch of one would be taken for a constant.
    example = torch.zeros(2, *export.image_shape)
    try:
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"{export.recipe.model.name} cannot be written as ONNX: {str(error).splitlines()[0]}"
        ) from error
    assert program is not None, "without a file to write, the program is returned"
    program.model.metadata_props.update(export.metadata)
    with _replacing(path) as temporary:
        # One file: weights beside it would get lost.
        program.save(temporary, external_data=False)


def _refuse_existing(paths: list[Path], force: bool) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing and not force:
        raise FileExistsError(f"{', '.join(existing)} exists; --force (force=True) replaces it")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to, which becomes ``path`` once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
