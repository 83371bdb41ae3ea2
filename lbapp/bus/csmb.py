# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""CSMB, the configuration-sharing message bus: values ⇄ bytes of one message (docs/wire.md draws each).

Owns the layout of 003's FIGURES 11, 12, 14 and 15. Pure. Never keeps anything between two calls: serials,
versions and order are ``sessions.py``'s.

    0               2               4               6               8
    +---------------+---------------+---------------+---------------+----------+-----------+
    | type          | serial_global | serial_bytype | msg_length    | body     | tag (16)  |
    +---------------+---------------+---------------+---------------+----------+-----------+

The length counts everything; the tag is there once both sides are authenticated. Addresses are 16 bytes: IPv4 is
``::ffff:a.b.c.d``, none is ``::``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

from lbapp.bus import counted
from lbapp.bus.auth import NONCE_BYTES, PROOF_BYTES, TAG_BYTES, Role
from lbapp.bus.counted import Counters, check_parts
from lbapp.bus.errors import DecodeError, EncodeError, Fault

HEADER = Struct("!HHHH")
LONGEST = 0xFFFF
LONGEST_BEFORE_AUTH = 256
"""Nobody who has not proved anything makes us hold more than this."""
MOST_TARGETS = 4096
TARGETS_A_PART = 512
SERVERS_A_PART = 128
MOST_APP_DATA = 255
COOKIE_KEY_BYTES = 16


class Kind(enum.IntEnum):
    """003's message types (FIGURE 10); from 16 on they are ours."""

    HELLO = 1
    AUTH = 2
    ADD_VS = 3
    DELETE_VS = 4
    VS_LIST = 5
    TABLE = 16
    SYNC_DONE = 17
    COUNTERS = 18
    KEYS = 19


class HelloFlag(enum.IntFlag):
    """FIGURE 15, HELLO."""

    REDUNDANT = 0x0001
    APP_PROXY = 0x0002


class Flag(enum.IntFlag):
    """FIGURE 15, ADD_VS and VS_LIST."""

    TRANSLATE_ADDR = 0x0001
    TRANSLATE_PORT = 0x0002
    ROUTE_BY_DST_IP = 0x0004
    WILDCARD_ADDR = 0x0008
    WILDCARD_PORT = 0x0010
    NOARP_MODE = 0x0020
    SSL_PROXY = 0x0040
    COOKIE_PROXY = 0x0080
    HTTP_PROXY = 0x0100
    RAW_PROXY = 0x0200
    LIMITED = 0x0400


class Error(enum.IntEnum):
    """FIGURE 16; OK is the absence of one."""

    OK = 0
    VERS_NEW = 1
    VERS_OBSOLETE = 2


class Assist(enum.IntEnum):
    """Classes of virtual servers (FIGURE 13)."""

    DFS_ASSIST = 1
    CS_ASSIST = 2
    HYBRID = 3


class Mode(enum.IntEnum):
    """What the fast path does with a flow it does not know: leave it to the switch, decide, ask, or shake hands with
    the client and ask with what it says."""

    PASS = 0
    DECIDE = 1
    PUNT = 2
    PROXY = 3


class Hash(enum.IntEnum):
    """How the fast path picks a slot, where it decides."""

    SOURCE = 0
    FLOW = 1
    TURN = 2


class TargetFlag(enum.IntFlag):
    """How packets reach a target."""

    ROUTED = 0x01
    TRANSLATE_ADDR = 0x02
    TRANSLATE_PORT = 0x04


class Version(NamedTuple):
    """vers_major, vers_minor: of both buses. One octet of an SSMB datagram, so below 16 each."""

    major: int
    minor: int

    @property
    def octet(self) -> int:
        """As in an SSMB header."""
        return self.major << 4 | self.minor


VERSIONS = (Version(1, 0), Version(1, 1), Version(1, 2), Version(1, 3))
PROXIES = Version(1, 1)
"""From this version on: KEYS, virtual servers of mode PROXY, and what SSMB carries of them."""
LIMITS = Version(1, 2)
"""From this version on: limits on new connections, and in COUNTERS what they refused."""
FINISHED = Version(1, 3)
"""From this version on: which side of a connection has finished, in NEWFLOW."""


class Hello(NamedTuple):
    """HELLO. The layout is the same in every version, so that it can be refused in every version.

    Attributes:
        identity: the DFS's datapath id, or the CS's own number: the same after a restart.
        incarnation: drawn at each start of the process, never 0.
        interval: milliseconds between two HELLOs of the CS (the DFS repeats what it was told).
        limit: the most bytes of UDP payload that the sender takes.
        ssmb_address: where the sender takes SSMB; all zero: the address of the TCP connection.
        standby_address: the standby CS (003, ssmb_standby_ipaddr); meant with REDUNDANT only.
        gateway: the default gateway (003, administrative addresses); b"" is none.
    """

    version: Version
    role: Role
    identity: int
    incarnation: int
    interval: int
    ssmb_address: bytes
    ssmb_port: int
    limit: int
    flags: HelloFlag = HelloFlag(0)
    error: Error = Error.OK
    standby_address: bytes = b""
    gateway: bytes = b""


class Challenge(NamedTuple):
    """AUTH: prove that you hold the key."""

    nonce: bytes


class Response(NamedTuple):
    """AUTH: the proof (``auth.proof``)."""

    proof: bytes


class Greeting(NamedTuple):
    """How the clients of a virtual server are shaken hands with; ``milliseconds`` they may take to say enough."""

    mss: int
    window_scale: int
    sack: bool
    milliseconds: int


class Limits(NamedTuple):
    """Limits on new connections: so many a second and so many at once (0: a second's worth), of the virtual server and
    of each client network of ``prefix`` bits. -1: there is no limit."""

    rate: int
    burst: int
    client_rate: int
    client_burst: int
    prefix: int


class VirtualServer(NamedTuple):
    """What ADD_VS and VS_LIST say of a virtual server.

    Attributes:
        address: virt_ipaddr, packed; ignored with WILDCARD_ADDR except for its family.
        idle_seconds, hard_seconds: of its flows; 0 is none.
        next_hop: next_hop_ipaddr, where ROUTE_BY_DST_IP is not set; else b"".
        app_data: the name of the cookie (COOKIE_PROXY); else b"".
        greeting: with mode PROXY, and only then.
        limits: with LIMITED, and only then.
    """

    number: int
    address: bytes
    port: int
    protocol: int
    flags: Flag
    assist: Assist = Assist.DFS_ASSIST
    mode: Mode = Mode.PASS
    hash: Hash = Hash.FLOW
    idle_seconds: int = 0
    hard_seconds: int = 0
    next_hop: bytes = b""
    app_data: bytes = b""
    greeting: Greeting | None = None
    limits: Limits | None = None

    def spoken(self, version: Version) -> VirtualServer:
        """What a peer of this version is told: an older one leaves to the switch, or asks about, what it does not
        know."""
        told = self
        if version < LIMITS and self.limits is not None:
            told = told._replace(limits=None, flags=told.flags & ~Flag.LIMITED,
                                 mode=Mode.PUNT if told.mode is Mode.DECIDE else told.mode)
        if version < PROXIES and self.mode is Mode.PROXY:
            told = told._replace(mode=Mode.PASS, greeting=None, flags=told.flags & ~Flag.RAW_PROXY)
        return told


class AddVs(NamedTuple):
    """ADD_VS: this virtual server exists, like this."""

    server: VirtualServer


class DeleteVs(NamedTuple):
    """DELETE_VS: this one does not exist any longer."""

    number: int


class VsListRequest(NamedTuple):
    """VS_LIST, asked: which virtual servers of mine do you hold?"""


class VsList(NamedTuple):
    """VS_LIST, answered, in parts; ``part`` counts from 0."""

    part: int
    parts: int
    servers: tuple[VirtualServer, ...]


class Target(NamedTuple):
    """One member in a distribution."""

    member: int
    address: bytes
    port: int
    mac: bytes
    out_port: int
    weight: int
    flags: TargetFlag = TargetFlag.TRANSLATE_ADDR | TargetFlag.TRANSLATE_PORT


class Table(NamedTuple):
    """TABLE: the distribution of one virtual server (004, configuration table), or a part of it.

    It is effective when the last part is there (back-up buffer, then flip); ``part`` counts from 0.
    """

    number: int
    generation: int
    part: int
    parts: int
    targets: tuple[Target, ...]


class SyncDone(NamedTuple):
    """SYNC_DONE: what was not added since this connection began does not exist."""

    servers: int


class Keys(NamedTuple):
    """KEYS: cookies are made and checked with these from now on.

    Attributes:
        current: the place, 0 or 1, of the key that makes new ones.
        there: bit 0: there is a first key; bit 1: a second.
        concealed: both (``auth.conceal``), of 16 bytes each; zeros where there is none.
    """

    current: int
    there: int
    concealed: bytes


Message = Hello | Challenge | Response | AddVs | DeleteVs | VsListRequest | VsList | Table | SyncDone | Counters | Keys

# version, flags, error, role, limit, identity, incarnation, interval, ssmb, standby, gateway, ssmb port
_HELLO = Struct("!BBHBBHQQI16s16s16sH")
HELLO_BYTES = _HELLO.size
# number, address, next hop, port, flags, idle, hard, protocol, class, mode, hash, length of app_data
_SERVER = Struct("!I16s16sHHHHBBBBB")
# MSS, window scale, flags, milliseconds
_GREETING = Struct("!HBBI")
# rate, burst, the same of client networks, bits of a network
_LIMITS = Struct("!iIiIB")
_NUMBER = Struct("!I")
_KEYS = Struct(f"!BB{2 * COOKIE_KEY_BYTES}s")
_PARTS = Struct("!BHHH")
_TABLE = Struct("!IIHHH")
_TARGET = Struct("!I16sH6sIHB")
_CHALLENGE, _RESPONSE = 1, 2
_REQUEST, _ANSWER = 1, 2
_MAPPED = bytes(10) + b"\xff\xff"
_NONE = bytes(16)
_MASKS: dict[Any, int] = {kind: sum(kind) for kind in (HelloFlag, Flag, TargetFlag)}
_KINDS = {int(kind): kind for kind in Kind}


def _wide(address: bytes) -> bytes:
    if len(address) == 4:
        return _MAPPED + address
    if not address:
        return _NONE
    if len(address) != 16 or address.startswith(_MAPPED) or address == _NONE:
        raise EncodeError(Fault.VALUE, "an address of 4 or 16 bytes, not mapped")
    return address


def _address(wide: bytes) -> bytes:
    if wide.startswith(_MAPPED):
        return wide[12:]
    return b"" if wide == _NONE else wide


def _virtual(address: bytes) -> bytes:
    """As :func:`_wide`, for an address that is never none: ``::`` is the wildcard of its family."""
    if len(address) == 16 and address == _NONE:
        return _NONE
    if not address:
        raise EncodeError(Fault.VALUE, "an address of 4 or 16 bytes")
    return _wide(address)


def _unvirtual(wide: bytes) -> bytes:
    return wide[12:] if wide.startswith(_MAPPED) else wide


# ------------------------------------------------------------------ values -> bytes


def _server(server: VirtualServer) -> bytes:
    if len(server.app_data) > MOST_APP_DATA:
        raise EncodeError(Fault.LONG, f"app_data of {len(server.app_data)} bytes, expected at most {MOST_APP_DATA}")
    return _SERVER.pack(server.number, _virtual(server.address), _wide(server.next_hop), server.port, server.flags,
                        server.idle_seconds, server.hard_seconds, server.protocol, server.assist, server.mode,
                        server.hash, len(server.app_data)) + server.app_data + _greeted(server) + _limited(server)


def _greeted(server: VirtualServer) -> bytes:
    if (server.mode is Mode.PROXY) != (server.greeting is not None):
        raise EncodeError(Fault.VALUE, "a greeting with mode PROXY, and only then")
    return b"" if server.greeting is None else _GREETING.pack(*server.greeting)


def _limited(server: VirtualServer) -> bytes:
    if (Flag.LIMITED in server.flags) != (server.limits is not None):
        raise EncodeError(Fault.VALUE, "limits with LIMITED, and only then")
    return b"" if server.limits is None else _LIMITS.pack(*server.limits)


def _target(target: Target) -> bytes:
    if len(target.mac) != 6:
        raise EncodeError(Fault.VALUE, "a MAC address of 6 bytes")
    return _TARGET.pack(target.member, _virtual(target.address), target.port, target.mac, target.out_port,
                        target.weight, target.flags)


def _body(message: Message) -> tuple[Kind, bytes]:
    match message:
        case Hello():
            if message.version.major > 15 or message.version.minor > 15:
                raise EncodeError(Fault.VALUE, "version numbers below 16")
            return Kind.HELLO, _HELLO.pack(
                *message.version, message.flags, message.error, message.role, message.limit, message.identity,
                message.incarnation, message.interval, _wide(message.ssmb_address), _wide(message.standby_address),
                _wide(message.gateway), message.ssmb_port)
        case Challenge(nonce) if len(nonce) == NONCE_BYTES:
            return Kind.AUTH, bytes((_CHALLENGE,)) + nonce
        case Response(proof) if len(proof) == PROOF_BYTES:
            return Kind.AUTH, bytes((_RESPONSE,)) + proof
        case AddVs(server):
            return Kind.ADD_VS, _server(server)
        case DeleteVs(number):
            return Kind.DELETE_VS, _NUMBER.pack(number)
        case VsListRequest():
            return Kind.VS_LIST, bytes((_REQUEST,))
        case VsList(part, parts, servers):
            check_parts(part, parts, EncodeError)
            return Kind.VS_LIST, _PARTS.pack(_ANSWER, part, parts, len(servers)) + b"".join(map(_server, servers))
        case Table(number, generation, part, parts, targets):
            check_parts(part, parts, EncodeError)
            return Kind.TABLE, _TABLE.pack(number, generation, part, parts, len(targets)) + b"".join(
                map(_target, targets))
        case Keys(current, there, concealed) if len(concealed) == 2 * COOKIE_KEY_BYTES:
            return Kind.KEYS, _KEYS.pack(current, there, concealed)
        case SyncDone(servers):
            return Kind.SYNC_DONE, _NUMBER.pack(servers)
        case Counters():
            return Kind.COUNTERS, counted.pack(message)
    raise EncodeError(Fault.VALUE, f"no message of this bus: {message!r:.80}")


def encode(message: Message) -> tuple[Kind, bytes]:
    """A message's type and body.

    Raises:
        EncodeError: it cannot be carried.
    """
    try:
        kind, body = _body(message)
    except EncodeError:
        raise
    except Exception as error:  # struct.error and whatever a value of a wrong type causes
        raise EncodeError(Fault.VALUE, f"{type(message).__name__}: {error}") from None
    if HEADER.size + len(body) + TAG_BYTES > LONGEST:
        raise EncodeError(Fault.LONG, f"{kind.name} of {len(body)} bytes")
    return kind, body


def tables(number: int, generation: int, targets: tuple[Target, ...]) -> list[Table]:
    """A whole distribution as the messages that carry it; an empty one too is one message."""
    if len(targets) > MOST_TARGETS:
        raise EncodeError(Fault.LIMIT, f"{len(targets)} targets, expected at most {MOST_TARGETS}")
    chunks = [targets[index:index + TARGETS_A_PART] for index in range(0, len(targets), TARGETS_A_PART)] or [()]
    return [Table(number, generation, part, len(chunks), chunk) for part, chunk in enumerate(chunks)]


def lists(servers: list[VirtualServer]) -> list[VsList]:
    """All virtual servers as the answer to VS_LIST."""
    chunks = [servers[index:index + SERVERS_A_PART] for index in range(0, len(servers), SERVERS_A_PART)] or [[]]
    return [VsList(part, len(chunks), tuple(chunk)) for part, chunk in enumerate(chunks)]


# ------------------------------------------------------------------ bytes -> values


def _exact(struct: Struct, body: bytes, offset: int = 0) -> tuple[Any, ...]:
    if len(body) != offset + struct.size:
        raise DecodeError(Fault.LENGTH, f"a body of {len(body)} bytes, expected {offset + struct.size}")
    return struct.unpack_from(body, offset)


def _hello(body: bytes) -> Hello:
    # Later versions may append; nothing before it may move.
    if len(body) < HELLO_BYTES:
        raise DecodeError(Fault.SHORT, f"HELLO of {len(body)} bytes, expected {HELLO_BYTES} at least")
    (major, minor, flags, error, role, limit, identity, incarnation, interval, ssmb, standby, gateway,
     port) = _HELLO.unpack_from(body)
    return Hello(Version(major, minor), Role(role), identity, incarnation, interval, _address(ssmb), port, limit,
                 _flags(HelloFlag, flags), Error(error), _address(standby), _address(gateway))


def _flags(kind: Any, value: int) -> Any:
    if value & ~_MASKS[kind]:
        raise DecodeError(Fault.VALUE, f"flags {value:#x}")
    return kind(value)


def _read_server(body: bytes, offset: int) -> tuple[VirtualServer, int]:
    end = offset + _SERVER.size
    if end > len(body):
        raise DecodeError(Fault.SHORT, "a virtual server is cut short")
    (number, address, hop, port, flags, idle, hard, protocol, assist, mode, hashed, length) = _SERVER.unpack_from(
        body, offset)
    if end + length > len(body):
        raise DecodeError(Fault.SHORT, "app_data is cut short")
    app_data, end = body[end:end + length], end + length
    greeting = None
    if mode == Mode.PROXY:
        if end + _GREETING.size > len(body):
            raise DecodeError(Fault.SHORT, "a greeting is cut short")
        mss, scale, sack, milliseconds = _GREETING.unpack_from(body, end)
        if sack > 1 or scale > 14:
            raise DecodeError(Fault.VALUE, f"a greeting with window scale {scale} and flags {sack:#x}")
        greeting, end = Greeting(mss, scale, sack == 1, milliseconds), end + _GREETING.size
    limits = None
    if flags & Flag.LIMITED:
        if end + _LIMITS.size > len(body):
            raise DecodeError(Fault.SHORT, "limits are cut short")
        limits, end = Limits(*_LIMITS.unpack_from(body, end)), end + _LIMITS.size
        if limits.rate < -1 or limits.client_rate < -1 or limits.prefix > (
                32 if address.startswith(_MAPPED) else 128):
            raise DecodeError(Fault.VALUE, f"limits {tuple(limits)}")
    return VirtualServer(number, _unvirtual(address), port, protocol, _flags(Flag, flags), Assist(assist), Mode(mode),
                         Hash(hashed), idle, hard, _address(hop), app_data, greeting, limits), end


def _auth(body: bytes) -> Message:
    if len(body) != 1 + NONCE_BYTES:
        raise DecodeError(Fault.LENGTH, f"AUTH of {len(body)} bytes, expected {1 + NONCE_BYTES}")
    if body[0] == _CHALLENGE:
        return Challenge(body[1:])
    if body[0] == _RESPONSE:
        return Response(body[1:])
    raise DecodeError(Fault.VALUE, f"AUTH {body[0]}")


def _add_vs(body: bytes) -> AddVs:
    server, end = _read_server(body, 0)
    if end != len(body):
        raise DecodeError(Fault.LENGTH, f"{len(body) - end} bytes after the virtual server")
    return AddVs(server)


def _vs_list(body: bytes) -> Message:
    if body == bytes((_REQUEST,)):
        return VsListRequest()
    if len(body) < _PARTS.size or body[0] != _ANSWER:
        raise DecodeError(Fault.VALUE, "VS_LIST that neither asks nor answers")
    _, part, parts, number = _PARTS.unpack_from(body)
    check_parts(part, parts, DecodeError)
    offset, servers = _PARTS.size, []
    for _ in range(number):
        server, offset = _read_server(body, offset)
        servers.append(server)
    if offset != len(body):
        raise DecodeError(Fault.LENGTH, f"{len(body) - offset} bytes after the last virtual server")
    return VsList(part, parts, tuple(servers))


def _table(body: bytes) -> Table:
    if len(body) < _TABLE.size:
        raise DecodeError(Fault.SHORT, f"TABLE of {len(body)} bytes")
    number, generation, part, parts, count = _TABLE.unpack_from(body)
    check_parts(part, parts, DecodeError)
    if len(body) != _TABLE.size + count * _TARGET.size:
        raise DecodeError(Fault.LENGTH, f"TABLE of {len(body)} bytes with {count} targets")
    return Table(number, generation, part, parts, tuple(
        Target(member, _unvirtual(address), port, mac, out_port, weight, _flags(TargetFlag, flags))
        for member, address, port, mac, out_port, weight, flags in _TARGET.iter_unpack(body[_TABLE.size:])))


def _keys(body: bytes) -> Keys:
    keys = Keys(*_exact(_KEYS, body))
    if keys.current > 1 or keys.there > 3 or not keys.there >> keys.current & 1:
        raise DecodeError(Fault.VALUE, f"KEYS {keys.there:#x}, of which number {keys.current} is used")
    return keys


_READERS: dict[Kind, Callable[[bytes], Message]] = {
    Kind.HELLO: _hello,
    Kind.AUTH: _auth,
    Kind.ADD_VS: _add_vs,
    Kind.DELETE_VS: lambda body: DeleteVs(*_exact(_NUMBER, body)),
    Kind.VS_LIST: _vs_list,
    Kind.TABLE: _table,
    Kind.SYNC_DONE: lambda body: SyncDone(*_exact(_NUMBER, body)),
    Kind.COUNTERS: counted.read,
    Kind.KEYS: _keys,
}


def decode(kind: int, body: bytes) -> Message:
    """The message of a type and a body (without header and tag).

    Raises:
        DecodeError: it is none.
    """
    if kind not in _KINDS:
        raise DecodeError(Fault.KIND, f"message type {kind}")
    try:
        return _READERS[_KINDS[kind]](body)
    except DecodeError:
        raise
    except ValueError as error:  # a number that no enumeration has
        raise DecodeError(Fault.VALUE, f"{_KINDS[kind].name}: {error}") from None
