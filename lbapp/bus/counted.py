# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a DFS has counted, on CSMB (COUNTERS): values ⇄ bytes of the message's body. Pure.

Owns the layout; who counts, and how often it is said, is the agent's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from struct import Struct
from typing import NamedTuple

from lbapp.bus.errors import DecodeError, EncodeError, Fault

MOST_COUNTERS = 128
MOST_NAME = 64
MOST_TRAFFIC = 65_536
TRAFFIC_A_PART = 1024

_COUNTERS = Struct("!HHIHH")
_COUNT = Struct("!Q")
_TRAFFIC = Struct("!IIQQQQ")


class Traffic(NamedTuple):
    """What a DFS has counted for one member of one virtual server since its fast path was set up. ``packets`` and
    ``bytes`` are those of closed connections, both ways.

    Member 0 (from 1.2) is none: ``opened`` and ``closed`` are the new connections that were refused, beyond the
    virtual server's limit and beyond that of a client network."""

    number: int
    member: int
    opened: int
    closed: int
    packets: int
    bytes: int


class Counters(NamedTuple):
    """COUNTERS: what the DFS has counted, or a part of it; ``part`` counts from 0.

    Attributes:
        connections: how many it holds.
        counters: (name, count), all in the first part.
        traffic: by virtual server and member.
    """

    part: int
    parts: int
    connections: int
    counters: tuple[tuple[str, int], ...]
    traffic: tuple[Traffic, ...]


def check_parts(part: int, parts: int, error: type[DecodeError] | type[EncodeError]) -> None:
    """Raise ``error`` unless this is one of so many parts, from 0."""
    if not 0 <= part < parts:
        raise error(Fault.VALUE, f"part {part} of {parts}")


def pack(message: Counters) -> bytes:
    """The body of a part.

    Raises:
        EncodeError: it cannot be carried.
    """
    part, parts, connections, counters, traffic = message
    check_parts(part, parts, EncodeError)
    return _COUNTERS.pack(part, parts, connections, len(counters), len(traffic)) + b"".join(
        map(_named, counters)) + b"".join(_TRAFFIC.pack(*one) for one in traffic)


def _named(counter: tuple[str, int]) -> bytes:
    name = counter[0].encode("ascii")
    if not 0 < len(name) <= MOST_NAME:
        raise EncodeError(Fault.LONG, f"a counter's name of {len(name)} bytes, expected 1 to {MOST_NAME}")
    return bytes((len(name),)) + name + _COUNT.pack(counter[1])


def counters(connections: int, named: Mapping[str, int], traffic: Iterable[Traffic]) -> list[Counters]:
    """All that was counted as the messages that carry it; what is beyond the limits is left out."""
    rows = tuple(itertools.islice(traffic, MOST_TRAFFIC))
    chunks = [rows[index:index + TRAFFIC_A_PART] for index in range(0, len(rows), TRAFFIC_A_PART)] or [()]
    names = tuple(itertools.islice(named.items(), MOST_COUNTERS))
    return [Counters(part, len(chunks), connections, () if part else names, chunk)
            for part, chunk in enumerate(chunks)]


def read(body: bytes) -> Counters:
    """A part.

    Raises:
        DecodeError: it is none.
    """
    if len(body) < _COUNTERS.size:
        raise DecodeError(Fault.SHORT, f"COUNTERS of {len(body)} bytes")
    part, parts, connections, names, rows = _COUNTERS.unpack_from(body)
    check_parts(part, parts, DecodeError)
    if names > MOST_COUNTERS or parts > MOST_TRAFFIC // TRAFFIC_A_PART:
        raise DecodeError(Fault.LIMIT, f"{names} counters in {parts} parts")
    offset, named = _COUNTERS.size, []
    for _ in range(names):
        length = body[offset] if offset < len(body) else 0
        end = offset + 1 + length
        if not 0 < length <= MOST_NAME or end + _COUNT.size > len(body):
            raise DecodeError(Fault.LENGTH, "a counter is cut short, or has no name")
        named.append((body[offset + 1:end].decode("ascii"), *_COUNT.unpack_from(body, end)))
        offset = end + _COUNT.size
    if len(body) != offset + rows * _TRAFFIC.size:
        raise DecodeError(Fault.LENGTH, f"COUNTERS of {len(body)} bytes with {rows} rows")
    return Counters(part, parts, connections, tuple(named), tuple(
        Traffic(*row) for row in _TRAFFIC.iter_unpack(body[offset:])))
