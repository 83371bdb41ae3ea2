# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""One CSMB connection as a state machine, for either end: bytes in, bytes and events out.

Owns order: who may say what when, serials, versions, the challenges, the beat of HELLOs. Pure: no socket, no
clock, no chance; ``now`` and nonces are given.

Theory of operation (everything that affects the state is in this file)

    phase   CS                                       DFS
    HELLO   says HELLO with a version of its own;    answers HELLO with the same version, or with VERS_NEW or
            after VERS_NEW tries a lower one, after  VERS_OBSOLETE and the nearest version it has; a challenge
            VERS_OBSOLETE a higher one               follows the HELLO that agrees
    AUTH    says its challenge; answers the DFS's    checks the CS's proof first, then proves itself: who cannot
            with its proof; checks the DFS's proof   prove anything learns nothing
    UP      says what it wants (ADD_VS, DELETE_VS,   holds it for this CS; repeats HELLO; answers VS_LIST
            TABLE, SYNC_DONE), HELLO periodically,
            asks VS_LIST
    DOWN    says nothing more; ``fault`` is why

Any fault ends the connection (phase DOWN), nothing else: the CS connects again and says everything anew. From UP on
each message ends with a tag over its place in the order, so that none can be added, changed, removed or repeated.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from hmac import compare_digest

from lbapp.bus import auth, csmb, ssmb
from lbapp.bus.auth import TAG_BYTES, Role, SessionKeys
from lbapp.bus.counted import MOST_TRAFFIC, Counters
from lbapp.bus.csmb import (
    HEADER,
    LONGEST,
    LONGEST_BEFORE_AUTH,
    MOST_TARGETS,
    AddVs,
    Challenge,
    DeleteVs,
    Error,
    Hello,
    HelloFlag,
    Keys,
    Message,
    Response,
    SyncDone,
    Table,
    Version,
    VirtualServer,
    VsList,
    VsListRequest,
)
from lbapp.bus.errors import BusError, DecodeError, Fault
from lbapp.bus.events import Added, Counted, Distribution, Down, Event, Keyed, Listed, Removed, Synced, Up
from lbapp.bus.holdings import MOST_SERVERS, SERVER, TABLE, Desired, Held

AUTHENTICATE_WITHIN = 5.0
MESSAGE_WITHIN = 0.7
"""Seconds from a message's first byte to its last, before authentication (HELLO and AUTH are one segment each)."""
MISSED = 3
"""HELLOs that may be missed before the peer counts as dead."""
INTERVALS = (50, 60_000)
HELLOS = 16
"""HELLOs before authentication, at most."""
MOST_OUTPUT = 16 << 20
_PUMP = 256 << 10


class Phase(enum.Enum):
    """See the module's theory of operation."""

    HELLO = "hello"
    AUTH = "auth"
    UP = "up"
    DOWN = "down"


class Session:
    """What both ends have in common.

    Args:
        key: the shared key.
        hello: this side's HELLO; its version is the first to be offered (CS).
        nonce: 32 fresh random bytes, used for nothing else.
        now: seconds of a monotonic clock.
        versions: all that this side speaks.
    """

    role: Role

    def __init__(self, key: bytes, hello: Hello, nonce: bytes, now: float,
                 versions: tuple[Version, ...] = csmb.VERSIONS) -> None:
        self.phase = Phase.HELLO
        self.fault: Fault | None = None
        self.hello = hello
        self.peer: Hello | None = None
        self.keys: SessionKeys | None = None
        self.versions = tuple(sorted(versions))
        self._key = key
        self._nonce = nonce
        self._peer_nonce = b""
        self._began = self._heard = now
        self._cut_since: float | None = None
        self._now = now
        self._said: list[bytes] = []
        self._in = bytearray()
        self._out = bytearray()
        self._events: list[Event] = []
        self._serial_out = self._serial_in = 0
        self._kinds_out: dict[int, int] = {}
        self._kinds_in: dict[int, int] = {}
        self._tagged_out = self._tagged_in = 0
        self._hellos = 0
        self.limits = False  # whether it is of a version that has limits on new connections
        self.finishes = False  # whether it is of a version whose NEWFLOW says who has finished
        self.proxies = False  # whether the peer reads what clients say (APP_PROXY), in a version that carries it

    # -------------------------------------------------------------- the carrier's side

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes of the connection, cut anywhere."""
        if self.phase is Phase.DOWN:
            return
        self._now = now
        self._in += data
        place = 0
        try:
            while self.phase is not Phase.DOWN and (length := self._length(place)):
                message = bytes(memoryview(self._in)[place:place + length])
                place += length
                self._take(message)
                self._heard = now
        except BusError as error:
            self.end(error.fault, str(error))
        del self._in[:place]
        if not self._in:
            self._cut_since = None
        elif place or self._cut_since is None:
            self._cut_since = now

    def tick(self, now: float) -> None:
        """Let time pass: a peer that does not authenticate, or is not heard any more, is given up."""
        self._now = now
        if self.phase is Phase.DOWN:
            return
        if self.phase is not Phase.UP:
            if now - self._began > AUTHENTICATE_WITHIN:
                self.end(Fault.LATE, f"not authenticated within {AUTHENTICATE_WITHIN:g} s")
            elif self._cut_since is not None and now - self._cut_since > MESSAGE_WITHIN:
                self.end(Fault.SLOW, f"a message of which {len(self._in)} bytes came, and no more")
        elif now - self._heard > MISSED * self._interval:
            self.end(Fault.SILENT, f"nothing heard for {now - self._heard:.1f} s")

    def take(self) -> bytes:
        """The bytes that are to be written now; ask again when they are."""
        data = bytes(self._out)
        self._out.clear()
        return data

    @property
    def busy(self) -> bool:
        """Whether there is something to write, or something has happened."""
        return bool(self._out or self._events)

    def drain(self) -> list[Event]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events

    def end(self, fault: Fault, text: str) -> None:
        """The connection has ended, or has to."""
        if self.phase is not Phase.DOWN:
            self.phase = Phase.DOWN
            self.fault = fault
            self._in.clear()
            self._out.clear()
            self._events.append(Down(fault, text))

    @property
    def _interval(self) -> float:
        raise NotImplementedError

    # -------------------------------------------------------------- messages

    def _length(self, place: int) -> int:
        """The length of the next message, if it is all there; 0 else. Checked before anything is kept for it."""
        if len(self._in) - place < HEADER.size:
            return 0
        length = HEADER.unpack_from(self._in, place)[3]
        least, most = HEADER.size, LONGEST_BEFORE_AUTH
        if self.phase is Phase.UP:
            least, most = HEADER.size + TAG_BYTES, LONGEST
        if length < least:
            raise DecodeError(Fault.SHORT, f"a message of {length} bytes, expected {least} at least")
        if length > most:
            raise DecodeError(Fault.LONG, f"a message of {length} bytes, expected {most} at most")
        return length if len(self._in) - place >= length else 0

    def _take(self, data: bytes) -> None:
        kind, serial, serial_by_type, _ = HEADER.unpack_from(data)
        body = data[HEADER.size:]
        if self.phase is Phase.UP:
            assert self.keys is not None
            expected = auth.tag(self.keys.csmb(self.role.other),
                                self._tagged_in.to_bytes(8, "big") + data[:-TAG_BYTES])
            if not compare_digest(expected, data[-TAG_BYTES:]):
                raise DecodeError(Fault.UNAUTHENTICATED, "a wrong tag")
            self._tagged_in += 1
            body = body[:-TAG_BYTES]
        by_type = self._kinds_in.get(kind, 0)
        if serial != self._serial_in or serial_by_type != by_type:
            raise DecodeError(Fault.SERIAL, f"serials {serial} and {serial_by_type}, expected {self._serial_in} and "
                                            f"{by_type}")
        message = csmb.decode(kind, body)
        self._serial_in = serial + 1 & 0xFFFF
        self._kinds_in[kind] = serial_by_type + 1 & 0xFFFF
        if self.phase is Phase.HELLO:
            self._said.append(data)
        self._handle(message)

    def _say(self, message: Message) -> None:
        if self.phase is Phase.DOWN:
            return
        kind, body = csmb.encode(message)
        size = HEADER.size + len(body) + (TAG_BYTES if self.phase is Phase.UP else 0)
        by_type = self._kinds_out.get(kind, 0)
        data = HEADER.pack(kind, self._serial_out, by_type, size) + body
        self._serial_out = self._serial_out + 1 & 0xFFFF
        self._kinds_out[kind] = by_type + 1 & 0xFFFF
        if self.phase is Phase.HELLO:
            self._said.append(data)
        if self.phase is Phase.UP:
            assert self.keys is not None
            data += auth.tag(self.keys.csmb(self.role), self._tagged_out.to_bytes(8, "big") + data)
            self._tagged_out += 1
        self._out += data
        if len(self._out) > MOST_OUTPUT:
            self.end(Fault.SLOW, f"{len(self._out)} bytes wait for the peer")

    def _handle(self, message: Message) -> None:
        raise NotImplementedError

    def _out_of_place(self, message: Message) -> BusError:
        return DecodeError(Fault.STATE, f"{type(message).__name__} from the {self.role.other.name} in phase "
                                        f"{self.phase.value}")

    def _meet(self, hello: Hello) -> None:
        """A HELLO that agrees on a version: is its sender what it should be?"""
        low, high = ssmb.LIMITS
        if hello.role is not self.role.other:
            raise DecodeError(Fault.DIRECTION, f"HELLO of a {hello.role.name}")
        if not low <= hello.limit <= high or not hello.incarnation or not hello.ssmb_port:
            raise DecodeError(Fault.VALUE, "HELLO without a limit, an incarnation or a port for SSMB")
        if not INTERVALS[0] <= hello.interval <= INTERVALS[1]:
            raise DecodeError(Fault.VALUE, f"HELLO every {hello.interval} ms")
        self.peer = hello

    def _proof(self, role: Role) -> bytes:
        return auth.proof(self._key, role, auth.transcript(self._said), *self._nonces())

    def _nonces(self) -> tuple[bytes, bytes]:
        pair = (self._nonce, self._peer_nonce)
        return pair if self.role is Role.CS else pair[::-1]

    def _check(self, response: Response) -> None:
        if not auth.proves(response.proof, self._key, self.role.other, auth.transcript(self._said), *self._nonces()):
            raise DecodeError(Fault.UNAUTHENTICATED, "the peer does not hold our key")

    def _up(self) -> None:
        assert self.peer is not None
        self.keys = auth.derive(self._key, auth.transcript(self._said), *self._nonces())
        self.phase = Phase.UP
        self.limits = self.peer.version >= csmb.LIMITS
        self.finishes = self.peer.version >= csmb.FINISHED
        self.proxies = self.peer.version >= csmb.PROXIES and HelloFlag.APP_PROXY in self.peer.flags
        self._events.append(Up(self.peer, self.keys, self.peer.version, min(self.hello.limit, self.peer.limit)))

    def _again(self, hello: Hello) -> None:
        """A HELLO while UP says that the peer is there; who it is cannot change."""
        assert self.peer is not None
        if hello._replace(interval=0) != self.peer._replace(interval=0):
            raise DecodeError(Fault.STATE, "HELLO says something else than before")
        if not INTERVALS[0] <= hello.interval <= INTERVALS[1]:
            raise DecodeError(Fault.VALUE, f"HELLO every {hello.interval} ms")
        self.peer = hello


class CsSession(Session):
    """The end that connects.

    Args:
        desired: what the DFS is to hold; changes of it are said as soon as :meth:`take` is called.
        switch: the datapath id that is expected; None: any.
    """

    role = Role.CS

    def __init__(self, key: bytes, hello: Hello, nonce: bytes, now: float, desired: Desired, *,
                 switch: int | None = None, versions: tuple[Version, ...] = csmb.VERSIONS) -> None:
        super().__init__(key, hello, nonce, now, versions)
        self._desired = desired
        self._switch = switch
        self._told: dict[int, VirtualServer] = {}
        self._synced = False
        self._asked: dict[int, VirtualServer] | None = None
        self._answer: list[VirtualServer] = []
        self._parts = 0
        self._counted: list[Counters] = []
        self._tried = {hello.version}
        self._last_hello = now
        self._say(hello)

    @property
    def _interval(self) -> float:
        return self.hello.interval / 1000

    def tick(self, now: float) -> None:
        """As in :class:`Session`; also says HELLO when it is time."""
        super().tick(now)
        if self.phase is Phase.UP and now - self._last_hello >= self._interval:
            self._last_hello = now
            self._say(self.hello)

    def end(self, fault: Fault, text: str) -> None:
        """As in :class:`Session`."""
        if self.phase is not Phase.DOWN:
            self._desired.silence()
        super().end(fault, text)

    def ask(self) -> None:
        """Ask VS_LIST, and repair what differs (:class:`Listed`). One question at a time."""
        if self.phase is Phase.UP and self._asked is None:
            self._pump()
            self._asked, self._answer, self._parts = dict(self._told), [], 0
            self._say(VsListRequest())

    def take(self) -> bytes:
        """As in :class:`Session`; says what changed in what is desired, as much as is sensible at once."""
        self._pump()
        return super().take()

    def _pump(self) -> None:
        if self.phase is not Phase.UP:
            return
        desired, dirty = self._desired, self._desired.dirty
        if desired.keys_dirty:
            desired.keys_dirty = False
            if self.proxies:
                self._say_keys()
        while dirty and len(self._out) < _PUMP and self.phase is Phase.UP:
            number = next(iter(dirty))
            what = dirty.pop(number)
            server = desired.servers.get(number)
            if server is None:
                if self._told.pop(number, None) is not None:
                    self._say(DeleteVs(number))
                continue
            if what & SERVER:
                self._told[number] = server.spoken(self.hello.version)
                self._say(AddVs(self._told[number]))
            if what & TABLE and number in desired.tables:
                for part in csmb.tables(number, *desired.tables[number]):
                    self._say(part)
        if not dirty and not self._synced:
            self._synced = True
            self._say(SyncDone(len(self._told)))
            self._events.append(Synced(len(self._told)))

    def _say_keys(self) -> None:
        assert self._desired.keys is not None
        assert self.keys is not None
        (first, second), current = self._desired.keys
        nothing = bytes(csmb.COOKIE_KEY_BYTES)
        self._say(Keys(current, (first is not None) | (second is not None) << 1, auth.conceal(
            self.keys.concealing, self._tagged_out, (first or nothing) + (second or nothing))))

    def _handle(self, message: Message) -> None:
        match message:
            case Hello() if self.phase is Phase.HELLO:
                self._negotiate(message)
            case Challenge(nonce) if self.phase is Phase.AUTH and not self._peer_nonce:
                self._peer_nonce = nonce
                self._say(Response(self._proof(Role.CS)))
            case Response() if self.phase is Phase.AUTH and self._peer_nonce:
                self._check(message)
                self._up()
                self._desired.all_again()
                self._last_hello = self._now
            case Hello() if self.phase is Phase.UP:
                self._again(message)
            case VsList() if self.phase is Phase.UP and self._asked is not None:
                self._compare(message)
            case Counters() if self.phase is Phase.UP:
                self._gather(message)
            case _:
                raise self._out_of_place(message)

    def _negotiate(self, answer: Hello) -> None:
        """003, FIGURE 16: a lower version after VERS_NEW, a higher one after VERS_OBSOLETE, each once."""
        offered = self.hello.version
        if answer.error is Error.OK:
            if answer.version != offered:
                raise DecodeError(Fault.VERSION, f"version {answer.version}, offered {offered}")
            self._meet(answer)
            if self._switch is not None and answer.identity != self._switch:
                raise DecodeError(Fault.PEER, f"datapath {answer.identity:#x}, expected {self._switch:#x}")
            self.phase = Phase.AUTH
            self._say(Challenge(self._nonce))
            return
        left = [version for version in self.versions if version not in self._tried]
        if answer.error is Error.VERS_NEW:
            left = [version for version in left if version < offered and version <= answer.version][-1:]
        else:
            left = [version for version in left if version > offered and version >= answer.version][:1]
        if not left:
            raise DecodeError(Fault.VERSION, f"{answer.error.name}: no version in common, the peer has "
                                             f"{answer.version.major}.{answer.version.minor}")
        self._tried.add(left[0])
        self.hello = self.hello._replace(version=left[0])
        self._say(self.hello)

    def _gather(self, part: Counters) -> None:
        counted = self._counted
        if part.part != len(counted) or (counted and counted[0].parts != part.parts):
            raise DecodeError(Fault.STATE, f"part {part.part} of COUNTERS, expected {len(counted)}")
        counted.append(part)
        if sum(len(piece.traffic) for piece in counted) > MOST_TRAFFIC:
            raise DecodeError(Fault.LIMIT, f"COUNTERS of more than {MOST_TRAFFIC} rows")
        if len(counted) == part.parts:
            self._counted = []
            self._events.append(Counted(counted[0].connections, dict(counted[0].counters),
                                        tuple(row for piece in counted for row in piece.traffic)))

    def _compare(self, answer: VsList) -> None:
        assert self._asked is not None
        if answer.part != self._parts or len(self._answer) + len(answer.servers) > MOST_SERVERS:
            raise DecodeError(Fault.STATE, f"part {answer.part} of VS_LIST, expected {self._parts}")
        self._parts += 1
        self._answer += answer.servers
        if self._parts < answer.parts:
            return
        held = {server.number: server for server in self._answer}
        wrong = {number for number in self._asked.keys() | held.keys() if self._asked.get(number) != held.get(number)}
        for number in wrong:
            # What it holds and should not is deleted, if it was not told again meanwhile.
            self._told.setdefault(number, held.get(number) or self._asked[number])
            self._desired.again(number)
        self._asked, self._answer = None, []
        self._events.append(Listed(len(held), len(wrong)))


class DfsSession(Session):
    """The end that listens.

    Args:
        held: finds what is held for a CS by its identity; may raise :class:`BusError` to refuse it.
    """

    role = Role.DFS

    def __init__(self, key: bytes, hello: Hello, nonce: bytes, now: float, held: Callable[[int], Held], *,
                 versions: tuple[Version, ...] = csmb.VERSIONS) -> None:
        super().__init__(key, hello, nonce, now, versions)
        self._find = held
        self._held = Held()
        self._confirmed: set[int] = set()
        self._synced = False
        self._table: list[Table] = []

    @property
    def idle(self) -> bool:
        """Whether the session is up and nothing waits to be written."""
        return self.phase is Phase.UP and not self._out

    def count(self, parts: list[Counters]) -> None:
        """Say COUNTERS, all its parts."""
        if self.phase is Phase.UP:
            for part in parts:
                self._say(part)

    @property
    def _interval(self) -> float:
        return (self.peer or self.hello).interval / 1000

    def _handle(self, message: Message) -> None:
        match message:
            case Hello() if self.phase is Phase.HELLO:
                self._negotiate(message)
            case Challenge(nonce) if self.phase is Phase.AUTH and not self._peer_nonce:
                self._peer_nonce = nonce
            case Response() if self.phase is Phase.AUTH and self._peer_nonce:
                self._check(message)
                assert self.peer is not None
                self._held = self._find(self.peer.identity)
                self._say(Response(self._proof(Role.DFS)))
                self._up()
            case _ if self.phase is not Phase.UP:
                raise self._out_of_place(message)
            case Hello():
                self._again(message)
                self._say(self.hello._replace(interval=message.interval))
            case AddVs(server):
                self._add(server)
            case DeleteVs(number):
                self._drop(number)
            case Table():
                self._distribute(message)
            case VsListRequest():
                for part in csmb.lists(list(self._held.servers.values())):
                    self._say(part)
            case SyncDone(servers) if not self._synced:
                self._sync(servers)
            case Keys() if self.hello.version >= csmb.PROXIES:
                self._reveal(message)
            case _:
                raise self._out_of_place(message)

    def _negotiate(self, offer: Hello) -> None:
        """003, FIGURE 16. The answer names the nearest version that we have."""
        self._hellos += 1
        if self._hellos > HELLOS:
            raise DecodeError(Fault.LIMIT, f"more than {HELLOS} HELLOs")
        if offer.error is not Error.OK:
            raise DecodeError(Fault.VALUE, f"a first HELLO with {offer.error.name}")
        if offer.version not in self.versions:
            lower = [version for version in self.versions if version < offer.version]
            error = Error.VERS_NEW if lower else Error.VERS_OBSOLETE
            self._say(self.hello._replace(version=lower[-1] if lower else self.versions[0], error=error))
            return
        self._meet(offer)
        self.hello = self.hello._replace(version=offer.version, interval=offer.interval)
        self._say(self.hello)
        self.phase = Phase.AUTH
        self._say(Challenge(self._nonce))

    def _reveal(self, message: Keys) -> None:
        assert self.keys is not None
        size = csmb.COOKIE_KEY_BYTES
        both = auth.conceal(self.keys.concealing, self._tagged_in - 1, message.concealed)
        self._events.append(Keyed((both[:size] if message.there & 1 else None, both[size:] if message.there & 2 else
                                   None), message.current))

    def _add(self, server: VirtualServer) -> None:
        if server.spoken(self.hello.version) != server:
            raise DecodeError(Fault.VALUE, "mode PROXY, or limits, in a version that has none")
        held = self._held.servers
        if server.number not in held and len(held) >= MOST_SERVERS:
            raise DecodeError(Fault.LIMIT, f"more than {MOST_SERVERS} virtual servers")
        self._confirmed.add(server.number)
        if held.get(server.number) != server:
            held[server.number] = server
            self._events.append(Added(server))

    def _drop(self, number: int) -> None:
        self._confirmed.discard(number)
        if self._table and self._table[0].number == number:
            self._table = []
        if self._held.servers.pop(number, None) is not None:
            self._events.append(Removed(number))

    def _distribute(self, part: Table) -> None:
        """Fill the back-up buffer; flip when it is whole (004, configuration table)."""
        if part.number not in self._confirmed:
            raise DecodeError(Fault.VALUE, f"TABLE of the unknown virtual server {part.number}")
        before = self._table
        if part.part != len(before) or (before and (
                before[0].number, before[0].generation, before[0].parts) != (part.number, part.generation, part.parts)):
            raise DecodeError(Fault.STATE, f"part {part.part} of a TABLE, expected {len(before)}")
        before.append(part)
        if sum(len(piece.targets) for piece in before) > MOST_TARGETS or part.parts > MOST_TARGETS:
            raise DecodeError(Fault.LIMIT, f"a TABLE of more than {MOST_TARGETS} targets")
        if len(before) == part.parts:
            self._table = []
            self._events.append(Distribution(part.number, part.generation,
                                             tuple(target for piece in before for target in piece.targets)))

    def _sync(self, servers: int) -> None:
        if servers != len(self._confirmed):
            raise DecodeError(Fault.STATE, f"SYNC_DONE of {servers} virtual servers, {len(self._confirmed)} were added")
        self._synced = True
        for number in [number for number in self._held.servers if number not in self._confirmed]:
            self._drop(number)
        self._events.append(Synced(servers))
