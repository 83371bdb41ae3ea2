# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Size instead of speed: very many virtual servers, and very many connections held at once.

``configuration`` applies a large site with the command an operator uses and watches the switch;
``held`` opens connections through a virtual server that the switch decides. Both return plain
figures for the ``scale`` part of ``latest.json``. Further parts are in ``connections.py`` and ``watching.py``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench import connections, watching
from bench.dialogue import Dialogue
from bench.holder import SPARE_FILES
from bench.lab import BenchError, Lab, raise_open_files
from bench.lbapp_targets import Installation, Lbapp
from bench.load import WEB_PORT
from bench.machine import rss_bytes
from bench.targets import VIP

HELD_PORT = 7000
MEMBERS = 5
ADDRESSES_PER_SERVER = 100
APPLY_PATIENCE = 600.0
INSTALL_PATIENCE = 300.0
QUIET_SECONDS = 3.0
"""The switch holds all rules when their number has not changed for so long."""
HOLD_PATIENCE = 300.0
_HOLDER = str(Path(__file__).resolve().parent / "holder.py")

Progress = Callable[[str], None]


def virtual_address(index: int) -> str:
    """The address of the ``index``-th virtual server, inside the hosts' network."""
    return f"10.{64 + index // 62500}.{index // 250 % 250}.{index % 250 + 1}"


def member_addresses(servers: int) -> list[str]:
    """The addresses of all members; server ``n`` (from 1) has those in 10.1.n.0."""
    return [f"10.1.{server}.{host}" for host in range(1, ADDRESSES_PER_SERVER + 1) for server in range(1, servers + 1)]


def site(virtual_servers: int, addresses: Sequence[str]) -> dict[str, Any]:
    """A site of so many virtual servers with a pool of five members each, decided by the switch."""
    document: dict[str, Any] = {"networks": [], "pools": [], "virtual_servers": []}
    for index in range(virtual_servers):
        name = f"scale{index}"
        chosen = [addresses[(index + step) % len(addresses)] for step in range(MEMBERS)]
        document["pools"].append({
            "name": name, "lb_algorithm": "WEIGHTED_ROUND_ROBIN",
            "members": [{"address": address, "protocol_port": WEB_PORT} for address in chosen]})
        document["virtual_servers"].append({
            "name": name, "vip_address": virtual_address(index), "protocol": "TCP", "protocol_port": WEB_PORT,
            "pool": name})
    return document


def configuration(count: int, progress: Progress) -> dict[str, float]:
    """Apply ``count`` virtual servers at once, and wait until the switch holds them all.

    Returns:
        seconds for the command and until the last rule, rules, memory of controller and switch.
    """
    with Lab() as lab:
        progress("starting")
        installation = Installation(lab)
        for index, server in enumerate(installation.servers, 1):
            lab.ip([f"addr add 10.1.{index}.{host}/8 dev eth0" for host in range(1, ADDRESSES_PER_SERVER + 1)], server)
        path = lab.directory / "site.yaml"
        # JSON is YAML, and quick to write.
        path.write_text(json.dumps(site(count, member_addresses(len(installation.servers))), indent=0))
        empty = installation.rules()
        controller, switch = installation.controller, installation.ovs
        vswitchd = int((switch.rundir / "ovs-vswitchd.pid").read_text())
        result: dict[str, float] = {
            "apply_virtual_servers": count, "apply_members": count * MEMBERS,
            "apply_controller_rss_before": controller.rss_bytes(), "apply_switch_rss_before": rss_bytes(vswitchd)}
        progress(f"lbapp apply: {count} virtual servers")
        start = time.monotonic()
        lab.run(installation.command("apply", "-f", str(path), "--yes"),
                timeout=APPLY_PATIENCE)
        result["apply_seconds"] = time.monotonic() - start
        progress("waiting until the switch holds all rules")
        result["installed_seconds"] = _stable(installation, start, empty)
        for index in (0, count // 2, count - 1):
            installation.wait_answer(virtual_address(index), WEB_PORT)
        # Answers may have waited for a member's address to be found, so rules are counted at the end.
        rules = installation.rules()
        result |= {"rules": rules, "rules_per_virtual_server": (rules - empty) / count,
                   "apply_controller_rss_after": controller.rss_bytes(), "apply_switch_rss_after": rss_bytes(vswitchd)}
        return result


def _stable(installation: Installation, start: float, empty: int) -> float:
    """Seconds from ``start`` to the last change in the number of rules."""
    seen, changed = installation.rules(), time.monotonic()
    end = changed + INSTALL_PATIENCE
    while time.monotonic() - changed < QUIET_SECONDS or seen <= empty:
        if time.monotonic() > end:
            raise BenchError(f"the switch holds {seen} rules after {INSTALL_PATIENCE:.0f} s, {empty} at the start")
        time.sleep(0.2)
        rules = installation.rules()
        if rules != seen:
            seen, changed = rules, time.monotonic()
    return changed - start


def held(count: int, progress: Progress) -> dict[str, float]:
    """Hold ``count`` connections through a virtual server that the switch decides.

    Returns:
        how many were opened and carried a byte both ways, rules, growth of controller and switch.
    """
    room = raise_open_files(1 << 20) - SPARE_FILES
    with Lab() as lab, ExitStack() as stack:
        progress("starting")
        installation = Installation(lab)
        empty = installation.rules()
        target = Lbapp("held", "WEIGHTED_ROUND_ROBIN", decision="switch")
        installation.post("/v1/virtual-servers", target.virtual_server("held", HELD_PORT, installation.addresses))
        _serve(lab, installation, count, room)
        installation.wait_answer(VIP, HELD_PORT)
        time.sleep(1.0)
        controller = installation.controller
        vswitchd = int((installation.ovs.rundir / "ovs-vswitchd.pid").read_text())
        rules, rss, switch_rss = installation.rules(), controller.rss_bytes(), rss_bytes(vswitchd)
        messages = controller.messages()

        progress(f"opening {count} connections")
        start = time.monotonic()
        holders = [stack.enter_context(Dialogue(argv)) for argv in _hold_commands(installation, count, room)]
        opened = sum(holder.answer()["held"] for holder in holders)
        seconds = time.monotonic() - start
        progress("checking every connection")
        for holder in holders:
            holder.ask("check")
        alive = sum(holder.answer()["alive"] for holder in holders)
        tracked = installation.ovs.conntrack_entries()
        after = controller.messages()
        return {
            "connections_opened": opened, "connections_held": alive, "held_open_seconds": seconds,
            "held_conntrack_entries": tracked,
            "held_rules_per_virtual_server": installation.rules() - empty,
            "held_rules_added_by_connections": installation.rules() - rules,
            "held_controller_rss_before": rss, "held_controller_rss_after": controller.rss_bytes(),
            "held_controller_bytes_per_connection": (controller.rss_bytes() - rss) / max(1, opened),
            "held_messages_per_connection": (after.total - messages.total) / max(1, opened),
            "held_switch_bytes_per_connection": (rss_bytes(vswitchd) - switch_rss) / max(1, opened),
        }


def _serve(lab: Lab, installation: Installation, count: int, room: int) -> None:
    # The kernel spreads connections over the processes by hash: leave each a fifth more than its share.
    each = -(-count // len(installation.servers))
    processes = max(1, -(-each * 6 // (room * 5)))
    for server in installation.servers:
        for number in range(processes):
            lab.spawn(server, f"holder-{server.name}-{number}", [sys.executable, _HOLDER, "serve", str(HELD_PORT)])


def _hold_commands(installation: Installation, count: int, room: int) -> list[list[str]]:
    clients = installation.clients
    commands = []
    for index, client in enumerate(clients):
        share = count // len(clients) + (index < count % len(clients))
        while share > 0:
            now = min(share, room)
            share -= now
            commands.append(client.argv(sys.executable, _HOLDER, "hold", VIP, str(HELD_PORT), str(now)))
    return commands


APPLIED: dict[str, str] = {
    "apply_virtual_servers": "virtual servers applied at once",
    "apply_members": "with members",
    "apply_seconds": "lbapp apply, s",
    "installed_seconds": "until the switch holds all rules, s",
    "rules": "OpenFlow rules",
    "rules_per_virtual_server": "OpenFlow rules a virtual server",
    "apply_controller_rss_before": "controller before",
    "apply_controller_rss_after": "controller after",
    "apply_switch_rss_before": "switch before",
    "apply_switch_rss_after": "switch after",
}
HELD: dict[str, str] = {
    "connections_opened": "connections opened",
    "connections_held": "of these alive, a byte both ways",
    "held_open_seconds": "time to open them, s",
    "held_conntrack_entries": "conntrack entries",
    "held_rules_per_virtual_server": "OpenFlow rules of the virtual server",
    "held_rules_added_by_connections": "OpenFlow rules added by connections",
    "held_controller_rss_before": "controller before",
    "held_controller_rss_after": "controller after",
    "held_controller_bytes_per_connection": "controller, bytes/connection",
    "held_messages_per_connection": "OpenFlow messages/connection",
    "held_switch_bytes_per_connection": "switch, bytes/connection",
}


class Part(NamedTuple):
    """One part of the measurement: what runs, and its figures with their names on the terminal."""

    measure: Callable[[int, Progress], dict[str, float]]
    figures: dict[str, str]


PARTS: dict[str, Part] = {
    "configuration": Part(configuration, APPLIED), "held": Part(held, HELD),
    "fastpath": Part(connections.fastpath, connections.FASTPATH), "idle": Part(connections.idle, connections.IDLE),
    "watching": Part(watching.watching, watching.FIGURES)}
