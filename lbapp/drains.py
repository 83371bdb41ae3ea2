# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp drain``: let members, or a switch, finish what they have, show how far they are, and take them back.

Owns the order of these steps. What draining means for traffic is the controller's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lbapp.assignments import endpoint as parsed
from lbapp.client import ApiError, Client, ClientError, Json
from lbapp.display import console, endpoint
from lbapp.showing import done

EVERY_S = 1.0
LOOKS = 2
"""Nothing is left when it was so twice in a row: at the first look, what was given just before may be on its way."""


def drain(client: Client, pool: str, member: str | None, timeout: int | None, wait: bool, patience: float | None,
          undo: bool) -> None:
    """Carry out the command for members.

    Args:
        pool: whose members.
        member: one of them, by address and port, name or id; None: all.
        timeout: seconds after which what is left is reset; None: as it is configured.
        wait: until nothing is left.
        patience: seconds to wait at most; None: for ever.
        undo: take them back instead.

    Raises:
        ClientError: with what to tell.
    """
    found = client.get("pools", pool)
    members = [one for one in found["members"] if member is None or _is(one, member)]
    if not members:
        raise ClientError(f"pool {found['name']} has no member {member}" if member else
                          f"pool {found['name']} has no members")
    changes: Json = {"draining": not undo}
    if timeout is not None and not undo:
        changes["drain_timeout"] = timeout
    for one in members:
        client.update("members", one["id"], changes, found["id"])
    names = {endpoint(one["address"], one["protocol_port"]) for one in members}
    if undo or not wait:
        done(f"pool {found['name']}: {', '.join(sorted(names))} {'in use again' if undo else 'draining'}")
        return
    _wait(lambda: _left(client, {"pool": found["name"]}, "member", names), found["name"], patience)
    done(f"pool {found['name']}: {', '.join(sorted(names))} drained")


def drain_switch(client: Client, switch: str, timeout: int | None, wait: bool, patience: float | None,
                 undo: bool) -> None:
    """Carry out the command for a switch, by its datapath id; the rest is as in :func:`drain`.

    Raises:
        ClientError: with what to tell.
    """
    dpid = client.get("switches", switch)["dpid"]  # none is drained by a slip of the pen
    changes: Json = {"draining": not undo}
    if timeout is not None and not undo:
        changes["drain_timeout"] = timeout
    client.update("switches", dpid, changes)
    if undo or not wait:
        done(f"switch {dpid}: {'in use again' if undo else 'draining'}")
        return
    _wait(lambda: _left(client, {"switch": dpid}, "switch", {dpid}), dpid, patience)
    done(f"switch {dpid}: drained")


def _is(member: Json, word: str) -> bool:
    if word in (member.get("id"), member.get("name")):
        return True
    try:
        return parsed(word) == (member["address"], member["protocol_port"])
    except ValueError:
        return False


def _left(client: Client, asked: dict[str, str], field: str, names: set[str]) -> int | None:
    """How many connections they still have; None where the controller cannot say just now."""
    try:
        listed = client.call("GET", "/v1/draining", params=asked)["draining"]
    except ApiError as error:
        if error.status < 500:
            raise
        return None
    found = [one["connections"] for one in listed if one[field] in names]
    return None if None in found else sum(found)


def _wait(count: Callable[[], int | None], name: str, patience: float | None) -> None:
    deadline = None if patience is None else time.monotonic() + patience
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                          TextColumn("connections ended"), TimeElapsedColumn()]
    with Progress(*columns, console=console(), disable=not sys.stdout.isatty(), transient=True) as progress:
        task = progress.add_task(f"draining {name}", total=None)
        most = looks = 0
        while True:
            left = count()
            looks = looks + 1 if left == 0 else 0
            if left is not None:
                most = max(most, left)
                progress.update(task, total=most, completed=most - left)
                if looks == LOOKS:
                    return
            if deadline is not None and time.monotonic() >= deadline:
                raise ClientError(f"{left if left is not None else 'an unknown number of'} connections are left; "
                                  "they go on draining")
            time.sleep(EVERY_S)
