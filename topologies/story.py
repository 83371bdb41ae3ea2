# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How a demonstration speaks: headings, commands with their answers, claims that are checked, tables.

Knows the terminal, and nothing of load balancing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

MOST_LINES = 14


class NotHeld(Exception):
    """A claim of the demonstration that turned out wrong. The message is the line to show."""


class Story:
    """The narrator.

    Args:
        console: where to speak; the terminal by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.claims = 0
        self._scene = 0
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the story began."""
        return time.monotonic() - self._begun

    def scene(self, title: str) -> None:
        """A heading."""
        self._scene += 1
        self.console.print(f"\n[bold cyan]{self._scene}. {escape(title)}[/]")

    def say(self, text: str, indent: int = 3) -> None:
        """A sentence; rich's markup is allowed. The terminal breaks long lines, so that they can be copied."""
        self.console.print(" " * indent + text, soft_wrap=True)

    def command(self, where: str, line: str) -> None:
        """A command that was really run."""
        self.say(f"[green]{escape(where)}$[/] [bold]{escape(line)}[/]")

    def answer(self, text: str) -> None:
        """What it printed, shortened where it is long."""
        lines = text.rstrip().splitlines()
        if len(lines) > MOST_LINES:
            lines = [*lines[:MOST_LINES], f"... {len(lines) - MOST_LINES} more lines"]
        for line in lines:
            self.say(f"[dim]{escape(line)}[/]", indent=5)

    def json(self, value: Any) -> None:
        """A JSON answer, one line a field."""
        self.answer(json.dumps(value, indent=2, ensure_ascii=False))

    def check(self, holds: bool, claim: str, otherwise: str = "") -> None:
        """Tell a claim that holds.

        Raises:
            NotHeld: it does not; ``otherwise`` says what was seen instead.
        """
        if not holds:
            raise NotHeld(f"{claim}: {otherwise}" if otherwise else claim)
        self.claims += 1
        self.say(f"[green]✓[/] {escape(claim)}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
        """A table; the first column is text, the others are figures."""
        table = Table(title=title, title_justify="left", title_style="italic")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.console.print(Padding(table, (0, 0, 0, 3), expand=False))
