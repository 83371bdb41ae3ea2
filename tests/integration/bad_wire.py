# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Wires that lose, repeat, reorder or damage packets, where the kernel has no netem: a program at a host's egress."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from topologies.hosts import LabHost

SOURCE = Path(__file__).with_name("bad_wire.bpf.c")
SLOW, LATE = "slow0", "slow1"


OFFLOADS = ("tx", "tso", "gso")


def _index(host: LabHost, interface: str) -> int:
    with host.entered():
        return socket.if_nametoindex(interface)


@contextlib.contextmanager
def bad_wire(host: LabHost, directory: Path, *, loss: float = 0, twice: float = 0, order: float = 0,
             damage: float = 0) -> Iterator[None]:
    """Make what a host sends suffer, for the time of the block.

    Args:
        host: the host.
        directory: for the compiled program.
        loss, twice, order, damage: the share of packets (0 to 1) that is lost, sent twice, overtaken, or has one bit
            flipped. Damage needs checksums that were really computed: they are, for the time of the block, and so
            there are no packets larger than the MTU.
    """
    host.run("ip", "link", "add", SLOW, "mtu", "65535", "type", "veth", "peer", "name", LATE, "mtu", "65535")
    try:
        for name in (SLOW, LATE):
            host.run("sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
            host.run("ip", "link", "set", name, "arp", "off", "up")
        # A packet waits about as long as the wire takes for a few others.
        host.run("tc", "qdisc", "add", "dev", SLOW, "root", "tbf", "rate", "8mbit", "burst", "70k", "latency", "100ms")
        program = directory / f"bad-{host.name}.o"
        shares = {"LOSS": loss, "TWICE": twice, "ORDER": order, "DAMAGE": damage}
        subprocess.run(["clang", "-O2", "-g", "-target", "bpf", "-I/usr/include/x86_64-linux-gnu",
                        *(f"-D{name}={round(share * 1024)}" for name, share in shares.items()),
                        f"-DSLOW={_index(host, SLOW)}", f"-DWIRE={_index(host, host.interface)}",
                        "-c", str(SOURCE), "-o", str(program)], check=True, capture_output=True, timeout=60)
        if damage:
            for name in (host.interface, SLOW):
                host.run("ethtool", "-K", name, *(word for one in OFFLOADS for word in (one, "off")))
        for interface, where, section in ((host.interface, "egress", "tc/bad"), (LATE, "ingress", "tc/late")):
            # A server agent may have its own program on the host's interfaces, and may be putting it there now: who
            # comes second is refused, and finds what it wants.
            host.run("tc", "qdisc", "add", "dev", interface, "clsact", check=False)
            host.run("tc", "filter", "add", "dev", interface, where, "bpf", "da", "obj", str(program), "sec", section)
        yield
    finally:
        host.run("tc", "filter", "del", "dev", host.interface, "egress", check=False)
        host.run("ip", "link", "del", SLOW, check=False)
        if damage:
            host.run("ethtool", "-K", host.interface, *(word for one in OFFLOADS for word in (one, "on")), check=False)
