"""Tables and notes on stdout: rich on a terminal, plain aligned text otherwise."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(title: str, columns: list[str], rows: list[list], notes: list[str] = ()) -> None:
    """Print a table whose cells are shown with `str`; numbers are right-aligned; `notes` follow, one a line."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, (name, is_right) in enumerate(zip(columns, right, strict=True)):
            # On a narrow terminal sentences wrap; names (the first column) and numbers stay whole, under tall headers.
            width = max((len(row[i]) for row in cells), default=0) if i == 0 or is_right else None
            header = name.replace(" ", "\n") if is_right and len(name) > width else name
            table.add_column(header, justify="right" if is_right else "left", min_width=width)
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
