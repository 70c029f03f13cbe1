"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    """Return a table, without a line break at its end.

    Args:
        titles: of the columns.
        rows: cells of each row; a ``|`` in one is escaped.
        text: pad the cells, and align the columns after the first `text` to the right; None to do neither.
    """
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    if text is None:
        rule = "|" + "---|" * len(titles)
        return "\n".join([_line(titles), rule, *map(_line, rows)])
    widths = [max(len(line[column]) for line in (titles, *rows)) for column in range(len(titles))]
    rules = ["-" * width if column < text else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [
        _line([cell.ljust(width) if column < text else cell.rjust(width) for column, (cell, width) in enumerate(pairs)])
        for pairs in (zip(line, widths, strict=True) for line in (titles, *rows))
    ]
    return "\n".join([lines[0], _line(rules), *lines[1:]])


def table(columns: Mapping[str, Callable[[T], str]], items: Iterable[T]) -> str:
    """Return a table with a row for each item.

    Args:
        columns: by title, what gives an item's cell.
        items: in the order of the rows.
    """
    return markdown(list(columns), [[cell(item) for cell in columns.values()] for item in items])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """Return `scale` times a value with so many digits behind the point, or nothing for None."""
    return "" if value is None else f"{scale * value:.{digits}f}"
