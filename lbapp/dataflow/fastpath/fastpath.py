# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path of one bridge: tables, wires, and the packets that an agent sends.

Owns setting it all up and taking it all down. What is in the tables is the agent's business.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from lbapp.dataflow.fastpath import build, kernel
from lbapp.dataflow.fastpath.injector import Injector, pair
from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError
from lbapp.dataflow.fastpath.ports import Changes, Programs, Wire, Wires
from lbapp.dataflow.fastpath.records import read
from lbapp.dataflow.fastpath.removal import PortsError
from lbapp.dataflow.fastpath.removal import remove as remove_ports
from lbapp.dataflow.fastpath.tables import MAX_CONNECTIONS, Tables, all_pins
from lbapp.dataflow.ovs import Ovs, OvsError
from lbapp.dataflow.pipeline import VIRTUAL_MAC

LOG = logging.getLogger("lbapp.fastpath")


class FastPathUnavailable(Exception):
    """This switch can have no fast path here. The message says why; Open vSwitch does it all then."""


class FastPath(Tables):
    """A bridge's fast path; made by :meth:`open`.

    Attributes:
        ports: the wires by OpenFlow port number.
    """

    bridge: str
    wires: Wires
    _injector: Injector
    _by_index: dict[int, Wire]

    @classmethod
    def open(cls, ovs: Ovs, bridge: str, *, max_connections: int = MAX_CONNECTIONS,
             bpffs: str | Path = kernel.BPFFS) -> FastPath:
        """Put a fast path in front of every port of a bridge, or take over the one that is there.

        One that is there goes on forwarding all the while.

        Raises:
            FastPathUnavailable: no compiler and no compiled object, no eBPF, no permission, ports that cannot be
                moved. The bridge is as it was.
        """
        where = Path(bpffs)
        if not where.is_dir() and not where.parent.is_dir():
            raise FastPathUnavailable(f"there is no {where}: this kernel has no eBPF")
        try:
            build.build()
        except build.BuildError as error:
            if not build.OBJECT.exists():
                raise FastPathUnavailable(str(error)) from None
            LOG.warning("going on with programs older than their sources: %s", error)
        try:
            kernel.mount(where)
            pins = _pins(ovs, bridge, where)
            if not _in_front(ovs, bridge):
                kernel.unpin(pins)  # of a bridge that is no more: nothing of it forwards
            found = cls(build.OBJECT, pins, max_connections=max_connections, mac=VIRTUAL_MAC)
        except (kernel.KernelError, OSError, OvsError) as error:
            raise FastPathUnavailable(str(error)) from None
        found.bridge, found._by_index = bridge, {}
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: Tables.close(found, keep=found.adopted))
            try:
                found._injector = Injector(bridge, found.programs["again"])
                found.door = found._injector.door
                undo.callback(found._injector.close)
                found.wires = Wires(ovs, bridge, Programs(found.programs["wire"], found.programs["out"]),
                                    found._connect, found._disconnect)
                undo.callback(found.wires.close)
                found.wires.sync()
            except (PortsError, NetlinkError, OvsError, OSError) as error:
                raise FastPathUnavailable(str(error)) from None
            undo.pop_all()
        for name, reason in found.wires.left_alone.items():
            LOG.info("bridge %s: port %s has no fast path: %s", bridge, name, reason)
        return found

    @property
    def ports(self) -> dict[int, Wire]:
        """The wires by OpenFlow port number."""
        return self.wires.ports

    def port_of(self, ifindex: int) -> int | None:
        """The OpenFlow port number of a wire."""
        wire = self._by_index.get(ifindex)
        return wire.ofport if wire is not None else None

    def sync_ports(self) -> Changes:
        """Follow the bridge's ports; connections through those that are gone are deleted.

        Raises:
            PortsError: a port could not get its wire, the others have theirs; or the agent's own interfaces were gone,
                and cannot be made.
        """
        if not self._injector.there():
            LOG.warning("bridge %s: the agent's own interfaces are gone, and are made anew", self.bridge)
            self._injector.close()
            try:
                self._injector = Injector(self.bridge, self.programs["again"])
            except OSError as error:
                raise PortsError(f"the agent's own interfaces cannot be made: {error}") from None
            self.door = self._injector.door
        changes = self.wires.sync()
        there = {wire.ifindex for wire in self.wires.ports.values()}
        gone = {wire.ifindex: wire for wire in changes.removed.values() if wire.ifindex not in there}
        for ifindex in gone:
            self.delete(ifindex=ifindex)
        self._injector.forget([index for wire in gone.values() for index in (wire.ifindex, wire.inner)])
        return changes

    def inject(self, ifindex: int, frame: bytes, soon: bool = False) -> bool:
        """Let a frame walk once more, as if it had come in on that wire. Its checksums have to be whole.

        Args:
            ifindex: the wire.
            frame: the frame.
            soon: see :meth:`Injector.inject`.

        Returns:
            False if the kernel had no room for it: as lost as any packet can be.
        """
        return self._injector.inject(ifindex, frame, soon)

    def send(self, ifindex: int, frame: bytes) -> bool:
        """Send a frame out on a wire, soon. False if it is too long, or there is no such wire."""
        return ifindex in self._by_index and self._injector.send(ifindex, frame, soon=True)

    def give(self, ifindex: int, frame: bytes) -> bool:
        """Let Open vSwitch have a frame that came in on a wire. False if it could not have it: see :meth:`send`, or
        it has the wire itself, with no pair in front."""
        wire = self._by_index.get(ifindex)
        return wire is not None and wire.inner > 0 and self._injector.send(wire.inner, frame)

    def close(self, keep: bool = False) -> None:
        """End. ``keep``: wires, tables and connections stay and go on; otherwise nothing of it is left behind.

        Raises:
            PortsError: a port could not be given back; all else was.
        """
        try:
            if not keep:
                self.wires.take_down()
        finally:
            self.wires.close()
            self._injector.close()
            super().close(keep)

    def _connect(self, wire: Wire) -> None:
        self._by_index[wire.ifindex] = wire
        self.maps["inner"].update(_index(wire.ifindex), _index(wire.inner))
        if wire.inner:
            self.maps["outer"].update(_index(wire.inner), _index(wire.ifindex))

    def _disconnect(self, wire: Wire) -> None:
        self._by_index.pop(wire.ifindex, None)
        self.maps["inner"].delete(_index(wire.ifindex))
        if wire.inner:
            self.maps["outer"].delete(_index(wire.inner))


def remove(ovs: Ovs, bridge: str, bpffs: str | Path = kernel.BPFFS) -> list[str]:
    """Undo all that a fast path, of whatever process, did to a bridge.

    Returns:
        The interfaces that are ports again.

    Raises:
        PortsError, OvsError: something could not be undone; all the rest was.
    """
    try:
        return remove_ports(ovs, bridge)
    finally:
        with contextlib.suppress(NetlinkError, OSError), Netlink() as netlink:
            links = netlink.links()
            for name in set(pair(bridge)) & links.keys():
                netlink.delete(links[name].ifindex)
        with contextlib.suppress(OvsError):
            kernel.unpin(_pins(ovs, bridge, Path(bpffs)))


def _pins(ovs: Ovs, bridge: str, bpffs: Path) -> Path:
    """Where a bridge's maps are pinned: by its datapath id, which a new bridge of the same name may not share, and
    its network namespace, in which alone the numbers of interfaces mean anything."""
    identifier = ovs.vsctl("get", "bridge", bridge, "datapath_id", wait=False).strip().strip('"')
    if not identifier.strip("[]"):
        raise OvsError(f"bridge {bridge} has no datapath id yet")
    return bpffs / "lbapp" / f"{identifier}-{Path('/proc/thread-self/ns/net').stat().st_ino:x}"


def _in_front(ovs: Ovs, bridge: str) -> bool:
    """Whether a fast path stands in front of a bridge already; a datapath in the kernel does not show it."""
    records = [record for record in read(ovs) if record.bridge == bridge]
    return any(record.wire is not None or record.datapath_type != "netdev" for record in records)


def _index(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


__all__ = ["FastPath", "FastPathUnavailable", "all_pins", "remove"]
