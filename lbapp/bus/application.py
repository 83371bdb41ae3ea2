# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What clients say, on SSMB: APP_QUERY, the REPLY to it, and PART, where either is longer than a datagram. Pure.

Owns the layout of the three (docs/wire.md draws them). Never keeps anything between two calls, except in an
:class:`Assembly`, which is its owner's: the parts of the one message that is arriving.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

from lbapp.bus.errors import DecodeError, EncodeError, Fault
from lbapp.bus.records import (
    ANSWER,
    FLOW,
    INSTALL,
    ROUTED,
    TRACKED,
    TRANSLATE,
    TRANSLATE_ADDRESS,
    Cursor,
    pack_answer,
    pack_flow,
    read_translation,
)
from lbapp.control.messages import AppQuery, AppReply, Binding, Edit, Error, FlowSignature, Query, Reply
from lbapp.values import astuple

MOST_DATA = 72 << 10
"""What a client said, or is answered: more than is ever read of it (64 KiB), or than may be configured."""
MOST_FAILED = 32
LONGEST = 80 << 10
"""A whole message; of each peer, so much is kept at most."""
MOST_PARTS = 255
PART_HEADER = Struct("!BBB")

_QUERIES = {size: Struct("!" + FLOW.format(size) + "IIBBBI") for size in (4, 16)}
_REPLIES = {size: Struct("!" + FLOW.format(size) + ANSWER.format(size) + "BI") for size in (4, 16)}
_MEMBER = Struct("!I")
_TIMED_OUT = 0x01
_EDIT = Struct("!II")
_MORE, _HANDOFF, _EDITED = 0x01, 0x02, 0x04
_ERRORS = tuple(Error)
_NOTHING = Error.OK


class Part(NamedTuple):
    """A piece of a message of type ``kind`` that is longer than a datagram; ``part`` counts from 0."""

    kind: int
    flags: int
    part: int
    parts: int
    data: bytes


# ------------------------------------------------------------------ values -> bytes


def pack_query(message: AppQuery, size: int) -> bytes:
    """APP_QUERY.

    Raises:
        EncodeError: it cannot be carried.
    """
    query, seq, ack, options, data, failed, timed_out = astuple(message)
    if len(data) > MOST_DATA or len(failed) > MOST_FAILED:
        raise EncodeError(Fault.LONG, f"APP_QUERY with {len(data)} bytes of data and {len(failed)} failed members")
    return b"".join((pack_flow(_QUERIES[size], size, query, seq, ack, _TIMED_OUT if timed_out else 0, len(failed),
                               len(options), len(data)), *map(_MEMBER.pack, failed), options, data))


def pack_reply(message: AppReply, size: int) -> bytes:
    """The REPLY to an APP_QUERY.

    Raises:
        EncodeError: it cannot be carried.
    """
    query, reply, binding, answer, edit = astuple(message)
    what = _HANDOFF if binding is Binding.HANDOFF else 0
    if edit is not None:
        if answer or what or reply is None or reply.error is not Error.OK:
            raise EncodeError(Fault.VALUE, "a change of what no member is told, or not from here")
        what, answer = _EDITED, _EDIT.pack(edit.at, edit.removed) + edit.text
    if len(answer) > MOST_DATA:
        raise EncodeError(Fault.LONG, f"an answer of {len(answer)} bytes, expected at most {MOST_DATA}")
    if reply is None:
        if answer:
            raise EncodeError(Fault.VALUE, "an answer to what is not decided yet")
        return pack_flow(_REPLIES[size], size, query, _NOTHING, *_unanswered(size), _MORE, 0)
    if reply.query != query:
        raise EncodeError(Fault.VALUE, "a REPLY to another query")
    flags, address, port, mac, out_port = pack_answer(
        size, reply.translation, reply.install * INSTALL | reply.tracked * TRACKED)
    return pack_flow(_REPLIES[size], size, query, reply.error, flags, reply.member, address, port, mac, out_port,
                     what, len(answer)) + answer


def _unanswered(size: int) -> tuple[Any, ...]:
    flags, address, port, mac, out_port = pack_answer(size, None, 0)
    return flags, 0, address, port, mac, out_port


def divide(kind: int, record: bytes, space: int) -> list[bytes]:
    """A message that is longer than ``space``, as the payloads of the PARTs that carry it.

    Raises:
        EncodeError: it is longer than any message may be.
    """
    step = space - PART_HEADER.size
    parts = -(-len(record) // step)
    if len(record) > LONGEST or parts > MOST_PARTS:
        raise EncodeError(Fault.LONG, f"a message of {len(record)} bytes, expected at most {LONGEST}")
    return [PART_HEADER.pack(kind, part, parts) + record[part * step:(part + 1) * step] for part in range(parts)]


# ------------------------------------------------------------------ bytes -> values


def read_queries(records: bytes, size: int, switch: int, count: int) -> list[AppQuery]:
    """So many APP_QUERY.

    Raises:
        DecodeError: they are none.
    """
    cursor, out = Cursor(records), []
    for _ in range(count):
        (serial, in_port, number, tcp, protocol, tos, mac, source, destination, source_port, destination_port, seq,
         ack, flags, failed, options, data) = cursor.take(_QUERIES[size])
        if flags & ~_TIMED_OUT or failed > MOST_FAILED or data > MOST_DATA:
            raise DecodeError(Fault.VALUE, f"APP_QUERY with flags {flags:#x}, {failed} members, {data} bytes")
        query = Query(serial, switch, in_port, mac, FlowSignature(source, source_port, destination, destination_port,
                                                                  protocol, tos), number, tcp)
        members = tuple(member for (member,) in _MEMBER.iter_unpack(cursor.raw(failed * _MEMBER.size)))
        out.append(AppQuery(query, seq, ack, cursor.raw(options), cursor.raw(data), members, flags != 0))
    cursor.end()
    return out


def read_replies(records: bytes, size: int, switch: int, count: int) -> list[AppReply]:
    """So many REPLY to APP_QUERY.

    Raises:
        DecodeError: they are none.
    """
    cursor, out = Cursor(records), []
    for _ in range(count):
        (serial, in_port, number, tcp, protocol, tos, mac, source, destination, source_port, destination_port, error,
         flags, member, address, port, host, out_port, what, length) = cursor.take(_REPLIES[size])
        if (flags & ~(INSTALL | TRACKED | TRANSLATE | TRANSLATE_ADDRESS | ROUTED)
                or what not in (0, _MORE, _HANDOFF, _EDITED) or length > MOST_DATA or error >= len(_ERRORS)
                or (what == _EDITED and (error or length < _EDIT.size))):
            raise DecodeError(Fault.VALUE, f"REPLY with error {error}, flags {flags:#x} and {what:#x}, {length} bytes")
        query = Query(serial, switch, in_port, mac, FlowSignature(source, source_port, destination, destination_port,
                                                                  protocol, tos), number, tcp)
        if what & _MORE:
            if (error, flags, member, length) != (0, 0, 0, 0):
                raise DecodeError(Fault.VALUE, "a REPLY that both decides and wants more")
            out.append(AppReply(query))
            continue
        reply = Reply(query, _ERRORS[error], member, read_translation(flags, address, port, host, out_port),
                      flags & INSTALL != 0, flags & TRACKED != 0)
        text = cursor.raw(length)
        if what & _EDITED:
            place, removed = _EDIT.unpack_from(text)
            out.append(AppReply(query, reply, edit=Edit(place, removed, text[_EDIT.size:])))
        else:
            out.append(AppReply(query, reply, Binding.HANDOFF if what & _HANDOFF else Binding.SPLICE, text))
    cursor.end()
    return out


def read_part(payload: bytes, flags: int, kinds: frozenset[int]) -> Part:
    """A PART.

    Args:
        flags: the datagram's, which are the message's.
        kinds: the types that may come in parts.

    Raises:
        DecodeError: it is none.
    """
    if len(payload) <= PART_HEADER.size:
        raise DecodeError(Fault.SHORT, "a part of nothing")
    kind, part, parts = PART_HEADER.unpack_from(payload)
    if kind not in kinds or part >= parts or parts < 2:
        raise DecodeError(Fault.VALUE, f"part {part} of {parts} of message type {kind}")
    return Part(kind, flags, part, parts, payload[PART_HEADER.size:])


class Assembly:
    """The message of one peer that is arriving in parts.

    Parts come in order, each once (they are acknowledged batches), so there is one such message at a time; one that
    is not continued was given up by its sender.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._size = 0

    def clear(self) -> None:
        """What is here will not be continued."""
        self._parts.clear()
        self._size = 0

    def take(self, part: Part, unpack: Callable[[int, int, bytes], list[Any]]) -> list[Any]:
        """Take the next part; returns the message where it was the last.

        Args:
            unpack: makes messages of a type, the flags and the bytes.

        Raises:
            DecodeError: the message is none, or too long.
        """
        last = self._parts[-1] if self._parts else None
        if part.part == 0:
            self.clear()
        elif last is None or last[:4] != (part.kind, part.flags, part.part - 1, part.parts):
            self.clear()
            return []  # its beginning went to another process
        self._parts.append(part)
        self._size += len(part.data)
        if self._size > LONGEST:
            self.clear()
            raise DecodeError(Fault.LONG, f"a message of more than {LONGEST} bytes")
        if part.part + 1 < part.parts:
            return []
        whole = b"".join([piece.data for piece in self._parts])
        self.clear()
        return unpack(part.kind, part.flags, whole)
