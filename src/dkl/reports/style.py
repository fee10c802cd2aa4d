"""How every figure looks: size, type, colours, bands, legends."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dkl.reports.groups import Spread

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches; shown 700 px wide, 9 points are 12.5 px
INK = "#1f2328"
FAINT = "#d3d8de"
POSITIVE = "#0072b2"
NEGATIVE = "#d55e00"

# Okabe and Ito's colours, told apart by readers of any colour vision; yellow and black are left
# out because they vanish on a light or a dark page.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_LABEL_WIDTH = 46

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same text width everywhere
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # class names and labels may hold dollar signs
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """What tells one recipe from the others: colour, and line or marker for those who see none."""

    colour: str
    line: str
    marker: str


def look(place: int) -> Look:
    """Return the look of the recipe at a place in the report; the same in every figure.

    Example:
        >>> look(0).colour == look(6).colour, look(0).line == look(6).line
        (True, False)
    """
    return Look(
        colour=_COLOURS[place % len(_COLOURS)],
        line=_LINES[(place + place // len(_COLOURS)) % len(_LINES)],
        marker=_MARKERS[place % len(_MARKERS)],
    )


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw and save in the house style; settings of the caller come back afterwards."""
    from matplotlib import rc_context

    with rc_context(_SETTINGS):
        yield


def new_figure(height: float, title: str) -> "Figure":
    """Return an empty figure of the common width with a title that states what is plotted."""
    from matplotlib.figure import Figure

    lines = textwrap.wrap(title, 72)
    height += 0.17 * (len(lines) - 1)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=10, fontweight="bold")
    return figure


def name_places(axes: "Axes", names: Sequence[str], width: float) -> None:
    """Write names along the x axis, ``width`` inches wide; turned where they would collide."""
    room = width / len(names)
    widest = 0.085 * max(map(len, names))
    if widest < room:
        axes.set_xticks(range(len(names)), names)
        return
    angle = 40 if room > 0.35 else 90
    axes.set_xticks(
        range(len(names)), names, rotation=angle, ha="right", va="center", rotation_mode="anchor"
    )
    figure = axes.figure
    figure.set_figheight(figure.get_figheight() + 0.75 * widest)  # type: ignore[union-attr]


def draw_band(axes: "Axes", xs: Sequence[float], ys: Sequence[Spread], style: Look) -> "Artist":
    """Draw the mean as a line and one standard deviation around it as a band."""
    if any(y.deviation is not None for y in ys):
        low = [y.mean - (y.deviation or 0.0) for y in ys]
        high = [y.mean + (y.deviation or 0.0) for y in ys]
        axes.fill_between(xs, low, high, color=style.colour, alpha=0.18, linewidth=0)
    marker = style.marker if len(xs) < 12 else ""
    (line,) = axes.plot(
        xs,
        [y.mean for y in ys],
        color=style.colour,
        linestyle=style.line,
        linewidth=1.6,
        marker=marker,
        markersize=4.5,
    )
    return line


def add_legend(figure: "Figure", handles: Sequence["Artist"], labels: Sequence[str]) -> None:
    """Put the legend below the axes, in as many columns as fit, and make room for it."""
    texts = [textwrap.shorten(label, _LABEL_WIDTH * 2, placeholder="...") for label in labels]
    texts = ["\n".join(textwrap.wrap(text, _LABEL_WIDTH * 2)) for text in texts]
    longest = max(len(text) for text in texts)
    num_columns = max(1, min(len(texts), int((WIDTH - 0.2) / (0.07 * longest + 0.55))))
    num_rows = -(-len(texts) // num_columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * num_rows + 0.1)
    figure.legend(
        handles,
        texts,
        loc="outside lower left",
        ncols=num_columns,
        handlelength=2.6,
        columnspacing=1.4,
    )
