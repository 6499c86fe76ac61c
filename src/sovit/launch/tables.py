"""Tables and texts that the commands print."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def duration_text(seconds: float) -> str:
    """Such as 47 s, 3 min 20 s, 2 h 05 min, 12 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400:,} d {whole % 86400 // 3600} h"


def count_text(value: float) -> str:
    """Three digits and a suffix, such as 4.2K, 26.1M, 1.7e+11."""
    for limit, suffix in ((1e3, ""), (1e6, "K"), (1e9, "M"), (1e12, "B")):
        if value < limit * 0.9995:
            scaled = value / (limit / 1e3)
            return f"{value:g}" if not suffix and value == int(value) else f"{scaled:.3g}{suffix}"
    return f"{value:.3g}"


def table(*columns: tuple[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=name != "reason", overflow="fold")  # type: ignore[arg-type]
    return table


def print_table(table: Table) -> None:
    """On a terminal as wide as it is, elsewhere as wide as the table needs, so that a pipe loses nothing."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(
            highlight=False, width=console.measure(table, options=console.options.update(width=1000)).maximum
        )
    console.print(table)
