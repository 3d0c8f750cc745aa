"""Rows of text as a table, for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table", "text_table"]

Row = Sequence[str]


def text_table(rows: Iterable[Row], header: Row | None = None, *, left: bool = False) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right unless ``left``."""
    lines = [*([header] if header else []), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))] if lines else []
    if header:
        lines.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left or column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(rows: Iterable[Row], header: Row | None = None, caption: str = "") -> str:
    """The same as an HTML table, escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header or ())
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align:{"right" if column else "left"}">{escape(cell)}</td>'
            for column, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        "<table>"
        + (f"<caption>{escape(caption)}</caption>" if caption else "")
        + (f"<thead><tr>{head}</tr></thead>" if header else "")
        + f"<tbody>{body}</tbody></table>"
    )
