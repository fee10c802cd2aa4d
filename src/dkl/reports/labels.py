"""Labels beside points that neither cover each other nor the points."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_DISTANCES = (6.0, 12.0, 20.0, 30.0, 42.0)  # points from the marker to the label's nearest edge
_DIRECTIONS = tuple(math.pi * step / 4 for step in (0, 4, 2, 6, 1, 3, 7, 5))  # right and left first
_MARKER = 4.0  # points around a marker that stay free
_PADDING = 1.0  # points around a label that stay free
_LEADER_FROM = 8.0  # points; labels further away get a line to their marker


def label_points(
    axes: "Axes",
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    colours: Sequence[str],
    *,
    obstacles: Sequence[tuple[float, float]] = (),
    size: float = 7.5,
) -> None:
    """Write a label beside each point, where it covers least; call it when the layout is final.

    Places around each point are tried from near to far, and the first free one is taken; where none
    is free, the one with the least overlap. A label that stands apart gets a thin line.

    Args:
        axes: with their final limits; the figure is drawn once to learn their size.
        points: in data coordinates.
        labels: one per point; those that come first get the better places.
        colours: of text and line, one per point.
        obstacles: further points that labels must not cover.
        size: of the text, in points.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    scale = figure.dpi / 72  # pixels per point
    frame = axes.get_window_extent()
    to_pixels = axes.transData.transform
    taken = [_around(to_pixels(point), _MARKER * scale) for point in (*points, *obstacles)]
    for point, label, colour in zip(points, labels, colours, strict=True):
        text = axes.annotate(
            label, point, xytext=(0, 0), textcoords="offset points", fontsize=size, color=colour
        )
        text.set_in_layout(False)
        extent = text.get_window_extent()
        x, y = to_pixels(point)
        best = min(
            _places(x, y, extent.width, extent.height, scale),
            key=lambda box: (
                _overlap(box, taken) + _outside(box, frame),
                math.dist(_mid(box), (x, y)),
            ),
        )
        taken.append(best.padded(_PADDING * scale))
        text.set_position(((best.x0 - x) / scale, (best.y0 - y + _descent(extent, y)) / scale))
        _draw_leader(axes, point, (x, y), best, scale, colour)


def _around(pixels: Any, reach: float) -> "Bbox":
    from matplotlib.transforms import Bbox

    x, y = pixels
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)


def _places(x: float, y: float, width: float, height: float, scale: float) -> "Iterator[Bbox]":
    """Yield boxes of a size around a point, from near to far."""
    from matplotlib.transforms import Bbox

    for distance in _DISTANCES:
        for angle in _DIRECTIONS:
            dx, dy = math.cos(angle), math.sin(angle)
            # The label's nearest edge, not its middle, is that far away.
            left = x + dx * distance * scale + (dx - 1) / 2 * width
            low = y + dy * distance * scale + (dy - 1) / 2 * height
            yield Bbox.from_bounds(left, low, width, height)


def _overlap(box: "Bbox", others: "Sequence[Bbox]") -> float:
    total = 0.0
    for other in others:
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        if width > 0 and height > 0:
            total += width * height
    return total


def _outside(box: "Bbox", frame: "Bbox") -> float:
    """Return the area of a box outside the axes, which weighs as much as covering something."""
    inside = _overlap(box, [frame])
    return 4 * (box.width * box.height - inside)


def _mid(box: "Bbox") -> tuple[float, float]:
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


def _descent(extent: "Bbox", baseline: float) -> float:
    """Return how far a text's box reaches below its position."""
    return baseline - float(extent.y0)


def _draw_leader(
    axes: "Axes",
    point: tuple[float, float],
    pixels: tuple[float, float],
    box: "Bbox",
    scale: float,
    colour: str,
) -> None:
    x, y = pixels
    nearest = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
    if math.dist(nearest, pixels) < _LEADER_FROM * scale:
        return
    line = axes.annotate(
        "",
        point,
        xytext=((nearest[0] - x) / scale, (nearest[1] - y) / scale),
        textcoords="offset points",
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.5,
            "shrinkA": 0,
            "shrinkB": 3,
        },
    )
    line.set_in_layout(False)
