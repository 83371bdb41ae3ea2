# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path of one bridge: tables, wires, and the packets that an agent sends.

Owns setting it all up and taking it all down. What is in the tables is the agent's business.
"""

from __future__ import annotations

import _socket
import contextlib
import logging
import socket
import struct
import sys
import zlib
from pathlib import Path

from lbapp.dataflow.fastpath import build, kernel
from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError
from lbapp.dataflow.fastpath.ports import Changes, Programs, Wire, Wires, inner_name
from lbapp.dataflow.fastpath.records import read
from lbapp.dataflow.fastpath.removal import HANDLE, PRIORITY, PortsError
from lbapp.dataflow.fastpath.removal import remove as remove_ports
from lbapp.dataflow.fastpath.tables import MAX_CONNECTIONS, Tables, all_pins
from lbapp.dataflow.joining import LEAST_MSS
from lbapp.dataflow.ovs import Ovs, OvsError
from lbapp.dataflow.pipeline import VIRTUAL_MAC

LOG = logging.getLogger("lbapp.fastpath")

_SO_MARK, _SOL_PACKET = 36, 263
_PACKET_VNET_HDR = 15
_GSO = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr (linux/virtio_net.h): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
_GSO_TCPV4, _GSO_TCPV6 = 1, 4
_LONGEST_FRAME = 1514
"""What is longer is several segments in one, and has to be cut up on the way: every path carries pieces of LEAST_MSS
(RFC 8200, 5)."""
_LARGEST_MTU = 65_535


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
            PortsError: a port could not get its wire; the others have theirs.
        """
        changes = self.wires.sync()
        there = {wire.ifindex for wire in self.wires.ports.values()}
        for ifindex in {wire.ifindex for wire in changes.removed.values()} - there:
            self.delete(ifindex=ifindex)
        if changes.removed:
            self._injector.forget()
        return changes

    def inject(self, ifindex: int, frame: bytes) -> bool:
        """Let a frame walk once more, as if it had come in on that wire. Its checksums have to be whole.

        Returns:
            False if the kernel had no room for it: as lost as any packet can be.
        """
        return self._injector.inject(ifindex, frame)

    def send(self, ifindex: int, frame: bytes) -> bool:
        """Send a frame out on a wire. False if the kernel had no room for it, or there is no such wire."""
        wire = self._by_index.get(ifindex)
        return wire is not None and self._injector.send(wire.name, frame)

    def give(self, ifindex: int, frame: bytes) -> bool:
        """Let Open vSwitch have a frame that came in on a wire. False if it could not have it: see :meth:`send`, or
        it has the wire itself, with no pair in front."""
        wire = self._by_index.get(ifindex)
        return wire is not None and wire.inner > 0 and self._injector.send(inner_name(wire.ifindex), frame)

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


def _large(frame: bytes) -> bytes:
    """A TCP frame that whoever needs it smaller may cut up; with a whole checksum, which needs no flag."""
    six = frame[12:14] == b"\x86\xdd"
    tcp = 54 if six else 14 + 4 * (frame[14] & 15)
    size = tcp + 4 * (frame[tcp + 12] >> 4)
    return _GSO.pack(0, _GSO_TCPV6 if six else _GSO_TCPV4, size, LEAST_MSS, 0, 0) + frame


class Injector:
    """Sends frames: into the program ``again``, or out on a wire.

    For the former there is a veth pair: what is sent into one end meets the program at the other one's ingress, and
    the socket's mark tells it the wire.

    Args:
        bridge: names the pair.
        program: the program ``again``.
    """

    def __init__(self, bridge: str, program: int) -> None:
        self._here, there = pair(bridge)
        self._sockets: dict[tuple[str, int, bool], _socket.socket] = {}
        with Netlink() as netlink:
            links = netlink.links()
            if self._here in links:  # of a process that was killed
                netlink.delete(links[self._here].ifindex)
            netlink.add_pair(self._here, there, _LARGEST_MTU, b"\x02lb\0\0\x03")
            try:
                links = netlink.links()
                for name in (self._here, there):
                    netlink.without_addresses(links[name].ifindex)
                    netlink.change(links[name].ifindex, up=True, arp=False)
                netlink.add_clsact(links[there].ifindex)
                netlink.set_program(links[there].ifindex, PRIORITY, HANDLE, program, f"lbapp-again {bridge}")
            except BaseException:
                netlink.delete(links[self._here].ifindex)
                raise

    def inject(self, ifindex: int, frame: bytes) -> bool:
        """See :meth:`FastPath.inject`."""
        return self._send(self._here, ifindex, frame)

    def send(self, name: str, frame: bytes) -> bool:
        """See :meth:`FastPath.send`."""
        return self._send(name, 0, frame)

    def _send(self, name: str, mark: int, frame: bytes) -> bool:
        large = len(frame) > _LONGEST_FRAME and frame[20 if frame[12:14] == b"\x86\xdd" else 23] == socket.IPPROTO_TCP
        one = self._sockets.get((name, mark, large))
        try:
            if one is None:
                one = self._sockets[name, mark, large] = self._made(name, mark, large)
            one.send(_large(frame) if large else frame)
        except OSError:
            # No room, longer than the MTU, or an interface that has gone: then the next one must not meet its socket.
            if one is not None:
                one.close()
            self._sockets.pop((name, mark, large), None)
            return False
        return True

    @staticmethod
    def _made(name: str, mark: int, large: bool) -> _socket.socket:
        # The class beneath socket.socket: eventlet leaves it alone. This one never waits, and a green call for each
        # frame would be dear.
        made = _socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        try:
            made.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark)
            if large:
                made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            made.bind((name, 0))
        except OSError:
            made.close()
            raise
        return made

    def forget(self) -> None:
        """Interfaces have gone: open sockets anew when they are needed."""
        for one in self._sockets.values():
            one.close()
        self._sockets.clear()

    def close(self) -> None:
        """Close the sockets and remove the pair."""
        self.forget()
        with contextlib.suppress(NetlinkError, OSError), Netlink() as netlink:
            links = netlink.links()
            if self._here in links:
                netlink.delete(links[self._here].ifindex)


def pair(bridge: str) -> tuple[str, str]:
    """The names of the veth pair by which a bridge's agent sends packets once more."""
    name = f"lbq{zlib.crc32(bridge.encode()):08x}"
    return f"{name}a", f"{name}b"


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


__all__ = ["FastPath", "FastPathUnavailable", "Injector", "all_pins", "pair", "remove"]
