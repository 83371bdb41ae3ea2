# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""One check: by which of them a monitor is carried out, and the simple ones, TCP, UDP and DNS.

A check is made once for each target and run again and again. ``run`` returns when the member does well, and raises
when it does not; it sets no limit of time, whoever runs it does (process.py). What it reads is limited here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype

from lbapp.config.fields import octets
from lbapp.config.monitor import Monitor, MonitorType
from lbapp.monitors.errors import CheckFailed, printable
from lbapp.monitors.protocol import Target
from lbapp.monitors.stream import Datagrams, Stream, endpoint

ANSWER_MOST = 64 << 10
"""Bytes of an answer that are looked at."""
COMMANDS_AT_ONCE = 4 * (os.cpu_count() or 1)


@dataclass
class Surroundings:
    """What checks of one process share.

    Attributes:
        scripts: the directory of external checks.
        at_once: how many of them run at the same time.
        sockets: raw ones, by what they are for; made by the first that needs them.
    """

    loop: asyncio.AbstractEventLoop
    scripts: Path | None = None
    at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(COMMANDS_AT_ONCE))
    sockets: dict[tuple[str, socket.AddressFamily], Any] = field(default_factory=dict)


class Check(ABC):
    """One way of checking one member.

    Attributes:
        silence_is_good: no answer in time is no failure.
        lacks: what there was not, when its time is over.
        gate: what it waits for before its time begins.
        needs_port: it goes to a port.
    """

    silence_is_good = False
    lacks = "answer"
    gate: asyncio.Semaphore | None = None
    needs_port = True

    def __init__(self, target: Target, around: Surroundings) -> None:
        self.target, self.monitor, self.around = target, target.monitor, around
        self.family, self.address = endpoint(target.address, target.checked_port)

    @abstractmethod
    async def run(self) -> bool:
        """Do it once.

        Returns:
            Whether the time it took says how fast the member is.

        Raises:
            CheckFailed, OSError: the member does not do well.
        """


class Tcp(Check):
    """Connects; says something, and hears what is expected, where that is given."""

    def __init__(self, target: Target, around: Surroundings) -> None:
        super().__init__(target, around)
        self._send = octets("send", self.monitor.send)
        self._expect = octets("expect", self.monitor.expect)

    async def run(self) -> bool:
        """See :class:`Check`."""
        stream = Stream(self.around.loop, self.family, self.address)
        try:
            await stream.connect()
            if self._send:
                await stream.send(self._send)
            if self._expect:
                await self._hear(stream)
            elif self._send:
                stream.finish()
        finally:
            stream.close()
        return True

    async def _hear(self, stream: Stream) -> None:
        heard = bytearray()
        while self._expect not in heard:
            if len(heard) >= ANSWER_MOST:
                raise CheckFailed(f"the first {ANSWER_MOST >> 10} KiB do not contain what is expected")
            data = await stream.receive()
            if not data:
                raise CheckFailed("the answer does not contain what is expected" if heard
                                  else "connection closed without an answer")
            heard += data


class Udp(Check):
    """Sends a datagram, and hears what is expected; or at least not that nobody is there."""

    def __init__(self, target: Target, around: Surroundings) -> None:
        super().__init__(target, around)
        self._send = octets("send", self.monitor.send)
        self._expect = octets("expect", self.monitor.expect)
        self.silence_is_good = not self._expect

    async def run(self) -> bool:
        """See :class:`Check`."""
        datagrams = Datagrams(self.around.loop, self.family, self.address)
        try:
            datagrams.send(self._send)
            if self._expect not in await datagrams.receive():
                raise CheckFailed("the answer does not contain what is expected")
        except ConnectionRefusedError:
            raise CheckFailed("port unreachable") from None
        finally:
            datagrams.close()
        return True


class Dns(Check):
    """Asks for a name; by TCP as well where the answer does not fit into a datagram."""

    def __init__(self, target: Target, around: Surroundings) -> None:
        super().__init__(target, around)
        self._query = dns.message.make_query(self.monitor.dns_name, self.monitor.dns_type, use_edns=0, payload=1232)
        self._query.id = 0
        self._wire = self._query.to_wire()
        self._type = dns.rdatatype.from_text(self.monitor.dns_type)

    async def run(self) -> bool:
        """See :class:`Check`."""
        query = secrets.token_bytes(2) + self._wire[2:]
        answer = await self._by_datagram(query)
        if self.monitor.dns_answer and answer.flags & dns.flags.TC:
            answer = await self._by_stream(query)
        self._judge(answer)
        return True

    async def _by_datagram(self, query: bytes) -> dns.message.Message:
        datagrams = Datagrams(self.around.loop, self.family, self.address)
        try:
            datagrams.send(query)
            while True:
                answer = self._answer(query, await datagrams.receive())
                if answer is not None:  # else somebody guesses: the real one may still come
                    return answer
        except ConnectionRefusedError:
            raise CheckFailed("port unreachable") from None
        finally:
            datagrams.close()

    async def _by_stream(self, query: bytes) -> dns.message.Message:
        stream = Stream(self.around.loop, self.family, self.address)
        try:
            await stream.connect()
            await stream.send(len(query).to_bytes(2, "big") + query)
            heard = b""
            while len(heard) < 2 or len(heard) < 2 + int.from_bytes(heard[:2], "big"):
                data = await stream.receive()
                if not data:
                    raise CheckFailed("connection closed without an answer")
                heard += data
            answer = self._answer(query, heard[2:2 + int.from_bytes(heard[:2], "big")])
        finally:
            stream.close()
        if answer is None:
            raise CheckFailed("the answer is to another question")
        return answer

    def _answer(self, query: bytes, wire: bytes) -> dns.message.Message | None:
        if len(wire) < 12 or wire[:2] != query[:2]:
            return None
        try:
            answer = dns.message.from_wire(wire, ignore_trailing=True, raise_on_truncation=False)
        except (dns.exception.DNSException, ValueError):
            raise CheckFailed("the answer is no DNS message") from None
        if not answer.flags & dns.flags.QR:
            return None
        # A server that refuses may leave the question out.
        if answer.question != self._query.question and (answer.question or answer.rcode() == dns.rcode.NOERROR):
            return None
        return answer

    def _judge(self, answer: dns.message.Message) -> None:
        if answer.rcode() != dns.rcode.NOERROR:
            raise CheckFailed(f"{dns.rcode.to_text(answer.rcode())}, expected NOERROR")
        wanted = self.monitor.dns_answer
        if not wanted:
            return
        found = [_plain(record.to_text()) for records in answer.answer for record in records]
        if _plain(wanted) not in found:
            raise CheckFailed(printable(f"{wanted} is not among the answers: {', '.join(found[:5]) or 'none'}"))


def _plain(text: str) -> str:
    """A record's text as people write it: no quotes, no dot at the end, small letters."""
    return text.strip().strip('"').rstrip(".").lower()


class NoPort(Check):
    """What cannot be done: the member takes connections to any port, and the monitor names none."""

    async def run(self) -> bool:
        """See :class:`Check`."""
        raise CheckFailed("the member has no port of its own, and the monitor names none")


def make(target: Target, around: Surroundings) -> Check:
    """The check that a target's monitor asks for."""
    from lbapp.monitors.external import External
    from lbapp.monitors.grpc import Grpc
    from lbapp.monitors.http import Http
    from lbapp.monitors.raw import Echo, HalfOpen

    kinds: dict[MonitorType, type[Check]] = {
        MonitorType.TCP: Tcp, MonitorType.TCP_HALF_OPEN: HalfOpen, MonitorType.HTTP: Http, MonitorType.HTTPS: Http,
        MonitorType.UDP: Udp, MonitorType.ICMP: Echo, MonitorType.DNS: Dns, MonitorType.GRPC: Grpc,
        MonitorType.EXTERNAL: External,
    }
    kind = kinds[target.monitor.type]
    return (NoPort if kind.needs_port and not target.checked_port else kind)(target, around)


def of(monitor: Monitor) -> str:
    """A monitor in a few words, for the log."""
    return f"{monitor.type.value} monitor {monitor.name}"
