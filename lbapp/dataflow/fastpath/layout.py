# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What lies in the fast path's maps and rings, as values of Python.

Says to Python what ``fastpath.h`` says to the programs, struct by struct; a test compares both with
the compiled object's type information. Pure: never touches the kernel. Records that are read or
written for every connection are plain values, made by one call of ``struct``.
"""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from lbapp.control.buckets import Ration, Shape
from lbapp.values import Value

VERSION = 3
TICK_SHIFT = 20
"""A tick is 2**20 nanoseconds of CLOCK_MONOTONIC."""
SLOTS = 1021
INSTALLS = 1024
DEPARTURE_FRAME = 1514
"""The longest frame that goes when its connection is entered."""
FRAME = 2048
FRAME_SMALL = 104
FRAME_MIDDLE = 512
FRAME_LARGE = 16384
"""Records of queries come in these sizes; the last one holds all that :data:`WINDOW` lets a client send at once."""
WINDOW = 14_600
"""What a client may send when its SYN has been answered here."""
OUT_MARK = 1 << 31
"""With it, the mark of a frame that the agent sends is the interface to leave by; without it, the one it came in on."""
HISTOGRAM = 32
SWEEPS = 2
"""So many walks over all connections may be under way."""
REQUESTS, REQUEST_DATA = 4096, 1460
"""How many clients' first data is kept for members' SYN-ACKs, and how many bytes of it."""

OUTBOUND, ROUTED, ESTABLISHED, FIN, PEER_FIN, RST, CLOSED, REPORTED, DECIDED, TRACKED, SPLICE, ANSWERED, HELD, ANEW = (
    1 << bit for bit in range(14))
"""Bits of :attr:`Flow.state`."""
TARGET_ROUTED = 1
MATCH_VIRTUAL_SERVER, MATCH_MEMBER, MATCH_IFINDEX, MATCH_ALL = 1, 2, 4, 8

KEEP_MAC = bytes(6)
"""As :attr:`Flow.source_mac`: the sender's stays."""
_Bytes = bytes
_Data = bytes | memoryview
_NOWHERE = bytes(16)
MAPPED = bytes(10) + b"\xff\xff"


class Mode(enum.IntEnum):
    """Who selects the member of a new connection."""

    PASS = 0
    DECIDE = 1
    PUNT = 2
    PROXY = 3


class Hash(enum.IntEnum):
    """How the fast path finds a connection's slot."""

    SOURCE = 0
    FLOW = 1
    TURN = 2


class Reason(enum.IntEnum):
    """Why :class:`Closed` was delivered; ALIVE: it is not closed, somebody had asked."""

    SHUTDOWN = 0
    IDLE = 1
    OVERFLOW = 2
    DELETED = 3
    ALIVE = 4


class Result(enum.IntEnum):
    """What became of a connection that was to be installed."""

    OPENED = 0
    EXISTS = 1
    TAKEN = 2
    FULL = 3
    GONE = 4
    """As OPENED, and what was to go with it has."""


class Ask(enum.IntEnum):
    """What came up the ring of queries.

    FIRST: a connection's first packet. DATA: a client's, whose handshake was answered here; :attr:`QueryRecord.options`
    are of its cookie, and this is its first data. LATER: what it says behind that. MEMBER: from the member of a splice
    that is not ready.
    """

    FIRST = 0
    DATA = 1
    MEMBER = 2
    LATER = 3


class Counter(enum.IntEnum):
    """What the programs count; see ``fastpath.h``."""

    HITS = 0
    MISS_OTHER = 1
    MISS_VLAN = 2
    MISS_OPTIONS = 3
    MISS_MALFORMED = 4
    MISS_FRAGMENT = 5
    MISS_FLOW = 6
    MISS_SERVICE = 7
    MISS_PASS = 8
    MISS_TARGET = 9
    MISS_TTL = 10
    MISS_TAKEN = 11
    MISS_FULL = 12
    MISS_QUERY = 13
    OPENED_HERE = 14
    OPENED_INSTALLED = 15
    QUERIES = 16
    CLOSED_COUNT = 17
    CLOSED_LOST = 18
    SHOT = 19
    GREETED = 20
    GREETED_ACK = 21
    COOKIE_BAD = 22
    RESET_SENT = 23
    ASKED_DATA = 24
    ASKED_MEMBER = 25
    ASK_LOST = 26
    SPLICE_WAIT = 27
    OVER_RATE = 28
    OVER_CLIENT = 29
    GIVEN = 30


# ------------------------------------------------------------------ small things

SWAPPED = array("H", range(1 << 16))
if sys.byteorder == "little":
    SWAPPED.byteswap()


def swap(port: int) -> int:
    """A port as it lies in network byte order, read as a number of this host; and back."""
    return SWAPPED[port]


def mapped(address: bytes) -> bytes:
    """16 bytes for an address of 4 or 16."""
    return MAPPED + address if len(address) == 4 else address


def unmapped(address: bytes) -> bytes:
    """4 bytes for an IPv4 address, 16 for an IPv6 address."""
    return address[12:] if address.startswith(MAPPED) else address


def ticks(milliseconds: float) -> int:
    """At most what 32 bits hold."""
    return min(int(milliseconds * 1_000_000) >> TICK_SHIFT, 0x7FFFFFFF)


def milliseconds(number_of_ticks: int) -> int:
    """The other way round."""
    return (number_of_ticks << TICK_SHIFT) // 1_000_000


# ------------------------------------------------------------------ flows

KEY = struct.Struct("=16s16sHHB3x")
FLOW = struct.Struct("=16s16sHH6s6sIIIIQQIIIHH")


class FlowKey(Value, frozen=True):
    """One direction of a connection, as its packets arrive. Addresses are 4 or 16 bytes."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    protocol: int

    def pack(self) -> bytes:
        """As it lies in the maps."""
        return KEY.pack(mapped(self.source), mapped(self.destination), SWAPPED[self.source_port],
                        SWAPPED[self.destination_port], self.protocol)

    @classmethod
    def unpack(cls, data: _Data) -> FlowKey:
        """The other way round."""
        source, destination, source_port, destination_port, protocol = KEY.unpack(data)
        return cls(unmapped(source), unmapped(destination), SWAPPED[source_port], SWAPPED[destination_port],
                   protocol)


class Flow(Value, frozen=True):
    """What becomes of one direction's packets, and what was seen of it.

    Attributes:
        source: addresses and ports as after translation.
        source_mac: :data:`KEEP_MAC` leaves the sender's.
        ifindex: the wire they leave by.
        state: bits, see :data:`OUTBOUND`.
        idle_seconds: how long it may be silent.
        used: ticks; with ``opened`` filled in by the kernel's side.
        request: with the state ``SPLICE``, as it is entered: what its member gets first (:class:`Requests`).
    """

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    destination_mac: bytes
    source_mac: bytes
    ifindex: int
    state: int
    serial: int
    virtual_server: int
    member: int
    idle_seconds: int
    packets: int = 0
    bytes: int = 0
    used: int = 0
    opened: int = 0
    request: int = 0

    def pack(self) -> _Bytes:
        """As it lies in the maps."""
        return FLOW.pack(mapped(self.source), mapped(self.destination), SWAPPED[self.source_port],
                         SWAPPED[self.destination_port], self.destination_mac, self.source_mac, self.ifindex,
                         self.state, self.used, self.opened, self.packets, self.bytes, self.serial,
                         self.virtual_server, self.member, self.idle_seconds, self.request)

    @classmethod
    def unpack(cls, data: _Data) -> Flow:
        """The other way round."""
        (source, destination, source_port, destination_port, destination_mac, source_mac, ifindex, state, used,
         opened, packets, octets, serial, virtual_server, member, idle, request) = FLOW.unpack(data)
        return cls(unmapped(source), unmapped(destination), SWAPPED[source_port], SWAPPED[destination_port],
                   destination_mac, source_mac, ifindex, state, serial, virtual_server, member, idle, packets, octets,
                   used, opened, request)


INSTALL = struct.Struct("=16s16sHHB3x" "16s16sHH6s6sIIIIQQIIIHH" "96x" "6sxxI4x")
"""A connection to be entered: its key, the way there, room for the way back, the client's place, the result."""
INSTALL_RESULT = 40 + 96 + 96 + 12
DEPARTURE = struct.Struct("=IIHBx40s2x")
"""What goes with it: a frame's wire, a SYN's initial sequence number, a length, the kind, and options; then a frame."""
DEPARTURE_SIZE = DEPARTURE.size + DEPARTURE_FRAME


# ------------------------------------------------------------------ virtual servers

SERVICE_KEY = struct.Struct("=16sHBx")
SERVICE_HEAD = struct.Struct("=IIIIHHHBBQQQQ16s")
NO_SCALE = 15
"""As a window scale: none was offered, or none is to be."""
SERVICE_SIZE = (SERVICE_HEAD.size + 4 * SLOTS + 7) // 8 * 8
TARGET = struct.Struct("=16sH6sIII")


class ServiceKey(NamedTuple):
    """A virtual server's address (4 or 16 bytes), port and protocol."""

    address: bytes
    port: int
    protocol: int

    def pack(self) -> bytes:
        """As it lies in the maps."""
        return SERVICE_KEY.pack(mapped(self.address), SWAPPED[self.port], self.protocol)

    @classmethod
    def unpack(cls, data: _Data) -> ServiceKey:
        """The other way round."""
        address, port, protocol = SERVICE_KEY.unpack(data)
        return cls(unmapped(address), SWAPPED[port], protocol)


class Service(NamedTuple):
    """A virtual server.

    Attributes:
        number: the control segment's.
        mode: who decides, see :class:`Mode`.
        slots: the table by which it decides, at most :data:`SLOTS` targets.
        mss: of a virtual server whose handshakes are answered here: what clients are offered, so what its members
            support; 0 is 536.
        window_scale: the same; None offers none.
        sack: the same.
        ration: limits on new connections; None: there are none.
    """

    number: int
    mode: int
    hash: int
    idle_seconds: int
    slots: tuple[int, ...] = ()
    mss: int = 0
    window_scale: int | None = None
    sack: bool = False
    ration: Ration | None = None

    def pack(self) -> bytes:
        """As it lies in the maps.

        Raises:
            ValueError: more slots than there is room for.
        """
        if len(self.slots) > SLOTS:
            raise ValueError(f"{len(self.slots)} slots, at most {SLOTS}")
        head = SERVICE_HEAD.pack(self.number, self.mode, self.hash, 0, min(self.idle_seconds, 0xFFFF),
                                 len(self.slots), self.mss,
                                 NO_SCALE if self.window_scale is None else self.window_scale, self.sack,
                                 *_rationed(self.ration))
        return (head + array("I", self.slots).tobytes()).ljust(SERVICE_SIZE, b"\0")

    @classmethod
    def unpack(cls, data: _Data) -> Service:
        """The other way round."""
        (number, mode, kind, _, idle, count, mss, scale, sack, cost, depth, client_cost, client_depth,
         mask) = SERVICE_HEAD.unpack_from(data)
        ration = Ration(Shape(cost, depth) if cost else None, Shape(client_cost, client_depth) if client_cost else None,
                        unmapped(mask)) if cost or client_cost else None
        return cls(number, mode, kind, idle, struct.unpack_from(f"={count}I", data, SERVICE_HEAD.size), mss,
                   None if scale == NO_SCALE else scale, bool(sack), ration)


_NO_BUCKET = (0, 0)


def _rationed(ration: Ration | None) -> tuple[int, int, int, int, bytes]:
    if ration is None:
        return 0, 0, 0, 0, b""
    return *(ration.server or _NO_BUCKET), *(ration.client or _NO_BUCKET), mapped(ration.mask)


class Target(NamedTuple):
    """Where a slot leads. ``address`` None, ``port`` 0: as the client sent it."""

    address: bytes | None
    port: int
    mac: bytes
    ifindex: int
    member: int
    routed: bool = False

    def pack(self) -> bytes:
        """As it lies in the maps."""
        return TARGET.pack(_NOWHERE if self.address is None else mapped(self.address), SWAPPED[self.port], self.mac,
                           self.ifindex, self.member, TARGET_ROUTED if self.routed else 0)

    @classmethod
    def unpack(cls, data: _Data) -> Target:
        """The other way round."""
        address, port, mac, ifindex, member, flags = TARGET.unpack(data)
        return cls(None if address == _NOWHERE else unmapped(address), SWAPPED[port], mac, ifindex, member,
                   bool(flags & TARGET_ROUTED))


STATS_KEY = struct.Struct("=II")
STATS = struct.Struct("=6Q")


RATE = struct.Struct("=QQQ")
CLIENT_KEY = struct.Struct("=I16s")


class Traffic(NamedTuple):
    """What a member had of a virtual server. Packets and bytes are of closed connections, both directions."""

    opened: int
    closed: int
    packets: int
    bytes: int


# ------------------------------------------------------------------ rings

RING_HEADER = struct.Struct("=II")
CLOSED_RECORD = struct.Struct("=I4x" "16s16sHHB3x" "6I4Q")
"""A record of the ring "closed", with the ring's own header."""
QUERY = struct.Struct("=IIIBxH")


class Closed(NamedTuple):
    """A connection's end, in the order of ``fp_closed``: addresses are 16 bytes, ports are swapped.

    :attr:`key` has them as one likes them; this way a record costs one call.
    """

    raw_source: bytes
    raw_destination: bytes
    raw_source_port: int
    raw_destination_port: int
    protocol: int
    virtual_server: int
    member: int
    serial: int
    reason: int
    state: int
    duration: int
    packets_in: int
    bytes_in: int
    packets_out: int
    bytes_out: int

    @property
    def key(self) -> FlowKey:
        """The connection as the client sent it."""
        return FlowKey(unmapped(self.raw_source), unmapped(self.raw_destination), SWAPPED[self.raw_source_port],
                       SWAPPED[self.raw_destination_port], self.protocol)

    @property
    def duration_ms(self) -> int:
        """From its first packet to its end."""
        return (self.duration << TICK_SHIFT) // 1_000_000


class QueryRecord(Value, frozen=True):
    """A packet for the agent.

    Attributes:
        ifindex: the wire it came in on.
        virtual_server: its number.
        frame: the whole packet; its checksum may be partial.
        kind: see :class:`Ask`.
        options: of a client's cookie, the bits 31 to 23 (:meth:`lbapp.dataflow.fastpath.cookies.Options.of`).
    """

    ifindex: int
    virtual_server: int
    frame: bytes
    kind: int = Ask.FIRST
    options: int = 0


# ------------------------------------------------------------------ proxied handshakes

COOKIES = struct.Struct("=16s16sII")
PENDING = struct.Struct("=II")
SPLICE_VALUE = struct.Struct("=IIbbH")
REQUEST = struct.Struct("=IIIIIHHBBBx")
REQUEST_SIZE = REQUEST.size + REQUEST_DATA


class Splice(Value, frozen=True):
    """How a member's side of a connection differs from the client's.

    Attributes:
        offset: the member's initial sequence number less the cookie, modulo 2**32.
        shift: the member's window scale less the one that the client was told.
        shift_in: the client's window scale less the one that the member was told, or takes it to be.
    """

    offset: int
    shift: int = 0
    shift_in: int = 0

    def pack(self, serial: int) -> bytes:
        """As it lies in the map."""
        return SPLICE_VALUE.pack(serial, self.offset, self.shift, self.shift_in, 1)

    @classmethod
    def unpack(cls, data: _Data) -> Splice | None:
        """The other way round; None for one that is not ready."""
        _, offset, shift, shift_in, ready = SPLICE_VALUE.unpack(data)
        return cls(offset, shift, shift_in) if ready else None


# ------------------------------------------------------------------ sweeping

WANTED = struct.Struct("=III")
SWEEP_WHAT = struct.Struct("=12I6s2x")
SWEEP_DONE = struct.Struct(f"=9I{HISTOGRAM}I")
SWEEP_SIZE = SWEEP_WHAT.size + SWEEP_DONE.size


class Wanted(NamedTuple):
    """What the next sweep does with the flow of a serial.

    ``final``: delete it, alive or not; otherwise it is deleted if it is closed, and told of as ALIVE if not.
    ``idle_seconds``: instead, give it this idle time-out (003, TIMEOUT).
    """

    final: bool = False
    idle_seconds: int = 0

    def pack(self) -> bytes:
        """As it lies in the map."""
        return WANTED.pack(self.final, min(self.idle_seconds, 0xFFFF), 0)


class Swept(NamedTuple):
    """What a sweep found and did; numbers of connections.

    Attributes:
        lingering: closed, still translated.
        kept: not 0: nobody could have been told of more ends, for the ring was full. The walk ended there, and the
            numbers are of what came before.
        histogram: of the live ones: at index i those silent for 2**i ticks and less than twice as long.
    """

    now: int
    live: int
    lingering: int
    kept: int
    shutdown: int
    idle: int
    overflow: int
    deleted: int
    relocated: int
    histogram: tuple[int, ...]

    @classmethod
    def nothing(cls) -> Swept:
        """Of a sweep that had nothing to do."""
        return cls(0, 0, 0, 0, 0, 0, 0, 0, 0, (0,) * HISTOGRAM)

    @classmethod
    def unpack(cls, data: _Data) -> Swept:
        """As it lies behind what was to be done."""
        now, live, lingering, kept, shutdown, idle, overflow, deleted, relocated, *histogram = (
            SWEEP_DONE.unpack_from(data, SWEEP_WHAT.size))
        return cls(now, live, lingering, kept, shutdown, idle, overflow, deleted, relocated, tuple(histogram))

    def older_than(self, count: int) -> int:
        """The milliseconds of silence for which at least ``count`` live connections have been silent, at least 1."""
        found = 0
        for index in range(HISTOGRAM - 1, 0, -1):
            found += self.histogram[index]
            if found >= count:
                return max(1, milliseconds((1 << index) - 1))
        return 1


LAYOUT = struct.Struct("=IIIIQQ6sxx")


class Layout(NamedTuple):
    """What a pinned set of maps was made by, the secret of its hashes, and the balancer's hardware address."""

    version: int
    flow_size: int
    service_size: int
    target_size: int
    seed: tuple[int, int]
    mac: bytes

    def pack(self) -> bytes:
        """As it lies in the map."""
        return LAYOUT.pack(self.version, self.flow_size, self.service_size, self.target_size, *self.seed, self.mac)

    @classmethod
    def unpack(cls, data: _Data) -> Layout:
        """The other way round."""
        version, flow, service, target, one, two, mac = LAYOUT.unpack(data)
        return cls(version, flow, service, target, (one, two), mac)

    @classmethod
    def current(cls, seed: tuple[int, int], mac: bytes) -> Layout:
        """Of this module."""
        return cls(VERSION, KEY.size + FLOW.size, SERVICE_SIZE, TARGET.size, seed, mac)

    def fits(self) -> bool:
        """Whether maps made by this can be read by this module."""
        return self[:4] == Layout.current(self.seed, self.mac)[:4]


def structs() -> Iterator[tuple[str, int]]:
    """Every struct of ``fastpath.h`` and the size that this module gives it."""
    yield from {
        "fp_key": KEY.size, "fp_flow": FLOW.size, "fp_service_key": SERVICE_KEY.size, "fp_service": SERVICE_SIZE,
        "fp_target": TARGET.size, "fp_stats_key": STATS_KEY.size, "fp_stats": STATS.size,
        "fp_closed": CLOSED_RECORD.size - RING_HEADER.size, "fp_query": QUERY.size, "fp_install": INSTALL.size,
        "fp_departure": DEPARTURE_SIZE, "fp_wanted": WANTED.size, "fp_sweep": SWEEP_SIZE,
        "fp_layout": LAYOUT.size, "fp_cookies": COOKIES.size, "fp_pending": PENDING.size,
        "fp_splice": SPLICE_VALUE.size, "fp_request": REQUEST_SIZE, "fp_rate": RATE.size,
        "fp_client_key": CLIENT_KEY.size,
    }.items()
