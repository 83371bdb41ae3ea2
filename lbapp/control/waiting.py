# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The lines in which connections wait while the members that may have them are full: one a pool.

Owns who waits, in which order and until when, and what is counted of it. Never knows whether there is room: it asks
(:meth:`Lines.serve`). No clock: ``now`` is the caller's.

First come, first served. Who can be given one member only (persistence) does not hold up those behind who can be given
any: each line is one queue for each way of waiting, and the oldest head that can be served is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from lbapp.config.pool import Waiting
from lbapp.control.limits import DEFAULTS, Limits
from lbapp.control.messages import Edit, FlowSignature, Query
from lbapp.values import Value

Flow = tuple[int, FlowSignature]
Way = tuple[int, int, int]
"""Switch, virtual server, and the member that it has to be (0: any)."""

T = TypeVar("T")
FOREMOST = 20
"""Of a line, so many are told of one by one."""


class Told(Value, frozen=True):
    """What is known of a client that was read (APP_QUERY).

    Attributes:
        policy: which led to the pool.
        read: what was read, short.
        unavailable: what it is told where no member is there.
        edit: what a member is told instead of some of it.
    """

    policy: str
    read: str
    unavailable: bytes
    edit: Edit | None = None


class Waiter(NamedTuple):
    """A connection in a line.

    Attributes:
        query: as it was asked last; who asks again keeps its place.
        pool: the id of the pool it is for.
        said: the key of what its client said, where that is what the pool knows it by (persistence).
        told: where its client was read.
        way: what it waits for.
        turn: grows with each that comes.
        since, until: the time at which it came, and at which it is refused.
    """

    query: Query
    pool: str
    said: bytes | None
    told: Told | None
    way: Way
    turn: int
    since: float
    until: float


class Standing(NamedTuple):
    """One that waits, as it is shown. ``position`` 1 is next."""

    position: int
    query: Query
    seconds: float


class LineView(NamedTuple):
    """A pool's line at one moment.

    Attributes:
        now: how many wait.
        longest: seconds that the first of them has waited.
        waited: how many have waited so far, those who still do included.
        timed_out: of those, how many were refused after their time.
        refused: how many found the line full.
        foremost: the first :data:`FOREMOST`.
    """

    now: int
    longest: float
    waited: int
    timed_out: int
    refused: int
    foremost: tuple[Standing, ...]


class _Line:
    __slots__ = ("queues", "refused", "size", "timed_out", "waited")

    def __init__(self) -> None:
        self.queues: dict[Way, OrderedDict[Flow, Waiter]] = {}
        self.size = self.waited = self.timed_out = self.refused = 0

    def heads(self) -> Iterator[Waiter]:
        for queue in self.queues.values():
            yield next(iter(queue.values()))

    def all(self) -> Iterator[Waiter]:
        for queue in self.queues.values():
            yield from queue.values()


class Lines:
    """The lines of all pools.

    Attributes:
        size: how many wait, in all of them.
    """

    def __init__(self, limits: Limits = DEFAULTS) -> None:
        self._limits = limits
        self._lines: dict[str, _Line] = {}
        self._where: dict[Flow, tuple[str, Way]] = {}
        self._turn = 0
        self.size = 0

    def stand(self, waiting: Waiting, query: Query, pool: str, said: bytes | None, told: Told | None, member: int,
              now: float) -> bool:
        """Stand in line; who stands there already keeps its place. False: it is full.

        Args:
            waiting: the pool's bounds.
            query, pool, said, told: see :class:`Waiter`.
            member: the one member that it has to be, 0 for any.
            now: seconds.
        """
        flow = _flow(query)
        known = self.find(query)
        way = (query.switch, query.virtual_server, member)
        if known is not None and known.pool == pool and known.way == way:
            self._lines[pool].queues[way][flow] = known._replace(query=query, said=said, told=told)
            return True
        turn, since, until = (self._turn, now, now + waiting.timeout) if known is None else (
            known.turn, known.since, known.until)
        if known is not None:
            self._remove(known)
        line = self._lines.setdefault(pool, _Line())
        if line.size >= waiting.limit or self.size >= self._limits.waiting:
            line.refused += 1
            return False
        queue = line.queues.setdefault(way, OrderedDict())
        queue[flow] = Waiter(query, pool, said, told, way, turn, since, until)
        self._where[flow] = pool, way
        line.size += 1
        self.size += 1
        if known is None:
            self._turn += 1
            line.waited += 1
        elif any(one.turn > turn for one in queue.values()):
            line.queues[way] = OrderedDict(sorted(queue.items(), key=lambda item: item[1].turn))
        return True

    def find(self, query: Query) -> Waiter | None:
        """The one that waits with this flow."""
        where = self._where.get(_flow(query))
        return self._lines[where[0]].queues[where[1]][_flow(query)] if where is not None else None

    def leave(self, query: Query) -> None:
        """This flow waits no more, if it did."""
        known = self.find(query)
        if known is not None:
            self._remove(known)

    def _remove(self, waiter: Waiter) -> None:
        flow, line = _flow(waiter.query), self._lines[waiter.pool]
        del self._where[flow]
        queue = line.queues[waiter.way]
        del queue[flow]
        if not queue:
            del line.queues[waiter.way]
        line.size -= 1
        self.size -= 1

    def overdue(self, now: float) -> list[Waiter]:
        """Take out those whose time is over."""
        taken = []
        for line in self._lines.values():
            if not line.size:
                continue
            for head in list(line.heads()):
                queue = line.queues[head.way]
                while queue:
                    waiter = next(iter(queue.values()))
                    if waiter.until > now:
                        break
                    self._remove(waiter)
                    line.timed_out += 1
                    taken.append(waiter)
        return taken

    def serve(self, attempt: Callable[[Waiter], T | None]) -> list[T]:
        """Have those served that can be, in their turn; who is served leaves.

        Args:
            attempt: serves one, or says None: there is no room for it, nor for others who wait for the same.
        """
        served: list[T] = []
        for line in list(self._lines.values()):
            blocked: set[Way] = set()
            while line.size:
                head = min((one for one in line.heads() if one.way not in blocked), key=lambda one: one.turn,
                           default=None)
                if head is None:
                    break
                answer = attempt(head)
                if answer is None:
                    blocked.add(head.way)
                    continue
                served.append(answer)
                self.leave(head.query)
        return served

    def forget(self, switch: int) -> None:
        """A switch is away: nobody there could be answered."""
        for line in self._lines.values():
            for waiter in [one for one in line.all() if one.way[0] == switch]:
                self._remove(waiter)

    def keep(self, pools: Mapping[str, object]) -> None:
        """Forget the counters of pools that are no more, once nobody waits there."""
        for pool in [one for one, line in self._lines.items() if one not in pools and not line.size]:
            del self._lines[pool]

    def view(self, pool: str, now: float) -> LineView:
        """A pool's line as it is now."""
        line = self._lines.get(pool)
        if line is None:
            return LineView(0, 0.0, 0, 0, 0, ())
        order = sorted(line.all(), key=lambda one: one.turn)
        return LineView(line.size, now - order[0].since if order else 0.0, line.waited, line.timed_out, line.refused,
                        tuple(Standing(place, one.query, now - one.since)
                              for place, one in enumerate(order[:FOREMOST], 1)))


def _flow(query: Query) -> Flow:
    return query.switch, query.signature._replace(tos=0)
