"""Tables as plain text, Markdown and Rich: what every table of the reports has in common."""

import textwrap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
_MAX_HEADER = 14  # characters; longer titles are broken into lines where nothing below is longer


class TextTable(ABC):
    """A header, lines of text and notes; a subclass says what they are.

    Example:
        >>> class Ages(TextTable):
        ...     notes = ("in years",)
        ...     header = ["name", "age"]
        ...     def lines(self, plus_minus=PLUS_MINUS):
        ...         return [["Ada", "36"]]
        >>> print(Ages().to_text())
        name  age
        ----  ---
        Ada    36
        note: in years
    """

    notes: tuple[str, ...]

    @property
    @abstractmethod
    def header(self) -> list[str]:
        """Column titles."""

    @abstractmethod
    def lines(self, plus_minus: str = PLUS_MINUS) -> list[list[str]]:
        """Return the rows as text, a cell per column of ``header``."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know first; it stands above the table."""
        return ()

    @property
    def breaks(self) -> frozenset[int]:
        """Places of the lines above which a new part of the table starts."""
        return frozenset()

    @property
    def num_label_columns(self) -> int:
        """How many columns hold words, aligned at the left; the others hold numbers."""
        return 1

    def to_text(self) -> str:
        """Return plain ASCII text with aligned columns, warnings above and notes below."""
        body = self.lines(plus_minus="+-")
        columns = list(zip(self.header, *body, strict=True))
        widths = [max([_header_width(title, cells), *map(len, cells)]) for title, *cells in columns]
        titles = [
            textwrap.wrap(title, width) or [""]
            for title, width in zip(self.header, widths, strict=True)
        ]
        height = max(map(len, titles))
        head = [
            [([""] * (height - len(title)) + title)[place] for title in titles]
            for place in range(height)
        ]
        rule = "  ".join("-" * width for width in widths)
        lines = [f"warning: {warning}" for warning in self.warnings]
        lines += [*(self._align(line, widths) for line in head), rule]
        for place, line in enumerate(body):
            if place in self.breaks:
                lines.append(rule)
            lines.append(self._align(line, widths))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_markdown(self) -> str:
        """Return a GitHub table, warnings above, notes as a list below."""
        num_left = self.num_label_columns
        align = ["---"] * num_left + ["---:"] * (len(self.header) - num_left)
        table = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
            for line in (self.header, align, *self.lines())
        ]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        warnings = [f"> **Warning:** {warning}" for warning in self.warnings]
        return "\n".join([*warnings, *([""] if warnings else []), *table, *notes])

    def to_rich(self) -> "rich.table.Table":
        """Return a Rich table; warnings are its title, the notes its caption."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        caption = Text("\n".join(self.notes)) if self.notes else None
        above = Text("\n".join(f"Warning: {warning}" for warning in self.warnings), "bold yellow")
        table = RichTable(
            box=box.SIMPLE_HEAD,
            title=above if self.warnings else None,
            title_justify="left",
            caption=caption,
            caption_justify="left",
        )
        for place, title in enumerate(self.header):
            side = self._side(place)
            table.add_column(
                Text(title), justify="right" if side == ">" else "left", overflow="fold"
            )
        for place, line in enumerate(self.lines()):
            if place in self.breaks:
                table.add_section()
            table.add_row(*map(Text, line))  # Text: a label with [brackets] is no markup
        return table

    def _side(self, place: int) -> str:
        return "<" if place < self.num_label_columns else ">"

    def _align(self, line: list[str], widths: list[int]) -> str:
        cells = (
            f"{cell:{self._side(place)}{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()


def _header_width(title: str, cells: list[str]) -> int:
    """Return the width that a title needs when it may be broken at spaces."""
    room = max([_MAX_HEADER, *map(len, cells)])
    return max(map(len, textwrap.wrap(title, room, break_long_words=False) or [""]))
