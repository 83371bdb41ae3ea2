# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual servers and distributions on both ends of CSMB: what the CS wants, what the DFS holds for it.

Both outlive a connection. Pure. Never sends: :class:`Desired` knows what has to be said again, a session says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lbapp.bus import csmb
from lbapp.bus.csmb import Target, VirtualServer
from lbapp.bus.errors import EncodeError, Fault

MOST_SERVERS = 16384
"""Virtual servers that a DFS holds for one CS."""

SERVER, TABLE = 1, 2


class Desired:
    """What a CS wants one DFS to hold.

    What changed waits in ``dirty`` (number -> SERVER | TABLE), once however often it changes: a slow DFS gets the
    latest state, not the history. Without a session nothing waits: the next one says everything.
    """

    def __init__(self) -> None:
        self.servers: dict[int, VirtualServer] = {}
        self.tables: dict[int, tuple[int, tuple[Target, ...]]] = {}
        self.dirty: dict[int, int] = {}
        self.keys: tuple[tuple[bytes | None, bytes | None], int] | None = None
        self.keys_dirty = False
        self._live = False
        self._generation = 0

    def put(self, server: VirtualServer) -> None:
        """This virtual server shall exist, like this.

        Raises:
            EncodeError: there are too many, or no message can carry it.
        """
        if self.servers.get(server.number) == server:
            return
        csmb.encode(csmb.AddVs(server))
        if server.number not in self.servers and len(self.servers) >= MOST_SERVERS:
            raise EncodeError(Fault.LIMIT, f"more than {MOST_SERVERS} virtual servers")
        self.servers[server.number] = server
        self._mark(server.number, SERVER)

    def remove(self, number: int) -> None:
        """This virtual server, and its distribution, shall not exist."""
        self.tables.pop(number, None)
        if self.servers.pop(number, None) is not None:
            self._mark(number, SERVER)

    def distribute(self, number: int, targets: Iterable[Target]) -> None:
        """The distribution of a virtual server that was put before.

        Raises:
            EncodeError: there is no such virtual server, there are too many targets, or no message can carry one.
        """
        whole = tuple(targets)
        if number not in self.servers:
            raise EncodeError(Fault.VALUE, f"a distribution for the unknown virtual server {number}")
        if number in self.tables and self.tables[number][1] == whole:
            return
        for part in csmb.tables(number, 0, whole):
            csmb.encode(part)
        self._generation = self._generation + 1 & 0xFFFFFFFF
        self.tables[number] = (self._generation, whole)
        self._mark(number, TABLE)

    def greet(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        """Cookies shall be made and checked with these keys, new ones with that at ``current``.

        Raises:
            EncodeError: there is no such key, or one has another length than 16 bytes.
        """
        if current not in (0, 1) or keys[current] is None or any(
                key is not None and len(key) != csmb.COOKIE_KEY_BYTES for key in keys):
            raise EncodeError(Fault.VALUE, "keys of 16 bytes, and one of them in use")
        self.keys, self.keys_dirty = (keys, current), self._live

    def replace(self, servers: Iterable[VirtualServer], tables: Mapping[int, Iterable[Target]]) -> None:
        """Want exactly this; what is the same already is not said again."""
        wanted = {server.number: server for server in servers}
        for number in [number for number in self.servers if number not in wanted]:
            self.remove(number)
        for server in wanted.values():
            self.put(server)
        for number, targets in tables.items():
            self.distribute(number, targets)

    def all_again(self) -> None:
        """A new connection: everything has to be said."""
        self._live = True
        self.keys_dirty = self.keys is not None
        self.dirty = dict.fromkeys(self.servers, SERVER | TABLE)

    def silence(self) -> None:
        """The connection has ended."""
        self._live = self.keys_dirty = False
        self.dirty.clear()

    def again(self, number: int) -> None:
        """The DFS does not hold this one as it was told: say it again."""
        self._mark(number, SERVER | TABLE)

    def _mark(self, number: int, what: int) -> None:
        if self._live:
            self.dirty[number] = self.dirty.get(number, 0) | what


class Held:
    """What a DFS holds for one CS (keyed by the CS's identity, whatever connection it comes over)."""

    def __init__(self) -> None:
        self.servers: dict[int, VirtualServer] = {}
