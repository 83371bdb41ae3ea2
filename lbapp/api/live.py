# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Live facts over REST: connections, counters, agents beside servers. Never touches the configuration."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
import webob

from lbapp.api.errors import ApiError, Problem, from_validation, invalid
from lbapp.api.requests import json_object, limit_of, next_page, query
from lbapp.api.resources import Answer, ok
from lbapp.api.views import ConnectionView, Runtime, StatisticsView
from lbapp.config.fields import canonical_address
from lbapp.config.snapshot import breathe
from lbapp.handoffs import MOST_AGENTS, MOST_LISTENERS
from lbapp.reports import LONGEST_NAME, Outdated, Unsigned
from lbapp.server_agent import report
from lbapp.server_agent.report import Told

MOST_REPORT = 64 << 10
"""Bytes: all that fits into a report's limits fits into half of it."""
FILTERS = ("virtual_server", "member", "client", "protocol", "state", "switch")


class Listener(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a server listens."""

    address: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Announcement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent beside servers adopts connections for."""

    listeners: Annotated[tuple[Listener, ...], msgspec.Meta(max_length=MOST_LISTENERS)]


class ReportedServer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server that a report is about; port 0: whatever serves at the address."""

    address: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


ValueName = Annotated[str, msgspec.Meta(pattern=f"^{report.NAME.pattern}$(?!\n)")]


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How loaded the servers beside an agent are.

    Attributes:
        run: 32 hexadecimal digits, others each time that the agent starts.
        sequence: from 1, greater in each report of a run.
        time: the agent's clock, seconds since 1970.
        values: what was measured, by name.
        signature: 64 hexadecimal digits, where the controller has the key of the buses.
    """

    run: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{32}$(?!\n)")]
    sequence: Annotated[int, msgspec.Meta(ge=1, le=report.MOST_SEQUENCE)]
    time: float
    servers: Annotated[tuple[ReportedServer, ...], msgspec.Meta(max_length=report.MOST_ENDPOINTS)]
    values: Annotated[dict[ValueName, float], msgspec.Meta(max_length=report.MOST_VALUES)]
    signature: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}$(?!\n)")] | None = None


class Live:
    """Requests for what the controller knows just now."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

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
            pools=[one for one in everything.pools if pool is not None and pool in (one.name, one.id)],
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
            following = next_page("/v1/connections", limit, wanted, chosen[-1].id)
        return ok({"connections": chosen, "next": following})

    def connection(self, request: webob.Request, reference: str) -> Answer:
        """GET of one connection, by its id."""
        query(request)
        serial = _serial(reference, "id")
        found = next((view for number, view in self._after(-1, {}) if number == serial), None)
        if found is None:
            raise ApiError(Problem.NOT_FOUND, f"no connection {reference} (any more)")
        return ok(found)

    def server_agents(self, request: webob.Request) -> Answer:
        """GET of the agents beside servers."""
        query(request)
        return ok({"server_agents": sorted(self.runtime.server_agents(), key=lambda agent: agent.name)})

    def announce(self, request: webob.Request, name: str) -> Answer:
        """PUT of an agent beside servers: what it adopts connections for. To be repeated before its lease ends."""
        query(request)
        try:
            told = msgspec.convert(json_object(request), Announcement)
        except msgspec.ValidationError as error:
            raise from_validation(error, "", ("listeners",)) from None
        listeners = []
        for index, one in enumerate(told.listeners):
            try:
                listeners.append((canonical_address(one.address), one.port))
            except ValueError as error:
                raise invalid(str(error), f"listeners[{index}].address") from None
        lease = self.runtime.announce(name, listeners)
        if lease is None:
            raise ApiError(Problem.CONFLICT, f"there are {MOST_AGENTS} agents beside servers already")
        return ok(lease)

    def report(self, request: webob.Request, name: str) -> Answer:
        """PUT of an agent beside servers: how loaded they are."""
        query(request)
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise invalid(f"expected a printable name of at most {LONGEST_NAME} characters", "name")
        if len(request.body) > MOST_REPORT:
            raise ApiError(Problem.TOO_LARGE, f"expected a report of at most {MOST_REPORT} bytes")
        try:
            told = msgspec.convert(json_object(request), LoadReport)
        except msgspec.ValidationError as error:
            if "`key` in" in str(error):
                raise invalid("expected names of small letters, digits and _, at most 64 of them", "values") from None
            raise from_validation(error, "", LoadReport.__struct_fields__) from None
        servers = []
        for index, one in enumerate(told.servers):
            try:
                servers.append((canonical_address(one.address), one.port))
            except ValueError as error:
                raise invalid(str(error), f"servers[{index}].address") from None
        try:
            answer = self.runtime.report(
                name, Told(bytes.fromhex(told.run), told.sequence, told.time, tuple(servers), told.values),
                None if told.signature is None else bytes.fromhex(told.signature))
        except Unsigned as refused:
            raise ApiError(Problem.UNAUTHORIZED, str(refused), "signature") from None
        except Outdated as refused:
            raise ApiError(Problem.CONFLICT, str(refused)) from None
        return ok(answer)

    def withdraw(self, request: webob.Request, name: str) -> Answer:
        """DELETE of an agent beside servers."""
        query(request)
        if not self.runtime.withdraw(name):
            raise ApiError(Problem.NOT_FOUND, f"no agent {name} beside a server")
        return Answer(204, None, {})

    def _after(self, after: int, wanted: dict[str, str]) -> Iterator[tuple[int, ConnectionView]]:
        connections: Iterable[ConnectionView] = breathe(self.runtime.connections())
        for view in connections:
            serial = int(view.id, 16)
            if serial > after and _matches(view, wanted):
                yield serial, view


def _serial(text: str, field: str = "marker") -> int:
    try:
        if len(text) > 32:
            raise ValueError
        return int(text, 16)
    except ValueError:
        raise invalid("expected the id of a connection (hexadecimal)", field) from None


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
