# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Which servers of this network namespace listen: only for those connections are announced to be adopted.

Owns which of the kernel's sockets these are. Tells nobody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

from lbapp.server_agent.adopt import Listener
from lbapp.server_agent.sockets import LISTEN, tcp


def listening() -> frozenset[tuple[str, int]]:
    """Address and port of every TCP listener; an address of all zeros is any.

    Raises:
        OSError: the kernel does not tell.
    """
    return frozenset((_spelled(one.address), one.port) for one in tcp(LISTEN))


def _spelled(packed: bytes) -> str:
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def heard(wanted: Iterable[Listener], there: Collection[tuple[str, int]]) -> list[Listener]:
    """Those that somebody listens for. ``::`` may be of IPv6 alone, which the table does not tell: it is of both."""
    def any_of(one: Listener) -> bool:
        return ("::", one.port) in there or (("0.0.0.0", one.port) in there and ":" not in (one.address or ""))

    return [one for one in wanted if any_of(one) or (one.address, one.port) in there]
