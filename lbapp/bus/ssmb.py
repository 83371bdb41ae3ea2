# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""SSMB, the state-sharing message bus: values ⇄ bytes of one datagram (docs/wire.md draws each).

Owns the layout of 003's FIGURES 5 to 9. Pure. Never keeps anything between two calls: sequence numbers, batches
and acknowledgements are ``channel.py``'s. Fixed records are packed and unpacked by one ``struct`` each, because
one passes for every connection; DELETE and STATS, of which many have to fit in a datagram, use varints. Messages with
what a client said may be longer than a datagram: ``application.py`` divides them.

    datagram = header (38) | records | tag (16)

    0       1       2       3       4               6
    +-------+-------+-------+-------+---------------+-------------------------------+
    | vers. | type  | flags | number| back          | session (8), sequence (8),    |
    +-------+-------+-------+-------+---------------+ batch (8), ack (8)            |
    +-------------------------------------------------------------------------------+
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from hmac import compare_digest, digest
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from lbapp.bus import application
from lbapp.bus.auth import TAG_BYTES, Role
from lbapp.bus.errors import DecodeError, EncodeError, Fault
from lbapp.bus.records import (
    ADD_TCP_OFFSETS,
    ANSWER,
    CLIENT_FINISHED,
    FLOW,
    INSTALL,
    MEMBER_FINISHED,
    ROUTED,
    TRACKED,
    TRANSLATE,
    TRANSLATE_ADDRESS,
    Cursor,
    pack_answer,
    pack_flow,
    put_number,
    read_translation,
    zigzag,
)
from lbapp.control.messages import (
    Closed,
    Delete,
    Error,
    FlowSignature,
    NewFlow,
    Query,
    Reap,
    Reason,
    Refused,
    Reply,
    Reset,
    Stats,
    Timeout,
)
from lbapp.values import astuple

HEADER = Struct("!BBBBHQQQQ")
OVERHEAD = HEADER.size + TAG_BYTES
MOST_RECORDS = 255
LIMIT = 1400
"""Bytes of UDP payload, unless both sides agree on another limit: one MTU, with room for tunnels."""
LIMITS = (576, 8900)


class Kind(enum.IntEnum):
    """003's message types (FIGURE 4); from 16 on they are ours."""

    QUERY = 1
    APP_QUERY = 2
    REPLY = 3
    NEWFLOW = 4
    DELETE = 5
    REAP = 6
    TIMEOUT = 7
    STATS = 8
    RESET = 9
    ACK = 16
    REFUSED = 17
    LOST = 18
    PART = 19
    APP_REPLY = 20


SENT_BY = {
    Role.DFS: frozenset({Kind.QUERY, Kind.APP_QUERY, Kind.DELETE, Kind.STATS, Kind.RESET, Kind.ACK, Kind.REFUSED,
                         Kind.LOST, Kind.PART}),
    Role.CS: frozenset({Kind.REPLY, Kind.NEWFLOW, Kind.REAP, Kind.TIMEOUT, Kind.RESET, Kind.ACK, Kind.LOST, Kind.PART,
                        Kind.APP_REPLY}),
}
URGENT = frozenset({Kind.QUERY, Kind.APP_QUERY, Kind.REPLY, Kind.APP_REPLY, Kind.NEWFLOW, Kind.RESET})
"""Priority H of FIGURE 4: the latency of a client's packets depends on them."""
ACKNOWLEDGED = frozenset({Kind.NEWFLOW, Kind.DELETE, Kind.RESET, Kind.REFUSED, Kind.LOST, Kind.PART})
"""What nothing else repairs: sent again until acknowledged."""
APPLICATION = frozenset({Kind.APP_QUERY, Kind.APP_REPLY})
"""What may come in parts."""
SINCE = dict.fromkeys((*APPLICATION, Kind.PART), 0x11)
"""The version from which on a type exists; the others always did."""

SIX = 0x01
FROM_CS = 0x02

_KINDS = {int(kind): kind for kind in Kind}
_ERRORS = tuple(Error)
_REASONS = (Reason.SHUTDOWN, Reason.IDLE, Reason.HARD, Reason.OVERFLOW, Reason.DELETED)
_REASON_CODES = {reason: code for code, reason in enumerate(_REASONS)}

# Flags of a record. OUTBOUND and ADD_TCP_OFFSETS are FIGURE 7's.
OUTBOUND, COUNTED, SAME_SERVER = 0x08, 0x10, 0x20
FINAL = 0x01

_QUERIES = {size: Struct("!" + FLOW.format(size)) for size in (4, 16)}
_REPLIES = {size: Struct("!" + FLOW.format(size) + ANSWER.format(size)) for size in (4, 16)}
_NEWFLOWS = {size: Struct("!" + FLOW.format(size) + ANSWER.format(size) + "II") for size in (4, 16)}
_REAP = Struct("!IIIB")
_TIMEOUT = Struct("!II")
_REFUSED = Struct("!II")
_RESET = Struct("!QQ")
_LOST = Struct("!Q")
_MAX_32 = 0xFFFFFFFF


class Lost(NamedTuple):
    """The peer had to drop this many records before they could be sent: reconcile."""

    switch: int
    records: int


class Body(NamedTuple):
    """The part of a datagram that is the same each time it is sent."""

    kind: Kind
    flags: int
    number: int
    payload: bytes


class Header(NamedTuple):
    """What a datagram says about itself. ``batch`` is 0 where it needs no acknowledgement.

    ``batch - back`` is the sender's oldest batch that is not acknowledged; ``ack`` acknowledges all batches of
    the receiver up to it.
    """

    version: int
    kind: int
    flags: int
    number: int
    back: int
    session: int
    sequence: int
    batch: int
    ack: int


ACK = Body(Kind.ACK, 0, 0, b"")


# ------------------------------------------------------------------ datagrams


def seal(key: bytes, role: Role, body: Body, version: int, session: int, sequence: int, *, batch: int = 0,
         back: int = 0, ack: int = 0) -> bytes:
    """One datagram, with its tag.

    Args:
        key: that of the sender (``SessionKeys.ssmb``).
        version: ``vers_major << 4 | vers_minor``, as negotiated.
    """
    flags = body.flags | FROM_CS if role is Role.CS else body.flags
    data = HEADER.pack(version, body.kind, flags, body.number, back, session, sequence, batch, ack) + body.payload
    return data + digest(key, data, "sha256")[:TAG_BYTES]


def header(datagram: bytes) -> Header:
    """Read the header of a datagram that nobody vouches for yet.

    Raises:
        DecodeError: it is too short to be one.
    """
    if len(datagram) < OVERHEAD:
        raise DecodeError(Fault.SHORT, f"a datagram of {len(datagram)} bytes, expected {OVERHEAD} at least")
    return Header._make(HEADER.unpack_from(datagram))


def authentic(key: bytes, datagram: bytes) -> bool:
    """Whether a datagram was sealed with this key; compared in constant time."""
    return compare_digest(digest(key, memoryview(datagram)[:-TAG_BYTES], "sha256")[:TAG_BYTES], datagram[-TAG_BYTES:])


def payload(datagram: bytes) -> bytes:
    """The records of a datagram."""
    return datagram[HEADER.size:-TAG_BYTES]


# ------------------------------------------------------------------ records: values -> bytes


def _pack_query(query: Query, size: int) -> bytes:
    return pack_flow(_QUERIES[size], size, query)


def _pack_reply(reply: Reply, size: int) -> bytes:
    query, error, member, translation, install, tracked = astuple(reply)
    flags, address, port, mac, out_port = pack_answer(size, translation, install * INSTALL | tracked * TRACKED)
    return pack_flow(_REPLIES[size], size, query, error, flags, member, address, port, mac, out_port)


def _pack_newflow(flow: NewFlow, size: int) -> bytes:
    query, member, translation, tracked, seq, ack, shift, client_finished, member_finished = astuple(flow)
    if (seq is None) != (ack is None) or (shift and seq is None) or not -128 <= shift < 128:
        raise EncodeError(Fault.VALUE, "both TCP offsets, or none, and a window shift only with them")
    flags, address, port, mac, out_port = pack_answer(
        size, translation, INSTALL | tracked * TRACKED | (0 if seq is None else ADD_TCP_OFFSETS)
        | client_finished * CLIENT_FINISHED | member_finished * MEMBER_FINISHED)
    return pack_flow(_NEWFLOWS[size], size, query, shift & 0xFF, flags, member, address, port, mac, out_port, seq or 0,
                     ack or 0)


def _pack_stats(stats: Stats, _: int) -> bytes:
    out = bytearray(stats.serial.to_bytes(4, "big"))
    out.append(stats.error)
    put_number(out, stats.packets)
    put_number(out, stats.bytes)
    return bytes(out)


def _pack_deletes(closed: Sequence[Closed], room: int) -> tuple[int, bytes]:
    """As many records as fit: their number and bytes.

    The serial is the difference to the record before it, and the virtual server is left out where it is the
    same as before: what closes together was opened together.
    """
    out = bytearray()
    count, last_serial, last_server = 0, 0, -1
    for serial, server, member, reason, outbound, counted, packets, octets, duration in map(astuple, closed):
        if not 0 <= serial <= _MAX_32 or not 0 <= server <= _MAX_32 or not 0 <= member <= _MAX_32:
            raise EncodeError(Fault.VALUE, "serial, virtual server and member of 32 bits")
        before = len(out)
        flags = _REASON_CODES[reason] | (OUTBOUND if outbound else 0) | (COUNTED if counted else 0)
        if server == last_server:
            out.append(flags | SAME_SERVER)
            put_number(out, zigzag(serial - last_serial))
        else:
            out.append(flags)
            put_number(out, zigzag(serial - last_serial))
            put_number(out, server)
        put_number(out, member)
        put_number(out, packets)
        put_number(out, octets)
        put_number(out, round(duration * 1000))
        if len(out) > room:
            del out[before:]
            break
        count, last_serial, last_server = count + 1, serial, server
        if count == MOST_RECORDS:
            break
    return count, bytes(out)


_PACKERS: dict[Kind, Callable[[Any, int], bytes]] = {
    Kind.QUERY: _pack_query,
    Kind.APP_QUERY: application.pack_query,
    Kind.APP_REPLY: application.pack_reply,
    Kind.REPLY: _pack_reply,
    Kind.NEWFLOW: _pack_newflow,
    Kind.REAP: lambda reap, _: _REAP.pack(reap.serial, reap.virtual_server, reap.member, FINAL if reap.final else 0),
    Kind.TIMEOUT: lambda timeout, _: _TIMEOUT.pack(timeout.serial, timeout.seconds),
    Kind.STATS: _pack_stats,
    Kind.REFUSED: lambda refused, _: _REFUSED.pack(refused.serial, refused.virtual_server),
}
_FIXED = {Kind.QUERY: _QUERIES, Kind.REPLY: _REPLIES, Kind.NEWFLOW: _NEWFLOWS}


def room(limit: int = LIMIT) -> int:
    """How many bytes of records a datagram of ``limit`` bytes has."""
    return limit - OVERHEAD


def full(kind: Kind, limit: int = LIMIT) -> int:
    """From how many messages on at least one datagram is full."""
    if kind in _FIXED:
        return min(MOST_RECORDS, room(limit) // _FIXED[kind][4].size)
    return 1 if kind in APPLICATION else MOST_RECORDS


def pack(kind: Kind, messages: Iterable[Any], space: int) -> list[Body]:
    """Messages of one kind as the fewest bodies, each no larger than ``space``, in order within a family.

    One of what a client said that is larger becomes several bodies of type PART.

    Args:
        kind: DELETE takes :class:`Closed` values; the others their own messages.
        space: see :func:`room`.

    Raises:
        EncodeError: a message cannot be carried; nothing is packed then.
    """
    try:
        if kind is Kind.DELETE:
            return _delete_bodies(list(messages), space)
        if kind in _FIXED or kind in APPLICATION:
            four: list[Any] = []
            sixes: list[Any] = []
            for message in messages:
                signature = message.signature if kind is Kind.QUERY else message.query.signature
                (four if len(signature.source) == 4 else sixes).append(message)
            return _bodies(kind, 0, 4, four, space) + _bodies(kind, SIX, 16, sixes, space)
        return _bodies(kind, 0, 0, list(messages), space)
    except EncodeError:
        raise
    except (StructError, TypeError, AttributeError, KeyError, OverflowError, ValueError) as error:
        raise EncodeError(Fault.VALUE, f"{kind.name}: {error}") from None


def _bodies(kind: Kind, flags: int, size: int, messages: list[Any], space: int) -> list[Body]:
    packer = _PACKERS[kind]
    records = [packer(message, size) for message in messages]
    if kind in _FIXED:
        step = min(MOST_RECORDS, space // _FIXED[kind][size].size)
        return [Body(kind, flags, len(part), b"".join(part))
                for part in (records[index:index + step] for index in range(0, len(records), step))]
    bodies: list[Body] = []
    part: list[bytes] = []
    used = 0
    for record in records:
        if len(record) > space and kind in APPLICATION:
            if part:
                bodies.append(Body(kind, flags, len(part), b"".join(part)))
                part, used = [], 0
            bodies += [Body(Kind.PART, flags, 1, piece) for piece in application.divide(kind, record, space)]
            continue
        if len(record) > space:
            raise EncodeError(Fault.LONG, f"{kind.name} of {len(record)} bytes, expected at most {space}")
        if part and (used + len(record) > space or len(part) == MOST_RECORDS):
            bodies.append(Body(kind, flags, len(part), b"".join(part)))
            part, used = [], 0
        part.append(record)
        used += len(record)
    if part:
        bodies.append(Body(kind, flags, len(part), b"".join(part)))
    return bodies


def _delete_bodies(closed: list[Closed], space: int) -> list[Body]:
    bodies = []
    while closed:
        count, records = _pack_deletes(closed, space)
        if not count:
            raise EncodeError(Fault.LONG, f"DELETE in {space} bytes")
        bodies.append(Body(Kind.DELETE, 0, count, records))
        del closed[:count]
    return bodies


def reset(session: int, floor: int) -> Body:
    """RESET: forget every flow. What this session sent up to sequence number ``floor`` is void."""
    return Body(Kind.RESET, 0, 1, _RESET.pack(session, floor))


def reset_floor(records: bytes) -> tuple[int, int]:
    """Session and floor of a RESET."""
    session, floor = _RESET.unpack(records)
    return session, floor


def lost(records: int) -> Body:
    """LOST: so many records were dropped at the sender."""
    return Body(Kind.LOST, 0, 1, _LOST.pack(records))


# ------------------------------------------------------------------ records: bytes -> values


def _unpack_queries(records: bytes, size: int, switch: int, count: int) -> list[Query]:
    return [Query(serial, switch, in_port, mac, FlowSignature(source, source_port, destination, destination_port,
                                                              protocol, tos), number, flags)
            for serial, in_port, number, flags, protocol, tos, mac, source, destination, source_port, destination_port
            in _QUERIES[size].iter_unpack(records)]


def _unpack_replies(records: bytes, size: int, switch: int, count: int) -> list[Reply]:
    out = []
    for (serial, in_port, number, tcp, protocol, tos, mac, source, destination, source_port, destination_port, error,
         flags, member, address, port, host, out_port) in _REPLIES[size].iter_unpack(records):
        if flags & ~(INSTALL | TRACKED | TRANSLATE | TRANSLATE_ADDRESS | ROUTED):
            raise DecodeError(Fault.VALUE, f"REPLY with flags {flags:#x}")
        query = Query(serial, switch, in_port, mac, FlowSignature(source, source_port, destination, destination_port,
                                                                  protocol, tos), number, tcp)
        out.append(Reply(query, _ERRORS[error], member, read_translation(flags, address, port, host, out_port),
                         flags & INSTALL != 0, flags & TRACKED != 0))
    return out


def _unpack_newflows(records: bytes, size: int, switch: int, count: int) -> list[NewFlow]:
    out = []
    for (serial, in_port, number, tcp, protocol, tos, mac, source, destination, source_port, destination_port, shift,
         flags, member, address, port, host, out_port, seq, ack) in _NEWFLOWS[size].iter_unpack(records):
        translation = read_translation(flags, address, port, host, out_port)
        if translation is None or (shift and not flags & ADD_TCP_OFFSETS):
            raise DecodeError(Fault.VALUE, f"NEWFLOW with flags {flags:#x} and window shift {shift}")
        query = Query(serial, switch, in_port, mac, FlowSignature(source, source_port, destination, destination_port,
                                                                  protocol, tos), number, tcp)
        seq_offset, ack_offset = (seq, ack) if flags & ADD_TCP_OFFSETS else (None, None)
        out.append(NewFlow(query, member, translation, flags & TRACKED != 0, seq_offset, ack_offset,
                           (shift ^ 0x80) - 0x80, flags & CLIENT_FINISHED != 0, flags & MEMBER_FINISHED != 0))
    return out


def _unpack_deletes(records: bytes, size: int, switch: int, count: int) -> list[Delete]:
    cursor, closed = Cursor(records), []
    serial, server = 0, -1
    for _ in range(count):
        flags = cursor.octet()
        if flags & ~(0x07 | OUTBOUND | COUNTED | SAME_SERVER):
            raise DecodeError(Fault.VALUE, f"DELETE with flags {flags:#x}")
        delta = cursor.number()
        serial += delta >> 1 if not delta & 1 else -(delta + 1 >> 1)
        if not 0 <= serial <= _MAX_32:
            raise DecodeError(Fault.VALUE, "a serial that is no number of 32 bits")
        if not flags & SAME_SERVER:
            server = cursor.number(_MAX_32)
        elif server < 0:
            raise DecodeError(Fault.VALUE, "the first record has no virtual server")
        closed.append(Closed(serial, server, cursor.number(_MAX_32), _REASONS[flags & 0x07], flags & OUTBOUND != 0,
                             flags & COUNTED != 0, cursor.number(), cursor.number(), cursor.number() / 1000))
    cursor.end()
    return [Delete(switch, tuple(closed))]


def _unpack_stats(records: bytes, size: int, switch: int, count: int) -> list[Stats]:
    cursor, out = Cursor(records), []
    for _ in range(count):
        serial = int.from_bytes(cursor.raw(4), "big")
        out.append(Stats(switch, serial, _ERRORS[cursor.octet()], cursor.number(), cursor.number()))
    cursor.end()
    return out


def _unpack_reaps(records: bytes, size: int, switch: int, count: int) -> list[Reap]:
    out = []
    for serial, server, member, flags in _REAP.iter_unpack(records):
        if flags & ~FINAL:
            raise DecodeError(Fault.VALUE, f"REAP with flags {flags:#x}")
        out.append(Reap(switch, serial, server, member, flags & FINAL != 0))
    return out


_UNPACKERS: dict[Kind, Callable[[bytes, int, int, int], list[Any]]] = {
    Kind.QUERY: _unpack_queries,
    Kind.APP_QUERY: application.read_queries,
    Kind.APP_REPLY: application.read_replies,
    Kind.REPLY: _unpack_replies,
    Kind.NEWFLOW: _unpack_newflows,
    Kind.DELETE: _unpack_deletes,
    Kind.REAP: _unpack_reaps,
    Kind.TIMEOUT: lambda records, _, switch, __: [Timeout(switch, *fields) for fields in _TIMEOUT.iter_unpack(records)],
    Kind.STATS: _unpack_stats,
    Kind.RESET: lambda records, _, switch, __: [Reset(switch) for _ in _RESET.iter_unpack(records)],
    Kind.ACK: lambda records, _, __, ___: [None] * len(records),
    Kind.REFUSED: lambda records, _, switch, __: [Refused(switch, *fields) for fields in _REFUSED.iter_unpack(records)],
    Kind.LOST: lambda records, _, switch, __: [Lost(switch, *fields) for fields in _LOST.iter_unpack(records)],
    Kind.PART: lambda records, size, _, __: [application.read_part(records, SIX if size == 16 else 0, _IN_PARTS)],
}
_SINGLE = frozenset({Kind.RESET, Kind.LOST, Kind.PART})
_IN_PARTS: frozenset[int] = frozenset(map(int, APPLICATION))


def unpack(kind: int, flags: int, count: int, records: bytes, switch: int) -> list[Any]:
    """The messages of a datagram's body. A DELETE is one :class:`Delete` of all its records.

    Args:
        kind, flags, count: from the header.
        switch: the datapath id that the session speaks for; no record repeats it.

    Raises:
        DecodeError: it is no body; nothing of it is taken.
    """
    if kind not in _KINDS:
        raise DecodeError(Fault.KIND, f"message type {kind}")
    if flags & ~(SIX | FROM_CS):
        raise DecodeError(Fault.VALUE, f"flags {flags:#x}")
    known = _KINDS[kind]
    try:
        messages = _UNPACKERS[known](records, 16 if flags & SIX else 4, switch, count)
    except StructError:
        raise DecodeError(Fault.LENGTH, f"{len(records)} bytes are no whole records of {known.name}") from None
    except IndexError:
        raise DecodeError(Fault.VALUE, f"an error code or reason of {known.name} that does not exist") from None
    found = len(messages[0].closed) if known is Kind.DELETE else len(messages)
    if found != count or (not count and known is not Kind.ACK) or (known in _SINGLE and count != 1):
        raise DecodeError(Fault.LENGTH, f"{found} records of {known.name}, announced {count}")
    return messages
