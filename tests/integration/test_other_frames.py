# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What is not the balancer's is switched as by any learning switch, and other Ryu applications work beside it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.support import LAN, VIP, VIP6, configure, members, pool, server, settle
from topologies.hosts import LabHost
from topologies.namespace import wait_until

if TYPE_CHECKING:
    from topologies.lab import Lab

EXPERIMENTAL = 0x88B5
"""An ethertype that nobody uses (IEEE 802, local experimental)."""
VLAN = 7
ALL_FRAMES, SOL_PACKET, PACKET_AUXDATA = 3, 263, 8


@pytest.fixture
def site(lab: Lab) -> Lab:
    """A balancer with all that it has rules for, beside which the others live."""
    configure(lab, [pool("web", "WEIGHTED_ROUND_ROBIN", members(lab)),
                    pool("six", "ROUND_ROBIN", members(lab, six=True))],
              [server("web", 80, "web"), server("rules", 81, "web", state="rules"), server("six", 80, "six", VIP6)],
              LAN)
    return lab


def _mac(host: LabHost) -> bytes:
    (link,) = json.loads(host.run("ip", "-j", "link", "show", host.interface).stdout)
    return bytes.fromhex(link["address"].replace(":", ""))


@contextlib.contextmanager
def wire(host: LabHost, ethertype: int = EXPERIMENTAL) -> Iterator[socket.socket]:
    """A raw socket on a host's interface; it sees what comes with one ethertype."""
    with host.entered():
        endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
        endpoint.bind((host.interface, ethertype))
    endpoint.settimeout(1)
    with endpoint:
        yield endpoint


def test_hosts_reach_each_other(site: Lab) -> None:
    for first, second in (("c1", "c2"), ("c1", "s1"), ("s2", "s3"), ("s1", "c3")):
        one, other = site.hosts[first], site.hosts[second]
        one.run("ip", "neigh", "flush", "dev", one.interface)
        one.run("ip", "-6", "neigh", "flush", "dev", one.interface)
        one.run("ping", "-c3", "-i0.1", "-W1", "-s1400", other.address)
        one.run("ping", "-c3", "-i0.1", "-W1", "-s1400", other.address6)
        shown = one.run("ip", "neigh", "show", other.address).stdout
        assert _mac(other).hex(":") in shown, "its own MAC, not the balancer's"
    assert site.client("c1").curl(f"http://{site.server('s2').address}/") == "s2\n", "a member, asked directly"


def test_an_unknown_ethertype_crosses(site: Lab) -> None:
    first, second, third = site.clients
    with wire(first) as one, wire(second) as other, wire(third) as bystander:
        everywhere = b"\xff" * 6 + _mac(first) + EXPERIMENTAL.to_bytes(2, "big") + b"hello, all" + bytes(40)
        one.send(everywhere)
        assert other.recv(200)[:24] == everywhere[:24] == bystander.recv(200)[:24], "broadcast goes everywhere"
        back = _mac(first) + _mac(second) + EXPERIMENTAL.to_bytes(2, "big") + os.urandom(64)
        other.send(back)
        assert one.recv(200) == back
        to = _mac(second) + _mac(first) + EXPERIMENTAL.to_bytes(2, "big") + os.urandom(1000)
        one.send(to)
        assert other.recv(2000) == to, "unchanged"
        bystander.settimeout(0.2)
        with pytest.raises(TimeoutError):
            bystander.recv(2000)


def test_tagged_frames_cross(site: Lab) -> None:
    """Tag and content arrive; whoever has no part in it does not get the answer."""
    first, second = site.client("c1"), site.server("s1")
    tag = b"\x81\x00" + VLAN.to_bytes(2, "big")
    with wire(first, ALL_FRAMES) as one, wire(second, ALL_FRAMES) as other:
        for endpoint in (one, other):
            endpoint.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        content = EXPERIMENTAL.to_bytes(2, "big") + os.urandom(200)
        one.send(b"\xff" * 6 + _mac(first) + tag + content)
        assert _tagged(other, content) == VLAN
        other.send(_mac(first) + _mac(second) + tag + content)
        assert _tagged(one, content) == VLAN


def _tagged(endpoint: socket.socket, content: bytes) -> int:
    """Wait for a frame of this content and return its VLAN; the kernel hands the tag beside the frame."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        frame, ancillary, _flags, _sender = endpoint.recvmsg(2000, 100)
        if frame.endswith(content) and endpoint.getsockname()[4] != frame[6:12]:
            if frame[12:14] == b"\x81\x00":
                return int.from_bytes(frame[14:16], "big")
            return int(struct.unpack_from("=HH", ancillary[0][2], 16)[0])
    raise TimeoutError("no such frame")


def test_multicast_and_large_transfers_between_others(site: Lab) -> None:
    """Two hosts move data past the balancer; the switch's TSO and checksums hold for them as well."""
    import hashlib

    digest, target = site.make_file("ten", 10_000_000), site.directory / "ten-direct"
    site.client("c2").curl(f"http://{site.server('s3').address}/ten", "-o", str(target))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    with contextlib.ExitStack() as stack:
        receivers = []
        for host in (site.client("c2"), site.server("s1")):
            with host.entered():
                endpoint = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            endpoint.settimeout(1)
            endpoint.bind(("", 7777))
            endpoint.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                                socket.inet_aton("239.1.2.3") + socket.inet_aton(host.address))
            receivers.append(endpoint)
        first = site.client("c1")
        with first.entered():
            sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(first.address))
        sender.sendto(b"to all of you", ("239.1.2.3", 7777))
        assert [endpoint.recv(100) for endpoint in receivers] == [b"to all of you"] * 2


def test_the_controller_hears_nothing_of_it(site: Lab) -> None:
    before = site.rest.get("/v1/stats")["switches"][0]["packet_ins"]
    site.client("c1").run("ping", "-c20", "-i0.02", "-W1", site.client("c2").address)
    assert site.client("c1").curl(f"http://{site.server('s2').address}/") == "s2\n"
    after = site.rest.get("/v1/stats")["switches"][0]["packet_ins"]
    assert after - before <= 12, "some answers of members to probes, no more"


# ------------------------------------------------------------------ beside other applications


def _serves(lab: Lab) -> None:
    configure(lab, [pool("web", "ROUND_ROBIN", members(lab))],
              [server("switch", 80, "web", decision="switch"), server("controller", 81, "web"),
               server("rules", 82, "web", state="rules")])
    for port in (80, 81, 82):
        assert set(lab.client("c1").who(f"http://{VIP}:{port}/", 45)) == {"s1", "s2", "s3"}, port
    lab.client("c1").run("ping", "-c3", "-i0.1", "-W1", lab.client("c2").address)
    lab.client("c1").run("ping", "-c3", "-i0.1", "-W1", lab.client("c2").address6)


def test_beside_a_learning_switch_of_ryus(make_lab: Callable[..., Lab]) -> None:
    """``simple_switch_13`` wants the table-miss rule of table 0; the balancer's must be there again."""
    lab = make_lab("single", applications=["ryu.app.simple_switch_13"])
    lab.start_servers()
    lab.start_controller()
    _serves(lab)
    lab.controller.kill()
    lab.start_controller()
    settle(lab)
    wait_until(lambda: lab.client("c1").answered(f"http://{VIP}/", 3) == 3, 10, "it serves after a restart")
    _serves(lab)


def test_beside_ofctl_rest_whose_interface_wants_our_token(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab("single", applications=["ryu.app.ofctl_rest"])
    lab.start_servers()
    lab.start_controller()
    _serves(lab)
    asked = "/stats/switches"
    answered = lab.rest.request("GET", asked)
    assert (answered.status_code, answered.text) == (200, "[1]")
    # It cannot print all of Open vSwitch's actions: one table, then.
    listed = lab.rest.post("/stats/flow/1", {"table_id": 60})["1"]
    assert {flow["table_id"] for flow in listed} == {60}
    assert len(listed) >= 2, "it sees the balancer's rules"
    assert len(lab.rest.get("/stats/port/1")["1"]) >= 6
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        refused = lab.rest.request("GET", asked, headers=headers)
        assert refused.status_code == 401, refused.text
        before = time.monotonic()
        with contextlib.suppress(httpx.TransportError):
            assert lab.rest.request("POST", "/stats/flowentry/add", {"dpid": 1, "match": {}, "actions": []},
                                    headers=headers).status_code == 401
        assert time.monotonic() - before < 5
    assert set(lab.client("c2").who(f"http://{VIP}/", 45)) == {"s1", "s2", "s3"}, "and nothing was changed"
