# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Both buses over sockets: ``DfsServer`` (agent) listens, ``CsClient`` (controller) connects, again and again.

Owns who is connected. Never decides about a flow: messages and events are handed to two callbacks, in the order
they came, from one greenlet each socket; a callback must not block for long. One list of messages is of one kind,
or of those that are acknowledged (DELETE, REFUSED, NEWFLOW, RESET, LOST) in the order in which they were sent.
Needs eventlet's hub, monkey-patched or not.

What a peer is told while it is away: QUERY, REPLY and the like are dropped and counted, DELETE, NEWFLOW and RESET
wait (``channel.py``), virtual servers and distributions are said anew (``holdings.py``).
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import eventlet
from eventlet.green import socket
from eventlet.hubs import get_hub

from lbapp.bus import auth, counted, csmb, ssmb
from lbapp.bus.auth import Role
from lbapp.bus.channel import Channel, Timing
from lbapp.bus.csmb import Hello, HelloFlag, Target, Version, VirtualServer
from lbapp.bus.errors import BusError, Fault
from lbapp.bus.events import Down, Event, Up
from lbapp.bus.holdings import Desired, Held
from lbapp.bus.links import LOG, Complaints, Connection, Datagrams, clock, family, guarded, pack_address, unpack_address
from lbapp.bus.sessions import CsSession, DfsSession, Phase
from lbapp.bus.ssmb import Kind
from lbapp.control.messages import AppQuery, AppReply, Closed, NewFlow, Query, Reap, Refused, Reply, Stats, Timeout

BEAT = 0.5
"""Seconds between two looks at the clocks of established sessions, at most: an idle agent should sleep."""
WATCH = 0.1
"""The same for connections that have not authenticated yet."""
UNAUTHENTICATED = 32
CONTROL_SEGMENTS = 16
BACK_OFF = (0.2, 5.0)
CONNECT_WITHIN = 3.0

NO_FLAGS = HelloFlag(0)

OnEvent = Callable[[Any, Event], None]
OnMessages = Callable[[Any, list[Any]], None]


def draw() -> int:
    """A number for this start of the process: 64 bits, never 0."""
    return int.from_bytes(os.urandom(8), "big") or 1


class Peer:
    """The other segment, connected or not. Its ``send_`` methods batch; ``flush`` sends what waits.

    Attributes:
        identity: the CS's number, or the DFS's datapath id; 0 while unknown.
        channel: SSMB; ``channel.counts`` says what happened.
        hello: the peer's last HELLO, None while it was never connected.
    """

    def __init__(self, role: Role, switch: int, timing: Timing | None, complaints: Complaints,
                 on_messages: OnMessages, first: int = 1) -> None:
        self.identity = 0
        self.channel = Channel(role, switch, timing, first)
        self.hello: Hello | None = None
        self._complaints = complaints
        self._on_messages = on_messages
        self._connection: Connection | None = None
        self._link: Datagrams | None = None
        self._address = ("", 0)
        self._timer: Any = None
        self._timer_at = 0.0

    @property
    def connected(self) -> bool:
        """Whether there is an authenticated session."""
        return self.channel.session != 0

    def send_queries(self, messages: Sequence[Query]) -> None:
        """QUERY, from the DFS."""
        self._send(Kind.QUERY, messages)

    def send_app_queries(self, messages: Sequence[AppQuery]) -> None:
        """APP_QUERY, from the DFS; dropped and counted where the session's version has none."""
        self._send(Kind.APP_QUERY, messages)

    def send_deletes(self, closed: Sequence[Closed]) -> None:
        """Closed connections (DELETE), from the DFS: gathered, and never lost silently."""
        self._send(Kind.DELETE, closed)

    def send_stats(self, messages: Sequence[Stats]) -> None:
        """STATS, from the DFS."""
        self._send(Kind.STATS, messages)

    def send_refused(self, messages: Sequence[Refused]) -> None:
        """REFUSED, from the DFS: it could not hold these flows."""
        self._send(Kind.REFUSED, messages)

    def send_replies(self, messages: Sequence[Reply]) -> None:
        """REPLY, from the CS."""
        self._send(Kind.REPLY, messages)

    def send_app_replies(self, messages: Sequence[AppReply]) -> None:
        """REPLY to APP_QUERY, from the CS."""
        self._send(Kind.APP_REPLY, messages)

    def send_newflows(self, messages: Sequence[NewFlow]) -> None:
        """NEWFLOW, from the CS: sent again until acknowledged."""
        self._send(Kind.NEWFLOW, messages)

    def send_reaps(self, messages: Sequence[Reap]) -> None:
        """REAP, from the CS; the CS repeats it while nobody answers."""
        self._send(Kind.REAP, messages)

    def send_timeouts(self, messages: Sequence[Timeout]) -> None:
        """TIMEOUT, from the CS."""
        self._send(Kind.TIMEOUT, messages)

    def send_reset(self) -> None:
        """RESET: forget every flow that was opened so far. Sent again until acknowledged."""
        now = clock()
        self._out(self.channel.reset(now), now)

    def flush(self, *, urgent: bool = False) -> None:
        """Send what waits for a full datagram; or only what somebody waits for, and the rest (DELETE) goes on
        gathering."""
        now = clock()
        self._out(self.channel.flush(now, urgent=urgent), now)

    def _send(self, kind: Kind, messages: Sequence[Any]) -> None:
        now = clock()
        self._out(self.channel.send(kind, messages, now), now)

    def _out(self, datagrams: list[bytes], now: float) -> None:
        if self._link is not None:
            for datagram in datagrams:
                self._link.send(datagram, self._address)
        due = self.channel.due
        if due is None or (self._timer is not None and self._timer_at <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = get_hub().schedule_call_global(max(due - now, 0), self._fire)

    def _fire(self) -> None:
        self._timer = None
        guarded("a timer", self._tick)

    def _tick(self) -> None:
        now = clock()
        self._out(self.channel.tick(now), now)

    def _take(self, datagram: bytes, sender: tuple[Any, ...]) -> None:
        now = clock()
        try:
            messages, out = self.channel.receive(datagram, now)
        except BusError as error:
            self._complaints.note(f"{sender[0]} (SSMB)", error.fault, str(error))
            return
        self._out(out, now)
        if messages:
            guarded("a message's handler", self._on_messages, self, messages)

    def _opened(self, connection: Connection, up: Up, link: Datagrams, switch: int) -> None:
        """A session begins; one that was there ends."""
        old, self._connection = self._connection, connection
        if old is not None and old is not connection:
            old.end(Fault.REPLACED, "the same peer has connected again")
        self.hello, self.identity, self._link = up.peer, up.peer.identity, link
        host = connection.address[0]
        if up.peer.ssmb_address and family(unpack_address(up.peer.ssmb_address)) == family(host):
            host = unpack_address(up.peer.ssmb_address)
        self._address = (host, up.peer.ssmb_port)
        now = clock()
        self._out(self.channel.open(up.keys, up.peer.incarnation, up.version.octet, now, switch=switch,
                                    limit=up.limit), now)

    def _closed(self) -> None:
        self._connection = None
        self.channel.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class CsPeer(Peer):
    """A control segment, seen from the DFS. ``held.servers``: the virtual servers that it announced."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.held = Held()

    def send_counters(self, connections: int, counters: Mapping[str, int],
                      traffic: Iterable[counted.Traffic]) -> bool:
        """COUNTERS, unless there is no session or it has not read what it was told before: then False. Rows of member 0
        (what limits refused) are told to whoever knows limits."""
        connection = self._connection
        if connection is None or not isinstance(connection.session, DfsSession) or not connection.session.idle:
            return False
        rows = traffic if connection.session.limits else (row for row in traffic if row.member)
        connection.session.count(counted.counters(connections, counters, rows))
        connection.settle()
        return True


class DfsServer:
    """The DFS's end of both buses: takes connections of several CSs at once.

    Args:
        listen: address and port of CSMB (port 0: any, see ``address``).
        key: the shared key (``keyfile.read``).
        identity: the datapath id.
        on_event: called with the :class:`CsPeer` and Up, Down (of an authenticated peer), Added, Removed,
            Distribution, Synced.
        on_messages: called with the :class:`CsPeer` and Reply, NewFlow, Reap, Timeout, Reset or Lost values.
        ssmb_port: UDP port for SSMB, at the same address; 0: any.
        flags: HelloFlag.APP_PROXY if it can extract application data.
    """

    def __init__(self, listen: tuple[str, int], key: bytes, identity: int, on_event: OnEvent,
                 on_messages: OnMessages, *, ssmb_port: int = 0, flags: HelloFlag = NO_FLAGS,
                 limit: int = ssmb.LIMIT, timing: Timing | None = None,
                 versions: tuple[Version, ...] = csmb.VERSIONS) -> None:
        self.complaints = Complaints()
        self.peers: dict[int, CsPeer] = {}
        self._key = key
        self._on_event = on_event
        self._on_messages = on_messages
        self._timing = timing
        self._versions = versions
        self._first = 1
        self._sessions: dict[int, CsPeer] = {}
        self._waiting: OrderedDict[Connection, None] = OrderedDict()
        self._connections: dict[Connection, CsPeer | None] = {}
        self._listener = socket.socket(family(listen[0]), socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(listen)
            self._listener.listen(64)
            self._link = Datagrams((listen[0], ssmb_port), self._take)
        except OSError:
            self._listener.close()
            raise
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._hello = Hello(max(versions), Role.DFS, identity, draw(), 1000, pack_address(self._link.address[0]),
                            self._link.address[1], limit, flags)
        self._greenlets = [eventlet.spawn(self._accept), eventlet.spawn(self._beat)]

    def close(self) -> None:
        """End every connection and stop."""
        for greenlet in self._greenlets:
            greenlet.kill()
        for connection in list(self._connections):
            connection.end(Fault.CLOSED, "this side stops")
        self._listener.close()
        self._link.close()

    def forget(self, identity: int) -> None:
        """A control segment will not come back: drop what is held, and what waits, for it."""
        peer = self.peers.pop(identity, None)
        if peer is not None:
            # If it does come back: it took batches of this incarnation up to here.
            self._first = max(self._first, peer.channel.next_batch)
            if peer._connection is not None:
                peer._connection.end(Fault.CLOSED, "forgotten")

    @property
    def unauthenticated(self) -> int:
        """Connections that have proved nothing yet."""
        return len(self._waiting)

    def _accept(self) -> None:
        while True:
            try:
                stream, address = self._listener.accept()
            except OSError as error:
                # Out of descriptors, most likely: those that are open go on.
                self.complaints.note("listening", Fault.LIMIT, f"cannot take a connection: {error.strerror}")
                eventlet.sleep(0.2)
                continue
            session = DfsSession(self._key, self._hello, os.urandom(auth.NONCE_BYTES), clock(), self._hold,
                                 versions=self._versions)
            connection = Connection(stream, address[:2], session, self._event)
            self._connections[connection] = None
            self._waiting[connection] = None
            if len(self._waiting) > UNAUTHENTICATED:
                # The oldest had most time to prove itself; a right one needs milliseconds.
                next(iter(self._waiting)).end(Fault.LIMIT, "too many unauthenticated connections")
            eventlet.spawn_n(self._serve, connection)
            eventlet.spawn_n(self._watch, connection)

    def _watch(self, connection: Connection) -> None:
        while connection.session.phase in (Phase.HELLO, Phase.AUTH):
            guarded("a session's clock", connection.tick, clock())
            eventlet.sleep(WATCH)

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            self._waiting.pop(connection, None)
            self._connections.pop(connection, None)

    def _beat(self) -> None:
        while True:
            eventlet.sleep(BEAT)
            now = clock()
            for connection, peer in list(self._connections.items()):
                if peer is not None:
                    guarded("a session's clock", connection.tick, now)

    def _hold(self, identity: int) -> Held:
        peer = self.peers.get(identity)
        if peer is None:
            if len(self.peers) >= CONTROL_SEGMENTS:
                raise BusError(Fault.LIMIT, f"more than {CONTROL_SEGMENTS} control segments")
            peer = self.peers[identity] = CsPeer(Role.DFS, self._hello.identity, self._timing, self.complaints,
                                                 self._on_messages, self._first)
            peer.identity = identity
        return peer.held

    def _event(self, connection: Connection, event: Event) -> None:
        peer = self._connections.get(connection)
        if isinstance(event, Up):
            peer = self.peers[event.peer.identity]
            self._waiting.pop(connection, None)
            self._connections[connection] = peer
            self._sessions.pop(peer.channel.session, None)
            self._sessions[event.keys.session] = peer
            peer._opened(connection, event, self._link, self._hello.identity)
            LOG.info("bus: control segment %x at %s is connected", peer.identity, connection.address[0])
        if isinstance(event, Down):
            self._waiting.pop(connection, None)
            if event.fault is not Fault.CLOSED or peer is None:
                self.complaints.note(f"{connection.address[0]} (CSMB)", event.fault, event.text)
            if peer is None or peer._connection is not connection:
                return
            self._sessions.pop(peer.channel.session, None)
            peer._closed()
            LOG.info("bus: control segment %x is gone (%s)", peer.identity, event.text)
        if peer is not None:
            self._on_event(peer, event)

    def _take(self, datagram: bytes, sender: tuple[Any, ...]) -> None:
        peer = self._sessions.get(int.from_bytes(datagram[6:14], "big")) if len(datagram) >= ssmb.OVERHEAD else None
        if peer is None:
            fault = Fault.SESSION if len(datagram) >= ssmb.OVERHEAD else Fault.SHORT
            self.complaints.note(f"{sender[0]} (SSMB)", fault, f"a datagram of {len(datagram)} bytes of no session")
            return
        peer._take(datagram, sender)


class CsClient(Peer):
    """The CS's end of both buses towards one DFS: connects by itself, and again whenever it is not connected.

    Args:
        address: where the DFS's CSMB listens.
        key: the shared key (``keyfile.ensure``).
        identity: this control segment's own number, the same after a restart.
        on_event: called with this client and Up, Down, Synced, Listed, Counted.
        on_messages: called with this client and Query, AppQuery, Delete, Stats, Refused, Reset or Lost values.
        switch: the datapath id that is expected there; None: any.
        interval: seconds between two HELLOs.
    """

    def __init__(self, address: tuple[str, int], key: bytes, identity: int, on_event: OnEvent,
                 on_messages: OnMessages, *, switch: int | None = None, interval: float = 1.0,
                 flags: HelloFlag = HelloFlag.APP_PROXY, limit: int = ssmb.LIMIT, standby: bytes = b"",
                 gateway: bytes = b"", timing: Timing | None = None,
                 versions: tuple[Version, ...] = csmb.VERSIONS) -> None:
        super().__init__(Role.CS, switch or 0, timing, Complaints(), on_messages)
        self.complaints = self._complaints
        self.desired = Desired()
        self._timing = timing
        self._csmb_address = address
        self._key = key
        self._on_event = on_event
        self._switch = switch
        self._versions = versions
        self._own = Hello(max(versions), Role.CS, identity, draw(), round(interval * 1000), b"", 0, limit, flags,
                          csmb.Error.OK, standby, gateway)
        self._up_since: float | None = None
        self._trying: Connection | None = None
        self._greenlets = [eventlet.spawn(self._run), eventlet.spawn(self._beat)]

    def close(self) -> None:
        """End the connection and do not come back."""
        for greenlet in self._greenlets:
            greenlet.kill()
        if self._trying is not None:
            self._trying.end(Fault.CLOSED, "this side stops")
        if self._link is not None:
            self._link.close()
            self._link = None

    def put(self, server: VirtualServer) -> None:
        """ADD_VS, now and after each reconnection; see :meth:`Desired.put`."""
        self.desired.put(server)
        self._kick()

    def remove(self, number: int) -> None:
        """DELETE_VS."""
        self.desired.remove(number)
        self._kick()

    def distribute(self, number: int, targets: Iterable[Target]) -> None:
        """TABLE: the whole distribution of a virtual server."""
        self.desired.distribute(number, targets)
        self._kick()

    def replace(self, servers: Iterable[VirtualServer], tables: Mapping[int, Iterable[Target]]) -> None:
        """The DFS shall hold exactly this; only differences are said."""
        self.desired.replace(servers, tables)
        self._kick()

    def greet(self, keys: tuple[bytes | None, bytes | None], current: int) -> None:
        """KEYS: make and check cookies with these, now and after each reconnection."""
        self.desired.greet(keys, current)
        self._kick()

    @property
    def proxies(self) -> bool:
        """Whether the DFS is connected, and shakes hands with clients (APP_PROXY)."""
        return self.connected and self._connection is not None and self._connection.session.proxies

    @property
    def limits(self) -> bool:
        """Whether the DFS is connected, and keeps limits on new connections."""
        return self.connected and self._connection is not None and self._connection.session.limits

    @property
    def finishes(self) -> bool:
        """Whether the DFS is connected, and hears who has finished (NEWFLOW)."""
        return self.connected and self._connection is not None and self._connection.session.finishes

    def check(self) -> None:
        """Ask which virtual servers the DFS holds (VS_LIST), and repair differences: Listed says how many."""
        if self._trying is not None and isinstance(self._trying.session, CsSession):
            self._trying.session.ask()
            self._kick()

    def _kick(self) -> None:
        if self._trying is not None and self._trying.session.phase is Phase.UP:
            self._trying.settle()

    def _run(self) -> None:
        delay = BACK_OFF[0]
        while True:
            self._up_since = None
            try:
                self._connect()
            except OSError as error:
                self.complaints.note(f"{self._csmb_address[0]} port {self._csmb_address[1]}", Fault.CLOSED,
                                     f"cannot connect: {error.strerror or error}")
            except Exception as error:  # whatever it was: the next attempt must take place
                LOG.error("bus: connecting to %s failed: %s: %s", self._csmb_address[0], type(error).__name__, error)
            # One that was of use is tried again soon; one that only answers and fails, less and less often.
            lasted = self._up_since is not None and clock() - self._up_since > BACK_OFF[1]
            delay = BACK_OFF[0] if lasted else delay
            eventlet.sleep(delay)
            delay = min(delay * 2, BACK_OFF[1])

    def _connect(self) -> None:
        stream = socket.socket(family(self._csmb_address[0]), socket.SOCK_STREAM)
        try:
            stream.settimeout(CONNECT_WITHIN)
            stream.connect(self._csmb_address)
            stream.settimeout(None)
            local = stream.getsockname()[0]
            if self._link is None or self._link.address[0] != local:
                if self._link is not None:
                    self._link.close()
                self._link = Datagrams((local, 0), self._take)
        except OSError:
            stream.close()
            raise
        hello = self._own._replace(ssmb_address=pack_address(local), ssmb_port=self._link.address[1])
        session = CsSession(self._key, hello, os.urandom(auth.NONCE_BYTES), clock(), self.desired,
                            switch=self._switch, versions=self._versions)
        self._trying = Connection(stream, self._csmb_address, session, self._event)
        try:
            self._trying.run()
        finally:
            self._trying = None

    def _event(self, connection: Connection, event: Event) -> None:
        if isinstance(event, Up):
            assert self._link is not None
            self._up_since = clock()
            if self.identity and self.identity != event.peer.identity:
                # Another switch answers at this address: what waits was not meant for it.
                self.channel = Channel(Role.CS, event.peer.identity, self._timing, self.channel.next_batch)
            self._opened(connection, event, self._link, event.peer.identity)
            LOG.info("bus: datapath %x at %s is connected", self.identity, connection.address[0])
        if isinstance(event, Down):
            connected = self.connected
            self._closed()
            self.complaints.note(f"{connection.address[0]} port {connection.address[1]}", event.fault, event.text)
            if not connected:
                return
        self._on_event(self, event)

    def _beat(self) -> None:
        pause = min(BEAT, WATCH * 2, self._own.interval / 4000)
        while True:
            eventlet.sleep(pause)
            if self._trying is not None:
                with contextlib.suppress(OSError):
                    guarded("a session's clock", self._trying.tick, clock())
