# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which servers of this network namespace listen: only for those connections are announced to be adopted.

Owns the look into the kernel's table. Tells nobody.
"""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from lbapp.server_agent.adopt import Listener

NET = Path("/proc/thread-self/net")
_LISTEN = "0A"


def listening(net: Path = NET) -> frozenset[tuple[str, int]]:
    """Address and port of every TCP listener; an address of all zeros is any.

    The kernel lists listeners before all other sockets (``tcp_seq_start``), so the rest of a long table is not read.
    """
    found = set()
    for table in ("tcp", "tcp6"):
        # A host may have no IPv6, and so no such table.
        with contextlib.suppress(OSError), (net / table).open(encoding="ascii") as lines:
            next(lines, "")
            for line in lines:
                _, local, _, state, _ = line.split(maxsplit=4)
                if state != _LISTEN:
                    break
                address, _, port = local.partition(":")
                found.add((_address(address), int(port, 16)))
    return frozenset(found)


def _address(digits: str) -> str:
    """Of words in the host's order of bytes, as the kernel prints them."""
    words = (bytes.fromhex(digits[at:at + 8]) for at in range(0, len(digits), 8))
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def heard(wanted: Iterable[Listener], there: Collection[tuple[str, int]]) -> list[Listener]:
    """Those that somebody listens for. ``::`` may be of IPv6 alone, which the table does not tell: it is of both."""
    def any_of(one: Listener) -> bool:
        return ("::", one.port) in there or (("0.0.0.0", one.port) in there and ":" not in (one.address or ""))

    return [one for one in wanted if any_of(one) or (one.address, one.port) in there]
