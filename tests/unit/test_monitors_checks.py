# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.monitors.checks, .raw and .stream: TCP, half-open TCP, UDP, ICMP and DNS against servers on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

import dns.message
import dns.rcode
import dns.rrset
import pytest

from lbapp.monitors import raw
from lbapp.monitors.checks import Surroundings
from lbapp.monitors.errors import printable
from lbapp.monitors.raw import checksum
from lbapp.monitors.stream import host_of, server_name, words
from tests.monitored import (
    HASTY,
    closed_port,
    closed_udp_port,
    endless,
    finds,
    says,
    silent,
    target,
    tcp_server,
    udp_server,
)
from topologies.namespace import wait_until

BOTH = pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")


def six(address: str) -> None:
    if ":" in address:
        try:
            socket.create_server((address, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 on this machine")


# ------------------------------------------------------------------ TCP


@BOTH
def test_tcp(address: str) -> None:
    six(address)
    with tcp_server(silent, address) as port:
        assert finds(target(port, address, type="TCP")) == "up"
    with closed_port(address) as one:
        assert finds(target(one.getsockname()[1], address, type="TCP")) == "connection refused"


def test_another_port_than_the_members_own() -> None:
    with tcp_server(silent) as port, closed_port() as one:
        assert finds(target(one.getsockname()[1], type="TCP", port=port)) == "up"


def test_a_member_without_a_port_of_its_own() -> None:
    assert finds(target(0, type="TCP")) == "the member has no port of its own, and the monitor names none"
    with tcp_server(silent) as port:
        assert finds(target(0, type="TCP", port=port)) == "up"


def test_what_is_said_by_tcp_arrives_though_nothing_is_expected() -> None:
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        while data := connection.recv(100):
            heard.append(data)

    with tcp_server(serve) as port:
        assert finds(target(port, type="TCP", send="hex:00ff0a")) == "up"
        wait_until(lambda: b"".join(heard) == b"\x00\xff\x0a", 30, "all that was said")


@pytest.mark.parametrize(("serve", "fields", "found"), [
    (says(b"220 mail.example ESMTP\r\n", hear=False), {"expect": "220 "}, "up"),
    (says(b"+PO", b"NG\r\n"), {"send": "PING", "expect": "+PONG"}, "up"),
    (says(b"-ERR\r\n"), {"send": "PING", "expect": "+PONG"}, "the answer does not contain what is expected"),
    (says(), {"send": "PING", "expect": "+PONG"}, "connection closed without an answer"),
    (endless(b"", b"x" * 4096), {"send": "PING", "expect": "+PONG"},
     "the first 64 KiB do not contain what is expected"),
    (silent, {"send": "PING", "expect": "+PONG", **HASTY}, "no answer within 0.4 s"),
])
def test_tcp_that_is_to_answer(serve: Callable[[socket.socket], None], fields: dict[str, object], found: str) -> None:
    with tcp_server(serve) as port:
        assert finds(target(port, type="TCP", **fields)) == found


@needs_root
@BOTH
def test_half_open(address: str) -> None:
    six(address)
    accepted: list[socket.socket] = []
    with tcp_server(accepted.append, address) as port:
        assert finds(target(port, address, type="TCP_HALF_OPEN")) == "up"
    assert accepted == []  # no connection came of it
    with closed_port(address) as one:
        assert finds(target(one.getsockname()[1], address, type="TCP_HALF_OPEN")) == "connection refused"


@needs_root
def test_more_half_open_checks_of_a_port_than_there_are_ports_for() -> None:
    async def flood() -> tuple[list[object], int]:
        asking = raw._HalfOpens(asyncio.get_running_loop(), socket.AF_INET)
        asking._send = lambda packet, address: None  # type: ignore[method-assign]
        tasks = [asyncio.ensure_future(asking.ask("127.0.0.9", 80)) for _ in range(raw.PORTS + 1)]
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        left = len(asking._waiting) + len(asking._expected)
        asyncio.get_running_loop().remove_reader(asking._socket.fileno())
        return [str(task.exception()) for task in done], left

    failed, left = asyncio.run(flood())
    assert (failed, left) == (["16 checks of this port are on their way already"], 0)


@needs_root
def test_a_syn_that_is_not_answered_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "AGAIN_S", 0.05)
    sent: list[bytes] = []
    send = raw._HalfOpens._send

    def lose_the_first(self: raw._HalfOpens, packet: bytes, address: str) -> None:
        sent.append(packet)
        if len(sent) > 1:
            send(self, packet, address)

    monkeypatch.setattr(raw._HalfOpens, "_send", lose_the_first)
    with tcp_server(silent) as port:
        assert finds(target(port, type="TCP_HALF_OPEN")) == "up"
    assert len(sent) == 2 and sent[0] == sent[1]


@needs_root
def test_answers_to_others_are_no_answers() -> None:
    async def judge() -> dict[str, bool]:
        loop = asyncio.get_running_loop()
        asking = raw._HalfOpens(loop, socket.AF_INET)
        asking._send = lambda packet, address: None  # type: ignore[method-assign]
        waiting = asyncio.ensure_future(asking.ask("127.0.0.9", 80))
        await asyncio.sleep(0)
        (there, port, own), = asking._waiting
        wanted = asking._expected[there, port, own]
        results = {}

        def answer(name: str, source: str, flags: int, acknowledged: int, length: int = 20) -> None:
            segment = struct.pack("!HHIIBBHHH", port, own, 7, acknowledged, 5 << 4, flags, 0, 0, 0)
            asking._take((b"\x45" + bytes(19) + segment)[:20 + length], source)
            results[name] = asking._waiting[there, port, own].done()

        answer("another host", "127.0.0.8", 0x12, wanted)
        answer("another number", "127.0.0.9", 0x12, wanted + 1)
        answer("no SYN", "127.0.0.9", 0x10, wanted)
        answer("cut off", "127.0.0.9", 0x12, wanted, 19)
        asking._take(b"", "127.0.0.9")
        answer("the answer", "127.0.0.9", 0x12, wanted)
        assert await waiting is True
        loop.remove_reader(asking._socket.fileno())
        return results

    assert asyncio.run(judge()) == {"another host": False, "another number": False, "no SYN": False,
                                    "cut off": False, "the answer": True}


def test_checksum_is_that_of_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    assert checksum(b"\xff") == 0x00FF


# ------------------------------------------------------------------ UDP, ICMP


@BOTH
def test_udp(address: str) -> None:
    six(address)
    with udp_server(lambda data: b"echo " + data, address) as port:
        assert finds(target(port, address, type="UDP", send="hex:ff01", expect="hex:20ff01")) == "up"
        assert finds(target(port, address, type="UDP", send="x", expect="y")) == (
            "the answer does not contain what is expected")
        assert finds(target(port, address, type="UDP", send="x")) == "up"
    gone = closed_udp_port(address)
    assert finds(target(gone, address, type="UDP", send="x")) == "port unreachable"
    assert finds(target(gone, address, type="UDP", send="x", expect="x")) == "port unreachable"


def test_udp_that_is_silent_is_up_unless_an_answer_is_expected() -> None:
    with udp_server(lambda _: None) as port:
        assert finds(target(port, type="UDP", send="x", **HASTY)) == "up"
        assert finds(target(port, type="UDP", send="x", expect="x", **HASTY)) == "no answer within 0.4 s"


@needs_root
@BOTH
def test_icmp(address: str) -> None:
    six(address)
    assert finds(target(0, address, type="ICMP")) == "up"


@needs_root
def test_icmp_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw._Echoes, "_send", lambda *_: None)
    assert finds(target(0, type="ICMP", **HASTY)) == "no answer within 0.4 s"


@needs_root
@BOTH
def test_only_the_very_reply_counts(address: str) -> None:
    six(address)

    async def judge() -> dict[str, bool]:
        loop = asyncio.get_running_loop()
        asking = raw._Echoes(loop, socket.AF_INET6 if ":" in address else socket.AF_INET)
        asking._send = lambda packet, address: None  # type: ignore[method-assign]
        waiting = asyncio.ensure_future(asking.ask(address))
        await asyncio.sleep(0)
        (key,) = asking._waiting
        number, value = key[1], key[2]
        results = {}

        def reply(name: str, kind: int, identifier: int, number: int, value: bytes, source: str = address) -> None:
            head = b"" if ":" in address else b"\x45" + bytes(19)
            asking._take(head + struct.pack("!BBHHH", kind, 0, 0, identifier, number) + value, source)
            results[name] = asking._waiting[key].done()

        right = 129 if ":" in address else 0
        reply("a request", 128 if ":" in address else 8, asking._id, number, value)
        reply("another's", right, asking._id ^ 1, number, value)
        reply("another one", right, asking._id, number + 1, value)
        reply("another value", right, asking._id, number, bytes(16))
        reply("another host", right, asking._id, number, value, "fd00::9" if ":" in address else "127.0.0.9")
        reply("short", right, asking._id, number, value[:15])
        reply("the reply", right, asking._id, number, value)
        await waiting
        loop.remove_reader(asking._socket.fileno())
        return results

    assert asyncio.run(judge()) == {"a request": False, "another's": False, "another one": False,
                                    "another value": False, "another host": False, "short": False, "the reply": True}


def test_raw_sockets_that_are_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(raw, "_HalfOpens", refuse)
    refuse.__name__ = "_HalfOpens"
    assert finds(target(80, type="TCP_HALF_OPEN")) == "raw sockets are not permitted on this host"


# ------------------------------------------------------------------ DNS


def responder(rcode: int = dns.rcode.NOERROR, *answers: tuple[str, str], truncated: bool = False,
              change: Callable[[bytearray], object] = lambda _: None) -> Callable[[bytes], bytes]:
    def answer(wire: bytes) -> bytes:
        query = dns.message.from_wire(wire)
        reply = dns.message.make_response(query)
        reply.set_rcode(dns.rcode.Rcode(rcode))
        name = query.question[0].name
        for kind, text in answers:
            reply.answer.append(dns.rrset.from_text(name, 60, "IN", kind, text))
        if truncated:
            reply.flags |= 0x0200
            reply.answer.clear()
        out = bytearray(reply.to_wire())
        change(out)
        return bytes(out)

    return answer


@pytest.mark.parametrize(("answer", "fields", "found"), [
    (responder(0, ("A", "192.0.2.7"), ("A", "192.0.2.8")), {"dns_answer": "192.0.2.8"}, "up"),
    (responder(0), {}, "up"),
    (responder(0, ("A", "192.0.2.7")), {"dns_answer": "192.0.2.8"},
     "192.0.2.8 is not among the answers: 192.0.2.7"),
    (responder(0), {"dns_answer": "192.0.2.8"}, "192.0.2.8 is not among the answers: none"),
    (responder(0, ("TXT", '"Fine Today"')), {"dns_type": "TXT", "dns_answer": "fine today"}, "up"),
    (responder(0, ("CNAME", "www.example.")), {"dns_type": "CNAME", "dns_answer": "WWW.example"}, "up"),
    (responder(0, ("AAAA", "2001:db8::1")), {"dns_type": "AAAA", "dns_answer": "2001:db8::1"}, "up"),
    (responder(dns.rcode.SERVFAIL), {}, "SERVFAIL, expected NOERROR"),
    (responder(dns.rcode.NXDOMAIN), {}, "NXDOMAIN, expected NOERROR"),
    (lambda wire: wire[:2] + b"\x80\x05" + bytes(8), {}, "REFUSED, expected NOERROR"),
    (lambda wire: wire[:2] + b"\xff" * 40, {}, "the answer is no DNS message"),
    (responder(0, change=lambda wire: wire.__setitem__(0, wire[0] ^ 1)), HASTY, "no answer within 0.4 s"),
    (responder(0, change=lambda wire: wire.__setitem__(13, wire[13] ^ 1)), HASTY, "no answer within 0.4 s"),
    (lambda wire: wire, HASTY, "no answer within 0.4 s"),
    (lambda wire: wire[:7], HASTY, "no answer within 0.4 s"),
    (lambda _: None, HASTY, "no answer within 0.4 s"),
])
def test_dns(answer: Callable[[bytes], bytes | None], fields: dict[str, object], found: str) -> None:
    with udp_server(answer) as port:
        assert finds(target(port, type="DNS", dns_name="health.example", **fields)) == found


def test_dns_by_tcp_where_a_datagram_does_not_hold_the_answer() -> None:
    whole = responder(0, ("A", "192.0.2.8"))

    def serve(connection: socket.socket) -> None:
        query = connection.recv(65_536)
        reply = whole(query[2:])
        for one in (struct.pack("!H", len(reply)), reply[:5], reply[5:]):
            connection.sendall(one)

    port = closed_udp_port()
    with tcp_server(serve, port=port), udp_server(responder(0, truncated=True), port=port):
        assert finds(target(port, type="DNS", dns_name="health.example", dns_answer="192.0.2.8")) == "up"
        assert finds(target(port, type="DNS", dns_name="health.example", dns_answer="192.0.2.9")) == (
            "192.0.2.9 is not among the answers: 192.0.2.8")


@pytest.mark.parametrize(("serve", "found"), [
    (says(), "connection closed without an answer"),
    (says(b"\0\x0c" + bytes(12)), "the answer is to another question"),
    (silent, "no answer within 0.4 s"),
])
def test_dns_by_tcp_that_goes_wrong(serve: Callable[[socket.socket], None], found: str) -> None:
    port = closed_udp_port()
    with tcp_server(serve, port=port), udp_server(responder(0, truncated=True), port=port):
        fields = HASTY if "within" in found else {}
        assert finds(target(port, type="DNS", dns_name="health.example", dns_answer="192.0.2.8", **fields)) == found


# ------------------------------------------------------------------ words


def test_errors_are_told_in_words() -> None:
    assert words(ConnectionRefusedError(111, "x")) == "connection refused"
    assert words(OSError(90, "x")) == "message too long"
    assert words(OSError("something else")) == "something else"
    assert printable("a\x1b[31m\nb" + "x" * 500).startswith("a [31m bxx")
    assert len(printable("x" * 500)) == 200


@pytest.mark.parametrize(("name", "host", "verified", "unverified"), [
    ("www.example", "www.example", "www.example", "www.example"),
    ("www.example.:8443", "www.example.", "www.example", "www.example"),
    ("192.0.2.1:443", "192.0.2.1", "192.0.2.1", None),
    ("[2001:db8::1]:443", "2001:db8::1", "2001:db8::1", None),
    ("2001:db8::1", "2001:db8::1", "2001:db8::1", None),
])
def test_the_name_in_the_greeting(name: str, host: str, verified: str, unverified: str | None) -> None:
    assert host_of(name) == host
    assert (server_name(name, True), server_name(name, False)) == (verified, unverified)


def test_surroundings_limit_commands() -> None:
    async def made() -> bool:
        return Surroundings(asyncio.get_running_loop()).at_once.locked()

    assert asyncio.run(made()) is False
