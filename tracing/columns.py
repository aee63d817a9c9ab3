"""Columns of text that fit a width: the least telling ones are left out. Does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from msgspec import Struct
from rich.text import Text

__all__ = ("Column", "Columns", "fit_columns")

Row = TypeVar("Row")


class Column(Struct, Generic[Row], frozen=True):
    """One column of rows of one kind."""

    title: str
    text: Callable[[Row], str]
    place: int
    """How much it is needed: 0 is never left out, the highest is left out first."""
    align_right: bool = False


class Columns(Struct, Generic[Row], frozen=True):
    """Columns that fit, and their widths in cells."""

    columns: tuple[Column[Row], ...]
    widths: tuple[int, ...]

    @property
    def cells(self) -> int:
        """Width of a line: a gap of one cell follows each column."""
        return sum(self.widths) + len(self.widths)

    def titles(self) -> Text:
        """The line above the rows."""
        return self._line([column.title for column in self.columns], "dim")

    def line(self, row: Row) -> Text:
        """One row."""
        return self._line([column.text(row) for column in self.columns])

    def _line(self, texts: Sequence[str], style: str = "") -> Text:
        cells = (
            text.rjust(width) if column.align_right else text.ljust(width)
            for column, width, text in zip(self.columns, self.widths, texts, strict=True)
        )
        return Text(no_wrap=True, overflow="crop").append(" ".join(cells) + " ", style)


def fit_columns(
    columns: Sequence[Column[Row]], rows: Sequence[Row], max_cells: float
) -> Columns[Row]:
    """The columns for these rows that fit in `max_cells`, or those that are never left out."""
    for place in sorted({column.place for column in columns}, reverse=True):
        kept = tuple(column for column in columns if column.place <= place)
        widths = tuple(max(map(len, [column.title, *map(column.text, rows)])) for column in kept)
        fitted = Columns(kept, widths)
        if fitted.cells <= max_cells:
            break
    return fitted
