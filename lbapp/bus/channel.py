# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""One side of SSMB towards one peer: batches, tags, replay, acknowledgements. A state machine without a socket.

Owns what is unsent, unacknowledged and half received. Never reads a clock: ``now`` is given, in seconds of any
monotonic clock. Never knows what a message means to a connection.

Theory of operation
    A channel lives as long as its process; sessions (``open`` ... ``close``) come and go beneath it, one for
    each CSMB connection, each with keys and sequence numbers of its own.
    *Gathering.* Messages wait per kind until a datagram is full or ``urgent``/``patient`` seconds have passed
    (003, FIGURE 4: priority H or L), or until ``flush``.
    *Kinds that repeat themselves* (QUERY, REPLY, REAP, ...) are sent once. Without a session they are dropped.
    *Kinds that nothing repeats* (``ssmb.ACKNOWLEDGED``) are numbered batches of one stream, which outlives the
    session: at most ``flight`` of them are under way, the rest waits, ``queue`` at most. The oldest ones are sent
    again until the peer's ``ack`` passes them. The peer takes each batch once, in order, so a batch that is sent
    again, also in a later session, is never counted twice. What does not fit the queue is counted, and the peer
    is told how much it has missed (LOST), so that it reconciles.
    *Incarnations.* Each process draws a number when it starts. A peer with a new one has forgotten everything:
    its stream starts anew, and it takes ours from the oldest batch that is still unacknowledged (``back``).
    *Messages longer than a datagram* (what clients say) come in parts, which are such batches: what is lost of them is
    sent again, and nothing else. They take half of the queue at most, because DELETE must not be lost for them; one
    for which there is no room is dropped whole, and its sender asks again. They do not outlive the session.
    *RESET* forgets every flow before it and none after it: until it is acknowledged nothing else is sent, and the
    peer ignores what was sent before and comes later.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from lbapp.bus import ssmb
from lbapp.bus.application import PART_HEADER, Assembly, Part
from lbapp.bus.auth import Role, SessionKeys, Window
from lbapp.bus.errors import BusError, DecodeError, Fault
from lbapp.bus.ssmb import ACK, ACKNOWLEDGED, SENT_BY, SINCE, URGENT, Body, Kind

FLIGHT = 256
"""Batches under way at once, and batches that a receiver holds back for one that is missing."""


class Timing(NamedTuple):
    """Seconds, and bounds."""

    urgent: float = 0.001
    patient: float = 0.1
    acknowledge: float = 0.02
    again: float = 0.05
    again_most: float = 1.0
    burst: int = 16
    queue: int = 4096


class Channel:
    """SSMB towards one peer.

    Args:
        role: whose side this is.
        switch: the DFS's datapath id, where it is known before the first session (on the DFS's side).
        timing: delays and bounds.
        first: the number of the first batch; above all that this incarnation has sent to the same peer before.

    Attributes:
        counts: what happened, by name: ``sent``, ``received``, ``messages_sent``, ``messages_received``,
            ``resent``, ``duplicates``, ``dropped_<kind>``, ``lost_records``, ``ignored_<fault>``, ...
    """

    def __init__(self, role: Role, switch: int = 0, timing: Timing | None = None, first: int = 1) -> None:
        self.role = role
        self.switch = switch
        self.timing = timing or Timing()
        self.counts: Counter[str] = Counter()
        self.limit = ssmb.LIMIT
        self._keys: SessionKeys | None = None
        self._key_out = self._key_in = b""
        self._version = 0
        self._sequence = 0
        self._window = Window()
        self._pending: dict[Kind, list[Any]] = {}
        self._since: dict[Kind, float] = {}
        # The stream we send: what waits for a number, what is under way by number.
        self._queue: deque[Body] = deque()
        self._flight: dict[int, tuple[Body, float]] = {}
        self._next = first
        self._lost = 0
        self._again_at: float | None = None
        self._again = self.timing.again
        self._barrier = 0
        # The stream we receive: the next batch, and what came before its turn.
        self._peer = 0
        self._expected = 0
        self._early: dict[int, tuple[list[Any], bytes, int]] = {}
        self._assembly = Assembly()
        self._ack_at: float | None = None
        self._unanswered = 0

    # -------------------------------------------------------------- sessions

    @property
    def session(self) -> int:
        """The number of the session; 0 where there is none."""
        return self._keys.session if self._keys else 0

    def open(self, keys: SessionKeys, peer: int, version: int, now: float, *, switch: int | None = None,
             limit: int = ssmb.LIMIT) -> list[bytes]:
        """Begin a session. Returns what is to be sent at once: what the peer has not acknowledged yet.

        Args:
            peer: the peer's incarnation.
            version: ``vers_major << 4 | vers_minor``.
            limit: bytes of UDP payload that both sides take.
        """
        self._keys, self._version = keys, version
        self._key_out, self._key_in = keys.ssmb(self.role), keys.ssmb(self.role.other)
        self._sequence, self._window = 0, Window()
        self.limit = limit
        if switch is not None:
            self.switch = switch
        if peer != self._peer:
            self._peer, self._expected = peer, 0
            self._early.clear()
            self._assembly.clear()
        if version < SINCE[Kind.PART]:
            # An older peer than the one before: what it would not know takes its place in the order as lost.
            self._flight = {batch: (ssmb.lost(1) if body.kind is Kind.PART else body, sent)
                            for batch, (body, sent) in self._flight.items()}
        self._again = self.timing.again
        # All of it went to another session, if anywhere.
        self._flight = {batch: (body, float("-inf")) for batch, (body, _) in self._flight.items()}
        self._again_at = now if self._flight else None
        self._ack_at, self._unanswered = None, 0
        return self.tick(now)

    def close(self) -> None:
        """End the session. What the peer must not miss is kept for the next one."""
        self._keys = None
        self._ack_at = self._again_at = None
        self._unanswered = 0
        for kind in [kind for kind in self._pending if kind not in ACKNOWLEDGED]:
            self.counts[f"dropped_{kind.name.lower()}"] += len(self._pending.pop(kind))
            self._since.pop(kind, None)
        if not self._barrier:  # whose place is counted in the queue
            self._queue = deque(body for body in self._queue if body.kind is not Kind.PART)

    # -------------------------------------------------------------- sending

    def send(self, kind: Kind, messages: Sequence[Any], now: float) -> list[bytes]:
        """Take messages of one kind (of :class:`Closed` for DELETE). Returns the datagrams that are full now.

        Raises:
            EncodeError: one of them cannot be carried. Those taken before it in the same call may be lost with it.
        """
        if kind not in SENT_BY[self.role] or kind in (Kind.RESET, Kind.ACK, Kind.LOST, Kind.PART):
            raise ValueError(f"{self.role.name} does not send {kind.name}")
        if (self._keys is None and kind not in ACKNOWLEDGED) or self._unknown(kind):
            self.counts[f"dropped_{kind.name.lower()}"] += len(messages)
            return []
        waiting = self._pending.get(kind)
        if waiting is None:
            waiting = self._pending[kind] = []
            self._since[kind] = now
        waiting += messages
        if len(waiting) < ssmb.full(kind, self.limit):
            return []
        return self._pack(kind, now, whole=False)

    def flush(self, now: float, *, urgent: bool = False) -> list[bytes]:
        """Everything that waits, or what is ``urgent`` of it, as datagrams."""
        out: list[bytes] = []
        for kind in [kind for kind in self._pending if not urgent or kind in URGENT]:
            out += self._pack(kind, now, whole=True)
        return out

    def reset(self, now: float) -> list[bytes]:
        """Send RESET: the peer is to forget every flow that was opened so far."""
        out = self.flush(now)
        if not self._queue or self._queue[-1].kind is not Kind.RESET:
            # Without a session there is nothing under way that could come late: floor 0.
            self._queue.append(ssmb.reset(self.session, self._sequence if self._keys else 0))
            self._barrier = self._next + len(self._queue) - 1
        return out + self._launch(now)

    def _pack(self, kind: Kind, now: float, *, whole: bool) -> list[bytes]:
        messages = self._pending.pop(kind)
        since = self._since.pop(kind)
        bodies = ssmb.pack(kind, messages, ssmb.room(self.limit))
        if not whole:
            # One that is not full goes on waiting, unless families were mixed (then it is not the messages' tail).
            last = bodies[-1]
            tail = last.flags == bodies[0].flags and last.number < ssmb.full(kind, self.limit)
            if tail and kind not in ssmb.APPLICATION:
                self._pending[kind] = messages[-last.number:]
                self._since[kind] = since if len(bodies) == 1 else now
                bodies.pop()
        if kind in ACKNOWLEDGED:
            for body in bodies:
                self._enqueue(body)
            return self._launch(now)
        if self._barrier or self._keys is None:
            self.counts[f"dropped_{kind.name.lower()}"] += sum(body.number for body in bodies)
            return []
        if kind in ssmb.APPLICATION:
            return self._divided(kind, bodies, now)
        return [self._seal(body, now) for body in bodies]

    def _divided(self, kind: Kind, bodies: list[Body], now: float) -> list[bytes]:
        out: list[bytes] = []
        taken = False
        for body in bodies:
            if body.kind is not Kind.PART:
                out.append(self._seal(body, now))
                continue
            _, part, parts = PART_HEADER.unpack_from(body.payload)
            if not part:
                taken = len(self._queue) + parts <= self.timing.queue // 2
                self.counts[f"dropped_{kind.name.lower()}"] += not taken
            if taken:
                self._queue.append(body)
        return out + self._launch(now)

    def _unknown(self, kind: int) -> bool:
        """Whether the session's version has no such message type."""
        return self._keys is not None and self._version < SINCE.get(Kind(kind), 0)

    def _enqueue(self, body: Body) -> None:
        if len(self._queue) >= self.timing.queue:
            self._lost += body.number
            self.counts["lost_records"] += body.number
            return
        self._queue.append(body)

    def _launch(self, now: float) -> list[bytes]:
        """Give numbers to what waits, as far as the window allows."""
        if self._keys is None:
            return []
        out = []
        while len(self._flight) < FLIGHT:
            if self._queue:
                body = self._queue.popleft()
            elif self._lost:
                body, self._lost = ssmb.lost(self._lost), 0
            else:
                break
            self._flight[self._next] = (body, now)
            out.append(self._seal(body, now, self._next))
            self._next += 1
        if self._flight and self._again_at is None:
            self._again_at = now + self._again
        return out

    def _repeat(self, now: float) -> list[bytes]:
        """The oldest batches that were not sent just now, once more."""
        out = []
        for batch in list(self._flight)[:self.timing.burst]:
            body, sent = self._flight[batch]
            if now - sent >= self.timing.again:
                self._flight[batch] = (body, now)
                out.append(self._seal(body, now, batch))
                self.counts["resent"] += 1
        return out

    def _seal(self, body: Body, now: float, batch: int = 0) -> bytes:
        assert self._keys is not None
        self._sequence += 1
        self._ack_at, self._unanswered = None, 0
        counts = self.counts
        counts["sent"] += 1
        counts["messages_sent"] += body.number
        back = batch - next(iter(self._flight)) if batch else 0
        return ssmb.seal(self._key_out, self.role, body, self._version, self._keys.session, self._sequence,
                         batch=batch, back=back, ack=max(self._expected - 1, 0))

    # -------------------------------------------------------------- time

    @property
    def due(self) -> float | None:
        """When :meth:`tick` has something to do; None: not before something else happens."""
        if self._keys is None:
            return None
        times = [since + (self.timing.urgent if kind in URGENT else self.timing.patient)
                 for kind, since in self._since.items()]
        times += [moment for moment in (self._again_at, self._ack_at) if moment is not None]
        return min(times, default=None)

    def tick(self, now: float) -> list[bytes]:
        """What has to be sent because time has passed."""
        if self._keys is None:
            return []
        out: list[bytes] = []
        if self._again_at is not None and now >= self._again_at:
            out += self._repeat(now)
            self._again = min(self._again * 2, self.timing.again_most)
            self._again_at = now + self._again if self._flight else None
        for kind, since in list(self._since.items()):
            if now - since >= (self.timing.urgent if kind in URGENT else self.timing.patient):
                out += self._pack(kind, now, whole=True)
        out += self._launch(now)
        if self._ack_at is not None and now >= self._ack_at:
            out.append(self._seal(ACK, now))
        return out

    # -------------------------------------------------------------- receiving

    def receive(self, datagram: bytes, now: float) -> tuple[list[Any], list[bytes]]:
        """Take one datagram.

        Returns:
            The messages that it (and what it was waited for with) brings, and datagrams to send.

        Raises:
            DecodeError: it is ignored; the fault says why, and is counted in ``counts``.
        """
        try:
            return self._receive(datagram, now)
        except BusError as error:
            self.counts[f"ignored_{error.fault.value}"] += 1
            raise

    def _receive(self, datagram: bytes, now: float) -> tuple[list[Any], list[bytes]]:
        if self._keys is None:
            raise DecodeError(Fault.SESSION, "no session")
        if len(datagram) > ssmb.LIMITS[1]:
            raise DecodeError(Fault.LONG, f"a datagram of more than {ssmb.LIMITS[1]} bytes")
        version, code, flags, number, back, session, sequence, batch, ack = ssmb.header(datagram)
        if session != self._keys.session:
            raise DecodeError(Fault.SESSION, "a datagram of another session")
        if not self._window.fresh(sequence):
            raise DecodeError(Fault.REPLAYED, f"sequence number {sequence} was seen already, or is too old")
        if not ssmb.authentic(self._key_in, datagram):
            raise DecodeError(Fault.UNAUTHENTICATED, "a wrong tag")
        self._window.mark(sequence)
        if version != self._version:
            raise DecodeError(Fault.VERSION, f"version {version:#x}, agreed on {self._version:#x}")
        if (flags & ssmb.FROM_CS != 0) != (self.role is Role.DFS):
            raise DecodeError(Fault.DIRECTION, "a datagram of our own role")
        if code not in SENT_BY[self.role.other]:
            fault = Fault.DIRECTION if code in SENT_BY[self.role] else Fault.KIND
            raise DecodeError(fault, f"the peer does not send message type {code}")
        if self._unknown(code):
            raise DecodeError(Fault.KIND, f"message type {code} in version {version:#x}")
        if (code in ACKNOWLEDGED) != (batch != 0) or back >= max(batch, 1) or back >= FLIGHT:
            raise DecodeError(Fault.VALUE, f"message type {code} as batch {batch}, {back} behind it")
        if ack >= self._next:
            raise DecodeError(Fault.VALUE, f"batch {ack} is acknowledged and was never sent")
        self.counts["received"] += 1
        out = self._acknowledged(ack, now)
        records = ssmb.payload(datagram)
        if not batch:
            return self._count(ssmb.unpack(code, flags, number, records, self.switch)), out
        return self._ordered(code, flags, number, records, batch, back, now), out + self._answer_soon(now)

    def _count(self, messages: list[Any]) -> list[Any]:
        self.counts["messages_received"] += len(messages)
        return messages

    def _acknowledged(self, ack: int, now: float) -> list[bytes]:
        flight = self._flight
        if not flight or ack < next(iter(flight)):
            return []
        while flight and (oldest := next(iter(flight))) <= ack:
            del flight[oldest]
        # What is the oldest now was perhaps lost as well: it need not wait for as long as the one before it.
        self._again = self.timing.again
        self._again_at = max(next(iter(flight.values()))[1] + self._again, now) if flight else None
        if self._barrier and ack >= self._barrier:
            self._barrier = 0
        return self.tick(now)

    def _ordered(self, code: int, flags: int, number: int, records: bytes, batch: int, back: int,
                 now: float) -> list[Any]:
        """A numbered batch: its messages, if it is its turn, and those that waited for it."""
        if batch - back > self._expected:
            # The peer will never send what is older: it was acknowledged by our former self.
            self._expected = batch - back
            for old in [early for early in self._early if early < self._expected]:
                del self._early[old]
        if batch < self._expected or batch in self._early:
            self.counts["duplicates"] += 1
            self._ack_at = now
            return []
        if batch >= self._expected + FLIGHT:
            raise DecodeError(Fault.VALUE, f"batch {batch}, expected {self._expected} and {FLIGHT} more at most")
        try:
            messages = ssmb.unpack(code, flags, number, records, self.switch)
        except DecodeError as error:
            # Sending it again would not mend it: it takes its turn, empty.
            self.counts[f"ignored_{error.fault.value}"] += 1
            messages, records = [], b""
        self._early[batch] = (messages, records if code == Kind.RESET else b"", code)
        out: list[Any] = []
        while self._expected in self._early:
            ready, raw, kind = self._early.pop(self._expected)
            self._expected += 1
            out += self._whole(ready[0]) if kind == Kind.PART and ready else ready
            if kind == Kind.RESET and raw:
                session, floor = ssmb.reset_floor(raw)
                if session == self.session:
                    self._window.raise_floor(floor)
        self._unanswered += 1
        if self._ack_at is None:
            self._ack_at = now + self.timing.acknowledge
        return self._count(out)

    def _whole(self, part: Part) -> list[Any]:
        """The message whose last part this is."""
        try:
            return self._assembly.take(part, lambda kind, flags, data: ssmb.unpack(kind, flags, 1, data, self.switch))
        except DecodeError as error:
            self.counts[f"ignored_{error.fault.value}"] += 1
            return []

    def _answer_soon(self, now: float) -> list[bytes]:
        if self._ack_at is not None and (self._unanswered >= self.timing.burst or self._ack_at <= now):
            return [self._seal(ACK, now)]
        return []

    # -------------------------------------------------------------- for those who watch

    @property
    def next_batch(self) -> int:
        """The number that the next batch will have."""
        return self._next

    @property
    def backlog(self) -> int:
        """Batches that the peer has not acknowledged."""
        return len(self._queue) + len(self._flight)

