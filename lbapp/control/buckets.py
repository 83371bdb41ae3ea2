# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Limits on new connections, as token buckets: what the fast path does in eBPF, for whoever it does not do it for.

Owns the buckets of virtual servers and of their clients' networks. Never reads a clock; a test holds it against
``bucket.bpf.h`` and the fast path's programs, packet by packet.

A bucket is one number: the time at which it will be full again (ITU-T I.371, Annex A, "virtual scheduling"). A token
costs the time in which one is made, and all of them together are the depth. Times are whole sixteenths of a
nanosecond, and a cost is rounded up: so 10 000 000 a second are kept to a part in 1600, and never exceeded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from lbapp.config.model import UNLIMITED, Protocol, VirtualServer
from lbapp.control.messages import Error, FlowSignature, Query, Reply
from lbapp.control.statistics import Ledger, Refusal
from lbapp.control.waiting import Lines

SECOND = 16_000_000_000
DEEPEST = 1 << 62
"""What a bucket can hold beside a clock in one word of 64 bits: nine years' worth of tokens."""
SLACK = SECOND
"""A bucket that is emptier than empty by more than this was deeper once, and is only empty."""
CLIENTS = 65_536
"""Networks that are remembered; of more, the one that was silent the longest begins with a full bucket again."""
LATELY = 4096
"""Flows of which it is remembered that they had their token."""
LATELY_SECONDS = 3
"""How long a flow may be asked about again: one token is for all of it."""


class Shape(NamedTuple):
    """A bucket: what a token costs, and what all of them cost."""

    cost: int
    depth: int


class Ration(NamedTuple):
    """The limits of a virtual server. None: there is none. ``mask`` is of 4 or 16 bytes, as its addresses."""

    server: Shape | None
    client: Shape | None
    mask: bytes


def shape(rate: int, burst: int) -> Shape | None:
    """The bucket of so many new connections a second, and so many at once; None where there is no limit."""
    if rate == UNLIMITED:
        return None
    if rate == 0:
        return Shape(1, 0)
    cost = -(-SECOND // rate)
    return Shape(cost, min(cost * (burst or rate), DEEPEST))


def mask(prefix: int, size: int) -> bytes:
    """The first ``prefix`` bits of an address of ``size`` bytes."""
    return ((1 << 8 * size) - (1 << 8 * size - prefix)).to_bytes(size, "big")


def ration(rate: int, burst: int, client_rate: int, client_burst: int, network: bytes) -> Ration | None:
    """Limits as the configuration has them; None where there are none. ``network``: the mask of clients' addresses."""
    server, client = shape(rate, burst), shape(client_rate, client_burst)
    return Ration(server, client, network) if server is not None or client is not None else None


def take(full: int, now: int, one: Shape) -> tuple[int, bool]:
    """Take a token; returns the bucket after it, and whether there was one (``bucket_take``)."""
    cost, depth = one
    deeper = full > now + depth + SLACK
    following = now + depth if deeper else max(full, now)
    if following + cost <= now + depth:
        return following + cost, True
    return (following if deeper else full), False


class Buckets:
    """The buckets of all virtual servers.

    Args:
        clients, lately: how many are remembered.
    """

    def __init__(self, clients: int = CLIENTS, lately: int = LATELY) -> None:
        self._most_clients = clients
        self._most_lately = lately
        self._rations: dict[int, tuple[VirtualServer, Ration | None]] = {}
        self._servers: dict[int, int] = {}
        self._clients: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        self._lately: OrderedDict[tuple[int, FlowSignature | tuple[int, int]], int] = OrderedDict()

    def __len__(self) -> int:
        """The client networks that are remembered."""
        return len(self._clients)

    def refuses(self, virtual_server: VirtualServer, query: Query, now: float) -> Refusal | None:
        """Take tokens for a new connection, once; None: there were, else which limit refuses it.

        Args:
            virtual_server: the virtual server.
            query: the connection. Who is asked about again is known by its serial; UDP, of which several packets may
                come before an answer, by its addresses and ports.
            now: seconds, that only grow.
        """
        number, at = virtual_server.number, round(now * SECOND)
        known = self._rations.get(number)
        if known is None or known[0] is not virtual_server:
            known = self._rations[number] = (virtual_server, ration_of(virtual_server))
        if known[1] is None:
            return None
        flow = query.signature if virtual_server.protocol is Protocol.UDP else (query.switch, query.serial)
        since = self._lately.get((number, flow))
        if since is not None and at - since < LATELY_SECONDS * SECOND:
            return None
        over = self.take(number, known[1], query.signature.source, at)
        if over is None:
            self._lately[number, flow] = at
            self._lately.move_to_end((number, flow))
            if len(self._lately) > self._most_lately:
                self._lately.popitem(last=False)
        return over

    def take(self, number: int, rationed: Ration, source: bytes, now: int) -> Refusal | None:
        """As :meth:`refuses`, by the virtual server's number, its limits and the client's address.

        The client's bucket comes first: what one network is refused costs the others nothing.
        """
        server, client, _ = rationed
        before = after = 0
        key = (number, network(source, rationed.mask))
        if client is not None:
            before = self._clients.pop(key, 0)
            after, taken = take(before, now, client)
            self._clients[key] = after
            if len(self._clients) > self._most_clients:
                self._clients.popitem(last=False)
            if not taken:
                return Refusal.CLIENT_RATE
        if server is not None:
            self._servers[number], taken = take(self._servers.get(number, 0), now, server)
            if not taken:
                if client is not None:
                    self._clients[key] = after - client.cost
                return Refusal.RATE
        return None

    def forget(self, numbers: Iterable[int]) -> None:
        """Virtual servers are gone. What their clients had taken goes as others come."""
        for number in numbers:
            self._rations.pop(number, None)
            self._servers.pop(number, None)


class Rates:
    """The limits on new connections that the control segment keeps itself.

    Args:
        ledger: counts what is refused.
        lines: who waits there was let in before.
    """

    def __init__(self, ledger: Ledger, lines: Lines) -> None:
        self._ledger = ledger
        self._lines = lines
        self._buckets = Buckets()

    def refuse(self, virtual_server: VirtualServer, query: Query, now: float) -> Reply | None:
        """Take tokens for a new connection; None: there were, else its refusal. Costs nothing without limits."""
        if not virtual_server.limited or (self._lines.size and self._lines.find(query) is not None):
            return None
        why = self._buckets.refuses(virtual_server, query, now)
        if why is None:
            return None
        self._ledger.refuse(virtual_server.number, why)
        return Reply(query, Error.CONNLIMIT)

    def forget(self, numbers: Iterable[int]) -> None:
        """Virtual servers are gone."""
        self._buckets.forget(numbers)


def ration_of(virtual_server: VirtualServer) -> Ration | None:
    """The limits of a virtual server."""
    four = virtual_server.version == 4
    return ration(virtual_server.rate_limit, virtual_server.rate_burst, virtual_server.client_rate_limit,
                  virtual_server.client_rate_burst,
                  mask(virtual_server.client_prefix_v4, 4) if four else mask(virtual_server.client_prefix_v6, 16))


def network(address: bytes, masked: bytes) -> bytes:
    """The part of an address that its mask leaves."""
    return (int.from_bytes(address, "big") & int.from_bytes(masked, "big")).to_bytes(len(address), "big")
