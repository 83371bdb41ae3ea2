# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What happens to an established connection of virtual servers that read what clients say: every way to end it, readers
that stop, probes of who is silent. Real kernels at both ends, all segments judged; every binding, IPv4 and IPv6.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.integration.capture import Capture, captures
from tests.integration.support import VIP, VIP6, fault, reset, statistics
from tests.integration.watched import WAYS, Connection, Watched, laboratory
from tests.segments import ACK, FIN, RST, SYN, Segment
from topologies.hosts import LabHost
from topologies.lab import unavailable
from topologies.namespace import wait_until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SIZE = 300_000
SMALL, USUAL = 8192, 65_536
"""SO_RCVBUF of who stops reading, and of a listener otherwise; the kernel takes it twice."""
TCP_INFO_FIN_WAIT1 = 4
both_ways = pytest.mark.parametrize("way", list(WAYS))
both = pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with laboratory(tmp_path_factory.mktemp("ends")) as made:
        yield made


@contextlib.contextmanager
def established(site: Watched, way: str, vip: str, ends: list[Capture], room: int = 0,
                behind: int = USUAL) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection that both sides have said something on, and the member's end of it; their SO_RCVBUF."""
    wait_until(lambda: active(site, way, vip) == 0, 10, "those before have ended")
    listener = site.listeners[way]
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, behind)
    made = Connection(site, way, vip, ends, room=room)
    with made.socket:
        made.say("GET", "/by-hand")
        member, _ = listener.accept()
        with member:
            member.settimeout(30)
            asked = b""
            while not asked.endswith(b"\r\n\r\n"):
                asked += exactly(member, 1)
            assert asked.startswith(b"GET /by-hand HTTP/1.1\r\n")
            member.sendall(b"hello")
            assert exactly(made.socket, 5) == b"hello"
            assert active(site, way, vip) == 1
            yield made, member


def exactly(end_of: socket.socket, size: int) -> bytes:
    """So many bytes."""
    found = b""
    while len(found) < size:
        part = end_of.recv(size - len(found))
        assert part, f"ended after {len(found)} bytes of {size}"
        found += part
    return found


def pass_on(source: socket.socket, sink: socket.socket, data: bytes) -> None:
    """It arrives as it was."""
    sending = threading.Thread(target=source.sendall, args=(data,), daemon=True)
    sending.start()
    assert exactly(sink, len(data)) == data
    sending.join()


def finish(made: Connection, member: socket.socket) -> None:
    """In order, the client first."""
    made.socket.shutdown(socket.SHUT_WR)
    assert member.recv(1) == b""
    member.close()
    made.until_closed()


def active(site: Watched, way: str, vip: str) -> int:
    """Connections that the balancer has."""
    return int(statistics(site.lab, f"{way}-{'six' if vip == VIP6 else 'four'}")["active"])


def over(site: Watched, way: str, vip: str) -> None:
    """The balancer knows that it has ended."""
    wait_until(lambda: active(site, way, vip) == 0, 5, "the balancer knows of its end")


# ------------------------------------------------------------------ ends


@both
@both_ways
def test_both_finish_at_once(site: Watched, way: str, vip: str) -> None:
    """Their FINs cross: neither knows of the other's when it sends its own. Both go through TIME_WAIT."""
    ends_of = (site.lab.client(), site.lab.server())

    def waiting(host: LabHost) -> bool:
        return re.search(rf":{made.port}\b", host.run("ss", "-Htan", "state", "time-wait").stdout) is not None

    with captures(*ends_of) as ends, established(site, way, vip, ends) as (made, member):
        with contextlib.ExitStack() as crossing:
            for host in ends_of:
                crossing.enter_context(fault(host, "tcp flags & fin == fin drop"))
            member.shutdown(socket.SHUT_WR)
            made.socket.shutdown(socket.SHUT_WR)
            wait_until(lambda: active(site, way, vip) == 0, 5, "both FINs have passed the balancer")
            for one in (made.socket, member):
                assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_INFO_FIN_WAIT1
        made.until_closed()
        assert member.recv(1) == b""
        wait_until(lambda: all(waiting(host) for host in ends_of), 5, "both are in TIME_WAIT")
        made.judge()


@both
@both_ways
def test_a_member_that_finishes_while_the_client_sends(site: Watched, way: str, vip: str) -> None:
    data = os.urandom(SIZE)
    with captures(site.lab.client(), site.lab.server()) as ends, established(site, way, vip, ends) as (made, member):
        pass_on(made.socket, member, data)
        member.sendall(b"enough")
        member.shutdown(socket.SHUT_WR)
        assert exactly(made.socket, 6) == b"enough"
        made.until_closed()
        pass_on(made.socket, member, data)
        assert active(site, way, vip) == 1, "half of it lives"
        made.socket.shutdown(socket.SHUT_WR)
        assert member.recv(1) == b""
        _, seen = made.judge()
        over(site, way, vip)
    assert seen.up.stream.endswith(data + data)


@both
@both_ways
@pytest.mark.parametrize("by", ["client", "member"])
def test_a_reset(site: Watched, way: str, vip: str, by: str) -> None:
    """The other end hears of it at once, and so does the balancer."""
    with captures(site.lab.client(), site.lab.server()) as ends, established(site, way, vip, ends) as (made, member):
        here, there = (made.socket, member) if by == "client" else (member, made.socket)
        pass_on(there, here, b"x" * SIZE)
        reset(here)
        with pytest.raises(ConnectionResetError):
            there.recv(1)
        over(site, way, vip)
        made.judge_reset(by)


# ------------------------------------------------------------------ silence


@both
@both_ways
@pytest.mark.parametrize("reader", ["client", "member"])
def test_a_reader_that_stops(site: Watched, way: str, vip: str, reader: str) -> None:
    """Its window closes, the other end asks whether it still is, and when it reads again all of it is there."""
    data, hosts = os.urandom(SIZE), (site.lab.client(), site.lab.server())
    room, behind = (SMALL, USUAL) if reader == "client" else (0, SMALL)
    with captures(*hosts, *hosts) as wires, established(site, way, vip, wires[:2], room, behind) as (made, member):
        source, sink = (member, made.socket) if reader == "client" else (made.socket, member)
        look, closed = wires[3 if reader == "client" else 2], list[Segment]()

        def shut() -> bool:
            closed.extend(one for one in look.read() if not one.sent and made.port in (one.sport, one.dport)
                          and one.flags & (SYN | RST | FIN | ACK) == ACK and not one.window)
            return len([one for one in closed if one.ack == closed[-1].ack]) >= 2

        sending = threading.Thread(target=source.sendall, args=(data,), daemon=True)
        sending.start()
        wait_until(shut, 10, "windows of 0 at the other end, the second one as a probe's answer")
        assert exactly(sink, SIZE) == data
        sending.join()
        pass_on(sink, source, b"all of it")
        finish(made, member)
        made.judge()
        over(site, way, vip)


def probes(found: list[Segment], made: Connection) -> int:
    """How many segments of a connection came in that only say what was said before: nothing, one number back."""
    high, count = None, 0
    for one in found:
        if not one.sent and made.known in ((one.source, one.sport), (one.destination, one.dport)):
            count += high is not None and not one.payload and one.seq == high - 1 & 0xFFFFFFFF
            end = one.seq + len(one.payload) + (1 if one.flags & SYN else 0)
            high = end if high is None or end - high & 0xFFFFFFFF < 1 << 31 else high
    return count


def test_probes_of_connections_that_are_silent(site: Watched) -> None:
    """Keep-alive of the clients, then of the members: each is answered by the other end, and the connection lives."""
    hosts = (site.lab.client(), site.lab.server())
    with contextlib.ExitStack() as open_ones:
        looks, made = open_ones.enter_context(captures(*hosts)), []
        for way in sorted(WAYS, key="handoff".__eq__):  # who comes later shakes hands with no member
            for vip in (VIP, VIP6):
                ends = open_ones.enter_context(captures(*hosts))
                made.append((way, vip, *open_ones.enter_context(established(site, way, vip, ends))))
        seen: list[list[Segment]] = [[], []]
        for asked in (1, 0):
            asking = [member if asked == 0 else one.socket for _, _, one, member in made]
            for end_of in asking:
                end_of.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
                end_of.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
                end_of.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

            def enough(asked: int = asked) -> bool:
                seen[asked] += looks[asked].read()
                return all(probes(seen[asked], one) >= 2 for _, _, one, _ in made)

            wait_until(enough, 15, "two probes of each at the other end")
            for end_of in asking:
                end_of.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        for way, vip, one, member in made:
            assert active(site, way, vip) == 1
            pass_on(one.socket, member, b"still there")
            pass_on(member, one.socket, b"still here")
            finish(one, member)
            one.judge()
            over(site, way, vip)
