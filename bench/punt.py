# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""CPU per punt of the controller's own code, without a switch: packet-in bytes in, packet-out bytes out.

``python -m bench.punt [--profile]``. The way of ``LoadBalancer.receive`` with a real packet-in
of Open vSwitch, for each style; what the socket costs is not in it (``make bench`` measures that).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import struct
import time
import types
import warnings

from lbapp.config.model import Algorithm, Configuration, Decision, Member, Pool, Protocol, State, VirtualServer
from lbapp.control.messages import Host, NeighbourSeen, SwitchUp
from lbapp.dataflow.pipeline import Kind, cookie

SWITCH = 1


def packet_in(number: int, client_port: int) -> bytes:
    """A packet-in as Open vSwitch sends it: a SYN to 10.0.0.100:80, with partial checksum."""
    tcp = struct.pack("!HHIIBBHHH", client_port, 80, 1000, 0, 10 << 4, 2, 64240, 0, 0) + bytes.fromhex(
        "020405b40402080a5c1d1d3c0000000001030307")
    source, destination = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 100))
    pseudo = sum(struct.unpack("!4H", source + destination)) + 6 + len(tcp)
    tcp = tcp[:16] + struct.pack("!H", pseudo % 0xFFFF) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 7, 0x4000, 64, 6, 0) + source + destination
    frame = bytes.fromhex("026c62000001" "0a0000000001" "0800") + ip + tcp
    match = bytes.fromhex("80000004" "00000001" "00010404" + f"{number:08x}" + "0001d204" "00000021" "0001d402" "0002")
    length = 4 + len(match)
    body = struct.pack("!IHBBQ", 0xFFFFFFFF, len(frame), 1, 20, cookie(Kind.QUERY, number) | 0x1234) + struct.pack(
        "!HH", 1, length) + match + bytes(-length % 8) + b"\0\0" + frame
    return struct.pack("!BBHI", 4, 10, 8 + len(body), 0) + body


def application(state: str, algorithm: str) -> tuple[object, object]:
    """A LoadBalancer without Ryu's machinery, with one connected switch."""
    warnings.simplefilter("ignore")
    import eventlet.wsgi
    eventlet.wsgi.ALREADY_HANDLED = []
    from lbapp.app import LoadBalancer, Switch

    app = LoadBalancer(wsgi=None)
    pool = Pool(name="p", id="p", lb_algorithm=Algorithm(algorithm), members=tuple(
        Member(address=f"10.0.0.{n}", protocol_port=80, number=n, id=str(n)) for n in (2, 3, 4, 5, 6)))
    server = VirtualServer(name="v", id="v", number=1, vip_address="10.0.0.100", protocol=Protocol.TCP,
                           protocol_port=80, default_pool_id="p", state=State(state), decision=Decision.CONTROLLER)
    app.configure(Configuration(virtual_servers={"v": server}, pools={"p": pool}))
    datapath = types.SimpleNamespace(id=SWITCH, send=lambda data: True, address=("127.0.0.1", 1))
    switch = Switch(datapath, app.control, app.configuration)
    app.switches[SWITCH] = switch
    app.control.handle(SwitchUp(SWITCH, {}), 0.0)
    for n in (2, 3, 4, 5, 6):
        app.control.handle(NeighbourSeen(SWITCH, f"10.0.0.{n}", Host(bytes((2, 0, 0, 0, 0, n)), n)), 0.0)
    for _ in switch.session.reconcile(app.configuration):
        pass
    return app, datapath


def main() -> None:
    """Print microseconds of CPU per punt, for each style."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--count", type=int, default=50_000)
    arguments = parser.parse_args()
    messages = [packet_in(1, 1024 + n % 60000) for n in range(arguments.count)]
    for state, algorithm in (("conntrack", "ROUND_ROBIN"), ("conntrack", "LEAST_CONNECTIONS"),
                             ("rules", "ROUND_ROBIN")):
        app, datapath = application(state, algorithm)
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        before = time.process_time()
        for message in messages:
            app.receive(datapath, 10, message)  # type: ignore[attr-defined]
        spent = time.process_time() - before
        profile.disable()
        print(f"{state:10} {algorithm:18} {spent / len(messages) * 1e6:6.1f} us a punt")
        if arguments.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    main()
