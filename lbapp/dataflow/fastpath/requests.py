# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What clients have said whose members were sent a SYN: kept for the members' SYN-ACKs (``splice.bpf.h``).

The SYN-ACK tells how the member counts, makes the splice ready, and becomes the client's first data in its place:
nobody is asked. Owns which places are free. The memory is shared with the programs; the
kernel is called only to take something back.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from mmap import mmap

from lbapp.dataflow.fastpath.layout import NO_SCALE, REQUEST, REQUEST_DATA, REQUEST_SIZE


class State(enum.IntEnum):
    """Of a place. Only programs leave WAITING: for TAKEN and then GIVEN, or (``revoke``) for NONE."""

    NONE = 0
    WAITING = 1
    TAKEN = 2
    GIVEN = 3


_STRIDE = REQUEST_SIZE // 4
_NONE, _WAITING, _TAKEN, _GIVEN = map(int, State)
_NO_SCALES = NO_SCALE, 0


class Requests:
    """The places.

    Args:
        memory: of the array ``requests``; its size says how many places there are, and may be 0.
        revoke: takes the request at an index back, if it is WAITING, and says what it was; no program may come between.
    """

    def __init__(self, memory: mmap | bytearray, revoke: Callable[[int], int]) -> None:
        self._memory = memory
        self._words = memoryview(memory).cast("I")
        self._revoke = revoke
        self._free = list(range(len(memory) // REQUEST_SIZE, 0, -1))

    def keep(self, serial: int, isn: int, cookie: int, scales: tuple[int, int] | None, window: int, flags: int,
             data: bytes) -> int:
        """Keep a client's first data for its member.

        Args:
            serial: of the connection, which is to be installed with the state ``SPLICE`` and this request.
            isn, cookie: the two initial sequence numbers of the client's side.
            scales: the window scale that the client was told, and the client's own; None: there are none.
            window, flags: of the segment, as on the wire.
            data: all that the client said.

        Returns:
            The request's number; 0 where there is no place for it, or it is too long.
        """
        size = len(data)
        if not (0 < size <= REQUEST_DATA and self._free):
            return 0
        number = self._free.pop()
        at = (number - 1) * REQUEST_SIZE
        told, own = scales or _NO_SCALES
        REQUEST.pack_into(self._memory, at, _NONE, serial, isn, cookie, _sum(data), window, size, told, flags, own)
        self._memory[at + REQUEST.size:at + REQUEST.size + size] = data
        self._words[(number - 1) * _STRIDE] = _WAITING  # last: from now on a program may take it
        return number

    def given(self, number: int) -> bool:
        """Whether the member has it: the splice is ready."""
        return self._words[(number - 1) * _STRIDE] == _GIVEN

    def release(self, number: int) -> bool:
        """The place is free: its member has it, or is not to get it any more.

        Returns:
            Whether the member has it.
        """
        at = (number - 1) * _STRIDE
        # TAKEN: a program has it in its hands, for a microsecond.
        while (state := self._words[at]) in (_WAITING, _TAKEN):
            if state == _WAITING and self._revoke(number - 1) == _WAITING:
                break
        self._free.append(number)
        return state == _GIVEN

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()


def _sum(data: bytes) -> int:
    """The ones' complement sum of some bytes as a program's ``bpf_csum_diff`` has it, folded."""
    if sys.byteorder == "big" and len(data) & 1:
        data = bytes(data) + b"\0"
    return int.from_bytes(data, sys.byteorder) % 0xFFFF


__all__ = ["Requests", "State"]
