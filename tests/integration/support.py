# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of this directory share: sites to configure, clients that say exactly what they saw.

Never asserts anything about the load balancer: that is what the tests are for.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topologies.hosts import ECHO_PORT, LabHost
from topologies.namespace import Namespace, end, wait_until
from topologies.single import SingleTopo

if TYPE_CHECKING:
    from topologies.lab import Lab

VIP, VIP6 = SingleTopo.VIP, SingleTopo.VIP6
LAN = [{"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254"},
       {"name": "lan6", "cidr": "fd00::/64", "address": "fd00::254"}]
SIGMAS = 5
"""An observed share may be so many standard deviations off: by chance once in a million and a half."""
REFUSED_WITHIN = 0.5
"""Seconds: a refusal comes at once."""
TOLD_WITHIN = 3.0
"""Seconds: agents tell of ends several times a second, and of what they have counted once."""
FAULT = "table inet fault {{\n chain in {{\n type filter hook input priority -10; policy accept;\n {}\n }}\n}}\n"

# ------------------------------------------------------------------ sites


def members(lab: Lab, port: int = 80, six: bool = False, weights: Sequence[int] = (), names: Iterable[str] = (),
            **more: Any) -> list[dict[str, Any]]:
    """All servers of a laboratory (or those named) as members, of weight 1 or as given in their order."""
    chosen = [lab.server(name) for name in names] or lab.servers
    return [{"name": host.name, "address": host.address6 if six else host.address, "protocol_port": port,
             "weight": weights[index] if weights else 1, **more} for index, host in enumerate(chosen)]


def pool(name: str, algorithm: str, of: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A pool of a site."""
    return {"name": name, "lb_algorithm": algorithm, "members": of, **more}


def server(name: str, port: int, use: str | None, vip: str = VIP, protocol: str = "TCP", **more: Any) -> dict[str, Any]:
    """A virtual server of a site."""
    return {"name": name, "vip_address": vip, "protocol": protocol, "protocol_port": port, "pool": use, **more}


def configure(lab: Lab, pools: list[dict[str, Any]], servers: list[dict[str, Any]],
              networks: Sequence[dict[str, Any]] = (), offline: Iterable[str] = ()) -> None:
    """Make this the configuration and wait until the switches have it and every member was found.

    Args:
        lab: the laboratory.
        pools, servers, networks: as in a site file.
        offline: names of virtual servers that are not expected to serve.
    """
    for host in lab.servers:
        # Several virtual servers share a member's port here: a client's port that comes back on another one
        # within a minute would meet the member's memory of the first.
        host.run("sysctl", "-qw", "net.ipv4.tcp_max_tw_buckets=0")
    lab.apply({"networks": list(networks), "pools": pools, "virtual_servers": servers})
    settle(lab, offline)


def settle(lab: Lab, offline: Iterable[str] = (), within: float = 10.0, cached: bool = True) -> None:
    """Wait until the switches have the configuration, and all but the ``offline`` virtual servers serve.

    Args:
        lab: the laboratory.
        offline: names of virtual servers that are not expected to serve.
        within: seconds.
        cached: Open vSwitch's cache is to follow as well.
    """
    silent = set(offline)

    def settled() -> bool:
        listed = lab.rest.get("/v1/virtual-servers?limit=1000")["virtual_servers"]
        return all(one["provisioning_status"] == "ACTIVE"
                   and (one["name"] in silent or one["operating_status"] == "ONLINE") for one in listed)

    wait_until(settled, within, "the configuration is in the switches and the members were found")
    if cached:
        in_its_cache(lab)


def in_its_cache(lab: Lab) -> None:
    """Wait until Open vSwitch's cache has followed its rules, which it does a moment later."""
    for _ in range(2):  # a round that was under way may have looked at what changed before it did
        lab.ovs.appctl("revalidator/wait")


def member_path(lab: Lab, pool_name: str, name: str) -> str:
    """The REST path of a member."""
    listed = lab.rest.get(f"/v1/pools/{pool_name}/members")["members"]
    identifier = next(one["id"] for one in listed if one["name"] == name)
    return f"/v1/pools/{pool_name}/members/{identifier}"


def change_member(lab: Lab, pool_name: str, name: str, cached: bool = True, **fields: Any) -> None:
    """Change a member by PATCH, and wait until the switches have it (``cached``: see :func:`settle`)."""
    lab.rest.patch(member_path(lab, pool_name, name), fields)
    offline = [one["name"] for one in lab.rest.get("/v1/virtual-servers?limit=1000")["virtual_servers"]]
    settle(lab, offline, cached=cached)


def statistics(lab: Lab, name: str) -> dict[str, Any]:
    """The counters of a virtual server."""
    found = [one for one in lab.rest.get("/v1/stats")["virtual_servers"] if one["name"] == name]
    answer: dict[str, Any] = found[0]
    return answer


def wait_for_statistics(lab: Lab, name: str, within: float = 5.0, **wanted: Any) -> dict[str, Any]:
    """Wait until counters of a virtual server have these values (closed connections are told in batches)."""
    deadline = time.monotonic() + within
    while True:
        found = statistics(lab, name)
        if all(found[key] == value for key, value in wanted.items()):
            return found
        assert time.monotonic() < deadline, f"{name}: expected {wanted}, found {found}"
        time.sleep(0.1)


def at_rest(lab: Lab, name: str, active: int = 0) -> dict[str, Any]:
    """The counters of a virtual server once all ends of connections before are counted: they are told in batches, and
    what is told later would count for what a test does next.

    Where an agent was killed or cut off, some are never told of: then once nothing has been told for ``TOLD_WITHIN``.
    ``active``: connections that the test holds open.
    """
    seen, since = (-1, -1), 0.0

    def found() -> dict[str, Any] | None:
        nonlocal seen, since
        now = statistics(lab, name)
        if seen != (now["opened"], now["closed"]):
            seen, since = (now["opened"], now["closed"]), time.monotonic()
        rests = seen[0] - seen[1] == active or time.monotonic() - since > TOLD_WITHIN
        return now if rests else None
    answer: dict[str, Any] = wait_until(found, 20, f"the ends of earlier connections of {name}")
    return answer


def wait_for_both_rules(lab: Lab, name: str, within: float = 15.0) -> None:
    """Wait until a virtual server with ``state: rules`` has no connection and all is counted.

    A connection has ended once one of its rules has; its other direction is counted when that rule goes too.
    """
    wait_until(lambda: not lab.rest.get(f"/v1/connections?virtual_server={name}")["connections"], within,
               f"both rules of each connection of {name} are gone and counted")


def proportional(counted: Counter[str], weights: dict[str, int]) -> None:
    """Assert that counts are as their weights, within what chance allows (binomial, five sigma)."""
    number, total = sum(counted.values()), sum(weights.values())
    assert set(counted) <= {name for name, weight in weights.items() if weight}, counted
    for name, weight in weights.items():
        share = weight / total
        slack = SIGMAS * math.sqrt(number * share * (1 - share))
        assert abs(counted[name] - number * share) <= slack, (
            f"{name}: {counted[name]} of {number}, expected {number * share:.0f} give or take {slack:.0f}")


# ------------------------------------------------------------------ TCP clients


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def tcp(host: Namespace, address: str, port: int, source: str | None = None, source_port: int = 0,
        timeout: float = 3.0) -> socket.socket:
    """Connect from inside a namespace.

    Raises:
        ConnectionRefusedError: a RST came.
        TimeoutError: nothing came.
    """
    with host.entered():
        endpoint = socket.socket(family_of(address), socket.SOCK_STREAM)
    endpoint.settimeout(timeout)
    try:
        if source is not None or source_port:
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            endpoint.bind((source or "", source_port))
        endpoint.connect((address, port))
    except BaseException:
        endpoint.close()
        raise
    return endpoint


def reset(end_of: socket.socket) -> None:
    """Close it with a RST."""
    end_of.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end_of.close()


class Held:
    """A connection that stays open and can be asked, again and again, who serves it."""

    def __init__(self, host: Namespace, address: str, port: int, source: str | None = None,
                 source_port: int = 0) -> None:
        self.socket = tcp(host, address, port, source, source_port)
        self.port: int = self.socket.getsockname()[1]
        self.server = self.ask()

    def ask(self) -> str:
        """The name of the server at the other end."""
        self.socket.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        answer = b""
        while True:
            more = self.socket.recv(4096)
            if not more:
                raise ConnectionResetError("the server closed the connection")
            answer += more
            head, found, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            if found and length is not None and len(body) >= int(length.group(1)):
                assert head.startswith(b"HTTP/1.1 200 "), head
                return body.decode().strip()

    def close(self) -> None:
        """Close it in the ordinary way (FIN)."""
        self.socket.close()

    def reset(self) -> None:
        """Close it with a RST."""
        reset(self.socket)


@contextlib.contextmanager
def held(host: Namespace, address: str, port: int, count: int, **options: Any) -> Iterator[list[Held]]:
    """So many connections, held open for the time of the block."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            one = Held(host, address, port, **options)
            stack.callback(one.close)
            made.append(one)
        yield made


def ask_from(host: Namespace, address: str, port: int, source: str) -> str:
    """Who answers one new connection from a certain address of the host."""
    one = Held(host, address, port, source)
    one.close()
    return one.server


def in_order(host: LabHost, url: str, count: int) -> list[str]:
    """Who answered, connection by connection, one after the other."""
    return host.run("curl", "-sSf", "--max-time", "30", "-H", "Connection: close", f"{url}?[1-{count}]",
                    timeout=40).stdout.split()


def refused(host: Namespace, address: str, port: int) -> float:
    """The seconds until a connection was refused with a RST.

    Raises:
        AssertionError: it was accepted, or nothing came.
    """
    begun = time.monotonic()
    try:
        tcp(host, address, port, timeout=3).close()
    except ConnectionRefusedError:
        return time.monotonic() - begun
    except TimeoutError:
        raise AssertionError(f"[{address}]:{port}: no answer, expected a RST") from None
    raise AssertionError(f"[{address}]:{port}: accepted, expected a RST")


def unreachable(host: LabHost, address: str, port: int) -> float:
    """The seconds until a datagram was answered with ICMP "port unreachable"."""
    begun = time.monotonic()
    try:
        answered = host.udp(address, port, timeout=3)
    except ConnectionRefusedError:
        return time.monotonic() - begun
    raise AssertionError(f"[{address}]:{port}: expected ICMP port unreachable, the answer was {answered}")


@contextlib.contextmanager
def addresses(host: LabHost, network: str, first: int, count: int) -> Iterator[list[str]]:
    """Further addresses of a host for the time of the block: ``network`` with the last number ``first`` and on."""
    given = [f"{network}{first + index}" for index in range(count)]
    six = ":" in network
    for address in given:
        host.run("ip", *(("-6",) if six else ()), "addr", "add", f"{address}/{128 if six else 32}", "dev",
                 host.interface, *(("nodad",) if six else ()))
    try:
        yield given
    finally:
        for address in given:
            host.run("ip", "addr", "del", f"{address}/{128 if six else 32}", "dev", host.interface, check=False)


@contextlib.contextmanager
def fault(host: LabHost, *rules: str) -> Iterator[Callable[[], str]]:
    """Rules of nftables at what comes in at a host; makes a function that lists them with their counters."""
    host.run("nft", "-f", "-", stdin=FAULT.format("\n".join(rules)))
    try:
        yield lambda: host.run("nft", "list", "table", "inet", "fault").stdout
    finally:
        host.run("nft", "delete", "table", "inet", "fault")


class Download:
    """A curl that fetches a file slowly enough for things to happen meanwhile.

    Args:
        host: the client.
        url: what to fetch.
        target: where to put it.
        limit: curl's ``--limit-rate``.
    """

    def __init__(self, host: LabHost, url: str, target: Path, limit: str = "6M") -> None:
        self.target = target
        target.unlink(missing_ok=True)
        self.process = host.popen("curl", "-gsSf", "--limit-rate", limit, "--max-time", "60", "-o", str(target), url,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.target.stat().st_size if self.target.exists() else 0

    @property
    def running(self) -> bool:
        """Whether it is still under way."""
        return self.process.poll() is None

    def progressed(self, octets: int, within: float = 15.0) -> None:
        """Wait until so many bytes have arrived."""
        wait_until(lambda: self.size >= octets, within, f"{octets} bytes of {self.target.name}")

    def digest(self) -> str:
        """The SHA-256 of what it got, once it has ended well."""
        import hashlib

        status = self.process.wait(timeout=70)
        assert self.process.stderr is not None
        assert status == 0, self.process.stderr.read().decode()
        return hashlib.sha256(self.target.read_bytes()).hexdigest()

    def close(self) -> None:
        """End it and remove what it got."""
        end(self.process)
        self.target.unlink(missing_ok=True)


@contextlib.contextmanager
def downloads(host: LabHost, urls: Sequence[str], directory: Path, limit: str = "6M") -> Iterator[list[Download]]:
    """Several downloads for the time of the block."""
    with contextlib.ExitStack() as stack:
        made = []
        for index, url in enumerate(urls):
            made.append(Download(host, url, directory / f"download-{host.name}-{index}", limit))
            stack.callback(made[-1].close)
        yield made


def lbapp(lab: Lab, *words: str) -> subprocess.Popen[str]:
    """The command, beside the controller."""
    return lab.root.popen(lab.controller.command, "--token-file", str(lab.controller.state / "token"), *words,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def said(process: subprocess.Popen[str], within: float = 60.0) -> str:
    """All that a command said, once it has ended well."""
    text, _ = process.communicate(timeout=within)
    assert process.returncode == 0, text
    return text


def flows(lab: Lab, *match: str, bridge: str = "") -> list[str]:
    """The rules of a switch that match, with their counters."""
    return [line.strip() for line in lab.ovs.ofctl("dump-flows", bridge or lab.bridges[0], *match).splitlines()
            if "cookie=" in line]


def packets(flow: str) -> int:
    """``n_packets`` of a rule as :func:`flows` prints it."""
    found = re.search(r"n_packets=(\d+)", flow)
    assert found is not None, flow
    return int(found.group(1))


__all__ = [
    "ECHO_PORT", "LAN", "REFUSED_WITHIN", "VIP", "VIP6", "Download", "Held", "addresses", "ask_from", "at_rest",
    "change_member", "configure", "downloads", "fault", "flows", "held", "in_its_cache", "in_order", "lbapp",
    "member_path", "members", "packets", "pool", "proportional", "refused", "reset", "said", "server", "settle",
    "statistics", "tcp", "unreachable", "wait_for_statistics",
]
