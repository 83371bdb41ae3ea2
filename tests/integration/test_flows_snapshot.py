# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of a real switch: as reviewed (``snapshots/*.txt``), and exactly those that the program says.

A snapshot is ``ovs-ofctl dump-flows --no-stats`` and ``dump-groups`` of a site's switch, sorted, without the
digests in the cookies (which repeat the rule). When rules change on purpose, renew the snapshots and review
their difference like code:

    LBAPP_RENEW_SNAPSHOTS=1 .venv/bin/pytest tests/integration/test_flows_snapshot.py
    git diff tests/integration/snapshots
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
import yaml

from lbapp.config.model import Configuration, Member, Network, Pool, VirtualServer
from lbapp.control.messages import Host
from lbapp.dataflow.openflow import GROUP_ADD, add_flow, group_mod, message
from lbapp.dataflow.pipeline import check
from lbapp.dataflow.program import SwitchProgram
from tests.integration.support import configure, settle

if TYPE_CHECKING:
    from topologies.lab import Lab

SNAPSHOTS = Path(__file__).with_name("snapshots")
RENEW = os.environ.get("LBAPP_RENEW_SNAPSHOTS") == "1"
HELLO, ERROR, ECHO_REQUEST, ECHO_REPLY, BARRIER_REQUEST, BARRIER_REPLY = 0, 1, 2, 3, 20, 21
_DIGEST = re.compile(r"(cookie=0x1b[0-9a-f]{8})[0-9a-f]{6}\b")

Resource = TypeVar("Resource", VirtualServer, Pool, Member, Network)


def dumped(lab: Lab, bridge: str, digests: bool = False) -> list[str]:
    """The rules and groups of a bridge, in an order of their own."""
    rules = lab.ovs.ofctl("--no-stats", "dump-flows", bridge).splitlines()
    groups = [line for line in lab.ovs.ofctl("dump-groups", bridge).splitlines() if "group_id=" in line]
    lines = [line.strip() for line in rules if "cookie=" in line]
    if not digests:
        lines = [_DIGEST.sub(r"\1......", line) for line in lines]
    return sorted(lines, key=_place) + sorted(line.strip() for line in groups)


def _place(line: str) -> tuple[int, int, str]:
    table, priority = re.search(r"table=(\d+)", line), re.search(r"priority=(\d+)", line)
    return int(table.group(1)) if table else 0, -int(priority.group(1)) if priority else 0, line


@pytest.mark.parametrize("topo", ["single", "two_networks"])
def test_rules_are_as_reviewed(make_lab: Callable[..., Lab], topo: str) -> None:
    lab = make_lab(topo)
    lab.start_controller()
    lab.apply(lab.topo.SITE)
    settle(lab)
    found = dumped(lab, "lb1")
    file = SNAPSHOTS / f"{topo}.txt"
    if RENEW:
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(found) + "\n")
        pytest.skip(f"{file.name} was renewed: review its difference")
    assert found == file.read_text().splitlines(), "see this module's text for how to renew the snapshots"


# ------------------------------------------------------------------ the program and the switch


def _resource(kind: type[Resource], view: dict[str, Any]) -> Resource:
    """A resource from what REST shows of it, without the statuses."""
    known = {field.name for field in msgspec.structs.fields(kind)}
    return msgspec.convert({key: value for key, value in view.items() if key in known}, kind)


def _pool(view: dict[str, Any]) -> Pool:
    members = tuple(_resource(Member, member) for member in view["members"])
    return msgspec.structs.replace(_resource(Pool, {**view, "members": []}), members=members)


def _listed(lab: Lab, kind: str) -> Iterator[dict[str, Any]]:
    path: str | None = f"/v1/{kind}?limit=1000"
    while path is not None:
        page = lab.rest.get(path)
        yield from page[kind.replace("-", "_")]
        path = page["next"]


def configured(lab: Lab) -> Configuration:
    """The configuration as REST shows it."""
    return Configuration(
        virtual_servers={one["id"]: _resource(VirtualServer, one) for one in _listed(lab, "virtual-servers")},
        pools={one["id"]: _pool(one) for one in _listed(lab, "pools")},
        networks={one["id"]: _resource(Network, one) for one in _listed(lab, "networks")})


def programmed(lab: Lab) -> SwitchProgram:
    """What the first switch should hold, computed here from what REST shows."""
    view = next(one for one in lab.rest.get("/v1/switches")["switches"] if int(one["dpid"], 16) == 1)
    hosts = {address: Host(bytes.fromhex(host["mac"].replace(":", "")), host["port"])
             for address, host in view["hosts"].items()}
    program = SwitchProgram(1, hosts)
    for _ in program.configure(configured(lab)):
        pass
    return program


def load(lab: Lab, bridge: str, program: SwitchProgram) -> None:
    """Give a bridge the rules of a program, by OpenFlow 1.3 on its management socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(10)
        line.connect(str(lab.ovs.rundir / f"{bridge}.mgmt"))
        line.sendall(message(HELLO, b"", 1))
        line.sendall(b"".join([*(group_mod(GROUP_ADD, group) for group in program.groups()),
                               *map(add_flow, program.flows()), message(BARRIER_REQUEST, b"", 2)]))
        kind = HELLO
        while kind != BARRIER_REPLY:
            head = line.recv(8, socket.MSG_WAITALL)
            _version, kind, length, xid = struct.unpack("!BBHI", head)
            body = line.recv(length - 8, socket.MSG_WAITALL) if length > 8 else b""
            assert kind != ERROR, f"the switch refused a rule: {body.hex()}"
            if kind == ECHO_REQUEST:
                line.sendall(message(ECHO_REPLY, body, xid))


def compared(lab: Lab) -> None:
    """Assert that the switch holds what the program says, and nothing else."""
    program = programmed(lab)
    for flow in program.flows():
        check(flow)
    lab.ovs.add_bridge("wanted")
    try:
        load(lab, "wanted", program)
        found, wanted = dumped(lab, "lb1", digests=True), dumped(lab, "wanted", digests=True)
    finally:
        lab.ovs.delete_bridge("wanted")
    assert sorted(set(found) - set(wanted)) == [], "rules that nobody asked for"
    assert sorted(set(wanted) - set(found)) == [], "rules that are missing"
    assert len(found) == len(wanted)


@pytest.mark.parametrize("changed", [False, True], ids=["applied once", "after changes"])
def test_the_switch_holds_exactly_what_the_program_says(lab: Lab, changed: bool) -> None:
    """After a first application, and after changes that each touched a part (differences add up to the whole)."""
    site = yaml.safe_load(lab.topo.SITE.read_text())
    configure(lab, site["pools"], site["virtual_servers"], site["networks"])
    if changed:
        lab.rest.patch("/v1/virtual-servers/web", {"maintenance": True})
        lab.rest.patch("/v1/pools/web6", {"lb_algorithm": "SOURCE_IP"})
        lab.rest.patch("/v1/virtual-servers/web-punted", {"state": "rules"})
        lab.rest.patch("/v1/virtual-servers/web-rules", {"state": "conntrack", "decision": "switch"})
        lab.rest.delete("/v1/virtual-servers/echo6")
        lab.rest.patch("/v1/virtual-servers/echo", {"snat": True})
        lab.rest.patch("/v1/networks/lan", {"gateway": "10.0.0.3"})
        members = lab.rest.get("/v1/pools/web-rules/members")["members"]
        lab.rest.delete(f"/v1/pools/web-rules/members/{members[0]['id']}")
        lab.rest.post("/v1/pools/web-rules/members", {"name": "s1", "address": "10.0.0.51", "protocol_port": 5300})
        lab.rest.patch(f"/v1/pools/web-rules/members/{members[1]['id']}", {"admin_state_up": False})
        settle(lab, ["web"])
    compared(lab)


def test_a_restarted_controller_finds_it_so(lab: Lab) -> None:
    """Reconciled from the switch's own rules: the same, also with a change made while it was away."""
    site = yaml.safe_load(lab.topo.SITE.read_text())
    configure(lab, site["pools"], site["virtual_servers"], site["networks"])
    stray = "table=60,priority=77,cookie=0x1b01000000123456,dl_dst=02:02:02:02:02:02,actions=drop"
    foreign = "table=70,priority=77,cookie=0x99,dl_dst=02:02:02:02:02:02,actions=drop"
    lab.ovs.ofctl("add-flow", "lb1", stray)
    lab.ovs.ofctl("add-flow", "lb1", foreign)
    lab.ovs.ofctl("--strict", "del-flows", "lb1", "table=60,priority=0")
    lab.controller.kill()
    lab.start_controller()
    settle(lab)
    try:
        listed = dumped(lab, "lb1")
        assert [line for line in listed if "cookie=0x99" in line], "somebody else's rule is left alone"
        lab.ovs.ofctl("--strict", "del-flows", "lb1", "table=70,priority=77,dl_dst=02:02:02:02:02:02")
        compared(lab)
    finally:
        lab.ovs.ofctl("del-flows", "lb1", "cookie=0x99/-1")
