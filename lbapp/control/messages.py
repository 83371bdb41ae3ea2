# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The messages between data flow segment (DFS) and control segment (CS), as values.

The names and meanings are those of 003 (FIGURES 4 to 8, "SSMB Wire Protocol"). What carries a
message (OpenFlow, a message bus) is not visible here. Messages from the DFS are past events;
messages from the CS are what the DFS has to do next.
"""

from __future__ import annotations

import enum

from lbapp.values import Value


class Error(enum.IntEnum):
    """Error codes of a reply (003, FIGURE 8); OK is the absence of one."""

    OK = 0
    UNKNOWN = 1
    NOTAVAIL = 2
    CONNLIMIT = 3
    CONNALIVE = 4


class FlowSignature(Value, frozen=True, cache_hash=True):
    """The sextuple that makes a flow (003, "flow signature"). Addresses are packed bytes (4 or 16)."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    protocol: int
    tos: int = 0

    @property
    def five(self) -> tuple[bytes, int, bytes, int, int]:
        """What makes a connection, whatever its type of service."""
        return self.source, self.source_port, self.destination, self.destination_port, self.protocol


class Host(Value, frozen=True):
    """Where a neighbour is, seen from one switch."""

    mac: bytes
    port: int


class Reason(enum.Enum):
    """Why a connection was closed (003, FIGURE 18)."""

    SHUTDOWN = "shutdown"
    IDLE = "idle"
    HARD = "hard"
    OVERFLOW = "overflow"
    DELETED = "deleted"


# ------------------------------------------------------------------ DFS -> CS


class Query(Value, frozen=True):
    """A flow that no rule covers (QUERY). ``virtual_server`` is a number, 0 where none matches.

    ``serial`` is chosen by the originator and stays for the life of the flow; ``tcp_flags`` is 0
    for UDP.
    """

    serial: int
    switch: int
    in_port: int
    client_mac: bytes
    signature: FlowSignature
    virtual_server: int
    tcp_flags: int


class AppQuery(Value, frozen=True):
    """A flow whose client was shaken hands with, and what it sent (APP_QUERY).

    ``seq`` and ``ack`` are those of the client's first data; ``ack`` less one is the cookie, which holds what the
    client offered. ``options``: TCP options as on the wire, none so far, for nobody needs them. ``data``: what the
    client sent so far, from its first byte. ``failed``: members that were selected before and refused, or did not
    answer. ``timed_out``: no more will come.
    """

    query: Query
    seq: int
    ack: int
    options: bytes
    data: bytes
    failed: tuple[int, ...] = ()
    timed_out: bool = False


class Closed(Value, frozen=True):
    """One closed connection or, with ``state: rules``, one closed direction of it.

    Counters are what the DFS counted; ``duration`` is in seconds; ``outbound`` is the
    OUTBOUND flag of 003 FIGURE 7 (server to client); of a whole connection, that a server's only packet ended it, the
    answer to the client's only one: it refused. ``counted`` is false where the DFS has no
    counters for the connection (conntrack).
    """

    serial: int
    virtual_server: int
    member: int
    reason: Reason
    outbound: bool = False
    counted: bool = True
    packets: int = 0
    bytes: int = 0
    duration: float = 0.0


class Delete(Value, frozen=True):
    """Closed connections, many in one message (DELETE; 000 claim 6)."""

    switch: int
    closed: tuple[Closed, ...]


class Stats(Value, frozen=True):
    """A live connection, in answer to REAP (STATS with CONNALIVE), or counters alone.

    With NOTAVAIL, in front of the same with CONNALIVE: its member has sent no byte of its own so far.
    """

    switch: int
    serial: int
    error: Error
    packets: int = 0
    bytes: int = 0


class Refused(Value, frozen=True):
    """The DFS could not hold the flow of a REPLY: a rule table or conntrack is full."""

    switch: int
    serial: int
    virtual_server: int


class Failed(Value, frozen=True):
    """A member answered a client with an error of its own, as far as anybody saw that: an HTTP ``status`` of 5xx."""

    switch: int
    serial: int
    virtual_server: int
    member: int
    status: int


class SwitchUp(Value, frozen=True):
    """A switch is connected; ``hosts`` is what its own rules say about neighbours (address -> Host)."""

    switch: int
    hosts: dict[str, Host]


class SwitchDown(Value, frozen=True):
    """A switch is no longer connected. It goes on forwarding."""

    switch: int


class NeighbourSeen(Value, frozen=True):
    """An ARP or neighbour advertisement told where ``address`` is."""

    switch: int
    address: str
    host: Host


class PortDown(Value, frozen=True):
    """A port of a switch lost its link or was removed."""

    switch: int
    port: int


class Live(Value, frozen=True):
    """The connections that a switch's conntrack really holds, as (serial, virtual server, member).

    ``agents``: those of its fast path as well. Otherwise nothing is said about odd serials, which its agent gave.
    """

    switch: int
    connections: tuple[tuple[int, int, int], ...]
    agents: bool = True


# ------------------------------------------------------------------ CS -> DFS


class Translation(Value, frozen=True):
    """What to rewrite for a flow (REPLY, NEWFLOW). ``address`` None: leave the address; ``port`` 0: the port.

    ``routed``: the balancer stands between two networks here, and acts as a router would (TTL, source MAC).
    """

    address: bytes | None
    port: int
    host: Host
    routed: bool = False


class Reply(Value, frozen=True):
    """What to do with a queried flow (REPLY). Self-contained: holds all of its query.

    ``error`` is not OK: refuse at once. ``install`` is false where the flow is installed already
    and only this packet has to be translated (a later packet overtook the rules).
    """

    query: Query
    error: Error
    member: int = 0
    translation: Translation | None = None
    install: bool = True
    tracked: bool = False


class Binding(enum.Enum):
    """How a member gets a connection whose handshake it has not seen: by a second handshake and offsets, or by its
    kernel's adopting it from the first data segment."""

    SPLICE = "splice"
    HANDOFF = "handoff"


class Edit(Value, frozen=True):
    """What the member is told instead of a part of what the client said: for ``removed`` bytes from ``at``, ``text``.

    All of it is in what the control segment was asked with. What follows keeps the client's sequence numbers.
    """

    at: int
    removed: int
    text: bytes


class AppReply(Value, frozen=True):
    """What to do with a flow whose client has spoken (REPLY to APP_QUERY).

    ``reply`` None: more bytes are needed. Its ``error`` not OK: the client gets ``answer`` and is then closed; with no
    ``answer`` it is reset. ``edit``, with binding SPLICE: what the client said is passed on with this change.
    """

    query: Query
    reply: Reply | None = None
    binding: Binding = Binding.SPLICE
    answer: bytes = b""
    edit: Edit | None = None


class NewFlow(Value, frozen=True):
    """A flow that the control segment originates (NEWFLOW), self-contained.

    ``seq_offset`` and ``ack_offset`` (ADD_TCP_OFFSETS of 003 FIGURE 7) are added modulo 2**32 to what the client
    sends; None: nothing is added. ``window_shift`` is the member's window scale less the one that the client was told.
    A side whose FIN or RST has not passed where the flow is has finished all the same.
    """

    query: Query
    member: int
    translation: Translation
    tracked: bool = False
    seq_offset: int | None = None
    ack_offset: int | None = None
    window_shift: int = 0
    client_finished: bool = False
    member_finished: bool = False


class Timeout(Value, frozen=True):
    """Give this flow another idle time-out (TIMEOUT), in seconds; 0: delete it unless it is alive, as REAP."""

    switch: int
    serial: int
    seconds: int


class Reset(Value, frozen=True):
    """Forget every flow (RESET). Both segments may send it."""

    switch: int


class Reap(Value, frozen=True):
    """Delete this flow unless it is alive (REAP, 003 FIGURE 19).

    Answered by Stats with CONNALIVE, or by Delete. ``final``: the control segment knows that it
    has ended (a new session took its place, its member is gone): delete it alive or not.
    """

    switch: int
    serial: int
    virtual_server: int
    member: int
    final: bool = False


class Probe(Value, frozen=True):
    """Ask on the wire where ``address`` is."""

    switch: int
    address: str


class HostChanged(Value, frozen=True):
    """What rules depend on changed: ``address`` is now at ``host``, or nowhere known (None)."""

    switch: int
    address: str
    host: Host | None


FromSwitch = Query | Delete | Stats | Failed | Refused | SwitchUp | SwitchDown | NeighbourSeen | PortDown | Live
ToSwitch = Reply | AppReply | Reap | Probe | HostChanged
