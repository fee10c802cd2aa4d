"""Features of clean and adversarial images in the plane (figures 3a and 3b of the paper)."""

import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dkl.reports.groups import Group, find_rows_by, group_runs
from dkl.reports.records import Run, RunError
from dkl.reports.style import INK, add_legend, figure_style, new_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE_NAME = "features.npz"
_MAX_CLASSES = 20
_MAX_IMAGES = 600  # clean and adversarial features of each go into one embedding
_SEED = 0
_MEASURES = (("intra_inter_ratio", "intra/inter"), ("silhouette", "silhouette"))
_IMAGES = (("clean", "clean"), ("adversarial", "adv."), ("both", "both"))


@dataclass(frozen=True)
class Features:
    """Features of the same N images, clean and adversarial, with their labels."""

    clean_ND: "np.ndarray[Any, Any]"
    adversarial_ND: "np.ndarray[Any, Any]"
    labels_N: "np.ndarray[Any, Any]"


def read_features(run: Run) -> Features | None:
    """Read features.npz of a run.

    Args:
        run: whose folder may hold the file, with ``clean`` [N, D], ``adversarial`` [N, D] and
            ``labels`` [N].

    Returns:
        The features; None where there is no file.

    Raises:
        RunError: a file that does not hold them.
    """
    import numpy as np

    file = run.path / FILE_NAME
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            clean, adversarial, labels = (arrays[k] for k in ("clean", "adversarial", "labels"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{file} is not readable: {error}; evaluate the run again") from error
    shapes = (clean.shape, adversarial.shape, labels.shape)
    good = clean.ndim == 2 and clean.shape == adversarial.shape and labels.shape == clean.shape[:1]
    if not good or len(clean) < 4:
        raise RunError(
            f"{file} needs clean [N, D], adversarial [N, D] and labels [N] with N of at least 4, "
            f"got {', '.join(map(str, shapes))}; evaluate the run again"
        )
    if not (np.isfinite(clean).all() and np.isfinite(adversarial).all()):
        raise RunError(f"{file} holds features that are not finite; evaluate the run again")
    return Features(clean.astype("float32"), adversarial.astype("float32"), labels.astype("int64"))


def has_features(run: Run) -> bool:
    """Tell whether a run's folder holds features."""
    return (run.path / FILE_NAME).is_file()


def feature_map(
    runs: Iterable[Run], *, method: str | None = None, reference: str | None = None
) -> "Figure | None":
    """Plot t-SNE embeddings of features, two recipes side by side (figures 3a and 3b).

    Each run's clean (filled) and adversarial (open) features are embedded together, from the
    positions of their first two principal components and with a fixed seed. Up to 20 classes are
    shown. How compact the classes are stands in the titles, measured on the features themselves.

    Args:
        runs: at least one run; those with features.npz are shown.
        method: label of the recipe on the left; by default the first one with "ikl" in it, else
            the last one.
        reference: label of the recipe on the right; by default the first one with "trades" in it.

    Returns:
        The figure, of one panel where only one recipe has features; None where none has.

    Raises:
        ValueError: a label that no recipe has, or a file that does not hold features.
        ImportError: scikit-learn is not installed, naming the extra that brings it.
    """
    groups, _ = group_runs(runs)
    pair = _pair([g for g in groups if any(map(has_features, g.runs))], groups, method, reference)
    if not pair:
        return None
    chosen = _one_seed(pair)
    features = [read_features(run) for run in chosen]
    with figure_style():
        title = "Features of clean (filled) and adversarial (open) images, t-SNE"
        figure = new_figure(2.5 + 2.2 * (3 - len(pair)), title)
        # The panels' titles have three lines: keep them off the figure's.
        figure.set_layout_engine("constrained", h_pad=0.12)
        classes: list[int] = []
        panels = figure.subplots(1, len(pair), squeeze=False).flat
        for axes, group, run, one in zip(panels, pair, chosen, features, strict=True):
            assert one is not None
            some = _select(one)
            classes = sorted({*classes, *some.labels_N.tolist()})
            _draw(axes, some)
            axes.set_title(f"{group.label}, seed {run.seed}\n{_compactness(run)}", fontsize=8.5)
        _add_legend(figure, chosen[0], classes)
    return figure


def _pair(
    having: Sequence[Group], groups: Sequence[Group], method: str | None, reference: str | None
) -> list[Group]:
    known = [group.label for group in groups]
    for label in (method, reference):
        if label is not None and label not in known:
            raise ValueError(f"no recipe is labelled {label!r}; there are: {', '.join(known)}")

    def choose(label: str | None, word: str, others: Sequence[Group]) -> Group | None:
        if label is not None:
            return next((group for group in others if group.label == label), None)
        return next((group for group in others if word in group.label.lower()), None)

    right = choose(reference, "trades", having)
    rest = [group for group in having if group is not right]
    left = choose(method, "ikl", rest) or (rest[-1] if rest and method is None else None)
    return [group for group in (left, right) if group is not None]


def _one_seed(pair: Sequence[Group]) -> list[Run]:
    """Return a run with features of each recipe, of one seed where they share one."""
    having = [{run.seed: run for run in group.runs if has_features(run)} for group in pair]
    shared = set.intersection(*({*one} for one in having))
    return [one[min(shared)] if shared else one[min(one)] for one in having]


def _select(features: Features) -> Features:
    """Keep the first classes, and as many images of each as make the embedding affordable."""
    import numpy as np

    classes = np.unique(features.labels_N)[:_MAX_CLASSES]
    most = max(2, _MAX_IMAGES // len(classes))
    places = np.concatenate([np.flatnonzero(features.labels_N == c)[:most] for c in classes])
    return Features(
        features.clean_ND[places], features.adversarial_ND[places], features.labels_N[places]
    )


def _embed(features: Features) -> "np.ndarray[Any, Any]":
    """Return positions [2 N, 2]: of the clean features, then of the adversarial ones."""
    import numpy as np

    try:
        from sklearn.manifold import TSNE

        threads = import_module("threadpoolctl")  # comes with scikit-learn
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install 'dkl[train]'") from error
    both_ND = np.concatenate([features.clean_ND, features.adversarial_ND])
    perplexity = min(30.0, (len(both_ND) - 1) / 3)
    has_plane = both_ND.shape[1] >= 2 and float(both_ND.std(0).max()) > 0
    start = "pca" if has_plane else "random"
    embedding = TSNE(init=start, perplexity=perplexity, random_state=_SEED)
    # One thread: same picture everywhere, and many threads on a busy machine take far longer.
    with threads.threadpool_limits(limits=1):
        positions: np.ndarray[Any, Any] = embedding.fit_transform(both_ND)
    return positions


def _draw(axes: "Axes", features: Features) -> None:
    positions = _embed(features)
    num_images = len(features.labels_N)
    colours = [_colour(label) for label in features.labels_N.tolist()]
    clean_x, clean_y = positions[:num_images].T
    adversarial_x, adversarial_y = positions[num_images:].T
    axes.scatter(
        adversarial_x, adversarial_y, s=11, facecolors="none", edgecolors=colours, linewidths=0.6
    )
    axes.scatter(clean_x, clean_y, s=9, c=colours, linewidths=0)
    axes.set(xticks=[], yticks=[], xlabel="t-SNE, no unit")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.set_box_aspect(1)


def _colour(label: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"]((label % 10 * 2 + label // 10 % 2) / 20 + 0.01)


def _compactness(run: Run) -> str:
    rows = find_rows_by(
        run,
        "feature_compactness",
        lambda row: (str(row.details.get("measure")), str(row.details.get("images"))),
    )
    lines = []
    for measure, title in _MEASURES:
        parts = [
            f"{name} {rows[measure, images].value:.2f}"
            for images, name in _IMAGES
            if (measure, images) in rows
        ]
        if parts:
            lines.append(f"{title}: {', '.join(parts)}")
    return "\n".join(lines) or "compactness not measured"


def _add_legend(figure: "Figure", run: Run, classes: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    names = run.class_names
    handles = [
        Line2D([], [], color=_colour(index), marker="o", markersize=5, linestyle="")
        for index in classes
    ]
    labels = [re.sub(r"\s+", " ", names[i]) if i < len(names) else str(i) for i in classes]
    for filled, label in ((True, "clean"), (False, "adversarial")):
        face = INK if filled else "none"
        marker = Line2D([], [], color=INK, marker="o", markersize=5, linestyle="")
        marker.set_markerfacecolor(face)
        handles.append(marker)
        labels.append(label)
    add_legend(figure, handles, labels)
