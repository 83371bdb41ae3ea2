# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Transcripts of the control segment: ``>> event`` in, ``<< command`` out.

A playbook feeds messages to a :class:`~lbapp.control.engine.ControlSegment` and compares all
that it answers, in order. A difference is shown as a transcript, with the lines that should not
be there and those that are missing. It owns the clock of its tests, and decides nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from lbapp.config.model import Algorithm, Configuration, Member, Network, Pool, Protocol, VirtualServer
from lbapp.control.engine import ControlSegment, Limits
from lbapp.control.messages import (
    Closed,
    Delete,
    Error,
    FlowSignature,
    Host,
    HostChanged,
    NeighbourSeen,
    Probe,
    Query,
    Reap,
    Reason,
    Refused,
    Reply,
    SwitchUp,
)

SYN, ACK, FIN, RST, PSH, URG, ECE = 0x02, 0x10, 0x01, 0x04, 0x08, 0x20, 0x40


def text(message: Any) -> str:
    """One line for a message, with addresses and MACs readable, and without what goes without saying."""
    if isinstance(message, Reply):
        translation = ""
        if message.translation is not None:
            to = message.translation
            whither = "=" if to.address is None else _address(to.address)
            translation = f" -> {whither}:{to.port or '='} at {text(to.host)}"
            translation += " (routed)" if to.routed else ""
        flags = ("" if message.install else " (installed)") + (" (tracked)" if message.tracked else "")
        member = f" member {message.member}" if message.member else ""
        return f"Reply {message.query.serial} {message.error.name}{member}{translation}{flags}"
    if isinstance(message, Query):
        signature = message.signature
        flags = "".join(letter for letter, bit in zip("FSRPAUE", (FIN, SYN, RST, PSH, ACK, URG, ECE), strict=True)
                        if message.tcp_flags & bit)
        return (f"Query {message.serial} switch {message.switch} virtual server {message.virtual_server} "
                f"{_address(signature.source)}:{signature.source_port} {flags}").rstrip()
    if isinstance(message, Host):
        return f"{message.mac.hex(':')}/{message.port}"
    if isinstance(message, (Probe, HostChanged)):
        where = "" if isinstance(message, Probe) else f" {text(message.host) if message.host else 'lost'}"
        return f"{type(message).__name__} switch {message.switch} {message.address}{where}"
    if isinstance(message, NeighbourSeen):
        return f"NeighbourSeen switch {message.switch} {message.address} {text(message.host)}"
    if isinstance(message, Reap):
        return f"Reap switch {message.switch} serial {message.serial} of {message.virtual_server}/{message.member}" + (
            " (final)" if message.final else "")
    return repr(message)


def _address(packed: bytes) -> str:
    if len(packed) == 4:
        return ".".join(map(str, packed))
    return "[" + ":".join(packed[i:i + 2].hex() for i in range(0, 16, 2)) + "]"


def replied(control: ControlSegment, asked: Query, now: float) -> Reply:
    """The answer to one that does not have to wait for it."""
    reply = control.query(asked, now)
    assert reply is not None
    return reply


class Playbook:
    """A control segment, a clock, and what was said so far.

    Args:
        configuration: what the control segment begins with.
        limits: its bounds.
    """

    def __init__(self, configuration: Configuration | None = None, limits: Limits | None = None) -> None:
        self.control = ControlSegment(configuration or Configuration(), limits or Limits())
        self.now = 0.0
        self.said: list[str] = []
        self.heard: list[Any] = []

    def at(self, seconds: float) -> Playbook:
        """Go on to another time, without a tick."""
        assert seconds >= self.now, "time only grows"
        self.now = seconds
        return self

    def __rshift__(self, event: Any) -> Playbook:
        """``playbook >> event``: hand a message to the control segment."""
        return self._do(text(event), lambda: self.control.handle(event, self.now))

    def tick(self, seconds: float | None = None) -> Playbook:
        """Let the control segment's timers run once, at another time."""
        if seconds is not None:
            self.at(seconds)
        return self._do("tick", lambda: self.control.tick(self.now))

    def until(self, seconds: float, step: float = 0.1) -> Playbook:
        """Tick as often as the application does, until a time."""
        commands: list[Any] = []
        while self.now + step <= seconds + 1e-9:
            self.now = round(self.now + step, 6)
            commands += self.control.tick(self.now)
        return self._do(f"ticks until {seconds}", lambda: commands)

    def configure(self, configuration: Configuration) -> Playbook:
        """Give the control segment another configuration."""
        return self._do("configure", lambda: self.control.configure(configuration, self.now))

    def want(self, switch: int, address: str) -> Playbook:
        """Ask for a host that is no member."""
        return self._do(f"want switch {switch} {address}", lambda: self.control.want(switch, address, self.now))

    def _do(self, what: str, action: Callable[[], Iterable[Any]]) -> Playbook:
        self.none()
        self.said.append(f">> {what}   (at {self.now:g} s)")
        self.heard = list(action())
        return self

    def __lshift__(self, expected: Any) -> Playbook:
        """``playbook << command``: the next thing the control segment says is this message, or this text."""
        want = expected if isinstance(expected, str) else text(expected)
        got = text(self.heard[0]) if self.heard else None
        if got == want and (isinstance(expected, str) or self.heard[0] == expected):
            self.said.append(f"<< {want}")
            del self.heard[0]
            return self
        raise AssertionError(self._difference([f"<< {want}"], [f"<< {text(message)}" for message in self.heard[:1]]))

    def none(self) -> Playbook:
        """The control segment has nothing more to say."""
        if self.heard:
            raise AssertionError(self._difference([], [f"<< {text(message)}" for message in self.heard]))
        return self

    def ignore(self) -> list[Any]:
        """Whatever else it says; returned, not compared."""
        heard, self.heard = self.heard, []
        self.said += [f"<< {text(message)}   (not compared)" for message in heard]
        return heard

    def _difference(self, expected: list[str], got: list[str]) -> str:
        lines = difflib.unified_diff(self.said + expected, self.said + got, "expected", "got", lineterm="", n=8)
        return "the transcript differs\n" + "\n".join(lines)


# ------------------------------------------------------------------ what tests are made of


def member(number: int, **fields: Any) -> Member:
    """Member ``n`` is 10.0.0.n:8080."""
    values: dict[str, Any] = {"address": f"10.0.0.{number}", "protocol_port": 8080, "number": number}
    return Member(**values | fields)


def site(count: int = 3, *, algorithm: Algorithm = Algorithm.ROUND_ROBIN, members: Iterable[Member] | None = None,
         networks: Iterable[Network] = (), pool: dict[str, Any] | None = None, **fields: Any) -> Configuration:
    """One virtual server, number 1, at 192.0.2.1:80 TCP, and a pool of ``count`` members."""
    chosen = tuple(members) if members is not None else tuple(member(n) for n in range(1, count + 1))
    values: dict[str, Any] = {"name": "web", "vip_address": "192.0.2.1", "protocol": Protocol.TCP,
                              "protocol_port": 80, "number": 1, "default_pool_id": "p"}
    return Configuration(virtual_servers={"v": VirtualServer(**values | fields)},
                         pools={"p": Pool(name="servers", lb_algorithm=algorithm, members=chosen, **(pool or {}))},
                         networks={network.name: network for network in networks})


def host(number: int) -> Host:
    """Member ``n`` has MAC 02:..:n and is at port n."""
    return Host(bytes((2, 0, 0, 0, 0, number)), number)


def up(count: int = 3, switch: int = 1) -> SwitchUp:
    """A switch whose rules know the first members already."""
    return SwitchUp(switch, {f"10.0.0.{n}": host(n) for n in range(1, count + 1)})


def seen(number: int, where: Host | None = None, switch: int = 1) -> NeighbourSeen:
    """Member ``n`` answered."""
    return NeighbourSeen(switch, f"10.0.0.{number}", where or host(number))


def query(serial: int, client: int | None = None, *, flags: int = SYN, switch: int = 1, virtual_server: int = 1,
          tos: int = 0, protocol: int = 6) -> Query:
    """A first packet. Client ``c`` is 198.51.100.(c mod 256), at a port of its own."""
    number = serial if client is None else client
    signature = FlowSignature(bytes((198, 51, 100, number % 256)), 1024 + number, bytes((192, 0, 2, 1)), 80,
                              protocol, tos)
    return Query(serial, switch, 99, b"\x02client"[:6], signature, virtual_server, 0 if protocol == 17 else flags)


def accepted(serial: int, number: int, *, installed: bool = False, tracked: bool = False) -> str:
    """The line of a REPLY that sends a connection to member ``n``."""
    return (f"Reply {serial} OK member {number} -> 10.0.0.{number}:8080 at {text(host(number))}"
            + (" (installed)" if installed else "") + (" (tracked)" if tracked else ""))


def refused(serial: int, error: Error) -> str:
    """The line of a REPLY that refuses."""
    return f"Reply {serial} {error.name}"


def closed(serial: int, number: int, reason: Reason = Reason.IDLE, *, outbound: bool = False, packets: int = 0,
           octets: int = 0, switch: int = 1, virtual_server: int = 1) -> Delete:
    """A DELETE of one connection, or of one direction of it."""
    return Delete(switch, (Closed(serial, virtual_server, number, reason, outbound, True, packets, octets, 1.0),))


def no_room(serial: int, switch: int = 1) -> Refused:
    """The switch could not hold a flow."""
    return Refused(switch, serial, 1)
