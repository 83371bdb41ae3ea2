# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path's programs and maps: what they are told, what they tell.

Owns the loaded object, its pins and its rings. Knows neither interfaces nor Open vSwitch
(:mod:`lbapp.dataflow.fastpath.fastpath` adds them).
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import secrets
import struct
import time
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path

from lbapp.dataflow.fastpath import kernel, layout
from lbapp.dataflow.fastpath.entries import Batch, Entry
from lbapp.dataflow.fastpath.layout import (
    Closed,
    Counter,
    Flow,
    FlowKey,
    Layout,
    QueryRecord,
    Result,
    Service,
    ServiceKey,
    Splice,
    Swept,
    Target,
    Traffic,
    Wanted,
)
from lbapp.dataflow.fastpath.requests import Requests

LOG = logging.getLogger("lbapp.fastpath")

MAX_CONNECTIONS = 1 << 20
LEAST_SPLICES = 65_536
HANDSHAKE_MS = 15_000
"""How long a client may take for its second packet: what a flood of SYN leaves does not stay longer."""
HALF_CLOSED_MS = 300_000
"""How long the other side may be silent when one has finished; as conntrack's tcp_fin_wait (lbapp.dataflow.ovs)."""

_U32 = struct.Struct("=I")
_ZERO = bytes(4)
_PACKET = 128
"""What the program "install" makes departures of: a SYN fits."""
_BESIDE = _U32.pack(1)
"""Where the walk that may be beside others has its orders."""
_MONOTONIC_COARSE = 6
"""The clock that the programs look at for packets (linux/time.h); Python has no name for it."""
_NOT_PINNED = ("installs", "departures", "requests", "sweeping", "decisions", "answers", "doubts", "lately")
_MAPS = frozenset({
    "closed", "cookies", "counters", "departures", "flows", "inner", "installs", "layout", "outer", "pending",
    "queries", "rates", "requests", "service_stats", "services", "splices", "sweeping", "targets", "wanted"})
_PROGRAMS = frozenset({"wire", "again", "out", "install", "finish", "revoke", "sweep"})
_TRACKED = struct.Struct("=52xI24xIII4x")
"""State, serial, virtual server and member of a flow."""


class Tables:
    """Programs and maps, loaded.

    Attributes:
        requests: what is kept for members' SYN-ACKs.
        door: the interface by which what goes with a connection leaves (``Injector.door``), in the namespace of the
            thread that installs; 0: nothing goes.

    Args:
        program: the compiled object.
        pins: the folder in which maps are pinned: they are taken over if they are there already, with everything in
            them, and outlive this process. None: they end with this object.
        max_connections: how many connections fit.
        mac: the balancer's hardware address.
        seed: the secret of the hashes; by default that of the maps that were there, else a new one.

    Raises:
        kernel.KernelError: the kernel has not what is needed, or not for us.
    """

    def __init__(self, program: Path, pins: Path | None = None, *, max_connections: int = MAX_CONNECTIONS,
                 mac: bytes, seed: tuple[int, int] | None = None) -> None:
        self.adopted = pins is not None and _adoptable(pins)
        if pins is not None:
            if not self.adopted:
                kernel.unpin(pins)
            pins.mkdir(parents=True, exist_ok=True)
        self.pins = pins
        self._object = kernel.Object(program, pins, lambda name: name not in _NOT_PINNED,
                                     {"flows": 2 * max_connections, "splices": _splices(max_connections)})
        maps = self._object.maps
        lacking = (_MAPS - maps.keys()) | (_PROGRAMS - self._object.programs.keys())
        if lacking:
            self._object.close()
            raise kernel.KernelError(f"{program} is not of this version: it has no {', '.join(sorted(lacking))}")
        self.programs = self._object.programs
        self.maps: Mapping[str, kernel.Map] = maps
        self._flows, self._services, self._targets = maps["flows"], maps["services"], maps["targets"]
        self._closed, self._queries = kernel.Ring(maps["closed"]), kernel.Ring(maps["queries"])
        self._installs, self._departures = maps["installs"].mapped(), maps["departures"].mapped()
        self._batch, self.door = Batch(self._installs, self._departures), 0
        self._requests = maps["requests"].mapped()
        self._install = kernel.Prepared(self.programs["install"], _PACKET)
        self.requests = Requests(self._requests, self._revoke)
        if seed is None:
            old = Layout.unpack(maps["layout"].lookup(_ZERO) or bytes(layout.LAYOUT.size))
            seed = old.seed if self.adopted else (secrets.randbits(64), secrets.randbits(64))
        maps["layout"].update(_ZERO, Layout.current(seed, mac).pack())
        if self.adopted and self._flows.max_entries != 2 * max_connections:
            LOG.warning("the fast path's table for %d connections is kept as it was made", self.max_flows)
        self._told: dict[ServiceKey, Service] = {}
        self._failed = False
        self._backlog: list[Closed] = []

    def close(self, keep: bool = False) -> None:
        """Let go of everything. ``keep``: what is pinned stays, and what is attached goes on."""
        self._closed.close()
        self._queries.close()
        self._installs.close()
        self._departures.close()
        self.requests.close()
        self._requests.close()
        self._object.close()
        if not keep and self.pins is not None:
            kernel.unpin(self.pins)

    # ---------------------------------------------------------- virtual servers

    def set_targets(self, targets: Mapping[int, Target | None]) -> None:
        """Set or (None) delete targets, by their number. Others stay."""
        self._targets.update_all({_U32.pack(number): target.pack() for number, target in targets.items()
                                  if target is not None})
        self._targets.delete_all(_U32.pack(number) for number, target in targets.items() if target is None)

    def targets(self) -> KeysView[int]:
        """The numbers of all targets."""
        return {_U32.unpack(key)[0]: None for key, _ in self._targets.items()}.keys()

    def set_services(self, services: Mapping[ServiceKey, Service | None]) -> None:
        """Set or (None) delete virtual servers; one that is as it was told before is left alone. Others stay.

        Each is replaced at once: no packet meets half of it, and established connections do not notice.
        """
        changed = {key: service for key, service in services.items()
                   if service is not None and self._told.get(key) != service}
        rates = self.maps["rates"]
        for service in changed.values():
            if service.ration is not None:
                rates.update(_U32.pack(service.number), bytes(layout.RATE.size), kernel.NOEXIST)
        self._services.update_all({key.pack(): service.pack() for key, service in changed.items()})
        self._told.update(changed)
        gone = set()
        for key in [key for key, service in services.items() if service is None]:
            found = self._services.lookup(key.pack())
            if found is not None:
                gone.add(found[:4])
            self._services.delete(key.pack())
            self._told.pop(key, None)
        if gone:
            rates.delete_all(gone - {_U32.pack(service.number) for service in self._told.values()})

    def services(self) -> dict[ServiceKey, int]:
        """All virtual servers' numbers."""
        return {ServiceKey.unpack(key): _U32.unpack_from(value)[0] for key, value in self._services.items()}

    # ------------------------------------------------------------- connections

    @property
    def max_flows(self) -> int:
        """How many connections fit."""
        return self._flows.max_entries // 2

    def install(self, entries: Sequence[Entry]) -> list[Result]:
        """Enter connections: both directions of each, or none.

        A connection that is there already is left as it is (EXISTS), unless it is closed: then it makes room. So is
        one whose way back is another connection's (TAKEN).

        Returns:
            One result a connection: GONE where what was to go with it has gone. Where that could not (the queue was
            full, it is too long, there is no door), the connection is OPENED all the same. FULL, too, where the
            kernel could not run the program.
        """
        results: list[Result] = []
        put, now = self._batch.put, _now()
        for first in range(0, len(entries), layout.INSTALLS):
            part, door = entries[first:first + layout.INSTALLS], 0
            for index, one in enumerate(part):
                put(index, one, now)
                if one.departure is not None:
                    door = self.door
            results += self._enter(len(part), door)
        return results

    def _enter(self, count: int, door: int) -> list[Result]:
        try:
            told = self._install(count, door)
        except kernel.KernelError as error:
            if door and error.errno == errno.ENODEV:
                self.door = 0  # somebody has removed it
                return self._enter(count, 0)
            if not self._failed:
                LOG.error("no connection can be entered: %s", error)
            self._failed = True
            return [Result.FULL] * count
        self._failed = False
        if told == count << 16 | count:
            return [Result.GONE] * count
        if told == count:
            return [Result.OPENED] * count
        return list(map(self._batch.result, range(count)))

    def lookup(self, key: FlowKey) -> Flow | None:
        """One direction of a connection."""
        found = self._flows.lookup(key.pack())
        return Flow.unpack(found) if found is not None else None

    def flows(self, limit: int, after: FlowKey | None = None) -> list[tuple[FlowKey, Flow]]:
        """Some flows, both directions, in the map's order, at most ``limit``; ``after``: those behind this one."""
        found: list[tuple[FlowKey, Flow]] = []
        skipping = after is not None
        for keys, values in self._flows.chunks(min(kernel.BATCH, max(limit, 64))):
            for index in range(len(keys) // layout.KEY.size):
                if len(found) >= limit:
                    return found
                key = FlowKey.unpack(keys[index * 40:index * 40 + 40])
                if skipping:
                    skipping = key != after
                    continue
                found.append((key, Flow.unpack(values[index * 96:index * 96 + 96])))
        return found

    def tracked(self) -> list[tuple[int, int, int]]:
        """The open connections that the control segment counts: (serial, virtual server, member)."""
        wanted, mask = layout.TRACKED, layout.TRACKED | layout.OUTBOUND | layout.CLOSED
        return [(serial, virtual_server, member) for _, values in self._flows.chunks()
                for state, serial, virtual_server, member in _TRACKED.iter_unpack(values) if state & mask == wanted]

    # ------------------------------------------------------- proxied handshakes

    def set_cookies(self, keys: Sequence[bytes | None], current: int) -> None:
        """Set the keys of cookies, of 16 bytes each, and which one new ones are made with; None: there is none.

        The key that is not current may be replaced at any time; cookies made with the old one are void then. To
        replace the current one, make the other one current first.
        """
        first, second = keys
        valid = (first is not None) | (second is not None) << 1
        self.maps["cookies"].update(_ZERO, layout.COOKIES.pack(first or b"", second or b"", current, valid))

    def set_splices(self, splices: Mapping[int, Splice]) -> set[int]:
        """Let connections that were installed with the state ``SPLICE`` be translated from now on.

        Args:
            splices: by serial.

        Returns:
            The serials of which no connection is there (any more).
        """
        table = self.maps["splices"]
        return {serial for serial, splice in splices.items()
                if not table.update(_U32.pack(serial), splice.pack(serial), kernel.EXIST)}

    def _revoke(self, index: int) -> int:
        return kernel.run(self.programs["revoke"], context=ctypes.c_uint32(index))[0]

    def splice(self, serial: int) -> Splice | None:
        """How a connection is translated; None where nobody has said so yet, or there is none."""
        found = self.maps["splices"].lookup(_U32.pack(serial))
        return Splice.unpack(found) if found is not None else None

    def forget_pending(self, keys: Iterable[FlowKey]) -> None:
        """These clients' first data has been dealt with; what else they send is no connection's, or their flow's."""
        self.maps["pending"].delete_all(key.pack() for key in keys)

    def close_flow(self, key: FlowKey) -> bool:
        """Close a connection, told of as any other; another one may take its place at once. False: there is none."""
        context = ctypes.create_string_buffer(key.pack(), layout.KEY.size)
        return kernel.run(self.programs["finish"], context=context)[0] == 1

    # -------------------------------------------------------------------- rings

    def closed(self, limit: int = 4096) -> list[Closed]:
        """Connections that ended, at most ``limit``, and the live ones that somebody had asked for."""
        if self._backlog:
            found, self._backlog = self._backlog[:limit], self._backlog[limit:]
            return found
        return self._read_closed(limit)

    def _read_closed(self, limit: int) -> list[Closed]:
        found: list[Closed] = []
        record, make, add = layout.CLOSED_RECORD, Closed._make, found.append
        read = 0
        with self._closed.pending(min(limit * record.size, self._closed.size)) as waiting:
            for fields in record.iter_unpack(waiting[:len(waiting) - len(waiting) % record.size]):
                if fields[0] & kernel.BUSY:
                    break
                read += 1
                if not fields[0] & kernel.DISCARD:
                    add(make(fields[1:]))
        if read:
            self._closed.consume(read * record.size)
        return found

    def queries(self, limit: int = 1024) -> list[QueryRecord]:
        """Packets that the control segment is to be asked about, or the agent itself, at most ``limit``."""
        head, unpack = layout.QUERY.size, layout.QUERY.unpack_from
        found: list[QueryRecord] = []
        for record in self._queries.drain(limit):
            ifindex, virtual_server, length, kind, options = unpack(record)
            found.append(QueryRecord(ifindex, virtual_server, record[head:head + length], kind, options))
        return found

    def queries_fileno(self) -> int:
        """For poll: readable when a query comes. The ring of closed connections wakes nobody; look there at times."""
        return self._queries.fd

    # ----------------------------------------------------------------- sweeping

    def sweep(self, linger_ms: float = 5000, evict_ms: float = 0, *, evict_most: int = 0xFFFFFFFF,
              handshake_ms: float = HANDSHAKE_MS, half_closed_ms: float = HALF_CLOSED_MS) -> Swept:
        """Walk over all connections; delete what has ended or is idle. This, and nothing else, may be called by another
        thread than all the rest.

        Args:
            linger_ms: how long a closed connection must have been silent before it goes.
            evict_ms: not 0: whatever has been silent for longer goes, however much time it still had.
            evict_most: but not more than so many.
            handshake_ms: how long a client may take for its second packet.
            half_closed_ms: how long silence may last when one side has finished.
        """
        return self._sweep(linger_ms, evict_ms, evict_most, handshake_ms, half_closed_ms, walk=_BESIDE)

    def delete(self, *, virtual_server: int | None = None, member: int | None = None, ifindex: int | None = None,
               serial: int | None = None, everything: bool = False) -> Swept:
        """Delete the connections to which all that is given applies, alive or not. Each call walks over all of them."""
        if serial is not None:
            return self.reap({serial: Wanted(final=True)})[0]
        match = (0 if virtual_server is None else layout.MATCH_VIRTUAL_SERVER) | (
            0 if member is None else layout.MATCH_MEMBER) | (0 if ifindex is None else layout.MATCH_IFINDEX) | (
            layout.MATCH_ALL if everything else 0)
        return self._all(match=match, virtual_server=virtual_server or 0, member=member or 0, ifindex=ifindex or 0)

    def relocate(self, member: int, mac: bytes, ifindex: int, virtual_server: int | None = None) -> Swept:
        """A member (of one virtual server, or of all) is somewhere else now: its connections go there."""
        match = layout.MATCH_MEMBER | (0 if virtual_server is None else layout.MATCH_VIRTUAL_SERVER)
        return self._sweep(match=match, member=member, virtual_server=virtual_server or 0, place=ifindex, mac=mac,
                           relocate=1)

    def reap(self, wanted: Mapping[int, Wanted]) -> tuple[Swept, set[int]]:
        """Look after the flows of these serials (003, REAP and TIMEOUT), in one walk.

        Returns:
            What was swept, and the serials of which no flow is there. Live ones that were asked about come
            out of :meth:`closed` as ``ALIVE``.
        """
        missing: set[int] = set()
        swept = Swept.nothing()
        table, pending = self.maps["wanted"], iter(wanted.items())
        while some := dict(itertools.islice(pending, table.max_entries // 2)):
            table.update_all({_U32.pack(serial): what.pack() for serial, what in some.items()})
            try:
                swept = self._all(wanted=1)
                missing.update(_U32.unpack(key)[0] for key, value in table.items()
                               if not layout.WANTED.unpack(value)[2])
            finally:
                table.delete_all(map(_U32.pack, some))
        return swept, missing

    def _all(self, *, match: int = 0, virtual_server: int = 0, member: int = 0, ifindex: int = 0,
             wanted: int = 0) -> Swept:
        """However many are to be deleted: where the ring has no room, it is read now and handed out by closed()."""
        deleted = 0
        while True:
            swept = self._sweep(match=match, virtual_server=virtual_server, member=member, ifindex=ifindex,
                                wanted=wanted)
            deleted += swept.deleted
            if not swept.kept:
                return swept._replace(deleted=deleted)
            self._backlog += self._read_closed(self._closed.size)

    def _sweep(self, linger_ms: float = 1 << 30, evict_ms: float = 0, evict_most: int = 0xFFFFFFFF,
               handshake_ms: float = 1 << 30, half_closed_ms: float = 1 << 30, *, match: int = 0,
               virtual_server: int = 0, member: int = 0, ifindex: int = 0, wanted: int = 0, relocate: int = 0,
               place: int = 0, mac: bytes = layout.KEEP_MAC, walk: bytes = _ZERO) -> Swept:
        ticks, sweeping = layout.ticks, self.maps["sweeping"]
        what = layout.SWEEP_WHAT.pack(ticks(linger_ms), ticks(handshake_ms), ticks(half_closed_ms), ticks(evict_ms),
                                      evict_most, match, virtual_server, member, ifindex, wanted, relocate, place, mac)
        sweeping.update(walk, what.ljust(layout.SWEEP_SIZE, b"\0"))
        kernel.run(self.programs["sweep"], context=ctypes.create_string_buffer(walk, len(walk)))
        return Swept.unpack(sweeping.lookup(walk) or bytes(layout.SWEEP_SIZE))

    # ----------------------------------------------------------------- counting

    def counters(self) -> dict[str, int]:
        """What the programs counted, by name."""
        table = self.maps["counters"]
        return {counter.name.lower(): sum(struct.unpack(f"={table.stride // 8}Q", table.lookup(_U32.pack(counter)) or
                                                        bytes(table.stride))) for counter in Counter}

    def service_stats(self) -> dict[tuple[int, int], Traffic]:
        """By virtual server and member."""
        found = {}
        for key, value in self.maps["service_stats"].items():
            opened, closed, packets_in, bytes_in, packets_out, bytes_out = layout.STATS.unpack(value)
            found[layout.STATS_KEY.unpack(key)] = Traffic(opened, closed, packets_in + packets_out,
                                                          bytes_in + bytes_out)
        return found

    def forget_stats(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Drop the statistics of what is no more: (virtual server, member)."""
        self.maps["service_stats"].delete_all(layout.STATS_KEY.pack(*pair) for pair in pairs)

    def refusals(self) -> dict[int, tuple[int, int]]:
        """New connections that limits refused, by virtual server: by its own, and by those of client networks."""
        return {_U32.unpack(key)[0]: layout.RATE.unpack(value)[1:] for key, value in self.maps["rates"].items()}

    def kernel_memory(self) -> dict[str, int]:
        """Bytes by map."""
        return {name: one.memory() for name, one in self.maps.items()}


def _splices(connections: int) -> int:
    """How many of so many connections may be spliced: of a large table a quarter, for buckets cost memory before
    anybody is in them."""
    return max(connections // 4, min(connections, LEAST_SPLICES))


def _now() -> int:
    return (time.clock_gettime_ns(_MONOTONIC_COARSE) >> layout.TICK_SHIFT) & 0xFFFFFFFF


def _adoptable(pins: Path) -> bool:
    """Whether maps are pinned there that this version can take over."""
    pinned = kernel.pinned_map(pins / "layout")
    if pinned is None:
        return False
    try:
        if pinned.value_size != layout.LAYOUT.size:
            return False
        value = pinned.lookup(_ZERO)
        return value is not None and Layout.unpack(value).fits()
    finally:
        os.close(pinned.fd)


def all_pins(bpffs: Path = kernel.BPFFS) -> Iterator[Path]:
    """The folders of pins of all switches, also those that a process left behind."""
    folder = bpffs / "lbapp"
    if folder.is_dir():
        yield from sorted(folder.iterdir())
