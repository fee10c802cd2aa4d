"""Figures as SVG text that can stand inside an HTML page."""

import io
import re
from typing import TYPE_CHECKING

from dkl.reports.style import FAINT, INK, figure_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(figure: "Figure", name: str, description: str) -> str:
    """Return the figure as an <svg> element for an HTML page.

    It scales with its container, has no identifiers or styles in common with other figures, and
    follows the page's colours: text and lines use the variables --ink and --faint.

    Args:
        figure: from a figure function.
        name: prefix of all identifiers; unique in the page; letters, digits and dashes.
        description: what a screen reader says.

    Returns:
        The element; the same text for the same figure.

    Raises:
        ValueError: a name that cannot be an identifier.
    """
    from matplotlib import rc_context

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(
            f"a figure's name starts with a letter and has dashes at most, got {name!r}"
        )
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with figure_style(), rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return _scope(text, name, description)


def _scope(text: str, name: str, description: str) -> str:
    # Inside HTML the namespaces are implied and the size comes from the container: of the element's
    # own attributes only the view box stays.
    head, body = text.split(">", 1)
    view_box = re.search(r'viewBox="([^"]*)"', head)
    assert view_box is not None
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = body.replace('<style type="text/css">*{', f'<style type="text/css">#{name}-svg *{{')
    body = body.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return f'<svg id="{name}-svg" viewBox="{view_box[1]}" role="img" aria-label="{label}">{body}'
