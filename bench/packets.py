# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients by the million, as far as a switch can tell: a program, run inside a host's namespace.

``python bench/packets.py INTERFACE MAC ADDRESS PORT FIRST COUNT`` sends frames of COUNT TCP clients to ADDRESS and
PORT by way of MAC; their addresses begin at FIRST, each with :data:`PORTS` ports. It obeys lines on its standard
input: ``syn`` sends the first packet of every client, ``ack`` a further one; anything else, or the end of input, ends
it. Every answer is one JSON object on a line. There are no sockets behind it: a million of these would measure the
kernel's memory for sockets instead of the switch's for connections. Imports nothing of the project.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import struct
import sys
from collections.abc import Iterator

PORTS = 50_000
FIRST_PORT = 10_000
SYN, ACK = 0x02, 0x10
_ATTEMPTS = 1000


def total(data: bytes) -> int:
    """The sum of 16-bit words that the Internet checksum is made from, not folded yet."""
    return sum(struct.unpack(f"!{len(data) // 2}H", data))


def folded(words: int) -> int:
    """The checksum of words whose sum this is."""
    return 0xFFFF - (words % 0xFFFF or 0xFFFF * bool(words))


def frames(source_mac: bytes, mac: bytes, address: str, port: int, first: str, count: int,
           flags: int) -> Iterator[bytearray]:
    """One frame of every client, with whole checksums. It is the same buffer each time."""
    destination, start = ipaddress.IPv4Address(address).packed, int(ipaddress.IPv4Address(first))
    frame = bytearray(54)
    frame[:14] = mac + source_mac + b"\x08\x00"
    for index in range(0, count, PORTS):
        source = (start + index // PORTS).to_bytes(4, "big")
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0x4000, 64, 6, 0, source, destination)
        frame[14:34] = ip[:10] + folded(total(ip)).to_bytes(2, "big") + ip[12:]
        tcp = struct.pack("!HHIIBBHHH", 0, port, 1, 1 if flags & ACK else 0, 5 << 4, flags, 64240, 0, 0)
        frame[34:54] = tcp
        words = total(source + destination) + 6 + len(tcp) + total(tcp)
        for client_port in range(FIRST_PORT, FIRST_PORT + min(PORTS, count - index)):
            struct.pack_into("!H", frame, 34, client_port)
            struct.pack_into("!H", frame, 50, folded(words + client_port))
            yield frame


def send(endpoint: socket.socket, frame: bytearray) -> bool:
    """Send a frame, again while the kernel has no room; False when it has none for long."""
    for _ in range(_ATTEMPTS):
        try:
            endpoint.send(frame)
            return True
        except OSError:
            continue
    return False


def main(interface: str, mac: str, address: str, port: int, first: str, count: int) -> None:
    """See the module."""
    endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    endpoint.bind((interface, 0))
    own = endpoint.getsockname()[4]
    for line in sys.stdin:
        flags = {"syn": SYN, "ack": ACK}.get(line.strip())
        if flags is None:
            break
        sent = sum(send(endpoint, frame)
                   for frame in frames(own, bytes.fromhex(mac.replace(":", "")), address, port, first, count, flags))
        print(json.dumps({"sent": sent}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
