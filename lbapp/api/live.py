# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Live facts over REST: switches, connections, counters. Only reads, and only from the runtime."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from urllib.parse import quote

import webob

from lbapp.api.errors import invalid
from lbapp.api.requests import limit_of, query
from lbapp.api.resources import Answer, ok
from lbapp.api.views import ConnectionView, Runtime, StatisticsView
from lbapp.config.model import canonical_address
from lbapp.config.snapshot import breathe

FILTERS = ("virtual_server", "member", "client", "protocol", "state", "switch")


class Live:
    """Requests for what the controller knows just now."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def switches(self, request: webob.Request) -> Answer:
        """GET of the switches."""
        query(request)
        return ok({"switches": sorted(self.runtime.switches(), key=lambda switch: switch.dpid)})

    def statistics(self, request: webob.Request) -> Answer:
        """GET of the counters, of all or of one virtual server or pool."""
        parameters = query(request, "virtual_server", "pool")
        everything = self.runtime.statistics()
        server, pool = parameters.get("virtual_server"), parameters.get("pool")
        if server is None and pool is None:
            return ok(everything)
        return ok(StatisticsView(
            uptime_seconds=everything.uptime_seconds,
            virtual_servers=[one for one in everything.virtual_servers
                             if server is not None and server in (one.name, one.id)],
            members=[one for one in everything.members if pool is not None and one.pool == pool],
            switches=[],
        ))

    def connections(self, request: webob.Request) -> Answer:
        """GET of connections, filtered, page by page, in the order of their ids."""
        parameters = query(request, *FILTERS, "limit", "marker")
        limit = limit_of(parameters)
        after = _serial(parameters["marker"]) if "marker" in parameters else -1
        wanted = {name: parameters[name] for name in FILTERS if name in parameters}
        # One more than asked for tells whether there is a next page.
        found = heapq.nsmallest(limit + 1, self._after(after, wanted), key=lambda pair: pair[0])
        chosen = [view for _, view in found[:limit]]
        following = None
        if len(found) > limit:
            kept = "".join(f"&{name}={quote(value, safe='')}" for name, value in wanted.items())
            following = f"/v1/connections?limit={limit}{kept}&marker={chosen[-1].id}"
        return ok({"connections": chosen, "next": following})

    def _after(self, after: int, wanted: dict[str, str]) -> Iterator[tuple[int, ConnectionView]]:
        connections: Iterable[ConnectionView] = breathe(self.runtime.connections())
        for view in connections:
            serial = int(view.id, 16)
            if serial > after and _matches(view, wanted):
                yield serial, view


def _serial(text: str) -> int:
    try:
        if len(text) > 32:
            raise ValueError
        return int(text, 16)
    except ValueError:
        raise invalid("expected the id of a connection (hexadecimal)", "marker") from None


def _matches(view: ConnectionView, wanted: dict[str, str]) -> bool:
    for name, value in wanted.items():
        actual = getattr(view, name)
        if name in ("protocol", "state"):
            if actual.upper() != value.upper():
                return False
        elif name in ("client", "member"):
            if value != actual and not _same_address(value, actual):
                return False
        elif actual != value:
            return False
    return True


def _same_address(address: str, endpoint: str) -> bool:
    """Whether ``ip:port`` is at an address given without its port."""
    try:
        return canonical_address(address) == endpoint.rpartition(":")[0].removeprefix("[").removesuffix("]")
    except ValueError:
        return False
