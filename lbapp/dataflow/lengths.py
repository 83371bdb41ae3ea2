# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Lengths inside OpenFlow messages, checked before anybody parses them.

Ryu's parsers advance by the lengths that a message states: a zero keeps them in the same place for
ever, and the whole controller with them. Knows every list of entries that states its own lengths
in what an OpenFlow 1.3 switch may send. Pure: bytes in, nothing out but an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

FLOW, GROUP, GROUP_DESC, METER, METER_CONFIG, TABLE_FEATURES = 1, 6, 7, 9, 10, 12
_APPLY_OR_WRITE = (3, 4)
_INSTRUCTION_LISTS, _ACTION_LISTS = (0, 1), (4, 5, 6, 7)
_NICIRA_CT = b"\x00\x00\x23\x20\x00\x23"


class LengthError(ValueError):
    """A message whose own lengths contradict each other."""


def _entries(data: bytes, offset: int, end: int, at: int, least: int, what: str,
             pad: int = 1) -> Iterator[tuple[int, int]]:
    """Walk a list: (begin, end) of each entry, whose 16-bit length stands ``at`` bytes after its begin."""
    while offset < end:
        length = int.from_bytes(data[offset + at:offset + at + 2], "big")
        if length < least or offset + length > end:
            raise LengthError(f"{what} of {length} bytes")
        yield offset, offset + length
        offset += -(-length // pad) * pad


def check_match(data: bytes, offset: int, end: int, what: str) -> int:
    """Check an ofp_match and its fields; returns where its padding ends.

    Raises:
        LengthError: it goes beyond ``end``, or a field beyond it.
    """
    length = int.from_bytes(data[offset + 2:offset + 4], "big")
    padded = offset + (length + 7 & ~7)
    if length < 4 or padded > end:
        raise LengthError(f"{what} with a match of {length} bytes")
    at, stop = offset + 4, offset + length
    while at < stop:
        if at + 4 > stop or not data[at + 3] or at + 4 + data[at + 3] > stop:
            raise LengthError(f"{what} with a field cut short")
        at += 4 + data[at + 3]
    return padded


def _actions(data: bytes, offset: int, end: int) -> None:
    for begin, stop in _entries(data, offset, end, 2, 8, "action"):
        if data[begin:begin + 2] == b"\xff\xff" and data[begin + 4:begin + 10] == _NICIRA_CT:
            _actions(data, begin + 24, stop)


def _flow(data: bytes, begin: int, end: int) -> None:
    offset = check_match(data, begin + 48, end, "flow entry")
    for at, stop in _entries(data, offset, end, 2, 8, "instruction"):
        if int.from_bytes(data[at:at + 2], "big") in _APPLY_OR_WRITE:
            _actions(data, at + 8, stop)


def _group_desc(data: bytes, begin: int, end: int) -> None:
    for at, stop in _entries(data, begin + 8, end, 0, 16, "bucket"):
        _actions(data, at + 16, stop)


def _meter_config(data: bytes, begin: int, end: int) -> None:
    for _ in _entries(data, begin + 8, end, 2, 12, "meter band"):
        pass


def _table_features(data: bytes, begin: int, end: int) -> None:
    for at, stop in _entries(data, begin + 64, end, 2, 4, "table feature", pad=8):
        if int.from_bytes(data[at:at + 2], "big") in _INSTRUCTION_LISTS + _ACTION_LISTS:
            for _ in _entries(data, at + 4, stop, 2, 4, "table feature's entry"):
                pass


def _nothing(data: bytes, begin: int, end: int) -> None:
    """All that is inside has a fixed size."""


_MULTIPARTS: dict[int, tuple[int, int, Callable[[bytes, int, int], None]]] = {
    FLOW: (0, 56, _flow), GROUP: (0, 40, _nothing), GROUP_DESC: (0, 8, _group_desc), METER: (4, 40, _nothing),
    METER_CONFIG: (0, 8, _meter_config), TABLE_FEATURES: (0, 64, _table_features),
}
"""By type: where an entry's length stands, the least it can be, and what to check inside."""


def check_multipart(data: bytes) -> None:
    """Check an OFPT_MULTIPART_REPLY.

    Raises:
        LengthError: naming the entry and its length.
    """
    if len(data) < 16:
        raise LengthError(f"multipart reply of {len(data)} bytes")
    known = _MULTIPARTS.get(data[8] << 8 | data[9])
    if known is not None:
        at, least, inside = known
        for begin, end in _entries(data, 16, len(data), at, least, "multipart entry"):
            inside(data, begin, end)


def check_queues(data: bytes) -> None:
    """Check an OFPT_QUEUE_GET_CONFIG_REPLY.

    Raises:
        LengthError: naming the entry and its length.
    """
    if len(data) < 16:
        raise LengthError(f"queue configuration of {len(data)} bytes")
    for begin, end in _entries(data, 16, len(data), 8, 16, "queue"):
        for _ in _entries(data, begin + 16, end, 2, 8, "queue property"):
            pass
