# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The program of a member's host on a real kernel, with servers that know nothing of it.

``lbapp/server_agent/adopt.bpf.c``, ``lbapp.server_agent.adopt`` and ``lbapp.server_agent.namespaces`` as they are used.
No sockets exist in test runs of programs, hence two namespaces and a client that plays the fast path.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.dataflow.fastpath import cookies
from lbapp.dataflow.fastpath.netlink import Netlink
from lbapp.server_agent import adopt
from tests.cookie_client import KEY, PSH, CookieClient, later
from tests.fastpath_packets import ACK, FIN, RST, SYN
from tests.namespaces import require
from topologies.namespace import Namespace, wait_until

LBAPP = str(Path(sys.executable).with_name("lbapp"))
SERVER = {4: "10.9.0.51", 6: "fd09::51"}
CLIENT = {4: "10.9.0.7", 6: "fd09::7"}
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
families = pytest.mark.parametrize("family", [4, 6])


class Place:
    """Two hosts, the program at the server's, and clients that play the fast path."""

    def __init__(self, server: Namespace, client: Namespace, cleanup: contextlib.ExitStack) -> None:
        self.server, self._cleanup = server, cleanup
        client.run("ip", "link", "add", "c0", "type", "veth", "peer", "name", "s0", "netns", str(server.pid))
        client.run("ip", "link", "set", "c0", "up")
        server.run("ip", "link", "set", "s0", "up")
        server.run("ip", "address", "add", f"{SERVER[4]}/24", "dev", "s0")
        server.run("ip", "address", "add", f"{SERVER[6]}/64", "dev", "s0", "nodad")
        with client.entered():
            self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self.wire.bind(("c0", 0))
            with Netlink() as netlink:
                mine = netlink.links()["c0"].address
        with server.entered():
            self.netlink = Netlink()
            theirs = self.netlink.links()["s0"].address
        self.macs = mine, theirs
        for address in CLIENT.values():
            server.run("ip", "neigh", "add", address, "lladdr", mine.hex(":"), "dev", "s0")
        self.adopter = adopt.Adopter()
        cleanup.callback(self.netlink.close)
        cleanup.callback(self.wire.close)
        cleanup.callback(self.adopter.close)
        self.adopter.set_listeners([adopt.Listener(SERVER[4], 80), adopt.Listener(None, 81),
                                    adopt.Listener(SERVER[6], 80)])
        self.adopter.set_keys((KEY, None))
        self.adopter.set_window_scale(7)
        adopt.attach(self.netlink, self.netlink.links()["s0"], self.adopter.program)

    def client(self, family: int = 4, **options: Any) -> CookieClient:
        return CookieClient(self.wire, self.macs, (CLIENT[family], SERVER[family]), **options)

    def listen(self, family: int = 4, port: int = 80, **options: Any) -> socket.socket:
        with self.server.entered():
            listener = socket.create_server((SERVER[family], port), reuse_port=False,
                                            family=socket.AF_INET6 if family == 6 else socket.AF_INET, **options)
        self._cleanup.callback(listener.close)
        listener.settimeout(3)
        return listener

    def accept(self, listener: socket.socket) -> socket.socket:
        accepted = listener.accept()[0]
        accepted.settimeout(3)
        self._cleanup.callback(accepted.close)
        return accepted

    def counted(self, **wanted: int) -> None:
        assert {name: value for name, value in self.adopter.counters().items() if value} == wanted


@pytest.fixture
def place(netns: Callable[[str], Namespace]) -> Iterator[Place]:
    with contextlib.ExitStack() as cleanup:
        try:
            yield Place(netns("server"), netns("client"), cleanup)
        except adopt.AdoptError as error:
            pytest.skip(str(error))


def nginx(place: Place, directory: Path) -> None:
    require("nginx")
    (directory / "index.html").write_text("x" * 300_000)
    (directory / "nginx.conf").write_text(f"""
daemon off; user root; pid {directory}/pid; error_log {directory}/error.log; worker_processes 1;
events {{}}
http {{ access_log off; root {directory};
  client_body_temp_path {directory}/1; proxy_temp_path {directory}/2; fastcgi_temp_path {directory}/3;
  uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;
  server {{ listen 80; listen [::]:80; location = /small {{ return 200 "small"; }} }} }}
""")
    directory.chmod(0o755)
    place.server.popen(shutil.which("nginx") or "nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"))
    wait_until(lambda: ":80 " in place.server.run("ss", "-ltnH").stdout, 5, "nginx listens")


@families
def test_nginx_serves_a_connection_that_begins_with_data(place: Place, tmp_path: Path, family: int) -> None:
    nginx(place, tmp_path)
    client = place.client(family)
    client.send(GET.replace(b"/ ", b"/small "), ACK | PSH)
    assert client.converse(until=100).endswith(b"small")
    place.counted(adopted=1)
    client.send(CLOSE, ACK | PSH)  # a second request: an ordinary connection now
    said = client.converse()
    assert said.count(b"HTTP/1.1 200 OK") == 2 and said.endswith(b"x" * 300_000)
    assert client.ended
    client.send(b"", ACK | FIN)
    answer = client.hear()
    assert answer is not None and answer.ack == client.seq and not answer.flags & RST
    place.counted(adopted=1)


@families
@pytest.mark.parametrize("offers", [cookies.Options(1400, 9, True), cookies.Options(536, None, False),
                                    cookies.Options(1280, 0, False), cookies.Options(8960, 14, True)])
def test_what_the_client_offered_is_what_the_kernel_does(place: Place, family: int, offers: cookies.Options) -> None:
    listener = place.listen(family)
    client = place.client(family, offers=offers)
    client.send(b"hello", ACK | PSH)
    accepted = place.accept(listener)
    assert accepted.recv(100) == b"hello"
    assert accepted.getpeername()[:2] == (CLIENT[family], 40000)
    information = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    options, scales = information[5], information[6]
    mss = struct.unpack_from("=I", information, 16)[0]
    largest = 1460 if family == 4 else 1440
    assert mss == min(max(offers.mss, 1220 if family == 6 else 0), largest)
    assert options == (2 if offers.sack else 0) | (4 if offers.window_scale is not None else 0)
    assert scales == (0 if offers.window_scale is None else offers.window_scale | 7 << 4)
    accepted.sendall(b"y" * 20_000)
    assert client.converse(until=20_000) == b"y" * 20_000
    place.counted(adopted=1)


@pytest.mark.parametrize("isn", [0xFFFFFFFF, 0xFFFFFFF0, 0])
def test_numbers_wrap(place: Place, isn: int) -> None:
    listener = place.listen()
    client = place.client(isn=isn)
    client.send(b"a" * 40, ACK | PSH)
    accepted = place.accept(listener)
    assert accepted.recv(100) == b"a" * 40
    client.send(b"b" * 40, ACK | PSH)
    assert accepted.recv(100) == b"b" * 40


def test_a_port_of_any_address_and_a_listener_of_both_families(place: Place) -> None:
    with place.server.entered():
        listener = socket.create_server(("::", 81), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener:
        listener.settimeout(3)
        for family in (4, 6):
            client = place.client(family, port=81)
            client.send(b"hello", ACK | PSH)
            accepted = place.accept(listener)
            assert accepted.recv(100) == b"hello"
            accepted.sendall(b"world")
            assert client.converse(until=5) == b"world"
    place.counted(adopted=2)


@families
def test_first_data_with_the_end_in_it(place: Place, family: int) -> None:
    listener = place.listen(family)
    client = place.client(family)
    client.send(b"all of it", ACK | PSH | FIN)
    accepted = place.accept(listener)
    assert accepted.recv(100) == b"all of it" and accepted.recv(100) == b""
    accepted.sendall(b"and all of mine")
    accepted.close()
    assert client.converse() == b"and all of mine" and client.ended


def test_several_segments_and_the_first_repeated(place: Place) -> None:
    listener = place.listen()
    client = place.client()
    for part in (b"a" * 1000, b"b" * 1000, b"c" * 1000):
        client.send(part)
    client.send(b"a" * 1000, at=later(client.isn, 1))
    accepted = place.accept(listener)
    heard = b""
    while len(heard) < 3000:
        heard += accepted.recv(4000)
    assert heard == b"a" * 1000 + b"b" * 1000 + b"c" * 1000
    place.counted(adopted=1)


@families
def test_a_second_segment_that_overtakes_the_first_draws_no_reset(place: Place, family: int) -> None:
    listener = place.listen(family)
    client = place.client(family)
    client.send(b"later", at=later(client.isn, 6))
    assert client.silence()
    place.counted(early=1)
    client.send(b"first")
    accepted = place.accept(listener)
    assert accepted.recv(100) == b"first"
    client.send(b"later")
    assert accepted.recv(100) == b"later"
    place.counted(adopted=1, early=1)


def test_a_listener_that_is_full_takes_it_when_there_is_room(place: Place) -> None:
    listener = place.listen(backlog=0)
    clients = [place.client(sport=40000 + number) for number in range(3)]
    for client in clients:
        client.send(b"hello", ACK | PSH)
    for client in clients[1:]:
        assert all(seen is None or not seen.flags & RST for seen in [client.hear(0.2)])
    assert place.accept(listener).recv(100) == b"hello"
    clients[-1].send(b"hello", ACK | PSH, at=later(clients[-1].isn, 1))  # as clients do that hear nothing
    assert place.accept(listener).recv(100) == b"hello"


# ------------------------------------------------------------------ what is not adopted


@families
@pytest.mark.parametrize("wrong", ["cookie", "key", "client"])
def test_a_wrong_cookie_is_refused_by_the_kernel_in_the_end(place: Place, family: int, wrong: str) -> None:
    """Nobody can tell at first whether its beginning was lost; repeated for three seconds it was not."""
    place.listen(family)
    options: dict[str, dict[str, Any]] = {"key": {"key": b"another key 1234"}, "cookie": {"cookie": 12345}}
    client = place.client(family, **options.get(wrong, {}))
    if wrong == "client":
        client.sport += 1
    client.send(b"hello", ACK | PSH)
    assert client.silence(0.5)
    place.counted(early=1)

    def refused() -> bool:
        client.send(b"hello", ACK | PSH, at=later(client.isn, 1))
        seen = client.hear(0.3)
        return seen is not None and bool(seen.flags & RST)

    wait_until(refused, 6, "the kernel's RST")
    assert "adopted" not in {name for name, value in place.adopter.counters().items() if value}


def test_a_key_that_was_replaced_is_worth_nothing(place: Place) -> None:
    place.listen()
    place.adopter.set_keys((None, KEY))
    client = place.client()
    client.send(b"hello", ACK | PSH)
    seen = client.hear()  # the slot is empty: this is no cookie of any fast path
    assert seen is not None and seen.flags & RST
    place.counted()


@families
def test_without_a_listener_the_kernel_refuses(place: Place, family: int) -> None:
    client = place.client(family)
    client.send(b"hello", ACK | PSH)
    seen = client.hear()
    assert seen is not None and seen.flags & RST and seen.seq == later(client.cookie, 1)
    place.counted(no_listener=1)


def test_ports_that_were_not_named_are_as_ever(place: Place) -> None:
    place.listen(port=82)
    client = place.client(port=82)
    client.send(b"hello", ACK | PSH)
    seen = client.hear()
    assert seen is not None and seen.flags & RST
    place.counted()


@families
def test_an_ordinary_connection_is_as_ever(place: Place, family: int) -> None:
    listener = place.listen(family)
    client = place.client(family)
    client.send(b"", SYN, at=client.isn)
    answer = client.hear()
    assert answer is not None and answer.flags == SYN | ACK
    client.expected = later(answer.seq, 1)
    client.send()
    client.send(b"hello", ACK | PSH)
    assert place.accept(listener).recv(100) == b"hello"
    place.counted()


def test_the_kernels_own_cookies_go_on(place: Place) -> None:
    place.server.run("sysctl", "-qw", "net.ipv4.tcp_syncookies=2")  # always
    listener = place.listen()
    client = place.client(sport=41000)
    client.send(b"", SYN, at=client.isn)
    answer = client.hear()
    assert answer is not None and answer.flags == SYN | ACK
    client.expected = later(answer.seq, 1)
    client.send()
    client.send(b"hello", ACK | PSH)
    assert place.accept(listener).recv(100) == b"hello"
    place.counted()


def test_a_listener_of_mptcp_adopts_nothing(place: Place) -> None:
    with place.server.entered():
        try:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        except OSError as error:
            pytest.skip(f"MPTCP: {error.strerror}")
    with listener:
        listener.bind((SERVER[4], 80))
        listener.listen()
        client = place.client()
        client.send(b"hello", ACK | PSH)
        assert client.silence()
    place.counted(refused=1)


# ------------------------------------------------------------------ a client's port that comes back


def ended(place: Place, listener: socket.socket, family: int) -> CookieClient:
    """A connection that the server ended first: its TIME_WAIT is there."""
    client = place.client(family)
    client.send(b"hello", ACK | PSH)
    accepted = place.accept(listener)
    accepted.recv(100)
    accepted.close()
    client.converse()
    client.send(b"", ACK | FIN)
    last = client.hear()
    assert last is not None and last.ack == client.seq
    assert "TIME-WAIT" in place.server.run("ss", "-tanH").stdout
    return client


@families
def test_time_wait_makes_room(place: Place, family: int) -> None:
    listener = place.listen(family)
    before = ended(place, listener, family)
    client = place.client(family, isn=later(before.seq, 100_000))
    client.send(b"again" * 100, ACK | PSH)
    accepted = place.accept(listener)
    assert accepted.recv(1000) == b"again" * 100
    accepted.sendall(b"welcome")
    assert client.converse(until=7) == b"welcome"
    place.counted(adopted=2, recycled=1)


def test_time_wait_is_kept_from_numbers_it_has_seen(place: Place) -> None:
    listener = place.listen()
    before = ended(place, listener, 4)
    client = place.client(isn=later(before.isn, -10_000))
    client.send(b"again", ACK | PSH)
    assert client.silence()
    place.counted(adopted=1, time_wait=1)


@families
def test_what_a_vanished_client_left_makes_room(place: Place, family: int) -> None:
    listener = place.listen(family)
    old = place.client(family)
    old.send(b"hello", ACK | PSH)
    accepted = place.accept(listener)
    assert accepted.recv(100) == b"hello"
    client = place.client(family, isn=later(old.seq, 3_000_000_000))
    client.send(b"again", ACK | PSH)
    assert place.accept(listener).recv(100) == b"again"
    with pytest.raises(ConnectionResetError):
        accepted.recv(100)
    place.counted(adopted=2, recycled=1)


# ------------------------------------------------------------------ where it is attached


def test_attached_replaced_and_removed(place: Place) -> None:
    links, netlink = place.netlink.links(), place.netlink
    assert [link.name for link in adopt.interfaces(links.values())] == ["s0"]
    assert [link.name for link in adopt.interfaces(links.values(), ["lo", "s0"])] == ["lo", "s0"]
    with pytest.raises(adopt.AdoptError, match="no interface eth9"):
        adopt.interfaces(links.values(), ["s0", "eth9"])
    first = adopt.attached(netlink)["s0"]
    assert first.name == "lbapp-adopt clsact"
    other = adopt.Adopter()
    try:
        adopt.attach(netlink, links["s0"], other.program)
        second = adopt.attached(netlink)["s0"]
        assert second.program != first.program and second.name == first.name
        assert adopt.detach(netlink, keep=["s0"]) == []
        assert adopt.detach(netlink) == ["s0"] and adopt.attached(netlink) == {}
        assert links["s0"].ifindex not in netlink.clsacts()
    finally:
        other.close()


def test_somebody_elses_filters_stay(place: Place) -> None:
    adopt.detach(place.netlink)
    link = place.netlink.links()["s0"]
    place.server.run("tc", "qdisc", "add", "dev", "s0", "clsact")
    place.netlink.set_program(link.ifindex, 5, 1, place.adopter.program, "of somebody else's")
    adopt.attach(place.netlink, link, place.adopter.program)
    assert adopt.attached(place.netlink)["s0"].name == "lbapp-adopt"
    adopt.detach(place.netlink)
    assert [one.priority for one in place.netlink.filters(link.ifindex)] == [5]


def test_an_interface_that_goes_meanwhile_is_none_of_ours(place: Place) -> None:
    """Other programs make and delete interfaces at any time: what is adopted at the others is not to suffer."""
    place.server.run("ip", "link", "add", "s1", "up", "type", "veth", "peer", "name", "s2")
    gone = place.netlink.links()["s1"]
    assert gone.up
    place.server.run("ip", "link", "del", "s1")
    assert not adopt.attach(place.netlink, gone, place.adopter.program)
    assert adopt.attach(place.netlink, place.netlink.links()["s0"], place.adopter.program)
    assert list(adopt.attached(place.netlink)) == ["s0"]


# ------------------------------------------------------------------ the whole agent


REST = """
import http.server, json, sys, pathlib
told = pathlib.Path(sys.argv[1])
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with told.open("a") as file:
            file.write(body.decode() + "\\n")
        self.answer(200, json.dumps({"cookie_keys": [sys.argv[2], None], "window_scale": 7,
                                     "lease_seconds": 10}).encode())
    def do_DELETE(self):
        with told.open("a") as file:
            file.write("gone\\n")
        self.answer(204, b"")
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""


def test_the_agent_from_its_start_to_its_end_and_after_a_kill(place: Place, tmp_path: Path) -> None:
    adopt.detach(place.netlink)
    told, log = tmp_path / "told", tmp_path / "log"
    told.touch()
    place.server.popen(sys.executable, "-c", REST, str(told), KEY.hex())

    def start() -> subprocess.Popen[Any]:
        count = len(told.read_text().splitlines())
        process = place.server.popen(LBAPP, "--token", "t", "server-agent", "--listen-port",
                                     "80", "--log-file", str(log))
        wait_until(lambda: len(told.read_text().splitlines()) >= count + 2, 10, "the agent announces itself")
        return process

    def works(sport: int) -> None:
        client = place.client(sport=sport)
        client.send(b"hello", ACK | PSH)
        assert place.accept(listener).recv(100) == b"hello"

    listener = place.listen()
    process = start()
    announced = [json.loads(line)["listeners"] for line in told.read_text().splitlines()[:2]]
    assert announced == [[], [{"address": SERVER[4], "port": 80}]], "where somebody listens"
    works(40001)
    process.kill()
    process.wait()
    works(40002)  # goes on with the keys it had
    process = start()
    works(40003)
    second = place.server.run(LBAPP, "--token", "t", "server-agent", "--listen-port", "80",
                              check=False)
    assert second.returncode == 1 and "another agent beside servers" in second.stderr
    process.terminate()
    assert process.wait(10) == 0
    assert told.read_text().splitlines()[-1] == "gone"
    assert adopt.attached(place.netlink) == {} and not place.netlink.clsacts()
    assert "stopped: adopted 1, refused 0" in log.read_text() and "Traceback" not in log.read_text()
    process = start()
    process.kill()
    process.wait()
    assert list(adopt.attached(place.netlink)) == ["s0"]
    place.server.run(LBAPP, "server-agent", "--remove")
    assert adopt.attached(place.netlink) == {}


def test_without_syncookies_there_is_none(place: Place) -> None:
    place.server.run("sysctl", "-qw", "net.ipv4.tcp_syncookies=0")
    done = place.server.run(LBAPP, "--token", "t", "server-agent", "--listen-port", "80",
                            check=False)
    assert done.returncode == 1
    assert done.stderr == "lbapp: net.ipv4.tcp_syncookies is 0: the kernel takes no connection by a cookie without it\n"


def test_an_agent_of_another_namespace(place: Place, netns: Callable[[str], Namespace], tmp_path: Path) -> None:
    """The servers' namespace has no way to the controller."""
    adopt.detach(place.netlink)
    told, outside = tmp_path / "told", netns("outside")
    told.touch()
    listener = place.listen()
    outside.popen(sys.executable, "-c", REST, str(told), KEY.hex())
    where = ("server-agent", "--netns", f"/proc/{place.server.pid}/ns/net")
    process = outside.popen(LBAPP, "--token", "t", *where, "--listen-port", "80")
    wait_until(lambda: len(told.read_text().splitlines()) >= 2, 10, "the agent announces itself")
    assert SERVER[4] in told.read_text() and SERVER[6] not in told.read_text()
    client = place.client()
    client.send(b"hello", ACK | PSH)
    assert place.accept(listener).recv(100) == b"hello"
    process.kill()
    process.wait()
    assert list(adopt.attached(place.netlink)) == ["s0"]
    outside.run(LBAPP, *where, "--remove")
    assert adopt.attached(place.netlink) == {}
    done = outside.run(LBAPP, "--token", "t", "server-agent", "--netns", str(told), "--listen-port", "80", check=False)
    assert done.returncode == 1 and done.stderr == f"lbapp: {told}: Invalid argument\n"
