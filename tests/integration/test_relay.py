# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What clients say, on switches without a fast path (every packet through the controller) and with the controller's own
handshakes (``binding: hybrid``). Exercises lbapp.relays from end to end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.hellos import hello, server_name
from tests.integration.bad_wire import bad_wire
from tests.integration.handed_over import Site
from tests.integration.l7_site import (
    both,
    configured,
    connect,
    everything,
    is_reset,
    laboratory,
    named,
    shows_why,
    url,
)
from tests.integration.support import VIP, at_rest, configure, members, pool, server, settle, statistics
from topologies.lab import Lab, unavailable
from topologies.namespace import wait_until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


COUNT_SYNS = """
table inet syns {
  chain in {
    type filter hook input priority 0; policy accept;
    tcp flags & (syn | ack) == syn counter
  }
}
"""


@pytest.fixture(scope="module", params=["relay", "hybrid"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    for made in laboratory(tmp_path_factory, *(["--fastpath"] if request.param == "hybrid" else [])):
        configured(made, binding="auto" if request.param == "relay" else "hybrid")
        yield made


def open_now(lab: Lab) -> set[str]:
    """The ids of the connections that are open."""
    return {one["id"] for one in lab.rest.get("/v1/connections?limit=1000")["connections"]}


def bindings(lab: Lab) -> Counter[str]:
    """Of the connections that are open."""
    return Counter(one["binding"] for one in lab.rest.get("/v1/connections?limit=1000")["connections"])


@both
@pytest.mark.parametrize(("path", "options", "expected"), [
    ("/one/x", (), "s1"), ("/about", ("-H", "Host: two.example"), "s2"),
    ("/about", ("-H", "Cookie: a=b; third=yes"), "s3")])
def test_http_goes_where_the_rules_say(lab: Lab, vip: str, path: str, options: tuple[str, ...], expected: str) -> None:
    for _ in range(4):
        found = lab.client().run("curl", "-gsS", "-o", "/dev/null", "-w", "%header{x-server}", "--max-time", "5",
                                 *options, url(vip, path)).stdout
        assert found == expected


@both
def test_what_no_rule_names_goes_to_the_default_pool_in_turns(lab: Lab, vip: str) -> None:
    name = named(vip, "web")
    before = at_rest(lab, name)
    assert lab.client().who(url(vip), 30) == Counter({"s1": 10, "s2": 10, "s3": 10})
    wait_until(lambda: statistics(lab, name)["closed"] - before["closed"] >= 30, 10, "the ends of all")
    after = statistics(lab, name)
    assert (after["opened"] - before["opened"], after["closed"] - before["closed"]) == (30, 30), "each once"


@both
def test_the_member_sees_the_client(lab: Lab, vip: str) -> None:
    told = json.loads(lab.client().curl(url(vip, "/about")))
    assert told["client_address"] == (lab.client().address6 if ":" in vip else lab.client().address)


@both
def test_tls_goes_where_its_server_name_says(lab: Lab, vip: str) -> None:
    for name, expected in (("one.example", "s1"), ("a.two.example", "s2"), ("other.example", "s3")):
        found = lab.client().curl(url(name, "/", 443, "https"), "-k", "--resolve", f"{name}:443:{vip}")
        assert found.strip() == expected
    assert lab.client().curl(url(vip, "/", 443, "https"), "-k").strip() == "s3", "no name"
    assert is_reset(lab.client(), vip, 443, hello(*[server_name(b"one.example")] * 2)), "no hello"


@both
def test_answers_of_our_own_and_members_that_refuse(lab: Lab, vip: str) -> None:
    client = lab.client()
    for path, status in (("/away", 308), ("/tea", 418), ("/dead", 503)):
        assert client.run("curl", "-gsSi", "--max-time", "5", url(vip, path)).stdout.startswith(f"HTTP/1.1 {status} ")
    for _ in range(4):
        found = client.run("curl", "-gsS", "-o", "/dev/null", "-w", "%header{x-server}", "--max-time", "5",
                           url(vip, "/half")).stdout
        assert found == "s2"
    assert client.run("curl", "-gsS", "--max-time", "5", "-X", "TRACE", url(vip), check=False).returncode == 56, "reset"
    assert client.answered(url(vip), 3) == 3


def test_who_has_a_connection(lab: Lab, request: pytest.FixtureRequest) -> None:
    expected = request.node.callspec.params["lab"]
    with connect(lab.client(), VIP, 80) as it:
        it.sendall(b"GET /one/x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"X-Server: s1" in it.recv(4096)
        wait_until(lambda: bindings(lab)[expected] == 1, 5, f"a connection of binding {expected}")
        (one,) = (one for one in lab.rest.get("/v1/connections")["connections"] if one["binding"] == expected)
        assert (one["policy"], one["virtual_server"]) == ("to-s1-four", "web-four")
        it.sendall(b"GET /one/x HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"X-Server: s1" in it.recv(4096)


@both
def test_why_a_connection_went_where_it_went(lab: Lab, vip: str, request: pytest.FixtureRequest) -> None:
    shows_why(lab, vip, request.node.callspec.params["lab"])


def test_messages_for_each_connection(lab: Lab, request: pytest.FixtureRequest) -> None:
    """A controller that has every packet is asked ever more for a long connection; with hybrid it is not."""
    def punted() -> int:
        return int(lab.rest.get("/v1/stats")["switches"][0]["packet_ins"])

    lab.make_file("long", 2_000_000)
    before = punted()
    lab.client().curl(url(VIP, "/long"))
    if request.node.callspec.params["lab"] == "hybrid":
        assert punted() - before < 40
    else:
        assert punted() - before > 100


@both
@pytest.mark.parametrize("how", ["clean", "loss", "order"])
def test_bodies_arrive_whole_both_ways(lab: Lab, vip: str, how: str) -> None:
    client, size = lab.client(), 2_000_000
    digest = lab.make_file("large", size)
    upload, target = lab.directory / "upload", lab.directory / "got"
    data = os.urandom(size)
    upload.write_bytes(data)
    with contextlib.ExitStack() as wires:
        for host in (client, *lab.servers) if how != "clean" else ():
            wires.enter_context(bad_wire(host, lab.directory, **{how: 0.03}))
        client.run("curl", "-gsS", "--max-time", "60", "-o", str(target), url(vip, "/large"), timeout=70)
        assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
        told = client.run("curl", "-gsS", "--max-time", "60", "-H", "Expect:", "-T", str(upload), url(vip, "/python"),
                          timeout=70).stdout
        assert told.strip() == hashlib.sha256(data).hexdigest()


def test_a_member_is_reached_past_the_balancer(lab: Lab) -> None:
    """Its packets from that port come to the controller where connections are relayed, which lets them go on."""
    assert lab.client().who("http://10.0.0.51/", 5) == Counter({"s1": 5})


def test_a_request_in_pieces(lab: Lab) -> None:
    with connect(lab.client(), VIP, 80) as it:
        for byte in b"GET /one/x HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n":
            it.sendall(bytes((byte,)))
            time.sleep(0.002)
        assert b"X-Server: s1" in everything(it)


def test_of_what_ended_nothing_is_left(lab: Lab) -> None:
    """Members finish at once, while their connections are being handed over: who has them then has not seen that."""
    before = open_now(lab)
    for _ in range(20):
        with connect(lab.client(), VIP, 80) as it:
            for part in (b"GET /one/x HTTP/1.1\r\nHost: a.example\r\n", b"Connection: close\r\n\r\n"):
                it.sendall(part)
                time.sleep(0.005)
            assert b"X-Server: s1" in everything(it)
    wait_until(lambda: open_now(lab) <= before, 10, "all have ended")


def test_the_binding_changes_while_connections_live(lab: Lab) -> None:
    """Who is established goes on; the next ones are had by whoever is told."""
    with connect(lab.client(), VIP, 80) as it:
        for binding in ("relay", "auto", "hybrid", "splice"):
            lab.rest.patch("/v1/virtual-servers/web-four", {"binding": binding})
            settle(lab)
            assert lab.client().who(url(VIP), 3) == Counter({"s1": 1, "s2": 1, "s3": 1})
        it.close()


def test_least_connections_are_counted(lab: Lab) -> None:
    configure(lab, [pool("least", "LEAST_CONNECTIONS", members(lab))],
              [server("least", 80, "least", application="http", binding="hybrid")])
    held = [connect(lab.client(), VIP, 80) for _ in range(6)]
    servers = Counter[str]()
    for one in held:
        one.sendall(b"GET /about HTTP/1.1\r\nHost: a\r\n\r\n")
        servers[one.recv(4096).split(b"X-Server: ")[1][:2].decode()] += 1
    assert servers == {"s1": 2, "s2": 2, "s3": 2}
    assert statistics(lab, "least")["active"] == 6
    for one in held:
        one.close()
    wait_until(lambda: statistics(lab, "least")["active"] == 0, 15, "the ends of all")


def test_members_adopt_what_is_relayed(lab: Lab) -> None:
    """``lbapp server-agent`` on their hosts: they have never seen a handshake."""
    configure(lab, [pool("adopting", "ROUND_ROBIN", members(lab))],
              [server("adopted", 80, "adopting", application="http", binding="auto")])
    site = Site(lab)
    site.start_agents()
    try:
        for host in lab.servers:
            host.run("nft", "-f", "-", stdin=COUNT_SYNS)
        assert lab.client().who(url(VIP), 9) == Counter({"s1": 3, "s2": 3, "s3": 3})
        for host in lab.servers:
            assert "counter packets 0 bytes 0" in host.run("nft", "list", "table", "inet", "syns").stdout, "no SYN"
        assert lab.client().who("http://10.0.0.51/", 1) == Counter({"s1": 1})
        assert "counter packets 1 " in lab.servers[0].run("nft", "list", "table", "inet", "syns").stdout, "it counts"
        digest = lab.make_file("adopted", 500_000)
        got = lab.directory / "got"
        lab.client().run("curl", "-gsS", "--max-time", "20", "-o", str(got), url(VIP, "/adopted"))
        assert hashlib.sha256(got.read_bytes()).hexdigest() == digest
    finally:
        site.stop_agents()
        for host in lab.servers:
            host.run("nft", "delete", "table", "inet", "syns", check=False)
