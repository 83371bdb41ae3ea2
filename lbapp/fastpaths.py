# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The fast paths of the connected switches, as the controller sees them: what they are told, what they ask.

A switch has one link at most: to an agent in this process, or to one elsewhere over the message buses. Owns
which link belongs to which switch and what each was told last; decides nothing.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lbapp.config.model import Configuration, VirtualServer
from lbapp.config.routing import Routes
from lbapp.control.cookies import CookieKeys
from lbapp.control.engine import ControlSegment
from lbapp.control.messages import AppQuery, AppReply, Closed, Delete, Error, FromSwitch, NewFlow, Query, Reap, Reply
from lbapp.control.switch_draining import OnSwitches
from lbapp.dataflow.carrier import Answered, Held
from lbapp.dataflow.distribution import Distribution, distribution
from lbapp.dataflow.fastpath.layout import Mode
from lbapp.dataflow.frames import Packet

LOG = logging.getLogger("lbapp.fastpath")

ASKED_AGAIN_SECONDS = 4.0
"""How long an agent may ask again about a flow whose REPLY was lost, and is told the same."""
RECENT = 4096
"""Answers that are remembered for it, at most, of each switch."""
RECENT_BYTES = 8 << 20
"""The same of what clients are answered (APP_QUERY), which may be long."""


class MemberTraffic(NamedTuple):
    """What a fast path has counted for one member of one virtual server since it was set up.

    ``packets`` and ``bytes`` are those of closed connections, both ways.
    """

    opened: int
    closed: int
    packets: int
    bytes: int


class Reading(NamedTuple):
    """What an agent tells of its fast path on demand.

    ``counters`` are by name; ``members`` by (virtual server, member); ``connections`` is how many it holds, None
    where that is not known here.
    ``before``: what ``opened`` was when this controller began.
    ``refused``: new connections beyond limits, by virtual server: beyond its own, and beyond a client network's.
    """

    connections: int | None
    counters: Mapping[str, int]
    members: Mapping[tuple[int, int], MemberTraffic]
    before: Mapping[tuple[int, int], int] = {}
    refused: Mapping[int, tuple[int, int]] = {}


class Link(Protocol):
    """An agent, wherever it runs. No method waits for an answer of the network.

    Attributes:
        proxies: whether it shakes hands with clients and asks with what they say (APP_QUERY).
        limits: whether it keeps limits on new connections, so that what it asks about is within them.
        lossy: whether a message may be lost on the way, so that what was answered may be asked again.
    """

    @property
    def proxies(self) -> bool:
        """See above."""

    @property
    def limits(self) -> bool:
        """See above."""

    @property
    def lossy(self) -> bool:
        """See above."""

    def configure(self, changed: Mapping[int, Distribution | None], *, whole: bool = False) -> None:
        """Take over these virtual servers (by number); None: it is gone, and so are its flows.

        ``whole``: these are all; whatever else is there from before is gone as well.
        """

    def greet(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        """Make and check cookies with these keys from now on; new ones with the one at ``current``."""

    def reply(self, replies: Sequence[Reply | AppReply]) -> None:
        """Install the flows of these replies (003, REPLY) and let the packets go that wait for them."""

    def deliver(self, answered: Sequence[Answered]) -> Sequence[Answered]:
        """Install the flows of queries that came as packet-ins, and let their packets go; returns those that the
        switch has to serve itself."""

    def take_over(self, flow: NewFlow) -> bool:
        """Have a connection that was relayed (NEWFLOW with offsets); false: it cannot."""

    def reap(self, reaps: Sequence[Reap]) -> None:
        """Delete flows unless they are alive: of a serial, or with serial 0 all of a member. Answers come by
        :meth:`FastPaths.heard`."""

    def live(self) -> Sequence[tuple[int, int, int]] | None:
        """The connections it holds that the control segment follows: (serial, virtual server, member). None: it has
        to be asked about each (REAP)."""

    def read(self) -> Reading:
        """Its counters."""

    def connections(self, limit: int) -> Iterator[Held]:
        """Open connections that it holds, at most so many."""

    def close(self) -> None:
        """The controller ends; the fast path goes on forwarding."""


class _Side:
    """What is known of one switch's link."""

    __slots__ = ("answered", "asked", "before", "counters", "decided", "link", "reaps", "recent", "refused", "size",
                 "told")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.told: dict[int, Distribution] = {}
        self.answered: list[Answered] = []
        self.reaps: list[Reap] = []
        self.counters: Counter[str] = Counter()
        self.asked: Counter[int] = Counter()
        self.recent: OrderedDict[int, tuple[float, Reply]] = OrderedDict()
        self.decided: OrderedDict[int, tuple[float, AppReply]] = OrderedDict()
        self.size = 0
        reading = link.read()
        self.before = {key: traffic.opened for key, traffic in reading.members.items()}
        self.refused = reading.refused


class FastPaths:
    """All links.

    Args:
        control: the control segment.
        perform: does what the control segment says.
        relayed: whether a virtual server's connections on a switch are relayed; by the number of the switch.
        relaying: these links are to what relays them, and are told of nothing else; fast paths leave them alone.
        cookies: the keys of cookies, where somebody else changes them.
        on_switches: makes what is in force on each switch, where somebody else needs that as well.

    Attributes:
        changed: called with a switch whose link came or went.
        queries: whether agents ask the control segment themselves (QUERY over the message bus); otherwise
            queries are packet-ins, and the fast path gets flows by REPLY alone.
    """

    def __init__(self, control: ControlSegment, perform: Callable[[Iterable[Any]], None],
                 relayed: Callable[[int, VirtualServer], bool] = lambda *_: False, *, relaying: bool = False,
                 cookies: CookieKeys | None = None, on_switches: OnSwitches | None = None) -> None:
        self._control = control
        self._perform = perform
        self._relayed = relayed
        self._relaying = relaying
        self.changed: Callable[[int], None] = lambda _: None
        self.queries = True
        self._own_cookies = cookies is None
        self._cookies = cookies or CookieKeys(lambda: secrets.token_bytes(16), time.monotonic())
        self._sides: dict[int, _Side] = {}
        self._configuration = Configuration()
        self._on_switches = on_switches or OnSwitches()
        self._routes = Routes()

    @property
    def cookies(self) -> CookieKeys:
        """The keys of the cookies that fast paths make, for whoever has to check them as well."""
        return self._cookies

    def __contains__(self, switch: int) -> bool:
        return switch in self._sides

    # -------------------------------------------------------------- links

    def add(self, switch: int, link: Link) -> None:
        """A link is there; it is told everything anew."""
        self._sides[switch] = _Side(link)
        link.greet(self._cookies.keys, self._cookies.current)
        self.refresh(switch, whole=True)
        self.changed(switch)

    def remove(self, switch: int) -> None:
        """A link is gone. Its fast path goes on with what it was told."""
        if self._sides.pop(switch, None) is not None:
            self.changed(switch)

    def proxies(self, switch: int) -> bool:
        """Whether a switch has a fast path whose agent shakes hands with clients."""
        side = self._sides.get(switch)
        return side is not None and side.link.proxies

    def close(self) -> None:
        """The controller ends."""
        for side in self._sides.values():
            side.link.close()
        self._sides.clear()

    # -------------------------------------------------------------- what they are told

    def configure(self, configuration: Configuration) -> None:
        """Take over a configuration; :meth:`refresh` tells a switch of it once its rules are there."""
        self._configuration = configuration
        self._routes = Routes(configuration.networks.values())

    def refresh(self, switch: int, numbers: Iterable[int] | None = None, *, whole: bool = False) -> None:
        """Tell a switch's fast path what changed: of these virtual servers, or of all."""
        side = self._sides.get(switch)
        if side is None:
            return
        hosts = self._control.hosts(switch)
        configuration = self._on_switches.of(self._configuration, switch)
        by_number = {server.number: server for server in configuration.virtual_servers.values()}
        wanted = by_number if numbers is None else {number: by_number[number] for number in numbers
                                                    if number in by_number}
        changed: dict[int, Distribution | None] = {}
        for number, server in wanted.items():
            pool = configuration.pool_of(server)
            made = distribution(server, pool, self._control.eligible(switch, server, pool), self._routes, hosts,
                                queries=self.queries, pools=tuple(configuration.pools_of(server).values()),
                                limits=side.link.limits)
            relayed = made is not None and made.mode is Mode.PROXY and self._relayed(switch, server)
            if self._relaying and not relayed:
                made = None
            elif made is not None and relayed and not self._relaying:
                made = made._replace(mode=Mode.PASS)
            if made != side.told.get(number):
                changed[number] = made
        if numbers is None:
            changed.update(dict.fromkeys(side.told.keys() - by_number.keys()))
        gone = self._gone_members(side, configuration) if numbers is None else set()
        for number, made in changed.items():
            if made is None:
                side.told.pop(number, None)
            else:
                side.told[number] = made
        if changed or whole:
            side.link.configure(changed, whole=whole)
        if gone:
            side.link.reap([Reap(switch, 0, 0, member, final=True) for member in sorted(gone)])

    @staticmethod
    def _gone_members(side: _Side, configuration: Configuration) -> set[int]:
        """Members that were told of and are configured no more."""
        there = {member.number for pool in configuration.pools.values() for member in pool.members}
        return {target.member for told in side.told.values() for target in told.targets} - there

    def takes(self, switch: int, reply: Reply, frame: bytes, packet: Packet) -> bool:
        """Whether the fast path takes a query that came as a packet-in from here on, with the next :meth:`flush`."""
        side = self._sides.get(switch)
        if side is None or reply.error is not Error.OK or reply.query.virtual_server not in side.told:
            return False
        side.answered.append(Answered(reply, frame, packet))
        return True

    def flush(self, switch: int) -> Sequence[Answered]:
        """Install what :meth:`takes` gathered; returns what the switch has to serve itself after all."""
        side = self._sides.get(switch)
        if side is None or not side.answered:
            return ()
        answered, side.answered = side.answered, []
        return side.link.deliver(answered)

    def reap(self, reap: Reap) -> None:
        """The control segment asks whether a flow is dead, or wants it deleted: with the next :meth:`tick`."""
        side = self._sides.get(reap.switch)
        if side is not None:
            side.reaps.append(reap)

    def tick(self) -> None:
        """Ask agents what the control segment wants to know, all in one; change the keys of cookies."""
        changed = self._own_cookies and self._cookies.tick(time.monotonic())
        if changed:
            self.greet()
        for side in list(self._sides.values()):
            if side.reaps:
                reaps, side.reaps = side.reaps, []
                side.link.reap(reaps)

    def greet(self) -> None:
        """The keys of cookies have changed."""
        for side in list(self._sides.values()):
            side.link.greet(self._cookies.keys, self._cookies.current)

    # -------------------------------------------------------------- what they ask and tell

    def asked(self, switch: int, queries: Sequence[Query | AppQuery]) -> None:
        """A batch of QUERY and APP_QUERY."""
        side = self._sides.get(switch)
        if side is None:
            return
        now = time.monotonic()
        side.counters["queries"] += len(queries)
        side.counters["query_messages"] += 1
        answers: list[Reply | AppReply] = []
        for one in queries:
            answer: Reply | AppReply | None
            if isinstance(one, AppQuery):
                number, answer = one.query.virtual_server, self._decide(side, one, now)
            else:
                number, answer = one.virtual_server, self._answer(side, one, now)
            side.asked[number] += 1
            if answer is not None:
                answers.append(answer)
        side.link.reply(answers)

    def late(self, reply: Reply | AppReply) -> None:
        """The answer for one that stood in line."""
        side = self._sides.get(reply.query.switch)
        if side is not None:
            if isinstance(reply, Reply):
                self._answered(side, reply, time.monotonic())
            else:
                self._decided(side, reply, time.monotonic())
            side.link.reply([reply])

    def _answer(self, side: _Side, query: Query, now: float) -> Reply | None:
        """One that is asked again has lost its REPLY: it is the same flow still, and counts once. None: it stands in
        line."""
        recent = side.recent
        known = recent.get(query.serial)
        if known is not None and known[1].query == query and now - known[0] < ASKED_AGAIN_SECONDS:
            return known[1]
        reply = self._control.query(query, now, side.link.limits)
        return self._answered(side, reply, now) if reply is not None else None

    @staticmethod
    def _answered(side: _Side, reply: Reply, now: float) -> Reply:
        if not side.link.lossy:
            return reply
        side.recent[reply.query.serial] = (now, reply)
        if len(side.recent) > RECENT:
            side.recent.popitem(last=False)
        return reply

    def _decide(self, side: _Side, asked: AppQuery, now: float) -> AppReply:
        """The same for APP_QUERY. What was decided stays so, whatever the client has said since."""
        known = side.decided.get(asked.query.serial) if side.decided else None
        if known is not None and known[1].query == asked.query and now - known[0] < ASKED_AGAIN_SECONDS:
            return known[1]
        reply = self._control.app_query(asked, now, side.link.limits)
        return reply if reply.reply is None else self._decided(side, reply, now)

    @staticmethod
    def _decided(side: _Side, reply: AppReply, now: float) -> AppReply:
        if not side.link.lossy:
            return reply
        decided, serial = side.decided, reply.query.serial
        known = decided.pop(serial, None)
        side.size += len(reply.answer) - (len(known[1].answer) if known is not None else 0)
        decided[serial] = (now, reply)
        while len(decided) > RECENT or side.size > RECENT_BYTES:
            side.size -= len(decided.popitem(last=False)[1][1].answer)
        return reply

    def closed(self, switch: int, closed: Sequence[Closed]) -> None:
        """A batch of DELETE: one message, however many connections it tells of."""
        side = self._sides.get(switch)
        if side is not None:
            side.counters["deletes"] += len(closed)
            side.counters["delete_messages"] += 1
        self._perform(self._control.handle(Delete(switch, tuple(closed)), time.monotonic()))

    def heard(self, messages: Iterable[FromSwitch]) -> None:
        """Answers to what was asked, and whatever else an agent has to say."""
        for message in messages:
            self._perform(self._control.handle(message, time.monotonic()))

    # -------------------------------------------------------------- views

    def live(self, switch: int) -> Sequence[tuple[int, int, int]] | None:
        """The followed connections that a switch's fast path holds; None where nobody here knows."""
        side = self._sides.get(switch)
        return side.link.live() if side is not None else ()

    def suspects(self, switch: int) -> list[Reap]:
        """What to ask an agent elsewhere that may have failed to tell of an end: about all its connections that the
        control segment follows. Serials of agents are odd."""
        return [Reap(switch, one.serial, one.virtual_server, one.member) for one in self._control.connections()
                if one.switch == switch and one.serial & 1 and not one.rules]

    def read(self, switch: int) -> Reading | None:
        """A fast path's counters; None where the switch has none."""
        side = self._sides.get(switch)
        if side is None:
            return None
        reading, none = side.link.read(), (0, 0)
        refused = {number: (max(0, counts[0] - side.refused.get(number, none)[0]),
                            max(0, counts[1] - side.refused.get(number, none)[1]))
                   for number, counts in reading.refused.items()}
        return reading._replace(before=reading.before or side.before, refused=refused)

    def serves(self, switch: int, virtual_server: int) -> bool:
        """Whether a virtual server's connections are in a switch's fast path, whoever decides."""
        side = self._sides.get(switch)
        return side is not None and virtual_server in side.told

    def decides(self, switch: int, virtual_server: int) -> bool:
        """Whether a switch's fast path selects the members of a virtual server itself."""
        side = self._sides.get(switch)
        told = side.told.get(virtual_server) if side is not None else None
        return told is not None and told.mode is Mode.DECIDE

    def messages(self, switch: int) -> Mapping[str, int]:
        """Messages between a fast path's agent and the control segment: ``queries`` and ``deletes`` one by one,
        ``query_messages`` and ``delete_messages`` as they travelled, many in one."""
        side = self._sides.get(switch)
        return side.counters if side is not None else {}

    def asked_by(self, switch: int) -> Mapping[int, int]:
        """How often a switch's agent asked, by virtual server."""
        side = self._sides.get(switch)
        return side.asked if side is not None else {}

    def link(self, switch: int) -> Link | None:
        """A switch's link."""
        side = self._sides.get(switch)
        return side.link if side is not None else None
