# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Interfaces, veth pairs and TC filters of the calling thread's network namespace, over rtnetlink.

Owns the encoding of the few requests that the fast path needs, and their answers. Knows nothing of
bridges. A socket of its own rather than a library: the ones there are run an event loop inside each
call, which fails as soon as two green threads of one process meet in it. The kernel answers a
request before it returns from taking it, so nothing here ever waits, in green threads neither.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

IFF_UP = 0x1
IFF_NOARP = 0x80
IFF_PROMISC = 0x100
IFF_LOWER_UP = 0x10000

CLSACT_PARENT = 0xFFFFFFF1
CLSACT_HANDLE = 0xFFFF0000
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
"""Where a filter hangs: the two sides of clsact (linux/pkt_sched.h, TC_H_MIN_INGRESS and _EGRESS)."""

_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE, _DUMP = 0x1, 0x4, 0x100, 0x200, 0x400, 0x300
_DUMP_INTERRUPTED, _ACK_TLVS = 0x10, 0x200
_ERROR, _DONE = 2, 3
_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWQDISC, _DELQDISC, _GETQDISC = 36, 37, 38
_NEWTFILTER, _DELTFILTER, _GETTFILTER = 44, 45, 46
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK = 1, 3, 4, 5
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_AF_SPEC, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 18, 20, 26, 29, 37
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_ADDR_GEN_MODE, _ADDR_GEN_NONE = 8, 1
_SKIP_STATISTICS = 8
_TCA_KIND, _TCA_OPTIONS = 1, 2
_BPF_FD, _BPF_NAME, _BPF_FLAGS, _BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_ETH_P_ALL = 0x0003
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_RTMGRP_LINK = 1
_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_TCMSG = struct.Struct("=BxxxiIII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE = 1 << 17
_ATTEMPTS = 5
_PATIENCE_S = 10.0


class NetlinkError(OSError):
    """The kernel refused a request: ``errno``, and in words why."""


class Link(NamedTuple):
    """An interface.

    Attributes:
        peer: the index of what it hangs on (a veth's other end, where that is in the same namespace); 0 if none.
        alias: free text that somebody gave it.
    """

    ifindex: int
    name: str
    flags: int
    mtu: int
    address: bytes
    kind: str
    peer: int
    alias: str

    @property
    def up(self) -> bool:
        """Whether its owner wants it up."""
        return bool(self.flags & IFF_UP)

    @property
    def carrier(self) -> bool:
        """Whether it is up and there is something at the other end."""
        return self.up and bool(self.flags & IFF_LOWER_UP)

    @property
    def promiscuous(self) -> bool:
        """Whether somebody set it promiscuous."""
        return bool(self.flags & IFF_PROMISC)


class Filter(NamedTuple):
    """A TC filter; ``name`` and ``program`` (the kernel's id) only for BPF."""

    priority: int
    handle: int
    kind: str
    name: str
    program: int


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[position + _ATTRIBUTE.size:position + length]
        position += length + -length % 4
    return found


def _string(value: bytes | None) -> str:
    return (value or b"").split(b"\0", 1)[0].decode(errors="replace")


def _integer(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value and len(value) == 4 else 0


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, flags, serial, _ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size:
            return
        yield kind, flags, serial, data[position + _HEADER.size:position + length]
        position += length + -length % 4


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    found = _attributes(body[_IFINFO.size:])
    information = _attributes(found.get(_IFLA_LINKINFO, b""))
    # The index of a peer elsewhere means nothing here.
    peer = 0 if _IFLA_LINK_NETNSID in found else _integer(found.get(_IFLA_LINK))
    return Link(index, _string(found.get(_IFLA_IFNAME)), flags, _integer(found.get(_IFLA_MTU)),
                found.get(_IFLA_ADDRESS, b""), _string(information.get(_INFO_KIND)), peer,
                _string(found.get(_IFLA_IFALIAS)))


class Netlink:
    """A socket to the kernel, in the namespace in which the calling thread is now.

    Args:
        protocol: what it speaks there; all methods but :meth:`dump` are rtnetlink's.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.bind((0, 0))
            self._socket.settimeout(_PATIENCE_S)
            for option in (_CAP_ACK, _EXT_ACK):
                # Only the wording of refusals depends on them.
                with contextlib.suppress(OSError):
                    self._socket.setsockopt(_SOL_NETLINK, option, 1)
        except BaseException:
            self._socket.close()
            raise
        self._serials = itertools.count(1)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------- requests

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Ask for a list; its messages, without their headers."""
        return self._request(kind, _DUMP, body)

    def _request(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        with self._lock:
            for _ in range(_ATTEMPTS):
                serial = next(self._serials) & 0xFFFFFFFF
                self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, serial, 0) + body)
                answers, whole = self._answers(serial, multipart=flags & _DUMP == _DUMP)
                if whole:
                    return answers
            raise NetlinkError(errno.EAGAIN, "the list changed faster than it could be read")

    def _answers(self, serial: int, multipart: bool) -> tuple[list[bytes], bool]:
        answers: list[bytes] = []
        whole = True
        while True:
            try:
                data = self._socket.recv(_RECEIVE)
            except TimeoutError:
                raise NetlinkError(errno.ETIMEDOUT, "the kernel does not answer") from None
            for kind, flags, number, body in _messages(data):
                if number != serial:
                    continue  # the rest of a request that was given up
                whole = whole and not flags & _DUMP_INTERRUPTED
                if kind == _ERROR:
                    self._check(body, flags, _HEADER.size)
                    return answers, whole
                if kind == _DONE:
                    self._check(body, flags)
                    return answers, whole
                answers.append(body)
            if not multipart and answers:
                return answers, whole

    @staticmethod
    def _check(body: bytes, flags: int, repeated: int = 0) -> None:
        """``repeated``: so much of the request comes before what is said of it."""
        code = -int(struct.unpack_from("=i", body)[0])
        if code:
            why = _string(_attributes(body[4 + repeated:]).get(1)) if flags & _ACK_TLVS else ""
            raise NetlinkError(code, why or os.strerror(code))

    # -------------------------------------------------------------------- links

    def links(self) -> dict[str, Link]:
        """All interfaces by name."""
        body = _IFINFO.pack(0, 0, 0, 0, 0) + _number(_IFLA_EXT_MASK, _SKIP_STATISTICS)
        found = [_link(answer) for answer in self._request(_GETLINK, _DUMP, body)]
        return {link.name: link for link in found}

    def add_pair(self, name: str, peer: str, mtu: int, peer_address: bytes) -> None:
        """Make a veth pair, down. ``peer`` gets that hardware address; both have the same MTU."""
        other = (_IFINFO.pack(0, 0, 0, 0, 0) + _text(_IFLA_IFNAME, peer) + _number(_IFLA_MTU, mtu)
                 + _attribute(_IFLA_ADDRESS, peer_address))
        information = _text(_INFO_KIND, "veth") + _attribute(_INFO_DATA, _attribute(_VETH_PEER, other))
        self._request(_NEWLINK, _ACK | _CREATE | _EXCL, _IFINFO.pack(0, 0, 0, 0, 0) + _text(_IFLA_IFNAME, name)
                      + _number(_IFLA_MTU, mtu) + _attribute(_IFLA_LINKINFO, information))

    def change(self, index: int, *, up: bool | None = None, promiscuous: bool | None = None, arp: bool | None = None,
               mtu: int | None = None, address: bytes | None = None) -> None:
        """Change what is given of an interface."""
        flags = mask = 0
        for wanted, bit in ((up, IFF_UP), (promiscuous, IFF_PROMISC), (None if arp is None else not arp, IFF_NOARP)):
            if wanted is not None:
                mask |= bit
                flags |= bit if wanted else 0
        body = _IFINFO.pack(0, 0, index, flags, mask)
        if mtu is not None:
            body += _number(_IFLA_MTU, mtu)
        if address is not None:
            body += _attribute(_IFLA_ADDRESS, address)
        self._request(_SETLINK, _ACK, body)

    def label(self, index: int, alias: str) -> None:
        """Give an interface its alias."""
        self._request(_SETLINK, _ACK, _IFINFO.pack(0, 0, index, 0, 0) + _text(_IFLA_IFALIAS, alias))

    def without_addresses(self, index: int) -> None:
        """The kernel gives the interface no IPv6 address by itself, and so says nothing through it."""
        mode = _attribute(_ADDR_GEN_MODE, bytes([_ADDR_GEN_NONE]))
        body = _attribute(_IFLA_AF_SPEC, _attribute(socket.AF_INET6, mode))
        with contextlib.suppress(NetlinkError):  # a kernel without IPv6 has no such setting
            self._request(_SETLINK, _ACK, _IFINFO.pack(0, 0, index, 0, 0) + body)

    def delete(self, index: int) -> bool:
        """Delete an interface, and the peer of a veth with it. False if there was none."""
        return self._gone(_DELLINK, _IFINFO.pack(0, 0, index, 0, 0))

    # ------------------------------------------------------------------ filters

    def clsacts(self) -> set[int]:
        """The indices of interfaces to which filters can be attached now (clsact or ingress)."""
        found = set()
        for answer in self._request(_GETQDISC, _DUMP, _TCMSG.pack(0, 0, 0, 0, 0)):
            _, index, _, parent, _ = _TCMSG.unpack_from(answer)
            if parent == CLSACT_PARENT:
                found.add(index)
        return found

    def add_clsact(self, index: int) -> bool:
        """Make filters possible on an interface. False if they were already."""
        try:
            self._request(_NEWQDISC, _ACK | _CREATE | _EXCL,
                          _TCMSG.pack(0, index, CLSACT_HANDLE, CLSACT_PARENT, 0) + _text(_TCA_KIND, "clsact"))
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    def delete_clsact(self, index: int) -> bool:
        """Delete clsact with all filters on it. False if there was none."""
        return self._gone(_DELQDISC, _TCMSG.pack(0, index, CLSACT_HANDLE, CLSACT_PARENT, 0)
                          + _text(_TCA_KIND, "clsact"))

    def filters(self, index: int, parents: Sequence[int] = (INGRESS,)) -> list[Filter]:
        """The filters of an interface; none where it has no clsact."""
        found = []
        for parent in parents:
            try:
                answers = self._request(_GETTFILTER, _DUMP, _TCMSG.pack(0, index, 0, parent, 0))
            except NetlinkError as error:
                if error.errno in (errno.EINVAL, errno.ENODEV, errno.ENOENT):
                    continue
                raise
            for answer in answers:
                _, _, handle, _, information = _TCMSG.unpack_from(answer)
                attributes = _attributes(answer[_TCMSG.size:])
                kind = _string(attributes.get(_TCA_KIND))
                options = _attributes(attributes.get(_TCA_OPTIONS, b"")) if kind == "bpf" else {}
                if handle:  # 0 is the head of all filters with this priority
                    found.append(Filter(information >> 16, handle, kind, _string(options.get(_BPF_NAME)),
                                        _integer(options.get(_BPF_ID))))
        return found

    def set_program(self, index: int, priority: int, handle: int, program: int, name: str) -> None:
        """Attach a program (a file descriptor) at ingress, direct action; one that is there is replaced at once."""
        options = _number(_BPF_FD, program) + _text(_BPF_NAME, name) + _number(_BPF_FLAGS, _DIRECT_ACTION)
        self._request(_NEWTFILTER, _ACK | _CREATE | _REPLACE,
                      _TCMSG.pack(0, index, handle, INGRESS, priority << 16 | socket.htons(_ETH_P_ALL))
                      + _text(_TCA_KIND, "bpf") + _attribute(_TCA_OPTIONS, options))

    def delete_filter(self, index: int, priority: int, handle: int) -> bool:
        """Delete a BPF filter at ingress. False if there was none."""
        return self._gone(_DELTFILTER,
                          _TCMSG.pack(0, index, handle, INGRESS, priority << 16 | socket.htons(_ETH_P_ALL))
                          + _text(_TCA_KIND, "bpf"))

    def _gone(self, kind: int, body: bytes) -> bool:
        try:
            self._request(kind, _ACK, body)
        except NetlinkError as error:
            if error.errno in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
                return False
            raise
        return True


class LinkEvents:
    """Tells that an interface of the calling thread's namespace came, went or changed."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, _RTMGRP_LINK))
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For poll: readable when something changed."""
        return self._socket.fileno()

    def drain(self, limit: int = 256) -> bool:
        """Forget what was told, at most so many at a time, and say whether it was anything."""
        told = False
        for _ in range(limit):
            try:
                self._socket.recv(_RECEIVE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more than the socket holds: something did change
                    raise
            told = True
        return told

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
