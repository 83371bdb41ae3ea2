# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The agent's share of proxied handshakes (APP_PROXY): from the client's first data to a connection of the fast path.

The fast path has shaken hands with the client by a cookie and holds nothing. This gathers what the client says, asks
the control segment (APP_QUERY) until it knows, and then gives the connection to the member it named. Owns the
connections that are on this way; decides nothing. Pure: frames in, frames and table entries out.

    READING    what the client sent is not enough yet
    OPENING    the member was sent a SYN with the client's own initial sequence number
    SENDING    the member gets what the client was already told has arrived
    ANSWERING  the control segment answered the client itself

Who acknowledges and who repeats: nobody here, as long as one flight of segments is enough. The client's own segments
are passed on once the member is there, and the client repeats what is lost. Only if more is needed to know, the
client is told that its bytes have arrived (it would not send more); from then on they are repeated here until the
member has acknowledged the last of them, and only then the fast path takes over.

The same where the member is told something else than the client said (``Edit``): what is changed is ours to deliver.
The member's SYN then carries the client's initial sequence number less what was put in, so that all that follows the
change has the client's own numbers, and nobody has to translate them.

Where one segment was all that the client said, the fast path keeps it (``fastpath/requests.py``): the member's SYN-ACK
becomes the client's first data on the spot, and only a member that refuses or is silent is heard of here.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from lbapp.control.messages import AppQuery, AppReply, Binding, Edit, Error, FlowSignature, Query, Refused, Reply
from lbapp.dataflow import frames, joining, tcp_frames
from lbapp.dataflow.distribution import Greeting
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.cookies import Options
from lbapp.dataflow.fastpath.entries import Departure, Entry, FirstFrame, Syn
from lbapp.dataflow.frames import ACK, FIN, PSH, RST, SYN, Segment
from lbapp.dataflow.handshake import Handshake, Phase
from lbapp.dataflow.joining import Going, going
from lbapp.dataflow.lately import Lately
from lbapp.dataflow.pipeline import VIRTUAL_MAC

LOG = logging.getLogger("lbapp.agent")

MAX_HANDSHAKES = 16_384
"""Connections on their way to a member; the oldest that is still being read makes room."""
MAX_TOTAL = 64 << 20
"""The same of all of them together."""
WINDOW = 14_600
"""What a client may send beyond what it was told has arrived, and what a member is sent at once."""
ASK_AGAIN_SECONDS = 0.5
MOST_AGAIN = 256
"""Questions asked again at once: a control segment that is slow has others waiting."""
GIVE_UP_SECONDS = 3.0
"""A control segment that does not answer for so long: the client is reset."""
OPEN_SECONDS = 1.0
OPEN_TRIES = 2
"""How long a member may take for its SYN-ACK before it is asked again (then twice as long), and how often."""
MAX_CHALLENGES = 3
REPEAT_SECONDS = 0.3
REPEATS = 5
PASSED_ON = 4096
"""Connections, at least, whose late segments, read from the ring when they were complete already, are still passed
on."""
LOOK_SECONDS = 0.05
"""So often it is seen which members have had what was kept for them."""
# Looking a member of an enumeration up takes seven times as long as a name.
_READING, _OPENING, _SENDING, _ANSWERING = Phase.READING, Phase.OPENING, Phase.SENDING, Phase.ANSWERING
_DATA, _OPENED, _GONE, _SPLICED, _OK = (layout.Ask.DATA, layout.Result.OPENED, layout.Result.GONE, Binding.SPLICE,
                                        Error.OK)


MakeEntry = Callable[[Reply, int, int, Departure | None], Entry | None]
"""A connection as a REPLY wants it, with further bits of state, a request that is kept for its member (0: none), and
what is to go with it; None where a port is unknown."""


class Proxy:
    """All connections of one switch that are on their way.

    Args:
        fastpath: where they end up.
        switch: its datapath id.
        serials: serials for them.
        entry: what makes a connection's entry.
        greeting: how a virtual server's clients were answered, by its number; None where it is none of these.
        counters: what was dropped or refused, by name.
    """

    def __init__(self, fastpath: Any, switch: int, serials: Iterator[int], entry: MakeEntry,
                 greeting: Callable[[int], Greeting | None], counters: Counter[str]) -> None:
        self._fastpath = fastpath
        self._switch = switch
        self._serials = serials
        self._entry = entry
        self._greeting = greeting
        self._counters = counters
        self._all: OrderedDict[FlowSignature, Handshake] = OrderedDict()
        self._members: dict[tuple[bytes, int, bytes, int], Handshake] = {}
        self._bytes = 0
        self._ready: list[Handshake] = []
        self._late: dict[tuple[int, Going], list[bytes]] = {}
        self._asking: dict[FlowSignature, Handshake] = {}
        self._kept: dict[FlowSignature, Handshake] = {}
        self._look_at = 0.0
        # By hashes: a whole signature of each, kept so long, would scatter in memory what is made for the next ones.
        self._passed: Lately[int, Going] = Lately(PASSED_ON)
        self._passed_back: Lately[tuple[bytes, int, bytes, int], Going] = Lately(PASSED_ON)

    def __len__(self) -> int:
        return len(self._all)

    # -------------------------------------------------------------- what comes

    def from_client(self, record: layout.QueryRecord, now: float) -> None:
        """A segment of a client whose handshake is proxied.

        Raises:
            MalformedError: the frame is not what its headers say.
        """
        frame, packet, part = tcp_frames.read(record.frame)
        signature = packet.signature
        known, fresh = self._all.get(signature), None
        if known is not None and record.kind == _DATA and known.cookie != part.ack - 1 & 0xFFFFFFFF:
            self._abandon(known)  # its client has begun anew
            known = None
        if known is None:
            how = self._passed.get(hash(signature))
            if how is not None and self._fastpath.lookup(_key(signature)) is not None:
                # It is translated now. Without its flow it would be handed back, again and again.
                self._later(record.ifindex, how, frame)
                return
            if record.kind != _DATA or not part.payload:
                # Of a connection that has ended: who goes on with that is reset by the fast path.
                self._counters["proxy_stray"] += 1
                self._fastpath.forget_pending([_key(signature)])
                return
            known = fresh = self._begin(record, frame, packet, part, now)
            if known is None:
                return
        if part.flags & SYN:
            if not known.begins(part.seq):
                self._abandon(known)  # it has begun anew, and comes again
            return
        if part.flags & RST:
            self._abandon(known)
            return
        if fresh is None and not self._goes_on(known, record.ifindex, frame, part, now):
            return
        if part.flags & FIN and known.ends(part):
            known.timed_out = True  # nothing more will come
        self._asking[signature] = known

    def _goes_on(self, known: Handshake, ifindex: int, frame: bytes, part: Segment, now: float) -> bool:
        """A further segment of the client; returns whether to ask what to do with what it said."""
        if known.phase is _ANSWERING:
            self._answered(known, part)
            return False
        if known.ready and known.ours:
            # The member has all that was delivered from here.
            self._later(ifindex, going(known.segment_most), frame)
            return False
        if known.request and self._fastpath.requests.given(known.request):
            self._follow(known, ifindex, frame)
            return False
        before = len(known.data)
        grown = known.take(part, frame)
        self._bytes += len(known.data) - before
        if known.phase is not _READING:
            if (grown or not known.whole) and self._let_go(known):  # else the member gets all of it from here
                self._follow(known, ifindex, frame)
            return False
        return grown or now - known.asked >= ASK_AGAIN_SECONDS or bool(part.flags & FIN and known.ends(part))

    def _begin(self, record: layout.QueryRecord, frame: bytes, packet: frames.Packet, part: Segment,
               now: float) -> Handshake | None:
        port = self._fastpath.port_of(record.ifindex)
        greeting = self._greeting(record.virtual_server)
        if port is None or greeting is None:
            self._counters["query_unknown_port"] += 1
            return None
        if len(self._all) >= MAX_HANDSHAKES or self._bytes >= MAX_TOTAL:
            self._look(now)
        while len(self._all) >= MAX_HANDSHAKES or self._bytes >= MAX_TOTAL:
            self._counters["proxy_dropped"] += 1
            self._reset(next(iter(self._all.values())))
        query = Query(next(self._serials) & 0xFFFFFFFF, self._switch, port, packet.source_mac, packet.signature,
                      record.virtual_server, packet.tcp_flags)
        made = Handshake.begun(query, record.ifindex, frame, part, Options.of(record.options), greeting, now)
        self._all[packet.signature] = made
        self._bytes += len(made.data)
        return made

    def _ask(self, one: Handshake, now: float) -> AppQuery | None:
        """Not for each of a slow client's bytes: ever seldomer, unless there is much to read."""
        size, due = len(one.data), one.asked + min(0.01 * one.asks, 0.5)
        if one.asks and not one.timed_out and size - one.size_asked < WINDOW // 8 and now < due:
            one.due = due
            self._tell_arrived(one)
            return None
        one.asks += 1
        one.unanswered += 1
        one.since = one.since or now
        one.asked, one.size_asked, one.due = now, size, 0.0
        return one.app_query

    def from_member(self, record: layout.QueryRecord, now: float) -> None:
        """A segment of a member that was sent a SYN.

        Raises:
            MalformedError: the frame is not what its headers say.
        """
        frame, packet, part = tcp_frames.read(record.frame)
        it = packet.signature
        ends = (it.source, it.source_port, it.destination, it.destination_port)
        one = self._members.get(ends)
        if one is None:
            how = self._passed_back.get(ends)
            if how is not None:
                self._later(record.ifindex, how, frame)
            else:
                self._counters["proxy_stray"] += 1
        elif one.ready and one.ours:
            one.flights[len(one.flights)] = frame
        elif part.flags & RST:
            if one.phase is _SENDING:
                self._reset(one)
            elif part.ack == one.isn + 1 & 0xFFFFFFFF:
                self._next_member(one, now)
        elif one.phase is _OPENING:
            if part.flags & (SYN | ACK) == SYN | ACK and part.ack == one.isn + 1 & 0xFFFFFFFF:
                self._opened(one, part, now)
            elif part.flags & ACK and not part.flags & SYN and one.challenges < MAX_CHALLENGES:
                # It still has an older connection of these ports (TIME_WAIT): do as a client does (RFC 9293, 3.10.7.3).
                one.challenges += 1
                self._to_member(one, Segment(part.ack, 0, RST, 0, b"", b""))
                self._synchronize(one)
        elif part.flags & ACK and not part.flags & SYN:
            self._acknowledged(one, part, record.ifindex, frame, now)

    def _opened(self, one: Handshake, part: Segment, now: float) -> None:
        if self._let_go(one):
            self._given(one)  # by an earlier SYN-ACK than this one
            return
        offered = Options.offered(part.options)
        one.member_isn = part.seq
        one.mss = min(one.mss, offered.mss)
        if (own := one.options.window_scale) is not None:
            one.shift = (offered.window_scale or 0) - one.greeting.window_scale
            one.shift_in = own if offered.window_scale is None else 0
        if not one.ours:
            self._pass_soon(one)
            return
        one.phase, one.una, one.tries = _SENDING, 0, 0
        self._send(one, now)

    def _acknowledged(self, one: Handshake, part: Segment, ifindex: int, frame: bytes, now: float) -> None:
        arrived = part.ack - one.isn - 1 & 0xFFFFFFFF
        if not one.una <= arrived <= len(one.data):
            return
        if arrived == len(one.data):
            one.flights = {0: frame}
            one.ifindex = ifindex  # the member's packet, which the fast path translates
            self._pass_soon(one)
        elif arrived > one.una:
            one.una, one.tries = arrived, 0
            self._send(one, now)

    def flush(self, now: float) -> list[AppQuery]:
        """Have the fast path take over what is ready, all at once; then let its packets go.

        Returns:
            What is to be asked after all that has come: one question a connection.
        """
        if self._ready:
            ready, self._ready = [one for one in self._ready if self._all.get(one.query.signature) is one], []
            self._fastpath.set_splices({one.query.serial: layout.Splice(one.member_isn - one.cookie & 0xFFFFFFFF,
                                                                        one.shift, one.shift_in) for one in ready})
            for one in ready:
                self._pass_on(one)
        if self._late:
            for (ifindex, how), late in self._late.items():
                for frame in joining.join(late, how.mss):
                    self._fastpath.inject(ifindex, frame, how.soon)
            self._late.clear()
        if now >= self._look_at:
            self._look(now)
        asking, self._asking = self._asking, {}
        questions = []
        for signature, one in asking.items():
            question = self._ask(one, now) if self._all.get(signature) is one else None
            if question is not None:
                questions.append(question)
        return questions

    def _keep(self, one: Handshake) -> int:
        """Have the fast path give the member what the client said; the number of the request, 0 where it cannot."""
        if not one.whole or len(one.data) > one.greeting.mss:
            return 0
        scales = (one.greeting.window_scale, own) if (own := one.options.window_scale) is not None else None
        one.request = self._fastpath.requests.keep(one.query.serial, one.isn, one.cookie, scales, one.window,
                                                   one.flags & (ACK | PSH), one.data)
        if one.request:
            self._kept[one.query.signature] = one
        return one.request

    def _look(self, now: float) -> None:
        self._look_at = now + LOOK_SECONDS
        for one in [one for one in self._kept.values() if self._fastpath.requests.given(one.request)]:
            self._given(one)

    def _given(self, one: Handshake, soon: bool = False) -> None:
        """The member has what the client said, and the fast path the connection."""
        self._forget(one)
        self._passed.put(hash(one.query.signature), going(one.segment_most, soon))

    def _later(self, ifindex: int, how: Going, frame: bytes) -> None:
        """Let a frame go with the next :meth:`flush`."""
        self._late.setdefault((ifindex, how), []).append(frame)

    def _follow(self, one: Handshake, ifindex: int, frame: bytes) -> None:
        """A segment of the client that was still on its way here when the member had got what was kept for it."""
        self._later(ifindex, going(one.segment_most), frame)
        self._given(one)

    def _let_go(self, one: Handshake) -> bool:
        """Take back what is kept for the member, if any; returns whether the member has it already."""
        if not one.request:
            return False
        del self._kept[one.query.signature]
        number, one.request = one.request, 0
        return bool(self._fastpath.requests.release(number))

    def _pass_soon(self, one: Handshake) -> None:
        if not one.ready:
            one.ready = True
            self._ready.append(one)

    def _pass_on(self, one: Handshake) -> None:
        """Let what the client said go, in order.

        A splice translates what follows on the spot, and that would overtake what goes soon. What is handed over holds
        it back until its member has said something (``HELD``): the longer that takes, the more comes here by the way
        round. So soon is for a client that seems to have said all, in one frame.
        """
        mss, soon = one.segment_most, one.member is None and one.in_one_frame
        if one.ours and one.ends_at is not None:
            self._passed_back.put(one.ends_at, going(mss))
        flights = one.flights
        for frame in flights.values() if len(flights) == 1 else joining.join(
                [flights[offset] for offset in sorted(flights)], mss):
            self._fastpath.inject(one.ifindex, frame, soon)
        self._given(one, soon)

    # -------------------------------------------------------------- what the control segment says

    def reply(self, replies: Sequence[AppReply], now: float) -> list[Refused]:
        """Do what was answered; returns the connections that could not be held."""
        refused: list[Refused] = []
        entering: list[tuple[Handshake, Reply, bool]] = []
        entries: list[Entry] = []
        for one in replies:
            known = self._all.get(one.query.signature)
            if known is None or known.query.serial != one.query.serial or known.phase is not _READING:
                if one.reply is not None and one.reply.error is _OK and known is None:
                    refused.append(Refused(self._switch, one.query.serial, one.query.virtual_server))
                continue
            known.unanswered = max(known.unanswered - 1, 0)
            known.since = now if known.unanswered else 0.0  # it may be an earlier question's answer
            if one.reply is None:
                self._tell_arrived(known)
            elif one.reply.error is not _OK:
                self._finish(known, one.answer, now)
            else:
                changed = one.edit is None or self._change(known, one.edit)
                splice = one.binding is _SPLICED or known.ours
                goes = Syn(known.isn, _packed(known.options)) if splice else FirstFrame(
                    known.ifindex, known.flights[0]) if known.in_one_frame else None
                entry = self._entry(one.reply, layout.SPLICE if splice else layout.HELD,
                                    self._keep(known) if splice else 0, goes) if changed else None
                if entry is None:
                    self._counters["reply_unknown_port"] += 1
                    refused.append(Refused(self._switch, one.query.serial, one.query.virtual_server))
                    self._reset(known)
                    continue
                known.phase = _OPENING
                entries.append(entry)
                entering.append((known, one.reply, splice))
        for (known, told, splice), result in zip(entering, self._fastpath.install(entries), strict=True):
            if result is not _GONE and result is not _OPENED:
                refused.append(Refused(self._switch, known.query.serial, known.query.virtual_server))
                self._reset(known)
            elif splice:
                self._open(known, told, now, result is _GONE)
            elif result is _GONE:
                self._given(known, soon=True)
            else:
                self._pass_on(known)
            if known.request and self._fastpath.requests.given(known.request):
                self._given(known)  # it came while the others were sent theirs
        return refused

    def _change(self, one: Handshake, edit: Edit) -> bool:
        size = len(one.data)
        changed = one.change(edit)
        self._bytes += len(one.data) - size
        return changed

    def _tell_arrived(self, one: Handshake) -> None:
        """More is needed: the client may send on. What it was told has arrived is now ours to deliver."""
        if len(one.data) > one.acked or one.asks > 1:
            one.acked = len(one.data)
            one.flights = {}
            self._to_client(one, Segment(one.cookie + 1, one.isn + 1 + one.acked, ACK, self._window(one), b"", b""))

    def _window(self, one: Handshake) -> int:
        return WINDOW >> (one.greeting.window_scale if one.options.window_scale is not None else 0)

    def _open(self, one: Handshake, reply: Reply, now: float, synchronized: bool) -> None:
        translation, signature = reply.translation, one.query.signature
        assert translation is not None
        address = translation.address if translation.address is not None else signature.destination
        port = translation.port or signature.destination_port
        one.phase, one.reply, one.tries, one.due = _OPENING, reply, 1, now + OPEN_SECONDS
        one.member = (address, port, self._fastpath.ports[translation.host.port].ifindex)
        one.ends_at = ends = (address, port, signature.source, signature.source_port)
        self._members[ends] = one
        if not synchronized:
            self._synchronize(one)

    def _synchronize(self, one: Handshake) -> None:
        self._to_member(one, Segment(one.isn, 0, SYN, 64_240, _packed(one.options), b""))

    def _finish(self, one: Handshake, answer: bytes, now: float) -> None:
        if not answer:
            self._reset(one)
            return
        one.phase, one.due, one.tries = _ANSWERING, now + REPEAT_SECONDS, 1
        self._bytes -= len(one.data)
        one.una = len(one.data)  # what the answer acknowledges
        one.data, one.flights, one.ahead = bytearray(answer), {}, {}
        self._bytes += len(one.data)
        self._answer(one)

    def _answer(self, one: Handshake) -> None:
        size = max(one.options.mss, 536)
        for at in range(0, len(one.data), size):
            last = FIN if at + size >= len(one.data) else 0
            self._to_client(one, Segment(one.cookie + 1 + at, one.isn + 1 + one.una, ACK | PSH | last,
                                         self._window(one), b"", bytes(one.data[at:at + size])))

    def _answered(self, one: Handshake, part: Segment) -> None:
        if part.flags & FIN:
            end = part.seq + len(part.payload) + 1
            seen = part.ack - one.cookie - 1 & 0xFFFFFFFF
            self._to_client(one, Segment(one.cookie + 2 + len(one.data), end, ACK, self._window(one), b"", b""))
            if seen > len(one.data):
                self._forget(one)

    # -------------------------------------------------------------- time

    def tick(self, now: float) -> list[AppQuery]:
        """Repeat what was lost, ask about what took too long, give up on the rest; to be called ten times a second."""
        self._look(now)
        for one in list(self._all.values()):
            if one.phase is _READING:
                self._still_reading(one, now)
            elif one.due > now:
                continue
            elif one.phase is _OPENING:
                if one.tries >= OPEN_TRIES:
                    self._next_member(one, now)
                else:
                    one.due = now + OPEN_SECONDS * 2 ** one.tries
                    one.tries += 1
                    self._synchronize(one)
            elif one.tries >= REPEATS:
                self._counters["proxy_unanswered"] += 1
                self._reset(one)
            elif one.phase is _SENDING:
                self._send(one, now)
            else:
                one.due = now + REPEAT_SECONDS * 2 ** one.tries
                one.tries += 1
                self._answer(one)
        return self.flush(now)

    def _still_reading(self, one: Handshake, now: float) -> None:
        if now - (one.since or (one.asked if one.timed_out else now)) >= GIVE_UP_SECONDS:
            self._counters["unanswered"] += 1
            self._reset(one)
            return
        if one.timed_out or one.since:
            # Who has said all and is asked for more stands in line: asked again, it is heard that it is still there.
            if now - one.asked < ASK_AGAIN_SECONDS or len(self._asking) >= MOST_AGAIN:
                return
            one.unanswered = 0  # the question or its answer was lost: this one has all that the client said
        elif now - one.first >= one.greeting.seconds:
            one.timed_out = True
        elif not (one.due and now >= one.due and len(one.data) > one.size_asked):
            return
        self._asking[one.query.signature] = one

    def _next_member(self, one: Handshake, now: float) -> None:
        assert one.reply is not None
        if self._let_go(one):
            self._given(one)  # it came at last
            return
        self._counters["proxy_member_failed"] += 1
        self._close(one)
        self._bytes -= len(one.data)
        one.change_back()
        self._bytes += len(one.data)
        one.failed = (*one.failed, one.reply.member)
        one.phase, one.reply = _READING, None
        # Another flow, with a serial of its own: the ledger will tell that this one has ended.
        one.query = one.query._replace(serial=next(self._serials) & 0xFFFFFFFF)
        one.asks, one.asked, one.size_asked, one.due = 0, now, len(one.data), 0.0
        one.since, one.unanswered = 0.0, 0
        self._asking[one.query.signature] = one

    def _send(self, one: Handshake, now: float) -> None:
        """Send what the member has not acknowledged yet, a window of it."""
        one.due = now + REPEAT_SECONDS * 2 ** one.tries
        one.tries += 1
        end = min(len(one.data), one.una + WINDOW)
        for at in range(one.una, end, one.segment_most):
            self._to_member(one, Segment(one.isn + 1 + at, one.member_isn + 1, ACK | PSH, one.window_in, b"",
                                         bytes(one.data[at:min(at + one.segment_most, end)])))

    # -------------------------------------------------------------- ends

    def _close(self, one: Handshake) -> None:
        """Take back what the fast path was given for a member that did not come."""
        if one.ends_at is not None:
            self._members.pop(one.ends_at, None)
            self._fastpath.close_flow(_key(one.query.signature))
            one.member = one.ends_at = None
        self._let_go(one)

    def _abandon(self, one: Handshake) -> None:
        """Its client is gone."""
        if one.member is not None:
            self._to_member(one, Segment(one.isn + 1 + len(one.data), 0, RST, 0, b"", b""))
        self._close(one)
        self._forget(one)

    def _reset(self, one: Handshake) -> None:
        """Refuse: the client is told so."""
        self._counters["refused"] += 1
        self._to_client(one, Segment(one.cookie + 1, one.isn + 1 + len(one.data), RST | ACK, 0, b"", b""))
        self._abandon(one)
        self._fastpath.forget_pending([_key(one.query.signature)])

    def _forget(self, one: Handshake) -> None:
        signature = one.query.signature
        if one.ends_at is not None:
            self._members.pop(one.ends_at, None)
        self._let_go(one)
        if self._all.pop(signature, None) is not None:
            self._bytes -= len(one.data)

    # -------------------------------------------------------------- frames

    def _to_client(self, one: Handshake, part: Segment) -> None:
        it = one.query.signature
        wire = self._fastpath.ports.get(one.query.in_port)
        if wire is not None:
            self._fastpath.send(wire.ifindex, frames.tcp(
                one.query.client_mac, VIRTUAL_MAC, (it.destination, it.destination_port), (it.source, it.source_port),
                part))

    def _to_member(self, one: Handshake, part: Segment) -> None:
        assert one.member is not None
        assert one.reply is not None
        assert one.reply.translation is not None
        it, translation = one.query.signature, one.reply.translation
        self._fastpath.send(one.member[2], frames.tcp(
            translation.host.mac, VIRTUAL_MAC if translation.routed else one.query.client_mac,
            (it.source, it.source_port), one.member[:2], part))


@lru_cache(maxsize=512)
def _packed(options: Options) -> bytes:
    """What a client offered, as TCP options; they offer much the same."""
    packed = b"\x02\x04" + options.mss.to_bytes(2, "big")
    if options.sack:
        packed += b"\x01\x01\x04\x02"
    if options.window_scale is not None:
        packed += b"\x01\x03\x03" + bytes((options.window_scale,))
    return packed


def _key(signature: FlowSignature) -> layout.FlowKey:
    return layout.FlowKey(signature.source, signature.destination, signature.source_port,
                          signature.destination_port, signature.protocol)
