# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Undoing what stands in front of ports: finds it, in the kernel and in Open vSwitch's database, whoever made it.

Owns how things of ours are recognized. A process that was killed leaves them behind; so they say themselves whose
they are: the Interface record names the interface in whose place it stands, the alias of a pair's inner end and the
names of filters name the bridge. Never puts anything in front of a port: that is ports.py.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Collection, Iterator, Mapping

from lbapp.dataflow.fastpath.netlink import EGRESS, INGRESS, Filter, Link, Netlink, NetlinkError
from lbapp.dataflow.fastpath.records import Record, forget_requests, give_back, in_order, read
from lbapp.dataflow.ovs import Ovs, OvsError

PRIORITY = 0x4C42
"""TC priority ("pref") of our filters. A late one: ``wire`` keeps what it gets, so others' filters come first."""
HANDLE = 1
_INNER = re.compile(r"lbi(\d+)")
OURS = re.compile(r"lb[io]\d+")
ALIAS = "lbapp "
WIRE_FILTER, OUT_FILTER = "lbapp-wire", "lbapp-out"
OWN_CLSACT = " clsact"
"""At the end of a filter's name or a pair's alias: W had no clsact before."""


class PortsError(Exception):
    """A bridge's ports cannot be brought in order. The message names the interface or bridge and what was expected."""


def remove(ovs: Ovs, bridge: str | None = None, netlink: Netlink | None = None) -> list[str]:
    """Undo all that any process ever did to a bridge's ports, or to all bridges'; whatever of it is left.

    Args:
        ovs: the switch.
        bridge: its name; None for all, and for what bridges that are no more left behind.
        netlink: a socket in the namespace of the bridge; by default one in the calling thread's.

    Returns:
        The interfaces that are ports again.

    Raises:
        PortsError: something could not be undone (Open vSwitch does not answer); all the rest was.
    """
    where = f"bridge {bridge}" if bridge else "removing the fast path's ports"
    with contextlib.ExitStack() as stack, about(where):
        return clear(ovs, netlink or stack.enter_context(Netlink()), bridge, frozenset())


def clear(ovs: Ovs, netlink: Netlink, bridge: str | None, keep: Collection[int],
          records: Collection[Record] | None = None) -> list[str]:
    """:func:`remove`, except for wires of interfaces with the indices to keep."""
    problems: list[str] = []
    if records is None:
        try:
            records = [record for record in read(ovs) if bridge in (None, record.bridge)]
        except OvsError as error:
            records = []
            problems.append(str(error))
    kept = {f"lbo{index}" for index in keep}
    displaced = [record for record in records if record.wire is not None and record.name not in kept]
    links = netlink.links()
    ports = {record.name for record in records}
    former = {record.wire or "" for record in displaced}
    former |= _take_filters(netlink, links, bridge, keep, former)
    for name in former - ports:
        if name in links and links[name].promiscuous:
            # Before Open vSwitch takes it: what it finds set, it would leave set for ever.
            with _gone_meanwhile():
                netlink.change(links[name].ifindex, promiscuous=False)
    given = _give_back(ovs, displaced, links, problems)
    for name in _pairs(links, bridge, {record.name for record in displaced}) - kept:
        if name in links:
            netlink.delete(links[name].ifindex)
    if problems:
        raise PortsError("; ".join(problems))
    return given


def _take_filters(netlink: Netlink, links: Mapping[str, Link], bridge: str | None, keep: Collection[int],
                  former: Collection[str]) -> set[str]:
    """Take our filters off interfaces, and return the names of these; clsact too where it was ours."""
    taken = set()
    able = netlink.clsacts()
    for link in links.values():
        if link.ifindex not in able or link.ifindex in keep:
            continue
        with _gone_meanwhile():
            inner = links.get(f"lbi{link.ifindex}")
            own = link.name in former and inner is not None and inner.alias.endswith(OWN_CLSACT)
            for one in netlink.filters(link.ifindex):
                kind, _, whose = one.name.removesuffix(OWN_CLSACT).partition(" ")
                if mine(one) and kind == WIRE_FILTER and bridge in (None, whose):
                    netlink.delete_filter(link.ifindex, one.priority, one.handle)
                    own = own or one.name.endswith(OWN_CLSACT)
                    taken.add(link.name)
            if own and not netlink.filters(link.ifindex, (INGRESS, EGRESS)):
                netlink.delete_clsact(link.ifindex)
    return taken


def _give_back(ovs: Ovs, displaced: Collection[Record], links: Collection[str], problems: list[str]) -> list[str]:
    """Those that stood in a port before stand there again; the names of those that could."""
    if not displaced:
        return []
    try:
        displaced, wait = in_order(ovs, displaced), True
    except OvsError:
        wait = False  # it will read the database when it starts
    given = []
    for record in displaced:  # one that cannot be must not keep the others
        try:
            ovs.vsctl(*give_back(record), wait=wait)
            given.append(record)
        except OvsError as error:
            problems.append(f"{record.wire} did not get its place in bridge {record.bridge} back: {error}")
    # In a transaction of its own, and not before it is open: the request is what gives it its number.
    unrequested = forget_requests(record for record in given if wait and record.wire in links)
    if unrequested:
        ovs.vsctl(*unrequested)
    return [record.wire or "" for record in given]


def _pairs(links: Mapping[str, Link], bridge: str | None, outers: Collection[str]) -> set[str]:
    """The outer ends of pairs that belong to a bridge (to any), or are among ``outers``."""
    found = set()
    for link in links.values():
        number = _INNER.fullmatch(link.name)
        if number is None or link.kind != "veth":
            continue
        outer = f"lbo{number[1]}"
        whose = (link.alias.removeprefix(ALIAS).removesuffix(OWN_CLSACT) if link.alias.startswith(ALIAS) else None)
        # One without an alias: its maker ended in that very moment.
        nobodys = not link.alias and outer in links and link.peer == links[outer].ifindex
        if outer in outers or (whose is not None and bridge in (None, whose)) or (nobodys and bridge is None):
            found.add(outer)
    return found


def mine(one: Filter) -> bool:
    """Whether a filter stands where ours do."""
    return one.priority == PRIORITY and one.handle == HANDLE and one.kind == "bpf"


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Errors name what they are about."""
    try:
        yield
    except PortsError as error:
        raise PortsError(f"{what}: {error}") from error
    except NetlinkError as error:
        raise PortsError(f"{what}: {error.strerror}") from error
    except (OvsError, OSError) as error:
        raise PortsError(f"{what}: {error}") from error


@contextlib.contextmanager
def _gone_meanwhile() -> Iterator[None]:
    """An interface that ended while it was looked after needs nothing more."""
    try:
        yield
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise
