# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The balancer's own address inside the members' network: where checks come from.

    bridge ── lbm-BRIDGE ══ members │ addresses        │: network namespace lbmon-BRIDGE-NUMBER

Names of network namespaces are the whole host's, those of bridges are not: the number is that of the network namespace
in which the bridge is (its inode), so that bridges of one name in two of them do not meet.

Owns the namespace, the veth pair and the port of the bridge; never the bridge. A namespace of its own, because the
network of the members may have the same numbers as others of this host, and because what is checked must take the way
that clients' packets take. To the bridge, and to a fast path beside it, it is a port like any other.

Everything is known by its name: what a process that was killed left behind is taken over, and what is there already is
not made again. Frames leave with whole checksums: the userspace datapath would hand on what a kernel leaves to be
completed by the card, and not every way out of it completes that.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import hashlib
import ipaddress
import json
import logging
import os
import socket
import struct
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lbapp.dataflow.fastpath.records import read
from lbapp.dataflow.ovs import Ovs, OvsError
from lbapp.monitors import namespace

LOG = logging.getLogger("lbapp.monitors")

NAMESPACES = Path("/run/netns")
INSIDE = "members"
"""The interface in the namespace."""
NAME_MOST = 15
COMMAND_S = 15.0
OPENED_S = 5.0
_SIOCETHTOOL = 0x8946
_ETHTOOL_SET = {"checksums": 0x17, "segmentation": 0x1F, "generic segmentation": 0x24}


class PlaceError(Exception):
    """There cannot be an address in the members' network; the text says why."""


def port_name(bridge: str) -> str:
    """The interface that is a port of the bridge: ``lbm-`` and its name, or something short of it."""
    name = f"lbm-{bridge}"
    if len(name) <= NAME_MOST:
        return name
    return f"lbm-{hashlib.blake2s(bridge.encode(), digest_size=5).hexdigest()}"


def namespace_name(bridge: str) -> str:
    """The network namespace of a bridge's place, where the bridge is in the one that the calling thread is in."""
    return f"lbmon-{bridge}-{Path('/proc/thread-self/ns/net').stat().st_ino}"


class Place:
    """See the module. In the network namespace in which it is made, and its methods are called.

    Args:
        ovs: the switch.
        bridge: its name.
        addresses: with prefix length, such as ``10.0.0.250/24``.
        tag: the VLAN of the members, where the bridge has several.
        gateways: routers that lead to members elsewhere, at most one of each family.

    Attributes:
        netns: the namespace's path.

    Raises:
        PlaceError: an address is none.
    """

    def __init__(self, ovs: Ovs, bridge: str, addresses: Collection[str], tag: int | None = None,
                 gateways: Collection[str] = ()) -> None:
        self._ovs, self._bridge, self._tag = ovs, bridge, tag
        try:
            self._addresses = {str(ipaddress.ip_interface(one)) for one in addresses}
        except ValueError as error:
            raise PlaceError(f"monitor address: {error}") from None
        self._gateways = {":" in one: one for one in gateways}
        self._namespace = namespace_name(bridge)
        self._port = port_name(bridge)
        self.netns = NAMESPACES / self._namespace

    def ensure(self) -> Path:
        """Have everything there as it should be, and return the namespace's path.

        Raises:
            PlaceError: it cannot be had.
        """
        try:
            if self._bridge not in self._ovs.bridges():
                raise PlaceError(f"no address for checks: there is no bridge {self._bridge}")
            self._make_namespace()
            made = self._make_pair()
            with _inside(self.netns):
                _whole_checksums(INSIDE)
                _settings(INSIDE)
            self._give_addresses()
            _ip("-n", self._namespace, "link", "set", "lo", "up")
            _ip("-n", self._namespace, "link", "set", INSIDE, "up")
            self._give_routes()
            # Nothing but what passes: this end says nothing of its own.
            _ip("link", "set", self._port, "addrgenmode", "none", "up")
            self._make_port(made)
        except OvsError as error:
            raise PlaceError(str(error)) from error
        except OSError as error:
            raise PlaceError(f"{self._namespace}: {error.strerror or error}") from error
        return self.netns

    def remove(self) -> None:
        """Take it all down; what is not there is no fault.

        Raises:
            PlaceError: something stays.
        """
        try:
            if self._is_port():
                self._ovs.delete_port(self._bridge, self._port)
        except OvsError as error:
            raise PlaceError(str(error)) from error
        inner = self._link(INSIDE, inside=True) if self.netns.exists() else None
        if self._link(self._port) is not None:
            _ip("link", "delete", self._port)
        elif inner is not None:
            return  # it is another's
        if self.netns.exists():
            _ip("netns", "delete", self._namespace)

    # ---------------------------------------------------------------------- parts

    def _make_namespace(self) -> None:
        if self.netns.exists():
            with contextlib.suppress(PlaceError):
                _ip("-n", self._namespace, "link", "show", "lo")
                return
            self.netns.unlink()  # the name of one that is no more
        _ip("netns", "add", self._namespace)

    def _link(self, name: str, inside: bool = False) -> dict[str, Any] | None:
        where = ("-n", self._namespace) if inside else ()
        found = [one for one in _listed(*where, "link", "show") if one.get("ifname") == name]
        return found[0] if found else None

    def _make_pair(self) -> bool:
        """Returns whether it is new."""
        outer, inner = self._link(self._port), self._link(INSIDE, inside=True)
        if inner is not None:
            if outer is None or (outer.get("link_index"), inner.get("link_index")) != (inner["ifindex"],
                                                                                       outer["ifindex"]):
                raise PlaceError(f"{self._namespace} is in use by another network namespace, "
                                 f"which has a bridge {self._bridge} too")
            return False
        if outer is not None:  # its other end is not where it should be
            _ip("link", "delete", self._port)
        _ip("link", "add", self._port, "type", "veth", "peer", "name", INSIDE, "netns", self._namespace)
        return True

    def _give_addresses(self) -> None:
        listed = _listed("-n", self._namespace, "address", "show", "dev", INSIDE)
        there = {f"{one['local']}/{one['prefixlen']}" for link in listed for one in link.get("addr_info", ())
                 if one.get("scope") == "global"}
        for address in there - self._addresses:
            _ip("-n", self._namespace, "address", "delete", address, "dev", INSIDE)
        for address in sorted(self._addresses - there):
            # Its uniqueness was the operator's to see to; checks are not to wait for a second.
            unasked = ("nodad",) if ":" in address else ()
            _ip("-n", self._namespace, "address", "add", address, "dev", INSIDE, *unasked)

    def _give_routes(self) -> None:
        for six in (False, True):
            words = ("-n", self._namespace, "-6" if six else "-4", "route")
            if six in self._gateways:
                _ip(*words, "replace", "default", "via", self._gateways[six], "dev", INSIDE)
            elif _listed(*words, "show", "default"):
                _ip(*words, "delete", "default")

    def _is_port(self) -> bool:
        # By the port, not by its interface: a fast path puts one of its own there.
        return (self._bridge in self._ovs.bridges()
                and self._port in self._ovs.vsctl("list-ports", self._bridge, wait=False).split())

    def _make_port(self, new: bool) -> None:
        there = self._is_port()
        if there and new:  # of the pair that was here before
            self._ovs.delete_port(self._bridge, self._port)
            there = False
        if not there:
            vlan = [] if self._tag is None else ["--", "set", "Port", self._port, f"tag={self._tag}"]
            self._ovs.vsctl("--may-exist", "add-port", self._bridge, self._port, *vlan)
            LOG.info("members are checked from %s, port %d of %s", ", ".join(sorted(self._addresses)), self._number(),
                     self._bridge)
        elif self._tag is not None:
            self._ovs.vsctl("set", "Port", self._port, f"tag={self._tag}")
        else:
            self._ovs.vsctl("clear", "Port", self._port, "tag")


    def _number(self) -> int:
        """The port's OpenFlow number, in one reading: a fast path may be exchanging its interface just now."""
        deadline = time.monotonic() + OPENED_S
        while True:
            found = [one for one in read(self._ovs) if (one.bridge, one.wire or one.name) == (self._bridge, self._port)]
            for one in found:
                if one.ofport is not None:
                    return one.ofport
            if time.monotonic() > deadline:
                why = found[0].error if found else "its record is gone"
                raise PlaceError(f"{self._port} cannot be a port of {self._bridge}: {why or 'it is not opened'}")
            time.sleep(0.05)


def _ip(*arguments: str) -> str:
    """The command of iproute2.

    Raises:
        PlaceError: it failed.
    """
    try:
        done = subprocess.run(["ip", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=COMMAND_S, check=False)
    except FileNotFoundError:
        raise PlaceError("ip is not installed (Debian package iproute2)") from None
    except subprocess.TimeoutExpired:
        raise PlaceError(f"no end within {COMMAND_S:g} s: ip {' '.join(arguments)}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PlaceError(f"ip {' '.join(arguments)}: {said[-1] if said else f'exit status {done.returncode}'}")
    return done.stdout


def _listed(*arguments: str) -> list[dict[str, Any]]:
    text = _ip("-json", *arguments)
    try:
        return [one for one in json.loads(text or "[]") if one]  # what does not fit leaves an empty object
    except ValueError:
        raise PlaceError(f"ip {' '.join(arguments)}: an answer that cannot be read") from None


@contextlib.contextmanager
def _inside(netns: Path) -> Iterator[None]:
    """The calling thread is in the namespace. Nothing in the block may wait: green threads share one."""
    # Held open: by its path it would be the namespace that was entered.
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        namespace.enter(netns)
        try:
            yield
        finally:
            namespace.enter(Path(f"/proc/self/fd/{here}"))
    finally:
        os.close(here)


def _whole_checksums(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for what, command in _ETHTOOL_SET.items():
            value = array.array("I", [command, 0])
            request = struct.pack("16sP8x", interface.encode(), value.buffer_info()[0])
            try:
                fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise OSError(error.errno, f"{what} offload of {interface}: {error.strerror}") from None


def _settings(interface: str) -> None:
    """Nobody but the operator gives it addresses and routes."""
    for name, value in (("accept_ra", "0"), ("autoconf", "0"), ("router_solicitations", "0")):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            Path(f"/proc/sys/net/ipv6/conf/{interface}/{name}").write_text(value)
