"""Tables and notes on stdout: rich on a terminal, plain aligned text otherwise."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(title: str, columns: list[str], rows: list[list], notes: list[str] = ()) -> None:
    """Print a table whose cells are shown with `str`; numbers are right-aligned; `notes` follow, one a line."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left", title_style="bold")
        for name, is_right in zip(columns, right, strict=True):
            table.add_column(name, justify="right" if is_right else "left", no_wrap=is_right)
        for row in cells:
            table.add_row(*map(Text, row))
        console = Console()
        console.print(table)
        for note in notes:
            console.print(Text(note))
        return
    print(title)
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    for row in [columns, *cells]:
        aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        print("  ".join(aligned).rstrip())
    for note in notes:
        print(note)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "-")
