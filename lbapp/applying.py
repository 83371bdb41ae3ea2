# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp apply``: read a site, show how it differs from what is configured, ask, apply.

Owns the order of these steps and how a difference looks. What differs is found in
:mod:`lbapp.changes`; what is right is known to the model and to the controller.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from lbapp.changes import Action, Change, FieldChange, difference, tally
from lbapp.client import ApiError, Client
from lbapp.display import console
from lbapp.site import SiteError, from_config, read

MOST_CHANGES = 200
"""Resources whose difference is shown; of the others only how many they are."""
MOST_FIELDS = 20

SIGNS = {Action.ADD: ("+", "green"), Action.CHANGE: ("~", "yellow"), Action.REMOVE: ("-", "red")}


def apply(connect: Callable[[], Client], file: str, dry_run: bool, yes: bool) -> None:
    """Carry out the command.

    Args:
        connect: makes the client, once the document is known to be good.
        file: path, or ``-`` for standard input.

    Raises:
        SiteError, ClientError: with what to tell.
    """
    begun = time.monotonic()
    out = console()
    source, text = _text(file)
    wanted = read(text, source)
    with connect() as client:
        current = client.config()
        changes = difference(from_config(current.document), wanted)
        if not changes:
            out.print("no changes", style="green")
            return
        for line in lines(changes):
            out.print(line, soft_wrap=True)
        document = wanted.document()
        try:
            if dry_run:
                client.apply(document, dry_run=True, etag=current.etag)
                out.print("dry run: the controller would accept this; nothing was changed")
                return
            if not yes and interactive():
                paused = time.monotonic()
                if not click.confirm("Apply?", default=False):
                    out.print("nothing was changed")
                    return
                begun += time.monotonic() - paused
            done = client.apply(document, etag=current.etag)
        except ApiError as error:
            if current.etag and (error.status == 412 or (error.status == 409 and error.field == "If-Match")):
                raise SiteError("the configuration was changed by somebody else meanwhile; "
                                "nothing was applied, run it again") from None
            raise
    out.print(f"applied: {done.created} created, {done.updated} updated, {done.deleted} deleted "
              f"in {time.monotonic() - begun:.2f} s", style="green")


def interactive() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _text(file: str) -> tuple[str, str]:
    if file == "-":
        return "standard input", sys.stdin.read()
    try:
        return file, Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise SiteError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SiteError(f"{file}: expected UTF-8 text, byte {error.start} is not") from None


def lines(changes: list[Change]) -> Iterable[Text]:
    """The difference as coloured lines, a resource or a field each, and a last one with the numbers."""
    for change in changes[:MOST_CHANGES]:
        sign, colour = SIGNS[change.action]
        yield Text(f"{sign} {change.what}", style=colour)
        for field in change.fields[:MOST_FIELDS]:
            yield _field(change.action, field)
        if len(change.fields) > MOST_FIELDS:
            yield Text(f"    ... and {len(change.fields) - MOST_FIELDS} more", style="dim")
    if len(changes) > MOST_CHANGES:
        yield Text(f"... and {len(changes) - MOST_CHANGES} more resources", style="dim")
    counts = tally(changes)
    yield Text(f"{counts[Action.ADD]} to add, {counts[Action.CHANGE]} to change, {counts[Action.REMOVE]} to remove",
               style="bold")


def _field(action: Action, change: FieldChange) -> Text:
    if action is Action.ADD:
        return Text(f"    {change.field}: {_value(change.new)}", style="green")
    if change.field.endswith("]"):  # a whole member
        if change.old is None:
            return Text(f"  + {change.field}: {change.new}", style="green")
        return Text(f"  - {change.field}: {change.old}", style="red")
    line = Text(f"    {change.field}: ")
    line.append(_value(change.old), style="red")
    line.append(" → ")
    return line.append(_value(change.new), style="green")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value) or '""'
