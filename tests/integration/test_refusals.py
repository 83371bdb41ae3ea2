# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a client sees that does not get a server: a RST or "port unreachable", at once, and counted."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.capture import captures
from tests.integration.support import (
    ECHO_PORT,
    REFUSED_WITHIN,
    VIP,
    VIP6,
    Held,
    change_member,
    configure,
    held,
    members,
    pool,
    refused,
    server,
    settle,
    statistics,
    tcp,
    unreachable,
)
from topologies.hosts import OWN_PORTS
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

WITH_FASTPATH = True


@pytest.fixture
def both(lab: Lab) -> Iterator[Lab]:
    """TCP 80 (the switch decides), 8080 (the controller), 8081 (rules), UDP 53, in both families."""
    pools, servers = [], []
    for six, vip in ((False, VIP), (True, VIP6)):
        name = "six" if six else "four"
        pools += [pool(f"web-{name}", "WEIGHTED_ROUND_ROBIN", members(lab, six=six)),
                  pool(f"echo-{name}", "ROUND_ROBIN", members(lab, ECHO_PORT, six))]
        servers += [server(f"switch-{name}", 80, f"web-{name}", vip),
                    server(f"controller-{name}", 8080, f"web-{name}", vip, decision="controller"),
                    server(f"rules-{name}", 8081, f"web-{name}", vip, state="rules"),
                    server(f"udp-{name}", 53, f"echo-{name}", vip, "UDP")]
    configure(lab, pools, servers)
    yield lab


def _refusals(lab: Lab, name: str, why: str) -> int:
    return int(statistics(lab, name)["refused"].get(why, 0))


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_a_port_that_nobody_serves_is_denied_at_once(both: Lab, vip: str) -> None:
    client = both.client("c1")
    assert refused(client, vip, 4444) < REFUSED_WITHIN
    assert unreachable(client, vip, 4444) < REFUSED_WITHIN
    begun = time.monotonic()
    done = client.run("curl", "-gsS", "--max-time", "5", f"http://[{vip}]:4444/" if ":" in vip
                      else f"http://{vip}:4444/", check=False)
    assert (done.returncode, time.monotonic() - begun < 1) == (7, True), done.stderr
    assert client.answered(f"http://[{vip}]/" if ":" in vip else f"http://{vip}/", 10) == 10


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])
def test_maintenance_refuses_new_connections_and_keeps_the_old(both: Lab, vip: str) -> None:
    lab, client = both, both.client("c1")
    name = "six" if ":" in vip else "four"
    ways = {f"switch-{name}": 80, f"controller-{name}": 8080, f"rules-{name}": 8081}
    old = {way: Held(client, vip, port) for way, port in ways.items()}
    try:
        for way in (*ways, f"udp-{name}"):
            lab.rest.patch(f"/v1/virtual-servers/{way}", {"maintenance": True})
        settle(lab, [*ways, f"udp-{name}"])
        for way, port in ways.items():
            before = _refusals(lab, way, "NOTAVAIL")
            assert refused(client, vip, port) < REFUSED_WITHIN, way
            assert _refusals(lab, way, "NOTAVAIL") == before + 1, way
            assert old[way].ask() == old[way].server, f"{way}: the established one goes on"
        assert unreachable(client, vip, 53) < REFUSED_WITHIN
        for way in (*ways, f"udp-{name}"):
            lab.rest.patch(f"/v1/virtual-servers/{way}", {"maintenance": False})
        settle(lab)
        for port in ways.values():
            Held(client, vip, port).close()
        assert client.udp(vip, 53) != [None]
    finally:
        for one in old.values():
            one.close()


def test_without_a_member_that_takes_it_a_connection_is_refused(both: Lab) -> None:
    lab, client = both, both.client("c2")
    offline = [f"{way}-four" for way in ("switch", "controller", "rules", "udp")]
    for one in lab.servers:
        for name in ("web-four", "echo-four"):
            change_member(lab, name, one.name, admin_state_up=False)
    for port in (80, 8080, 8081):
        assert refused(client, VIP, port) < REFUSED_WITHIN
    assert unreachable(client, VIP, 53) < REFUSED_WITHIN
    assert client.answered(f"http://[{VIP6}]/", 10) == 10, "the other family is not concerned"
    lab.rest.patch("/v1/pools/web-four", {"members": []})
    settle(lab, offline)
    assert refused(client, VIP, 80) < REFUSED_WITHIN
    lab.rest.patch("/v1/virtual-servers/switch-four", {"default_pool_id": None})
    settle(lab, offline)
    assert refused(client, VIP, 80) < REFUSED_WITHIN


def test_members_that_nobody_ever_saw_are_refused_for(lab: Lab) -> None:
    ghosts = [{"name": "ghost", "address": "10.0.0.99", "protocol_port": 80}]
    configure(lab, [pool("ghosts", "WEIGHTED_ROUND_ROBIN", ghosts)],
              [server("switch", 80, "ghosts"), server("controller", 81, "ghosts", decision="controller")],
              offline=["switch", "controller"])
    for port in (80, 81):
        assert refused(lab.client("c1"), VIP, port) < REFUSED_WITHIN


@pytest.mark.parametrize("how", [{}, {"state": "rules"}], ids=["conntrack", "rules"])
def test_connection_limit(lab: Lab, how: dict[str, Any]) -> None:
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))],
              [server("limited", 80, "web", connection_limit=5, **how), server("free", 81, "web")])
    client = lab.client("c1")
    with held(client, VIP, 80, 5) as open_ones:
        assert statistics(lab, "limited")["active"] == 5
        for attempt in range(3):
            assert refused(lab.clients[attempt], VIP, 80) < REFUSED_WITHIN
        assert _refusals(lab, "limited", "CONNLIMIT") == 3
        assert [one.ask() for one in open_ones] == [one.server for one in open_ones]
        Held(client, VIP, 81).close()
        for close in (open_ones[0].close, open_ones[1].reset):
            close()
            sixth: list[Held] = []

            def admitted(into: list[Held] = sixth) -> bool:
                try:
                    into.append(Held(client, VIP, 80))
                except ConnectionRefusedError:
                    return False
                return True

            wait_until(admitted, 10, "a place that was freed is given again", 0.02)
            open_ones.append(sixth[0])
            assert refused(client, VIP, 80) < REFUSED_WITHIN, "one, not more"
        for one in open_ones[2:]:
            one.close()
    wait_until(lambda: statistics(lab, "limited")["active"] == 0, 15, "all were seen to close")
    found = statistics(lab, "limited")
    assert (found["opened"], found["closed"]) == (7, 7), found


def test_a_limit_of_none(lab: Lab) -> None:
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))], [server("shut", 80, "web", connection_limit=0)])
    assert refused(lab.client("c1"), VIP, 80) < REFUSED_WITHIN


def test_a_virtual_server_that_is_down_denies_its_port(both: Lab) -> None:
    lab, client = both, both.client("c1")
    lab.rest.patch("/v1/virtual-servers/switch-four", {"admin_state_up": False})
    settle(lab, ["switch-four"])
    assert refused(client, VIP, 80) < REFUSED_WITHIN
    assert client.answered(f"http://{VIP}:8080/", 5) == 5
    lab.rest.patch("/v1/virtual-servers/switch-four", {"admin_state_up": True})
    settle(lab)
    assert client.answered(f"http://{VIP}/", 5) == 5


def test_a_segment_out_of_nowhere_is_refused_and_leaves_nothing(both: Lab) -> None:
    """Data for a connection that never was: a RST, and no entry (the switch has no business to guess)."""
    lab = both
    program = (
        "import socket,struct,sys\n"
        "src,dst,port=sys.argv[1],sys.argv[2],int(sys.argv[3])\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_TCP); s.settimeout(1)\n"
        "head=struct.pack('!HHIIBBHHH',31999,port,1000,2000,0x50,0x18,1000,0,0)\n"
        "pseudo=socket.inet_aton(src)+socket.inet_aton(dst)+struct.pack('!BBH',0,6,len(head)+4)\n"
        "data=pseudo+head+b'boo!'; total=sum(struct.unpack('!%dH'%(len(data)//2),data))\n"
        "total=(total>>16)+(total&0xffff); total+=total>>16\n"
        "s.sendto(head[:16]+struct.pack('!H',~total&0xffff)+head[18:]+b'boo!',(dst,0))\n"
        "while True:\n"
        "    p=s.recv(200); t=p[20:]\n"
        "    if t[2:4]==struct.pack('!H',31999) and t[:2]==struct.pack('!H',port): print(hex(t[13])); break\n")
    client = lab.client("c3")
    for port in (80, 8080, 8081):
        answer = client.run("python3", "-c", program, client.address, VIP, str(port)).stdout.strip()
        assert int(answer, 16) & 0x04, f"port {port}: expected a RST, got flags {answer}"
    assert "sport=31999" not in lab.ovs.appctl("dpctl/dump-conntrack")


@pytest.mark.parametrize("port", [80, 8080, 8081], ids=["switch", "controller", "rules"])
def test_floods_of_what_begins_nothing(both: Lab, port: int, told: Callable[[str], None]) -> None:
    """Row 13: no state, no member hears of it, and no more comes back than was sent."""
    lab, client = both, both.client("c3")

    def passed() -> tuple[int, int]:
        (link,) = json.loads(client.run("ip", "-j", "-s", "link", "show", client.interface).stdout)
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]

    before = passed()
    with captures(*lab.servers) as behind:
        for flags in (("-A",), ("-A", "-d", "100"), ("-R",), ("-F",), ("-F", "-P", "-U"), ()):
            client.run("hping3", "-q", *flags, "-p", str(port), "-c", "50", "-i", "u1000", VIP, check=False)
        assert lab.client("c1").answered(f"http://{VIP}:{port}/", 6) == 6
        heard = [one for capture in behind for one in capture.read()]
    strange = socket.inet_aton(client.address)
    assert any(one.dport == 80 for one in heard), "there was something to hear"
    assert not [one for one in heard if strange in (one.source, one.destination)]
    assert f"={client.address}," not in lab.ovs.appctl("dpctl/dump-conntrack")
    sent, back = (now - then for now, then in zip(passed(), before, strict=True))
    assert sent >= 6 * 50 * 54 and back <= sent, "no amplifier"
    told(f"{sent} bytes came, {back} went back")


def test_refusals_do_not_disturb_who_is_served(both: Lab) -> None:
    client = both.client("c1")
    with held(client, VIP, 80, 3) as open_ones:
        for _ in range(50):
            with pytest.raises(ConnectionRefusedError):
                tcp(client, VIP, 4445)
        assert [one.ask() for one in open_ones] == [one.server for one in open_ones]


@pytest.mark.parametrize(("vip", "port"), [(VIP, 80), (VIP, 8080), (VIP6, 80)])
def test_a_client_of_a_removed_member_may_use_its_port_again(both: Lab, vip: str, port: int) -> None:
    lab, client = both, both.client("c1")
    name = "six" if ":" in vip else "four"
    old = Held(client, vip, port, source_port=next(OWN_PORTS))
    left = [member for member in members(lab, six=":" in vip) if member["name"] != old.server]
    lab.rest.patch(f"/v1/pools/web-{name}", {"members": left})
    settle(lab)
    with pytest.raises(ConnectionResetError):
        old.ask()
    old.reset()
    new = Held(client, vip, port, source_port=old.port)
    assert new.server != old.server
    new.close()
