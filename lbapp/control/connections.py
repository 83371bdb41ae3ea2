# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The connections that the control segment must know, and how it finds out that one has ended.

Owns the table, its timers and the counting of opened and closed. Never selects a member.

Known are the connections of ``state: rules`` virtual servers, and those that count (a
connection limit, an algorithm that goes by load). All others live in the switch alone.

The end of a connection (003, "Flow Management", FIGURE 19):

* *state: rules*. The switch tells of each direction (DELETE). Both closed: gone. One closed by
  a shutdown, a hard timeout or on demand: ended, and it waits a little for the other's counters.
  One closed because it was idle, or for want of room: traffic may be one-way, so it lives on,
  and its next packet that climbs brings the rule back.
* *conntrack*. The switch's snapshots (Live) say who is there. Who is missing is gone; who is
  there and unknown here was opened before this controller started.
* Nothing heard for the idle time: REAP. STATS with CONNALIVE starts the timer again, DELETE
  ends it. Without an answer REAP is repeated three times; then the connection is dropped. While
  a switch is away nobody can answer, and nothing is concluded.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from lbapp.control.limits import DEFAULTS, Limits
from lbapp.control.messages import Closed, FlowSignature, Live, Query, Reap, Reason, Stats
from lbapp.control.statistics import Counts
from lbapp.control.timers import Timed, Timers

GRACE = 5.0
"""Seconds the switch has to tell of an idle connection before it is asked; and the other direction, once one ended."""

ANSWER = 2.0
REPEATS = 3
CONNTRACK_IDLE = 60.0
SETTLE = 3.0
"""Seconds in which packets of a new flow may still climb: cached decisions of the switch are revised within one
(and a client repeats its SYN after one). Later, a climbing packet means that the rules are gone."""

INBOUND, OUTBOUND, BOTH = 1, 2, 3

Tuple5 = tuple[bytes, int, bytes, int, int]


class Connection(NamedTuple):
    """A copy of what is known about a connection. Times are the caller's ``now``.

    ``signature`` is None where the connection is older than this controller; ``ended``: a
    shutdown was seen and one direction is still to come.
    """

    switch: int
    serial: int
    virtual_server: int
    member: int
    signature: FlowSignature | None
    rules: bool
    opened: float
    ended: bool
    packets: int
    bytes: int


class Entry(Timed):
    """A connection in the table.

    ``way`` is how its member is reached, kept for packets that come again; ``counts`` are the
    counters it appears in; ``idle`` is the time after which to ask, in seconds.
    """

    __slots__ = ("bytes", "closed_bytes", "closed_packets", "counts", "deadline", "directions", "ended", "idle",
                 "installed", "member", "opened", "packets", "reaps", "rules", "serial", "signature", "switch",
                 "virtual_server", "way")

    def __init__(self, switch: int, serial: int, virtual_server: int, member: int, rules: bool,
                 signature: FlowSignature | None, way: object, counts: tuple[Counts, ...], idle: float,
                 now: float) -> None:
        super().__init__()
        self.switch = switch
        self.serial = serial
        self.virtual_server = virtual_server
        self.member = member
        self.rules = rules
        self.signature = signature
        self.way = way
        self.counts = counts
        self.idle = idle
        self.opened = self.installed = now
        self.deadline = now + idle
        self.directions = 0
        self.ended = False
        self.reaps = 0
        self.packets = self.bytes = 0
        self.closed_packets = self.closed_bytes = 0

    def view(self) -> Connection:
        """A frozen copy."""
        return Connection(self.switch, self.serial, self.virtual_server, self.member, self.signature, self.rules,
                          self.opened, self.ended, self.packets, self.bytes)

    def reap(self, final: bool = False) -> Reap:
        """The message that asks the switch to delete it: unless it is alive, or in any case (``final``)."""
        return Reap(self.switch, self.serial, self.virtual_server, self.member, final)

    def new_session(self, serial: int, now: float) -> bool:
        """Whether a SYN on this 4-tuple opens another session, rather than being this one's again.

        003: the CS distinguishes "between a new DFS flow and a new TCP session by examining
        messages". A SYN is this session's own while it may still be on its way; not after a
        direction closed, and not later.
        """
        return serial != self.serial and (self.ended or self.directions != 0 or now - self.installed >= SETTLE)


_NONE: Mapping[int, Entry] = MappingProxyType({})


class Connections:
    """The table.

    Args:
        limits: its size, the work of one tick, the interval of snapshots.
    """

    def __init__(self, limits: Limits = DEFAULTS) -> None:
        self._limits = limits
        self._tables: dict[int, OrderedDict[int, Entry]] = {}
        self._by_signature: dict[int, dict[Tuple5, Entry]] = {}
        self._timers: Timers[Entry] = Timers(1.0)
        self._live_at: dict[int, float] = {}
        self._unseen: set[int] = set()
        self._size = 0
        self.overflowed = 0
        self.unanswered = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Connection]:
        """Copies of all, oldest first by switch. The table may change meanwhile."""
        for table in list(self._tables.values()):
            for entry in list(table.values()):
                yield entry.view()

    def find(self, switch: int, signature: FlowSignature) -> Entry | None:
        """The connection that has this signature, whatever the type of service."""
        index = self._by_signature.get(switch)
        return index.get(signature.five) if index else None

    # -------------------------------------------------------------- begin

    def open(self, query: Query, member: int, rules: bool, way: object, counts: tuple[Counts, ...], idle: float,
             now: float) -> None:
        """A queried flow got its member. The counters' ``opened`` and ``active`` are counted here."""
        entry = Entry(query.switch, query.serial, query.virtual_server, member, rules, query.signature, way, counts,
                      idle, now)
        self._insert(entry)
        self._by_signature.setdefault(entry.switch, {})[query.signature.five] = entry

    def _insert(self, entry: Entry) -> None:
        old = self.get(entry.switch, entry.serial)
        if old is not None:  # the originator began its serials anew
            self.remove(old)
        if self._size >= self._limits.connections:
            self._overflow()
        table = self._tables.get(entry.switch)
        if table is None:
            table = self._tables[entry.switch] = OrderedDict()
        table[entry.serial] = entry
        self._size += 1
        for counts in entry.counts:
            counts.opened += 1
            counts.active += 1
        self._set_timer(entry)

    def _set_timer(self, entry: Entry) -> None:
        self._timers.schedule(entry, math.ceil(entry.deadline))  # never early: it would be due again at once

    def _overflow(self) -> None:
        """Make room: the oldest goes (003 FIGURES 18, 21). Its rules in the switch live on."""
        self.overflowed += 1
        oldest = min((next(iter(table.values())) for table in self._tables.values() if table),
                     key=lambda entry: entry.opened)
        self.remove(oldest)

    # -------------------------------------------------------------- end

    def _end(self, entry: Entry) -> None:
        if not entry.ended:
            entry.ended = True
            for counts in entry.counts:
                counts.closed += 1
                counts.active -= 1

    def remove(self, entry: Entry) -> None:
        """Forget a connection; it counts as closed, once."""
        self._end(entry)
        self._timers.cancel(entry)
        table = self._tables[entry.switch]
        del table[entry.serial]
        if not table:
            del self._tables[entry.switch]
        self._size -= 1
        index = self._by_signature.get(entry.switch)
        if index and entry.signature is not None and index.get(entry.signature.five) is entry:
            del index[entry.signature.five]
            if not index:
                del self._by_signature[entry.switch]

    def get(self, switch: int, serial: int) -> Entry | None:
        """The connection that has this serial."""
        table = self._tables.get(switch)
        return table.get(serial) if table else None

    def of(self, switch: int) -> Mapping[int, Entry]:
        """The connections of a switch, by serial: a live view."""
        return self._tables.get(switch, _NONE)

    def take(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """Remove all that ``wanted`` is true for, and return them."""
        taken = [entry for table in self._tables.values() for entry in table.values() if wanted(entry)]
        for entry in taken:
            self.remove(entry)
        return taken

    def closed(self, entry: Entry, closed: Closed, now: float) -> None:
        """The switch closed a connection or, with rules, one direction of it (DELETE)."""
        if closed.counted:
            entry.closed_packets += closed.packets
            entry.closed_bytes += closed.bytes
            self._credit(entry, entry.closed_packets, entry.closed_bytes)
        if not entry.rules:
            self.remove(entry)
            return
        entry.directions |= OUTBOUND if closed.outbound else INBOUND
        if entry.directions == BOTH:
            self.remove(entry)
            return
        entry.reaps = 0
        if closed.reason in (Reason.IDLE, Reason.OVERFLOW):
            entry.deadline = now + entry.idle
        else:
            self._end(entry)
            entry.deadline = now + GRACE
        self._set_timer(entry)

    def stats(self, entry: Entry, stats: Stats, alive: bool, now: float) -> None:
        """Counters of a living connection; with CONNALIVE its idle timer starts again (FIGURE 19)."""
        self._credit(entry, entry.closed_packets + stats.packets, entry.closed_bytes + stats.bytes)
        if alive:
            entry.reaps = 0
            entry.deadline = now + entry.idle

    def _credit(self, entry: Entry, packets: int, octets: int) -> None:
        """Count what is beyond what was counted: a STATS counts what the DELETE will count again."""
        more_packets, more_bytes = max(0, packets - entry.packets), max(0, octets - entry.bytes)
        entry.packets += more_packets
        entry.bytes += more_bytes
        for counts in entry.counts:
            counts.packets += more_packets
            counts.bytes += more_bytes

    def reinstall(self, entry: Entry, now: float) -> bool:
        """Whether a packet that came again needs the flow's rules again; if so, they count as new.

        A packet may have overtaken the rules: then only it has to be translated. If a direction
        was closed or much time passed, the DFS has started a new flow for the same session.
        """
        if not entry.rules:
            return True
        if entry.ended or (not entry.directions and now - entry.installed < SETTLE):
            return False
        entry.directions = 0
        entry.installed = now
        entry.reaps = 0
        entry.deadline = now + entry.idle
        return True

    # -------------------------------------------------------------- snapshots

    def live(self, message: Live, now: float) -> list[tuple[int, int, int]]:
        """Compare with what a switch's conntrack holds; return those that are not known here.

        A connection younger than one interval may have begun after the snapshot was taken.
        """
        self._live_at[message.switch] = now
        if message.agents:
            self._unseen.discard(message.switch)
        else:
            self._unseen.add(message.switch)
        table = self._tables.get(message.switch)
        if not table:
            return list({row[0]: row for row in message.connections}.values())
        rows = {row[0]: row for row in message.connections}
        before = now - self._limits.live_interval
        for serial in table.keys() - rows.keys():
            entry = table[serial]
            if not entry.rules and entry.installed <= before and (message.agents or not serial & 1):
                self.remove(entry)
        return [rows[serial] for serial in rows if serial not in table]

    def adopt(self, switch: int, serial: int, virtual_server: int, member: int, rules: bool,
              counts: tuple[Counts, ...], idle: float, now: float) -> None:
        """Take in a connection that a switch holds and nobody here knew."""
        entry = Entry(switch, serial, virtual_server, member, rules, None, None, counts, idle, now)
        entry.installed = -math.inf  # it was in a snapshot: missing from the next one, it is gone
        self._insert(entry)

    # -------------------------------------------------------------- time

    def tick(self, now: float, up: Container[int]) -> Iterable[Reap]:
        """Ask about connections nothing was heard of.

        Args:
            now: seconds.
            up: the switches that can answer.
        """
        reaps = []
        for entry in self._timers.due(now, self._limits.reaps_per_tick):
            if entry.deadline <= now:
                if entry.switch not in up or (not entry.rules and self._fresh(entry, now)):
                    entry.reaps = 0
                    entry.deadline = now + entry.idle
                elif entry.reaps > REPEATS:
                    self.unanswered += 1
                    self.remove(entry)
                    continue
                else:
                    entry.reaps += 1
                    entry.deadline = now + ANSWER
                    reaps.append(entry.reap())
            self._set_timer(entry)
        return reaps

    def _fresh(self, entry: Entry, now: float) -> bool:
        """Whether a recent snapshot vouches for a conntrack connection that is still in the table."""
        if entry.serial & 1 and entry.switch in self._unseen:
            return False
        return now - self._live_at.get(entry.switch, float("-inf")) <= 2 * self._limits.live_interval

    def forget_switch(self, switch: int) -> None:
        """Drop everything about a switch."""
        for entry in list(self._tables.get(switch, {}).values()):
            self.remove(entry)
        self._live_at.pop(switch, None)
        self._unseen.discard(switch)
