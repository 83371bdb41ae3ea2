# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Agents on other hosts, as the controller reaches them: CSMB and SSMB on one side, fast path links on the other.

Owns the connections. What an agent is told while it is away is said when it is back; decides nothing.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import eventlet

from lbapp.bus.counted import Traffic
from lbapp.bus.events import Counted, Down, Up
from lbapp.bus.ssmb import Lost
from lbapp.bus.transport import CsClient
from lbapp.control.messages import AppQuery, AppReply, Delete, NewFlow, Query, Reap, Refused, Reply, Reset, Stats
from lbapp.control_segments import announce
from lbapp.dataflow.agent import HELD
from lbapp.dataflow.carrier import Answered, Held
from lbapp.dataflow.distribution import Distribution
from lbapp.fastpaths import FastPaths, MemberTraffic, Reading

LOG = logging.getLogger("lbapp.agents")

AGAIN_SECONDS = 1.0
REPEATS = 6
"""What nobody else would ask again is said so often, a second apart, unless it is answered."""
MOST_REAPS = 65_536
MOST_LIMITED = 16_384
"""Virtual servers of which it is remembered what their limits refused: as many as an agent serves."""


def own_identity(path: Path) -> int:
    """This control segment's number, the same after a restart: kept in a file, drawn on the first run.

    Raises:
        OSError: the file cannot be read or made.
    """
    try:
        return int(path.read_text(), 16) or 1
    except FileNotFoundError:
        pass
    except ValueError:
        LOG.warning("%s held no number; a new one is drawn", path)
    number = secrets.randbits(63) | 1
    path.write_text(f"{number:016x}\n")
    return number


class Totals:
    """What an agent has counted, added up over the fast paths that it set up one after the other.

    A fast path that is taken down and set up again counts from 0; what it held then is gone.
    """

    def __init__(self) -> None:
        self.connections: int | None = None
        self.before: dict[tuple[int, int], int] = {}
        self._counters: dict[str, tuple[int, int]] = {}
        self._members: dict[tuple[int, int], tuple[Traffic, MemberTraffic]] = {}
        self._refused: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}

    def take(self, counted: Counted) -> None:
        """The agent has told what it counted so far."""
        begun_anew = counted.counters.get("hits", 0) < self._counters.get("hits", (0, 0))[0]
        first = self.connections is None
        self.connections = counted.connections
        for name, count in counted.counters.items():
            last, so_far = self._counters.get(name, (0, 0))
            # Some are the programs', others the process's: one may begin anew without the other.
            self._counters[name] = (count, so_far + count - (last if last <= count and not begun_anew else 0))
        refused = {row.number: (row.opened, row.closed) for row in counted.traffic if not row.member}
        for number, now in refused.items():
            then, sums = self._refused.get(number, (now if first else (0, 0), (0, 0)))
            if begun_anew or now[0] < then[0] or now[1] < then[1]:
                then = (0, 0)
            self._refused[number] = (now, (sums[0] + now[0] - then[0], sums[1] + now[1] - then[1]))
            if len(self._refused) > MOST_LIMITED:
                del self._refused[next(iter(self._refused))]
        members = {}
        for row in counted.traffic:
            if not row.member:
                continue
            key = row[:2]
            before, total = self._members.get(key, (Traffic(*key, 0, 0, 0, 0), MemberTraffic(0, 0, 0, 0)))
            if begun_anew or row.opened < before.opened:
                total = total._replace(closed=total.opened)
                before = Traffic(*key, 0, 0, 0, 0)
            members[key] = (row, MemberTraffic(*(old + now - then for old, now, then in zip(
                total, row[2:], before[2:], strict=True))))
        if begun_anew:
            for key in self._members.keys() - members.keys():
                total = self._members[key][1]
                members[key] = (Traffic(*key, 0, 0, 0, 0), total._replace(closed=total.opened))
        self._members = members
        if first:
            self.before = {key: total.opened for key, (_, total) in members.items()}
        self.before = {key: self.before.get(key, 0) for key in members}

    @property
    def counters(self) -> dict[str, int]:
        """By name."""
        return {name: last if name == HELD else total for name, (last, total) in self._counters.items()}

    @property
    def refused(self) -> dict[int, tuple[int, int]]:
        """New connections beyond limits, by virtual server, since this controller began."""
        return {number: sums for number, (_, sums) in self._refused.items()}

    @property
    def members(self) -> dict[tuple[int, int], MemberTraffic]:
        """By (virtual server, member)."""
        return {key: total for key, (_, total) in self._members.items()}


class RemoteLink:
    """See :class:`lbapp.fastpaths.Link`: the agent is at the other end of a :class:`CsClient`."""

    def __init__(self, client: CsClient) -> None:
        self.client = client
        self.totals = Totals()
        self.incarnation = 0
        self.limits = False
        self.lossy = True
        self._unanswered: OrderedDict[tuple[int, int], tuple[Reap, int, float]] = OrderedDict()

    @property
    def proxies(self) -> bool:
        """See :class:`lbapp.fastpaths.Link`. Not while it is away: nobody would hear what clients say."""
        return self.client.proxies

    def configure(self, changed: Mapping[int, Distribution | None], *, whole: bool = False) -> None:
        """See :class:`lbapp.fastpaths.Link`. Said at once, and again after each reconnection.

        A member that is back (after a switch was drained to its end) is not to lose what it has from now on by a REAP
        that is repeated.
        """
        back = {target.member for made in changed.values() if made is not None for target in made.targets}
        for key in [(serial, member) for serial, member in self._unanswered if not serial and member in back]:
            del self._unanswered[key]
        said = {number: announce(made) for number, made in changed.items() if made is not None}
        if whole:
            self.client.replace([server for server, _ in said.values()],
                                {number: targets for number, (_, targets) in said.items()})
            return
        for number in changed.keys() - said.keys():
            self.client.remove(number)
        for number, (server, targets) in said.items():
            self.client.put(server)
            self.client.distribute(number, targets)

    def greet(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        """See :class:`lbapp.fastpaths.Link`. Said at once, and again after each reconnection; concealed."""
        self.client.greet(keys, current)

    def reply(self, replies: Sequence[Reply | AppReply]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.client.send_replies([reply for reply in replies if isinstance(reply, Reply)])
        self.client.send_app_replies([reply for reply in replies if isinstance(reply, AppReply)])
        self.client.flush(urgent=True)

    def deliver(self, answered: Sequence[Answered]) -> Sequence[Answered]:
        """See :class:`lbapp.fastpaths.Link`. Nobody here knows when these flows would be there, and a short connection
        is over by then: the switch has them in conntrack, and the fast path never hears of them."""
        return answered

    def take_over(self, flow: NewFlow) -> bool:
        """See :class:`lbapp.fastpaths.Link`. Nothing repeats a NEWFLOW that the agent refuses: REFUSED tells."""
        if not self.proxies or (not self.client.finishes and (flow.client_finished or flow.member_finished)):
            return False
        self.client.send_newflows([flow])
        return True

    def reap(self, reaps: Sequence[Reap]) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        once = [reap for reap in reaps if not reap.final]
        if once:
            self.client.send_reaps(once)  # the control segment's timers repeat it
        self.insist(reap for reap in reaps if reap.final)

    def insist(self, reaps: Iterable[Reap]) -> None:
        """REAP what nobody else would ask about again: repeated until it is answered, or was said often enough."""
        for reap in reaps:
            self._unanswered[reap.serial, reap.member] = (reap, REPEATS, 0.0)
            if len(self._unanswered) > MOST_REAPS:
                self._unanswered.popitem(last=False)
        self.again(time.monotonic())

    def again(self, now: float) -> None:
        """Say what nobody answered once more, where it is due."""
        if not self.client.connected:
            return
        due = [key for key, (_, _, at) in self._unanswered.items() if at <= now]
        self.client.send_reaps([self._unanswered[key][0] for key in due])
        for key in due:
            reap, left, _ = self._unanswered.pop(key)
            if left > 1:
                self._unanswered[key] = (reap, left - 1, now + AGAIN_SECONDS)

    def answered(self, messages: Iterable[Any]) -> None:
        """These came from the agent."""
        if not self._unanswered:
            return
        serials = {closed.serial for one in messages if isinstance(one, Delete) for closed in one.closed}
        serials |= {one.serial for one in messages if isinstance(one, Stats)}
        for key in [key for key in self._unanswered if key[0] in serials]:
            del self._unanswered[key]

    def live(self) -> None:
        """See :class:`lbapp.fastpaths.Link`: an agent elsewhere is asked connection by connection (REAP)."""

    def read(self) -> Reading:
        """See :class:`lbapp.fastpaths.Link`: as the agent told last (COUNTERS), and what its bus has counted."""
        bus = {f"bus_{name}": count for name, count in self.client.channel.counts.items()}
        return Reading(self.totals.connections, {**self.totals.counters, **bus}, self.totals.members,
                       self.totals.before, self.totals.refused)

    def connections(self, limit: int) -> Iterator[Held]:
        """See :class:`lbapp.fastpaths.Link`: its own host knows them."""
        return iter(())

    def close(self) -> None:
        """See :class:`lbapp.fastpaths.Link`."""
        self.client.close()


class RemoteAgents:
    """All agents that this controller was told of.

    Args:
        fastpaths: where their links belong.
        key: the shared key.
        identity: this control segment's number.
    """

    def __init__(self, fastpaths: FastPaths, key: bytes, identity: int) -> None:
        self._fastpaths = fastpaths
        self._key = key
        self._identity = identity
        self._clients: dict[tuple[str, int], CsClient] = {}
        self._links: dict[int, RemoteLink] = {}
        self._again = eventlet.spawn(self._repeat)

    def connect(self, address: tuple[str, int]) -> None:
        """Connect to an agent, for as long as this controller runs."""
        self._clients[address] = CsClient(address, self._key, self._identity, self._event, self._messages)

    def close(self) -> None:
        """End all connections; the fast paths go on."""
        self._again.kill()
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _event(self, client: CsClient, event: Any) -> None:
        switch = client.identity
        if isinstance(event, Up):
            self._up(client, switch, event.peer.incarnation)
        elif isinstance(event, Counted):
            if switch in self._links and self._links[switch].client is client:
                self._links[switch].totals.take(event)
        elif isinstance(event, Down):
            LOG.info("switch %016x: its agent is away (%s); the fast path goes on", switch, event.text)
            self._proxying(client, switch)

    def _proxying(self, client: CsClient, switch: int) -> None:
        """Who shakes hands with clients there may be somebody else now."""
        link = self._links.get(switch)
        if link is not None and link.client is client:
            self._fastpaths.refresh(switch)
            self._fastpaths.changed(switch)

    def _up(self, client: CsClient, switch: int, incarnation: int) -> None:
        if not client.limits:
            LOG.warning("switch %016x: its agent is of an older version and keeps no limits on new connections; this "
                        "controller does, and decides for the virtual servers that have them", switch)
        if not client.proxies:
            LOG.warning("switch %016x: its agent is of an older version and does not shake hands with clients; the "
                        "connections of virtual servers that read what clients say are relayed by this controller",
                        switch)
        for other in [number for number, link in self._links.items() if link.client is client and number != switch]:
            LOG.info("switch %016x: another switch's agent is at its address now", other)
            self._fastpaths.remove(other)
            del self._links[other]
        link = self._fastpaths.link(switch)
        if link is None:
            link = self._links[switch] = RemoteLink(client)
            link.incarnation, link.limits = incarnation, client.limits
            self._fastpaths.add(switch, link)
        elif isinstance(link, RemoteLink) and link.client is client:
            link.limits = client.limits
            self._proxying(client, switch)
            if link.incarnation != incarnation:
                # Its former self may have taken something with it that nobody will tell of.
                link.incarnation = incarnation
                link.insist(self._fastpaths.suspects(switch))
        else:
            LOG.error("switch %016x has a fast path agent already; the one at %s:%d is left alone", switch,
                      *next(address for address, known in self._clients.items() if known is client))

    def _repeat(self) -> None:
        while True:
            eventlet.sleep(AGAIN_SECONDS)
            for link in list(self._links.values()):
                try:
                    link.again(time.monotonic())
                except Exception:
                    LOG.exception("asking an agent again failed")

    def _messages(self, client: CsClient, messages: list[Any]) -> None:
        switch = client.identity
        link = self._links.get(switch)
        if link is None or link.client is not client:
            return
        link.answered(messages)
        queries = [message for message in messages if isinstance(message, (Query, AppQuery))]
        if queries:
            self._fastpaths.asked(switch, queries)
        for message in messages:
            if isinstance(message, Delete):
                self._fastpaths.closed(switch, message.closed)
            elif isinstance(message, (Stats, Refused)):
                self._fastpaths.heard((message,))
            elif isinstance(message, Lost):
                LOG.warning("switch %016x: its agent had to drop %d messages; connections are asked about", switch,
                            message.records)
                link.insist(self._fastpaths.suspects(switch))
            elif isinstance(message, Reset):
                LOG.info("switch %016x: its fast path has forgotten every connection", switch)
                link.insist(self._fastpaths.suspects(switch))
