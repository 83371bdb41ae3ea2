# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What records of SSMB are made of: flows, translations, numbers of as many octets as they need. Pure.

Owns the layout that several messages share (docs/wire.md, "Flow"). Knows neither messages nor datagrams: those are
``ssmb.py``'s and ``application.py``'s.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from lbapp.bus.errors import DecodeError, EncodeError, Fault
from lbapp.control.messages import Host, Query, Translation
from lbapp.values import astuple

# Flags of a record. ADD_TCP_OFFSETS is FIGURE 7's.
INSTALL, TRACKED, TRANSLATE, TRANSLATE_ADDRESS, ROUTED, ADD_TCP_OFFSETS, CLIENT_FINISHED, MEMBER_FINISHED = (
    1 << bit for bit in range(8))

# serial, in_port, virtual server, TCP flags, protocol, TOS, client's MAC, source, destination, ports
FLOW = "IIIHBB6s{0}s{0}sHH"
# error, flags, member, translated address and port, MAC and port of the next hop
ANSWER = "BBI{0}sH6sI"
_ZERO = {4: bytes(4), 16: bytes(16)}
_NOWHERE = Host(bytes(6), 0)
_MAX_64 = 0xFFFFFFFFFFFFFFFF


def pack_flow(struct: Struct, size: int, query: Query, *more: Any) -> bytes:
    """A flow (:data:`FLOW`), and what follows it, as ``struct`` has them; ``size`` is that of an address."""
    serial, _, in_port, mac, signature, number, flags = astuple(query)
    source, source_port, destination, destination_port, protocol, tos = astuple(signature)
    # struct pads and cuts strings without a word.
    if len(mac) != 6 or len(source) != size or len(destination) != size:
        raise EncodeError(Fault.VALUE, "a MAC address of 6 bytes and two addresses of one family")
    return struct.pack(serial, in_port, number, flags, protocol, tos, mac, source, destination, source_port,
                       destination_port, *more)


def pack_answer(size: int, translation: Translation | None, flags: int) -> tuple[Any, ...]:
    """Flags, address, port, MAC and port of the next hop."""
    if translation is None:
        return flags, _ZERO[size], 0, _NOWHERE.mac, 0
    address, mac = translation.address, translation.host.mac
    flags |= TRANSLATE | (ROUTED if translation.routed else 0)
    if address is None:
        address = _ZERO[size]
    else:
        flags |= TRANSLATE_ADDRESS
    if len(mac) != 6 or len(address) != size:
        raise EncodeError(Fault.VALUE, "a translation of the flow's family, and a MAC address of 6 bytes")
    return flags, address, translation.port, mac, translation.host.port


def read_translation(flags: int, address: bytes, port: int, mac: bytes, out_port: int) -> Translation | None:
    """What :func:`pack_answer` made."""
    if not flags & TRANSLATE:
        return None
    return Translation(address if flags & TRANSLATE_ADDRESS else None, port, Host(mac, out_port), flags & ROUTED != 0)


# ------------------------------------------------------------------ varints


def put_number(out: bytearray, value: int) -> None:
    """Append a varint."""
    if value < 0 or value > _MAX_64:
        raise EncodeError(Fault.VALUE, f"a number of 64 bits, not {value}")
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


class Cursor:
    """Reads varints and bytes of one payload, and nothing beyond it."""

    __slots__ = ("data", "place")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def number(self, most: int = _MAX_64) -> int:
        data, place, value, shift = self.data, self.place, 0, 0
        try:
            while (octet := data[place]) > 0x7F:
                value |= (octet & 0x7F) << shift
                shift += 7
                place += 1
                if shift > 63:
                    raise DecodeError(Fault.VALUE, "a number of more than 64 bits")
        except IndexError:
            raise DecodeError(Fault.SHORT, "a record ends within a number") from None
        value |= octet << shift
        if value > most or (shift and not octet):
            raise DecodeError(Fault.VALUE, f"a number {value}, expected at most {most} in its shortest form")
        self.place = place + 1
        return value

    def octet(self) -> int:
        if self.place >= len(self.data):
            raise DecodeError(Fault.SHORT, "a record is missing")
        self.place += 1
        return self.data[self.place - 1]

    def take(self, struct: Struct) -> tuple[Any, ...]:
        if self.place + struct.size > len(self.data):
            raise DecodeError(Fault.SHORT, "a record is cut short")
        self.place += struct.size
        return struct.unpack_from(self.data, self.place - struct.size)

    def raw(self, size: int) -> bytes:
        if self.place + size > len(self.data):
            raise DecodeError(Fault.SHORT, "a record is cut short")
        self.place += size
        return self.data[self.place - size:self.place]

    def end(self) -> None:
        if self.place != len(self.data):
            raise DecodeError(Fault.LENGTH, f"{len(self.data) - self.place} bytes after the last record")


def zigzag(value: int) -> int:
    """A signed number as an unsigned one: 0, -1, 1, -2 ... are 0, 1, 2, 3."""
    return value << 1 if value >= 0 else (-value << 1) - 1
