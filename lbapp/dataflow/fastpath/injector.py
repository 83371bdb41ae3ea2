# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How an agent's frames leave: through a pair of interfaces of its own, at both of whose ends the program ``again`` is.

What is sent into one end meets the program at the other one; the socket's mark tells it what to do with the frame.
One way ("soon"), the kernel has a thread of its own (threaded NAPI): all that a frame causes, which may be a whole
handshake with a member on the same machine, happens in that thread, on whichever processor is idle, and not in the
agent's call. The other way it is done in the call: for what must not be overtaken by what its sender says next.

What goes with a connection that is entered, the program ``install`` sends soon: it is told the door for that.

Owns the pair and the sockets. Knows neither tables nor connections.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import logging
import os
import socket
import struct
import subprocess
import zlib
from collections.abc import Collection, Iterator

from lbapp.config.pool import LEAST_MSS
from lbapp.dataflow import frames, splicing
from lbapp.dataflow.fastpath import layout
from lbapp.dataflow.fastpath.netlink import Netlink, NetlinkError
from lbapp.dataflow.fastpath.removal import HANDLE, PRIORITY

LOG = logging.getLogger("lbapp.fastpath")

_SO_MARK, _SOL_PACKET = 36, 263
_PACKET_VNET_HDR = 15
_GSO = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr (linux/virtio_net.h): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
_GSO_TCPV4, _GSO_TCPV6 = 1, 4
_AS_IT_IS = bytes(_GSO.size)
_LARGEST_MTU = 65_535
_ADDRESS = b"\x02lb\0\0\x03"
_NO_ROOM = frozenset({errno.EAGAIN, errno.ENOBUFS})
"""Of a socket, whose frames count against its buffer until they are dealt with, and of the pair's queue."""


class Injector:
    """Sends frames: into the fast path once more, or out on an interface.

    Attributes:
        door: the interface that goes soon by.

    Args:
        bridge: names the pair.
        program: the program ``again``.
    """

    def __init__(self, bridge: str, program: int) -> None:
        self._here, self._there = pair(bridge)
        self._sockets: dict[tuple[int, bool], _socket.socket] = {}
        self.door = 0
        with Netlink() as netlink:
            links = netlink.links()
            if self._here in links:  # of a process that was killed
                netlink.delete(links[self._here].ifindex)
            netlink.add_pair(self._here, self._there, _LARGEST_MTU, _ADDRESS)
            try:
                links = netlink.links()
                self.door = links[self._here].ifindex
                for name in (self._here, self._there):
                    netlink.without_addresses(links[name].ifindex)
                    netlink.change(links[name].ifindex, up=True, arp=False)
                    netlink.add_clsact(links[name].ifindex)
                    netlink.set_program(links[name].ifindex, PRIORITY, HANDLE, program, f"lbapp-again {bridge}")
            except BaseException:
                netlink.delete(links[self._here].ifindex)
                raise
        try:
            _give_thread(self._here, self._there)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None)
            LOG.warning("bridge %s: the kernel has no thread for what the agent sends, which costs its own time: %s%s",
                        bridge, error, f" ({said.decode(errors='replace').strip()})" if said else "")

    def inject(self, ifindex: int, frame: bytes, soon: bool = False) -> bool:
        """Let a frame walk as if it had come in on an interface. Its checksums have to be whole.

        Args:
            ifindex: the interface.
            frame: the frame.
            soon: it walks in its turn, behind what is to go soon by the same interface, in the same direction. Where
                too much waits, and otherwise, it walks at once: as a rule, it has when this returns.

        Returns:
            False if the kernel had no room for it: as lost as any packet can be.
        """
        return self._send(ifindex, frame, soon)

    def send(self, ifindex: int, frame: bytes, soon: bool = False) -> bool:
        """Send a frame out on an interface, likewise."""
        return self._send(ifindex | layout.OUT_MARK, frame, soon)

    def _send(self, mark: int, frame: bytes, soon: bool) -> bool:
        if soon and len(frame) > splicing.FRAME and _is_tcp(frame):
            # The kernel would do it, but GRO would give the last piece, alone the socket's, to the receiver first.
            pieces = splicing.divided(frame, frames.parse(frame), LEAST_MSS)
            return all(self._send(mark, piece, soon) for piece in pieces)
        one = self._sockets.get((mark, soon))
        try:
            if one is None:
                one = self._sockets[mark, soon] = self._made(mark, soon)
            one.send(_shape(frame) + frame)
        except OSError as error:
            if error.errno in _NO_ROOM:
                return soon and self._send(mark, frame, soon=False)
            if error.errno != errno.EMSGSIZE:
                self._drop((mark, soon))  # the next one must not meet it: the interface has gone
            return False
        return True

    def _made(self, mark: int, soon: bool) -> _socket.socket:
        # The class beneath socket.socket: eventlet leaves it alone. This one never waits, and a green call for each
        # frame would be dear.
        made = _socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        try:
            made.setsockopt(socket.SOL_SOCKET, _SO_MARK, struct.pack("I", mark))
            made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            made.bind((self._here if soon else self._there, 0))
        except OSError:
            made.close()
            raise
        return made

    def _drop(self, key: tuple[int, bool]) -> None:
        one = self._sockets.pop(key, None)
        if one is not None:
            one.close()

    def forget(self, indexes: Collection[int]) -> None:
        """These interfaces have gone. Closing a socket takes milliseconds: the others stay."""
        for key in [key for key in self._sockets if key[0] & ~layout.OUT_MARK in indexes]:
            self._drop(key)

    def there(self) -> bool:
        """Whether the pair is: anybody may remove it who may remove interfaces."""
        try:
            return socket.if_nametoindex(self._here) == self.door
        except OSError:
            return False

    def close(self) -> None:
        """Close the sockets and remove the pair."""
        for key in list(self._sockets):
            self._drop(key)
        with contextlib.suppress(NetlinkError, OSError), Netlink() as netlink:
            links = netlink.links()
            if self._here in links:
                netlink.delete(links[self._here].ifindex)


def pair(bridge: str) -> tuple[str, str]:
    """The names of the veth pair by which a bridge's agent sends packets."""
    name = f"lbq{zlib.crc32(bridge.encode()):08x}"
    return f"{name}a", f"{name}b"


def _is_tcp(frame: bytes) -> bool:
    return frame[20 if frame[12:14] == b"\x86\xdd" else 23] == socket.IPPROTO_TCP


def _shape(frame: bytes) -> bytes:
    """What goes in front: a long TCP frame is one that whoever needs it smaller may cut up; with a whole checksum,
    which needs no flag."""
    if len(frame) <= splicing.FRAME or not _is_tcp(frame):
        return _AS_IT_IS
    six = frame[12:14] == b"\x86\xdd"
    tcp = 54 if six else 14 + 4 * (frame[14] & 15)
    size = tcp + 4 * (frame[tcp + 12] >> 4)
    return _GSO.pack(0, _GSO_TCPV6 if six else _GSO_TCPV4, size, LEAST_MSS, 0, 0)


# ------------------------------------------------------------------ the kernel's thread

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
"""System calls (asm-generic/unistd.h); on MIPS and Alpha they have other numbers, and are refused."""
_FSCONFIG_CMD_CREATE = 6
_CLOEXEC = 1


def _give_thread(here: str, there: str) -> None:
    """Have a thread of the kernel receive what comes through the pair from here.

    With GRO, an interface of this kind has a queue of its own (NAPI), which a thread may look after; all that comes
    from one without TSO goes into it (``veth_skb_is_eligible_for_gro``, drivers/net/veth.c).

    Raises:
        OSError, SubprocessError: this kernel has none of it (before 5.13), or does not allow it, or there is no
            ``ethtool``.
    """
    for name, *feature in ((there, "gro", "on"), (here, "tso", "off")):
        subprocess.run(["ethtool", "-K", name, *feature], stdin=subprocess.DEVNULL, capture_output=True, check=True,
                       timeout=5)
    with _sysfs() as root:
        switch = os.open(f"class/net/{there}/threaded", os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
        try:
            os.write(switch, b"1")
        finally:
            os.close(switch)


@contextlib.contextmanager
def _sysfs() -> Iterator[int]:
    """The sysfs of this network namespace, as a directory; what is mounted at /sys may be another one's."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long

    def checked(*arguments: object) -> int:
        done = int(call(*arguments))
        if done < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"sysfs cannot be had: {os.strerror(number)}")
        return done

    opened = checked(_FSOPEN, b"sysfs", _CLOEXEC)
    try:
        checked(_FSCONFIG, opened, _FSCONFIG_CMD_CREATE, None, None, 0)
        mounted = checked(_FSMOUNT, opened, _CLOEXEC, 0)
    finally:
        os.close(opened)
    try:
        yield mounted
    finally:
        os.close(mounted)


__all__ = ["Injector", "pair"]
