# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""One connection that is relayed: what :mod:`lbapp.dataflow.relay` keeps of it. Pure; owns no table."""

from __future__ import annotations

from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.layout import Flow, FlowKey, Splice
from lbapp.dataflow.frames import ACK, FIN, Segment


class Connection:
    """A relayed connection; ``sides`` are its flows as the agent gave them, the client's first."""

    __slots__ = ("anew", "answered", "asked", "closed", "fins", "got", "kept", "keys", "met", "octets", "opened",
                 "packets", "parting", "sent", "sides", "splice", "taken", "told", "under_way", "used")

    def __init__(self, keys: tuple[FlowKey, FlowKey], sides: tuple[Flow, Flow], now: float) -> None:
        self.keys = keys
        self.sides = sides
        self.splice: Splice | None = None
        self.opened = now
        self.used = [now, now]
        self.packets = [0, 0]
        self.octets = [0, 0]
        self.fins = 0
        self.closed = self.told = self.taken = False
        self.answered = False  # its member has said something
        self.met = False  # its member has got beyond its SYN-ACK
        self.anew = False  # its client has sent a SYN since
        self.asked = True  # nothing behind what the client said last
        self.parting = 0  # packets since it was to be taken over; 0: it is not
        # Of each side, in its own numbers: behind what it sent, what of it was acknowledged, and frames between.
        self.sent: list[int | None] = [None, None]
        self.got: list[int | None] = [None, None]
        self.under_way = [0, 0]
        self.kept: list[list[tuple[int, bytes]]] = [[], []]

    @property
    def calm(self) -> bool:
        """Whether nothing that is under way can be overtaken by another path."""
        return sum(self.under_way) <= 1

    def count(self, side: int, part: Segment, number: int) -> bool:
        """A packet goes on from a side, in so many frames; returns whether it acknowledges more of the other's."""
        end = part.seq + len(part.payload) + (1 if part.flags & FIN else 0) & 0xFFFFFFFF
        sent = self.sent[side]
        if sent is None:
            self.got[side] = sent = self.sent[side] = part.seq
        if 0 < end - sent & 0xFFFFFFFF < 1 << 31:
            self.sent[side] = end
            self.under_way[side] += number
        sent, got = self.sent[1 - side], self.got[1 - side]
        ack = part.ack + (self.splice.offset if self.splice and not side else 0) & 0xFFFFFFFF
        if not part.flags & ACK:
            return False
        if sent is None or got is None:
            self.sent[1 - side] = self.got[1 - side] = ack  # so far others have delivered what it said
            return False
        if not 0 < ack - got & 0xFFFFFFFF <= sent - got & 0xFFFFFFFF:
            return False
        self.got[1 - side] = ack
        if ack == sent:
            self.under_way[1 - side] = 0
        return True

    def begun_anew(self, side: int, part: Segment) -> bool:
        """Whether a member that has forgotten the connection begins another one (``anew`` of the fast path). Part is a
        SYN or SYN-ACK."""
        if not side:
            self.anew = self.anew or (self.met and not part.flags & ACK)
            return False
        return self.anew and bool(part.flags & ACK)

    @property
    def waits(self) -> bool:
        """Whether its member is not there yet."""
        return self.splice is None and bool(self.sides[0].state & layout.SPLICE)

    def said(self, side: int, payload: bytes) -> int:
        """A side says something.

        Returns:
            The status, where a member begins an HTTP answer that tells of an error of its own (5xx); else 0.
        """
        begins, self.asked = side and self.asked, not side
        self.answered = self.answered or bool(side)
        if begins and payload[:7] == b"HTTP/1." and payload[8:10] == b" 5" and payload[10:12].isdigit():
            return int(payload[9:12])
        return 0
