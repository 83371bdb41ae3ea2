# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""One connection between the client's first data and its member: where it is on its way, and what the client said.

Owns the bytes, in order, and what is changed in them for the member. Sends nothing, knows no table and no clock: that
is :mod:`lbapp.dataflow.proxy`'s.
"""

from __future__ import annotations

import enum

import msgspec

from lbapp.control.messages import AppQuery, Edit, Query, Reply
from lbapp.dataflow.distribution import Greeting
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.frames import FIN, PSH, Segment
from lbapp.dataflow.splicing import FRAME

MAX_DATA = 68 << 10
"""What of one connection's data is kept: more than the 64 KiB that are read, so that what is too long is seen to be."""
MAX_AHEAD = 32
"""Segments of one connection that wait for one before them."""


class Phase(enum.Enum):
    """See :mod:`lbapp.dataflow.proxy`."""

    READING = "reading"
    OPENING = "opening"
    SENDING = "sending"
    ANSWERING = "answering"


# Looking a member of an enumeration up takes seven times as long as a name.
_READING = Phase.READING


class Handshake(msgspec.Struct, eq=False, gc=False):
    """A connection on its way.

    Attributes:
        isn, cookie: the two initial sequence numbers.
        data: what the client said, in order.
        ahead: what came before what precedes it, by its place in ``data``.
        flights: the client's own segments, likewise.
        acked: how much of ``data`` the client was told has arrived.
        since: since when questions are not answered; 0: all are.
        undo: what makes the data what the client said.
        request: its number, where the fast path keeps what the client said for the member's SYN-ACK; 0: it does not.
        flags: of the client's first segment.
        ends_at: the ends of the connection to the member, as the member's packets have them.
    """

    query: Query
    ifindex: int
    isn: int
    cookie: int
    options: Options
    greeting: Greeting
    window: int
    first: float
    asked: float
    mss: int
    flags: int
    phase: Phase = Phase.READING
    data: bytearray = msgspec.field(default_factory=bytearray)
    ahead: dict[int, bytes] = msgspec.field(default_factory=dict)
    flights: dict[int, bytes] = msgspec.field(default_factory=dict)
    acked: int = 0
    asks: int = 0
    since: float = 0.0
    unanswered: int = 0
    challenges: int = 0
    size_asked: int = -1
    timed_out: bool = False
    failed: tuple[int, ...] = ()
    reply: Reply | None = None
    member: tuple[bytes, int, int] | None = None
    ends_at: tuple[bytes, int, bytes, int] | None = None
    member_isn: int = 0
    shift: int = 0
    shift_in: int = 0
    due: float = 0.0
    tries: int = 0
    una: int = 0
    undo: Edit | None = None
    ready: bool = False
    request: int = 0

    @classmethod
    def begun(cls, query: Query, ifindex: int, frame: bytes, first: Segment, options: Options, greeting: Greeting,
              now: float) -> Handshake:
        """By the first data of a client, which is less than :data:`MAX_DATA`."""
        return cls(query, ifindex, first.seq - 1 & 0xFFFFFFFF, first.ack - 1 & 0xFFFFFFFF, options, greeting,
                   first.window, now, now, options.mss, first.flags, _READING, bytearray(first.payload), {},
                   {0: frame})

    @property
    def ours(self) -> bool:
        """Whether what the client said is delivered from here, not by the client's own segments."""
        return self.acked > 0 or self.undo is not None

    @property
    def whole(self) -> bool:
        """Whether one segment, which the client repeats if it is lost, was all that the client said."""
        return len(self.flights) == 1 and 0 in self.flights and not (self.ours or self.ahead or self.flags & FIN)

    @property
    def in_one_frame(self) -> bool:
        """Whether one frame is all that the client said, and nothing seems to come right behind: its stack had no more
        (PSH)."""
        return bool(self.flags & PSH) and self.whole and len(self.flights[0]) <= FRAME

    @property
    def window_in(self) -> int:
        """The client's window as the member takes it."""
        return min(self.window << self.shift_in, 0xFFFF)

    @property
    def segment_most(self) -> int:
        """The most data of a segment that the member takes."""
        return min(self.mss, self.greeting.mss)

    def begins(self, isn: int) -> bool:
        """Whether that is the client's own initial sequence number."""
        more = 0 if self.undo is None else self.undo.removed - len(self.undo.text)
        return isn == self.isn + more & 0xFFFFFFFF

    def change(self, edit: Edit) -> bool:
        """Have the member told something else, before it is told anything; returns whether that can be."""
        if edit.at + edit.removed > len(self.data):
            return False
        end = edit.at + edit.removed
        self.undo = Edit(edit.at, len(edit.text), bytes(self.data[edit.at:end]))
        self.data[edit.at:end] = edit.text
        self.isn = self.isn - len(edit.text) + edit.removed & 0xFFFFFFFF
        return True

    def change_back(self) -> None:
        """What the client said, as it said it."""
        if self.undo is not None:
            self.change(self.undo)
            self.undo = None

    @property
    def app_query(self) -> AppQuery:
        """What to ask."""
        return AppQuery(self.query, self.isn + 1 & 0xFFFFFFFF, self.cookie + 1 & 0xFFFFFFFF, b"", bytes(self.data),
                        self.failed, self.timed_out)

    def take(self, part: Segment, frame: bytes) -> bool:
        """Take a segment of the client over; returns whether there is more to read than before."""
        self.window = part.window
        offset = part.seq - self.isn - 1 & 0xFFFFFFFF
        if offset >= 1 << 31:
            offset -= 1 << 32
        before = len(self.data)
        if not self.ours and offset >= 0 and offset + len(part.payload) <= MAX_DATA:
            known = self.flights.get(offset)
            if known is None or len(known) <= len(frame):
                self.flights[offset] = frame
        if part.payload and offset + len(part.payload) > before:
            if offset > before:
                if len(self.ahead) < MAX_AHEAD and offset + len(part.payload) <= MAX_DATA:
                    self.ahead[offset] = part.payload
            else:
                self.data += part.payload[before - offset:]
                self._close_gaps()
        del self.data[max(before, MAX_DATA):]
        return len(self.data) > before

    def ends(self, last: Segment) -> bool:
        """Whether everything before this FIN is here."""
        return last.seq + len(last.payload) - self.isn - 1 & 0xFFFFFFFF == len(self.data)

    def _close_gaps(self) -> None:
        for offset in sorted(self.ahead):
            if offset > len(self.data):
                break
            self.data += self.ahead.pop(offset)[len(self.data) - offset:]
