# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Whether members begin to answer what clients asked them, and what they answer: ``first_byte`` and ``server_errors``
of a pool's ``passive``.

Owns the connections whose member has so many seconds left for its first byte. It hears of nobody's answers by itself:
when the time is over, the data flow segment is asked whether the connection lives (REAP), and says of one that does
whether its member has said anything. A client that is still sending is no fault of its member: only who finds the
client silent as well, twice in a row, takes that for a failure.

Bounded: the oldest of too many is no longer watched. No I/O and no clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Mapping

from lbapp.config.pool import Pool
from lbapp.control.limits import DEFAULTS, Limits
from lbapp.control.messages import Closed, Error, Failed, Reap, Stats
from lbapp.control.timers import Timed, Timers

GRAIN = 0.5
"""Questions are gathered for so long: each batch of them is a walk through all flows of a switch."""
ANSWER = 1.0
"""Seconds for an answer at least; then it is asked once more, so often:"""
REPEATS = 3


class _Watched(Timed):
    """A connection whose member has not answered yet, as far as is known."""

    __slots__ = ("asked", "member", "packets", "patience", "serial", "silent", "switch", "virtual_server")

    def __init__(self, reap: Reap, patience: float) -> None:
        super().__init__()
        self.switch, self.serial = reap.switch, reap.serial
        self.virtual_server, self.member = reap.virtual_server, reap.member
        self.patience = patience
        self.packets = -1
        self.asked = 0
        self.silent = False


class Answers:
    """See the module.

    Args:
        failed: what to do with (member's number, reason).
        limits: the size of the table, the work of one tick.
    """

    def __init__(self, failed: Callable[[tuple[int, str]], None], limits: Limits = DEFAULTS) -> None:
        self._failed = failed
        self._limits = limits
        self._patience: dict[int, float] = {}
        self._judged: set[int] = set()
        self._watched: OrderedDict[tuple[int, int], _Watched] = OrderedDict()
        self._new: deque[_Watched] = deque(maxlen=limits.chosen)
        self._timers: Timers[_Watched] = Timers(GRAIN)
        self._pools: dict[str, Pool] = {}

    def __len__(self) -> int:
        return len(self._watched)

    def configure(self, pools: Mapping[str, Pool]) -> None:
        """Take other pools over."""
        minded = {key: pool for key, pool in pools.items() if pool.passive is not None}
        if minded == self._pools:
            return
        self._pools, self._patience, self._judged = minded, {}, set()
        for pool in minded.values():
            numbers = [member.number for member in pool.members]
            if pool.passive is not None and pool.passive.first_byte:
                self._patience.update(dict.fromkeys(numbers, pool.passive.first_byte))
            if pool.passive is not None and pool.passive.server_errors:
                self._judged.update(numbers)

    def given(self, switch: int, serial: int, virtual_server: int, member: int) -> None:
        """A member was given this connection, whose client has spoken. Its time begins with the next tick."""
        patience = self._patience.get(member)
        if patience is None:
            return
        given = Reap(switch, serial, virtual_server, member)
        self._forget((given.switch, given.serial))
        watched = self._watched[given.switch, given.serial] = _Watched(given, patience)
        self._new.append(watched)
        if len(self._watched) > self._limits.chosen:
            self._forget(next(iter(self._watched)))

    def heard(self, stats: Stats) -> None:
        """A connection that was asked about lives, and its member has (CONNALIVE) or has not (NOTAVAIL) answered.

        Of one that has not, both are said, in this order.
        """
        watched = self._watched.get((stats.switch, stats.serial))
        if watched is None:
            return
        if stats.error is not Error.NOTAVAIL:
            if not watched.silent:
                self._forget((stats.switch, stats.serial))
            watched.silent = False
        elif stats.packets == watched.packets:
            self._forget((stats.switch, stats.serial))
            self._failed((watched.member, f"no answer within {watched.patience:g} s"))
        else:  # the client has said something in the meantime, or was not asked about before
            watched.packets, watched.silent, watched.asked = stats.packets, True, 0

    def ended(self, switch: int, closed: Iterable[Closed]) -> None:
        """Connections have ended; of one that had no answer, by the client's RST: it has waited for long enough."""
        if not self._watched:
            return
        for one in closed:
            watched = self._watched.get((switch, one.serial))
            if watched is None:
                continue
            self._forget((switch, one.serial))
            if one.counted and watched.packets >= 0 and one.packets <= watched.packets + 1:
                self._failed((watched.member, f"no answer within {watched.patience:g} s"))

    def failed(self, failed: Failed, now: float) -> Iterable[Reap]:
        """A member answered a client that it cannot, for a reason of its own."""
        if failed.member in self._judged:
            self._failed((failed.member, f"status {failed.status}"))
        return ()

    def _forget(self, key: tuple[int, int]) -> None:
        watched = self._watched.pop(key, None)
        if watched is not None:
            self._timers.cancel(watched)

    def tick(self, now: float, up: Container[int]) -> list[Reap]:
        """Ask about those whose time is over.

        Args:
            now: seconds.
            up: the switches that can answer.
        """
        for watched in self._new:
            if self._watched.get((watched.switch, watched.serial)) is watched:
                self._timers.schedule(watched, now + watched.patience + GRAIN)  # never early
        self._new.clear()
        asked: list[Reap] = []
        for watched in self._timers.due(now, self._limits.reaps_per_tick) if self._watched else ():
            watched.asked += 1
            if watched.asked > REPEATS or watched.switch not in up:
                self._forget((watched.switch, watched.serial))
                continue
            watched.silent = False
            asked.append(Reap(watched.switch, watched.serial, watched.virtual_server, watched.member))
            self._timers.schedule(watched, now + max(watched.patience / 2, ANSWER))
        return asked
