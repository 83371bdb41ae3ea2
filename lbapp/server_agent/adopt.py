# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of ``adopt.bpf.c``, and where its program is attached.

Owns the layouts of what is in the tables, loading, and the TC filters. Never speaks with a controller, and knows no
clock. Filters are found by their name, priority and handle, whoever made them: so what a killed process left behind
goes on adopting until the next one takes its place or ``remove`` takes it off.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import struct
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lbapp.dataflow.fastpath import build, kernel, layout
from lbapp.dataflow.fastpath.netlink import EGRESS, INGRESS, Filter, Link, Netlink, NetlinkError

PRIORITY = 0x4C41
"""TC priority ("pref") of our filter: before that of a fast path on the same interface."""
HANDLE = 1
NAME = "lbapp-adopt"
OWN_CLSACT = " clsact"
"""At the end of a filter's name: the interface had no clsact before."""
COUNTERS = ("adopted", "refused", "early", "no_listener", "recycled", "time_wait")
"""In the order of the program's."""
MAX_SCALE = 14
LISTENER = struct.Struct("=16sHxx")
SETTINGS = struct.Struct("=Ixxxx")
SYSCTL = Path("/proc/sys/net/ipv4")
NEEDED = {
    "tcp_syncookies": "the kernel takes no connection by a cookie without it",
    "tcp_window_scaling": "clients have been offered window scaling",
    "tcp_sack": "clients have been offered SACK",
}
"""Settings of the kernel that must not be 0, and why."""
_ZERO = bytes(4)
_ANY = bytes(16)


class AdoptError(Exception):
    """Connections cannot be adopted here. The message says why."""


class Listener(NamedTuple):
    """Where connections are adopted; an address of None is any."""

    address: str | None
    port: int

    def pack(self) -> bytes:
        """As a key of the table."""
        address = _ANY if self.address is None else layout.mapped(ipaddress.ip_address(self.address).packed)
        return LISTENER.pack(address, self.port)

    def document(self) -> dict[str, Any]:
        """As the controller is told."""
        return {"address": self.address, "port": self.port}


def lacking(sysctl: Path = SYSCTL) -> list[str]:
    """What of the kernel's settings in this network namespace keeps connections from being adopted, and why."""
    found = []
    for name, why in NEEDED.items():
        with contextlib.suppress(OSError):
            if (sysctl / name).read_text(encoding="ascii").strip() == "0":
                found.append(f"net.ipv4.{name} is 0: {why}")
    return found


class Adopter:
    """The program, loaded, and its tables.

    Args:
        path: the compiled object; by default it is compiled if that is due.

    Raises:
        AdoptError: it cannot be compiled or loaded.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            try:
                build.build(build.ADOPT_OBJECT, source=build.ADOPT_SOURCE)
            except build.BuildError as error:
                if not build.ADOPT_OBJECT.exists():  # a host without compiler has what was compiled elsewhere
                    raise AdoptError(f"the adopting program cannot be compiled: {error}") from None
        try:
            self._object = kernel.Object(path or build.ADOPT_OBJECT)
        except kernel.KernelError as error:
            raise AdoptError(str(error)) from None
        self.program = self._object.programs["adopt_cookies"]

    def close(self) -> None:
        """Let go of it. Where it is attached it stays."""
        self._object.close()

    def set_listeners(self, listeners: Iterable[Listener]) -> None:
        """Adopt connections to these, and to no others."""
        table = self._object.maps["listeners"]
        wanted = {listener.pack(): _ZERO for listener in listeners}
        if len(wanted) > table.max_entries:
            raise AdoptError(f"expected at most {table.max_entries} listeners, got {len(wanted)}")
        table.delete_all([key for key, _ in table.items() if key not in wanted])
        for key, value in wanted.items():
            table.update(key, value)

    def set_keys(self, keys: Sequence[bytes | None]) -> None:
        """Cookies made with these two keys, of 16 bytes each, are accepted, and no others; None: there is none."""
        first, second = keys
        valid = (first is not None) | (second is not None) << 1
        self._object.maps["cookies"].update(_ZERO, layout.COOKIES.pack(first or b"", second or b"", 0, valid))

    def set_window_scale(self, scale: int) -> None:
        """What clients were offered in the answers to their SYNs."""
        self._object.maps["settings"].update(_ZERO, SETTINGS.pack(scale))

    def counters(self) -> dict[str, int]:
        """What happened since it was loaded."""
        table = self._object.maps["counters"]
        found = {}
        for index, name in enumerate(COUNTERS):
            values = table.lookup(struct.pack("=I", index)) or b""
            found[name] = sum(struct.unpack(f"={len(values) // 8}Q", values))
        return found


# ------------------------------------------------------------------ where it is attached


def interfaces(links: Iterable[Link], names: Collection[str] = ()) -> list[Link]:
    """Those with these names; without any: all that are up, but for loopback.

    Raises:
        AdoptError: there is none of that name.
    """
    by_name = {link.name: link for link in links}
    missing = sorted(set(names) - set(by_name))
    if missing:
        raise AdoptError(f"there is no interface {', '.join(missing)}")
    if names:
        return [by_name[name] for name in dict.fromkeys(names)]
    return [link for link in by_name.values() if link.up and not link.flags & _LOOPBACK]


_LOOPBACK = 0x8
"""IFF_LOOPBACK."""


def attach(netlink: Netlink, link: Link, program: int) -> bool:
    """Attach the program at an interface's ingress, in the place of an earlier one.

    Returns:
        False where the interface went meanwhile.

    Raises:
        AdoptError: the kernel refuses, or somebody else's filter is where ours belongs.
    """
    try:
        filters = netlink.filters(link.ifindex)
        ours = [one for one in filters if _mine(one)]
        if any(one.priority == PRIORITY and not _mine(one) for one in filters):
            raise AdoptError(f"{link.name}: there is a filter of somebody else's with preference {PRIORITY}")
        own = netlink.add_clsact(link.ifindex) or any(one.name.endswith(OWN_CLSACT) for one in ours)
        netlink.set_program(link.ifindex, PRIORITY, HANDLE, program, NAME + (OWN_CLSACT if own else ""))
    except NetlinkError as error:
        if error.errno == errno.ENODEV:
            return False
        raise AdoptError(f"{link.name}: {error.strerror}") from None
    return True


def attached(netlink: Netlink) -> dict[str, Filter]:
    """The interfaces at which such a program is, whoever attached it, and its filter."""
    found: dict[str, Filter] = {}
    able = netlink.clsacts()
    for link in netlink.links().values():
        if link.ifindex in able:
            found.update((link.name, one) for one in netlink.filters(link.ifindex) if _mine(one))
    return found


def detach(netlink: Netlink, keep: Collection[str] = ()) -> list[str]:
    """Take such programs off all interfaces but some, and clsact where it came with them.

    Returns:
        The interfaces where there was one.
    """
    taken = []
    for name, one in attached(netlink).items():
        link = netlink.links().get(name)
        if name in keep or link is None:
            continue
        try:
            netlink.delete_filter(link.ifindex, one.priority, one.handle)
            if one.name.endswith(OWN_CLSACT) and not netlink.filters(link.ifindex, (INGRESS, EGRESS)):
                netlink.delete_clsact(link.ifindex)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:  # the interface went meanwhile
                raise AdoptError(f"{name}: {error.strerror}") from None
        taken.append(name)
    return taken


def _mine(one: Filter) -> bool:
    return (one.priority, one.handle, one.kind) == (PRIORITY, HANDLE, "bpf") and (
        one.name.removesuffix(OWN_CLSACT) == NAME)
