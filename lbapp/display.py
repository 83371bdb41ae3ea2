# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How things look on the terminal: tables, statuses, sizes and times, and JSON or YAML for programs.

Knows nothing of the controller. What came from it is never taken for markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 200
"""Where no terminal tells its width, lines are not to be broken."""

STATUS_STYLES = {
    "ONLINE": "green", "ACTIVE": "green", "connected": "green", "ESTABLISHED": "green",
    "DEGRADED": "yellow", "DRAINING": "yellow", "PENDING_UPDATE": "yellow", "NO_MONITOR": "cyan",
    "OFFLINE": "red", "ERROR": "red", "disconnected": "red",
    "DISABLED": "dim",
}


def console() -> Console:
    """Standard output as it is now, without colours where it is no terminal."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)


def dump(value: Any, output: str) -> None:
    """Print JSON or YAML, nothing else."""
    if output == "json":
        json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        yaml.dump(value, sys.stdout, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, width=120)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], empty: str = "none") -> None:
    """Print a table. A column's name begins with ``>`` if it holds figures; empty cells show nothing."""
    shown = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        shown.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left",
                         overflow="fold")
    for row in rows:
        shown.add_row(*(cell(one) for one in row))
    if not shown.row_count:
        console().print(f"{title}: {empty}" if title else empty)
    else:
        console().print(shown)


def fields(title: str, values: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, a line each."""
    shown = Table(box=None, show_header=False, title=title or None, title_justify="left", title_style="bold",
                  pad_edge=False)
    shown.add_column(style="dim")
    shown.add_column(overflow="fold")
    for name, value in values:
        shown.add_row(Text(name), cell(value))
    console().print(shown)


def cell(value: Any) -> Text:
    """A value as a cell; statuses have their colours."""
    if isinstance(value, Text):
        return value
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, bool):
        return Text("true" if value else "false")
    if isinstance(value, dict):
        return Text(", ".join(f"{key} {one}" for key, one in value.items()) or "-")
    if isinstance(value, list | tuple):
        return Text(", ".join(map(str, value)) or "-")
    text = str(value)
    return Text(text, style=STATUS_STYLES.get(text, ""))


def endpoint(address: Any, port: Any) -> str:
    """``address:port``, IPv6 in brackets, port 0 as ``*``."""
    host = f"[{address}]" if ":" in str(address) else str(address)
    return f"{host}:{port or '*'}"


def duration(seconds: float | None) -> str | None:
    """Seconds for people: 12s, 3m05s, 2h10m, 4d03h."""
    if seconds is None:
        return None
    whole = int(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{name}"
    return f"{whole}s"


def size(count: float | None) -> str | None:
    """Bytes for people, in powers of 1024."""
    if count is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
