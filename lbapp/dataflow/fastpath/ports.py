# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The wires of a bridge: what stands between an interface, the fast path's programs and Open vSwitch.

    host ── W ──(wire)── lbi7 ══ lbo7 ── bridge        7: W's index
               ◂─(out)──╯

Open vSwitch's userspace datapath takes frames from an interface before TC sees them, so no program
can keep one from it. Hence a veth pair in front of each port: ``wire`` at W's ingress leads what it
does not forward itself into lbi7, and so into the bridge; ``out`` at lbi7's ingress leads to W what
the bridge sends. lbo7 stands in W's place in W's own Port record, with W's OpenFlow port number and
hardware address, so bridge, rules and controller notice nothing. A datapath in the kernel needs no
pair: there only ``wire`` is attached.

Owns pairs, filters, and the exchange in Open vSwitch's database. Everything needed to undo it is
kept where it acts: the Interface record names W, lbi7's alias and the filters' names name the
bridge. So a process that was killed leaves a bridge that forwards, the next one adopts it without
moving a port, and ``remove`` (removal.py) finds all of it. Never looks into programs or maps; whoever does
is told of each wire before its first frame (``connect``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lbapp.dataflow.fastpath.netlink import Filter, Link, LinkEvents, Netlink, NetlinkError
from lbapp.dataflow.fastpath.records import Record, in_order, put_in_front, read
from lbapp.dataflow.fastpath.removal import (
    ALIAS,
    HANDLE,
    OURS,
    OUT_FILTER,
    OWN_CLSACT,
    PRIORITY,
    WIRE_FILTER,
    PortsError,
    about,
    clear,
    mine,
    remove,
)
from lbapp.dataflow.ovs import Ovs, OvsError

LOG = logging.getLogger(__name__)

class Programs(NamedTuple):
    """File descriptors of the two loaded TC programs."""

    wire: int
    out: int


class Wire(NamedTuple):
    """A port of the bridge, and what stands in front of it.

    Attributes:
        ofport: its OpenFlow port number.
        name: W, the interface towards the host.
        ifindex: W's.
        inner: the index of the pair's end in front, where frames for the bridge go; 0 where there is no pair.
        outer: the name of what the bridge has: the pair's other end, or W itself.
    """

    ofport: int
    name: str
    ifindex: int
    inner: int
    outer: str


class Changes(NamedTuple):
    """What a :meth:`Wires.sync` found: ports by OpenFlow port number, new (or adopted) and gone."""

    added: dict[int, Wire]
    removed: dict[int, Wire]


def inner_name(ifindex: int) -> str:
    """The name of a pair's end in front, by the index of its W."""
    return f"lbi{ifindex}"


def _nothing(_: Wire) -> None:
    pass


class Wires:
    """All wires of one bridge, in the network namespace in which it is made.

    Args:
        ovs: the switch.
        bridge: its name.
        programs: what to attach. Wires that are there already get them too, without losing a frame.
        connect: called for every wire before a frame takes it; after an adoption, too.
        disconnect: called for every wire after its last frame.

    Attributes:
        ports: the wires by OpenFlow port number.
        left_alone: the bridge's other interfaces, and why they have no wire.

    Raises:
        PortsError: no netlink socket.
    """

    def __init__(self, ovs: Ovs, bridge: str, programs: Programs, connect: Callable[[Wire], None] = _nothing,
                 disconnect: Callable[[Wire], None] = _nothing) -> None:
        self.ovs, self.bridge, self.programs = ovs, bridge, programs
        self.ports: dict[int, Wire] = {}
        self.left_alone: dict[str, str] = {}
        self._connect, self._disconnect = connect, disconnect
        self._lock = threading.RLock()
        self._lowered: set[int] = set()
        self._promiscuous: set[int] = set()
        with about(f"bridge {bridge}"):
            self._netlink = Netlink()
            self._events = LinkEvents()
            self._identifiers = Programs(*map(_program_identifier, programs))

    def close(self) -> None:
        """Close what this object holds open. The wires stay as they are, and forward."""
        self._events.close()
        self._netlink.close()

    def take_down(self) -> None:
        """Give the ports back to the bridge as they were, and remove all that was put in front of them.

        Raises:
            PortsError: something could not be undone; all the rest was.
        """
        with self._lock:
            gone, self.ports = self.ports, {}
            try:
                remove(self.ovs, self.bridge, self._netlink)
            finally:
                for wire in gone.values():
                    self._disconnect(wire)

    # ---------------------------------------------------------------------- sync

    def sync(self) -> Changes:
        """Bring the wires in line with the bridge: ports added, removed, lost, half there after a crash.

        Ports that have their wire are not moved.

        Raises:
            PortsError: a port could not get its wire; those that were to get theirs now have none, the others stay.
        """
        with self._lock, about(f"bridge {self.bridge}"):
            self._events.drain()
            links, records = self._look()
            wires = _adoptable(records, links)
            if clear(self.ovs, self._netlink, self.bridge, {wire.ifindex for wire in wires.values()}, records):
                links, records = self._look()
                wires = _adoptable(records, links)
            gone = {number: wire for number, wire in self.ports.items() if wires.get(number) != wire}
            for wire in gone.values():
                self._disconnect(wire)
            added = {number: wire for number, wire in wires.items() if self.ports.get(number) != wire}
            self.ports = {number: wire for number, wire in wires.items() if number not in added}
            for number, wire in added.items():
                self._connect(wire)
                self.ports[number] = wire
            new, self.left_alone = _divide(records, links)
            for wire in self.ports.values():
                self._attach(wire)
            if new:
                made = self._insert(new, links)
                added.update(made)
                self.ports.update(made)
            links = self._netlink.links()
            self._care(links)
            self._promiscuous = {link.ifindex for link in links.values() if link.promiscuous}
            return Changes(added, gone)

    def _look(self) -> tuple[dict[str, Link], list[Record]]:
        """Interfaces, and the bridge's records."""
        records = [record for record in read(self.ovs) if record.bridge == self.bridge]
        if not records and self.bridge not in self.ovs.bridges():
            raise PortsError("there is no such bridge in Open vSwitch")
        return self._netlink.links(), records

    # -------------------------------------------------------------------- insert

    def _insert(self, new: Collection[Record], links: Mapping[str, Link]) -> dict[int, Wire]:
        """Give ports their wires: all of these, or none."""
        made: dict[int, Wire] = {}
        try:
            order = in_order(self.ovs, new)  # and it lives; else the exchange would be noted, but not done
            for record in new:
                assert record.ofport is not None
                link = links[record.name]
                with about(record.name):
                    inner = self._make_pair(link, links)
                made[record.ofport] = wire = Wire(record.ofport, link.name, link.ifindex, inner, f"lbo{link.ifindex}")
                self._connect(wire)
            for record in order:
                wire = made[record.ofport or 0]
                self.ovs.vsctl(*put_in_front(record, wire.outer))
                # Only now: while Open vSwitch had W itself, it would have got these frames twice.
                self._attach(wire)
            self._verify(made)
            return made
        except BaseException as error:
            try:
                clear(self.ovs, self._netlink, self.bridge, {wire.ifindex for wire in self.ports.values()})
            except (PortsError, OvsError, NetlinkError) as further:
                LOG.error("bridge %s: ports could not be put back: %s", self.bridge, further)
                error.add_note(f"and ports could not be put back: {further}")
            for wire in made.values():
                self._disconnect(wire)
            raise

    def _make_pair(self, link: Link, links: Mapping[str, Link]) -> int:
        inner, outer = inner_name(link.ifindex), f"lbo{link.ifindex}"
        for name in (inner, outer):
            if name in links:  # somebody ended just after making it
                self._netlink.delete(links[name].ifindex)
        # W's address: Open vSwitch derives the bridge's own, and its datapath id, from those of its ports.
        self._netlink.add_pair(inner, outer, link.mtu, link.address)
        found = self._netlink.links()
        try:
            foreign = link.ifindex in self._netlink.clsacts()
            alias = f"{ALIAS}{self.bridge}" + ("" if foreign else OWN_CLSACT)
            self._netlink.label(found[inner].ifindex, alias)
            for name in (outer, inner):
                # Nothing but what passes: no neighbour discovery, no answers to ARP.
                self._netlink.without_addresses(found[name].ifindex)
                self._netlink.change(found[name].ifindex, up=name == outer or link.carrier, arp=False)
            self._set_program(found[inner].ifindex, OUT_FILTER, self.programs.out)
        except BaseException:
            self._netlink.delete(found[inner].ifindex)
            raise
        return found[inner].ifindex

    def _verify(self, made: Mapping[int, Wire]) -> None:
        """Open vSwitch has each pair where W was."""
        records = {record.name: record for record in read(self.ovs)}
        for number, wire in made.items():
            record = records.get(wire.outer)
            if record is None or record.ofport != number:
                why = "its record is gone" if record is None else (
                    record.error or f"its OpenFlow port number is {record.ofport}, expected {number}")
                raise PortsError(f"{wire.name}: Open vSwitch does not accept {wire.outer} in its place: {why}")

    # -------------------------------------------------------------------- filters

    def _attach(self, wire: Wire) -> None:
        """Both programs are where they belong, and are the ones of now."""
        with about(wire.name):
            if wire.inner:
                # Open vSwitch undoes its own setting when it lets go of an interface.
                self._netlink.change(wire.ifindex, promiscuous=True)
                if not self._runs(self._netlink.filters(wire.inner), self._identifiers.out):
                    self._set_program(wire.inner, OUT_FILTER, self.programs.out)
            if not self._runs(self._netlink.filters(wire.ifindex), self._identifiers.wire):
                self._set_program(wire.ifindex, WIRE_FILTER, self.programs.wire)

    @staticmethod
    def _runs(filters: Iterable[Filter], identifier: int) -> bool:
        return any(mine(one) and one.program == identifier for one in filters)

    def _set_program(self, index: int, kind: str, program: int) -> None:
        before = [one for one in self._netlink.filters(index) if mine(one)]
        new = self._netlink.add_clsact(index)
        name = f"{kind} {self.bridge}"
        if new or any(one.name.endswith(OWN_CLSACT) for one in before):
            name += OWN_CLSACT
        try:
            self._netlink.set_program(index, PRIORITY, HANDLE, program, name)
        except BaseException:
            if new:
                self._netlink.delete_clsact(index)
            raise

    # --------------------------------------------------------------------- follow

    def fileno(self) -> int:
        """For poll: readable when an interface changed; then :meth:`follow`."""
        return self._events.fileno()

    def follow(self) -> bool:
        """Carry changes of interfaces over to their wires: carrier, MTU, hardware address, a port that was disabled.

        Returns:
            Whether ports may have come or gone, so that :meth:`sync` is due.

        Raises:
            PortsError: the kernel refused.
        """
        with self._lock, about(f"bridge {self.bridge}"):
            if not self._events.drain():
                return False
            links = self._netlink.links()
            whole = self._care(links)
            # Open vSwitch sets what becomes a port promiscuous.
            promiscuous = {link.ifindex for link in links.values() if link.promiscuous}
            self._promiscuous &= promiscuous
            return not whole or bool(promiscuous - self._promiscuous)

    def _care(self, links: Mapping[str, Link]) -> bool:
        """Whether all wires are there; those that are, are as their W is."""
        whole = True
        for wire in self.ports.values():
            try:
                whole = self._care_for(wire, links) and whole
            except NetlinkError as error:
                if error.errno != errno.ENODEV:
                    raise PortsError(f"{wire.name}: {error.strerror}") from error
                whole = False
        return whole

    def _care_for(self, wire: Wire, links: Mapping[str, Link]) -> bool:
        link = links.get(wire.name)
        if link is None or link.ifindex != wire.ifindex:
            return False
        if not wire.inner:
            return True
        outer, inner = links.get(wire.outer), links.get(f"lbi{wire.ifindex}")
        if outer is None or inner is None:
            return False
        for end in (outer, inner):
            if end.mtu != link.mtu:
                self._netlink.change(end.ifindex, mtu=link.mtu)
        if outer.address != link.address:
            self._netlink.change(outer.ifindex, address=link.address)
        # A port that the controller disables is down for its host, as W would be.
        if not outer.up and link.up:
            self._netlink.change(link.ifindex, up=False)
            self._lowered.add(link.ifindex)
        elif outer.up and link.ifindex in self._lowered:
            self._lowered.discard(link.ifindex)
            self._netlink.change(link.ifindex, up=True)
        # A veth's end has a carrier while the other one is up.
        if inner.up != link.carrier:
            self._netlink.change(inner.ifindex, up=link.carrier)
        return outer.promiscuous


# ------------------------------------------------------------------------- reading


def _adoptable(records: Iterable[Record], links: Mapping[str, Link]) -> dict[int, Wire]:
    """The wires that are whole, and those that need nothing but a program."""
    found = {}
    for record in records:
        number = record.ofport if record.ofport is not None else record.requested
        if number is None:
            continue
        if record.wire is None and not _needs_pair(record) and _why_not(record, links) is None:
            found[number] = Wire(number, record.name, links[record.name].ifindex, 0, record.name)
        elif record.wire is not None and record.wire in links:
            ifindex = links[record.wire].ifindex
            outer, inner = links.get(f"lbo{ifindex}"), links.get(f"lbi{ifindex}")
            if outer is not None and inner is not None and (record.name, outer.peer) == (outer.name, inner.ifindex):
                found[number] = Wire(number, record.wire, ifindex, inner.ifindex, outer.name)
    return found


def _divide(records: Iterable[Record], links: Mapping[str, Link]) -> tuple[list[Record], dict[str, str]]:
    """The ports that are to get a pair, and for those that get no wire at all why not."""
    new: list[Record] = []
    left: dict[str, str] = {}
    for record in records:
        if record.wire is None:
            reason = _why_not(record, links)
            if reason is not None:
                left[record.name] = reason
            elif _needs_pair(record):
                new.append(record)
    return sorted(new, key=lambda record: record.ofport or 0), left


def _why_not(record: Record, links: Mapping[str, Link]) -> str | None:
    """Why a port gets no wire, if so."""
    if record.type not in ("", "system"):
        return f"is of type {record.type}"
    if record.bonded:
        return "is part of a bond"
    if record.name not in links:
        return "does not exist"
    if record.ofport is None:
        return f"is not open: {record.error or 'Open vSwitch has not come to it yet'}"
    if OURS.fullmatch(record.name):
        return "has a name that the fast path uses itself"
    return None


def _needs_pair(record: Record) -> bool:
    return record.datapath_type == "netdev"


def _program_identifier(program: int) -> int:
    """The kernel's number of a program, from its file descriptor.

    Raises:
        PortsError: it is not one.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"^prog_id:\s*(\d+)$", Path(f"/proc/self/fdinfo/{program}").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1])
    raise PortsError(f"file descriptor {program} is no eBPF program")
