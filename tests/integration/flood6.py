# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What hping3 does not do: segments over IPv6, from one address or from everywhere.

    python flood6.py INTERFACE SOURCE TO ADDRESS PORT FLAGS SIZE EVERY COUNT

SOURCE is an address or ``any`` (one in eight is a group's, as of IPv4's), TO a hardware address, EVERY the microseconds
from one segment to the next; COUNT 0 is for ever. Ports of the source and numbers are random.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import time

ETHER = b"\x86\xdd"
ANYWHERE, GROUP = bytes.fromhex("20010db8"), bytes.fromhex("ff0e0000")


def main() -> None:
    """See the module."""
    interface, source, to, address = sys.argv[1:5]
    port, flags, size, every, count = map(int, sys.argv[5:])
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    wire.bind((interface, 0))
    ethernet = bytes.fromhex(to.replace(":", "")) + wire.getsockname()[4] + ETHER
    head = struct.pack("!IHBB", 6 << 28, 20 + size, 6, 64)
    there, known = socket.inet_pton(socket.AF_INET6, address), b""
    if source != "any":
        known = socket.inet_pton(socket.AF_INET6, source)
    chance, payload, number, due = random.Random(1), b"x" * size, 0, time.monotonic()
    while not count or number < count:
        number += 1
        addresses = (known or (GROUP if number % 8 == 0 else ANYWHERE) + chance.randbytes(12)) + there
        segment = struct.pack("!HHIIBBHHH", chance.randrange(1024, 65536), port, chance.getrandbits(32),
                              chance.getrandbits(32), 5 << 4, flags, 512, 0, 0) + payload
        covered = addresses + struct.pack("!II", len(segment), 6) + segment + bytes(size % 2)
        check = 0xFFFF - int.from_bytes(covered, "big") % 0xFFFF
        wire.send(b"".join((ethernet, head, addresses, segment[:16], check.to_bytes(2, "big"), segment[18:])))
        due += every / 1_000_000
        ahead = due - time.monotonic()
        if ahead > 0.002:
            time.sleep(ahead)


if __name__ == "__main__":
    main()
