# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a CSMB session (:mod:`lbapp.bus.sessions`) tells its owner. Values only."""

from __future__ import annotations

from typing import NamedTuple

from lbapp.bus.auth import SessionKeys
from lbapp.bus.counted import Traffic
from lbapp.bus.csmb import Hello, Target, Version, VirtualServer
from lbapp.bus.errors import Fault


class Up(NamedTuple):
    """Both sides are authenticated. ``limit``: bytes of UDP payload that both take."""

    peer: Hello
    keys: SessionKeys
    version: Version
    limit: int


class Down(NamedTuple):
    """The connection has ended."""

    fault: Fault
    text: str


class Added(NamedTuple):
    """DFS: a virtual server is new, or not what it was."""

    server: VirtualServer


class Removed(NamedTuple):
    """DFS: a virtual server is gone."""

    number: int


class Distribution(NamedTuple):
    """DFS: a virtual server's whole new distribution; it replaces the old one at once."""

    number: int
    generation: int
    targets: tuple[Target, ...]


class Synced(NamedTuple):
    """The DFS holds what the CS wanted when the connection began (DFS: received; CS: said)."""

    servers: int


class Listed(NamedTuple):
    """CS: the answer to VS_LIST. ``repaired`` of the DFS's virtual servers were not as wanted, and are said again."""

    servers: int
    repaired: int


class Counted(NamedTuple):
    """CS: what the DFS has counted (COUNTERS), whole."""

    connections: int
    counters: dict[str, int]
    traffic: tuple[Traffic, ...]


class Keyed(NamedTuple):
    """DFS: the CS's keys of cookies, and which of them makes new ones (KEYS)."""

    keys: tuple[bytes | None, bytes | None]
    current: int


Event = Up | Down | Added | Removed | Distribution | Synced | Listed | Counted | Keyed
