# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A laboratory of one client and one server with a virtual server of every binding and family, and connections of which
both ends are watched.

Behind each of them are nginx, a server that takes bodies, and a listener of the test's own process: what is accepted
there is a member's end by hand. Real kernels at both ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.capture import Capture, real_checksums
from tests.integration.handed_over import Site
from tests.integration.support import VIP, VIP6, configure, family_of, members, pool, server
from tests.segments import View, compare
from topologies.lab import Lab
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

WEB_SERVER = Path(__file__).with_name("web_server.py")
WAYS = {"splice": (80, 80, 9000, 9010), "handoff": (81, 8080, 9001, 9011), "hybrid": (82, 8081, 9002, 9012),
        "relay": (83, 8082, 9003, 9013)}
"""The virtual server's port, and the member's: nginx, what takes bodies, and the one by hand. None is used both ways,
so that no port of a client means two connections there."""
SIZES = {way: 1_000_192 if way == "relay" else 5_000_192 for way in WAYS}
"""Bytes of what is large, a multiple of 256; every packet of a relayed connection goes through the controller."""
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, SEND_QUEUE, OFF_NO_WINDOW_PROBE = 19, 20, 21, 2, -1


def _to_pool(name: str, kind: str, value: str) -> dict[str, Any]:
    return {"name": f"{kind}-{value.strip('/')}", "action": "REDIRECT_TO_POOL", "redirect_pool": name,
            "rules": [{"type": kind, "compare_type": "STARTS_WITH", "value": value}]}


class Watched(Site):
    """The laboratory; ``listeners`` are the members' ends by hand, by binding."""

    listeners: dict[str, socket.socket]


@contextlib.contextmanager
def laboratory(directory: Path) -> Iterator[Watched]:
    """Everything, for the time of the block."""
    with contextlib.ExitStack() as running:
        # A process that moves to another processor overtakes the packets that it has sent from the one before.
        running.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        every, worker = sorted(os.sched_getaffinity(0)), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
        os.sched_setaffinity(0, {every[int(worker.removeprefix("gw")) % len(every)]})
        lab = running.enter_context(Lab(SingleTopo(clients=1, servers=1), directory=directory / "lab",
                                        options=["--fastpath"]))
        lab.start_servers()
        running.callback(end, lab.server().nginx(lab.directory / "files", (WAYS["relay"][1],)))
        made = Watched(lab, WAYS["handoff"][1:])
        made.listeners = {}
        for way, (_, _, port, by_hand) in WAYS.items():
            running.callback(end, lab.server().popen(sys.executable, str(WEB_SERVER), "s1", str(port)))
            with lab.server().entered():
                made.listeners[way] = running.enter_context(socket.create_server(
                    ("::", by_hand), family=socket.AF_INET6, dualstack_ipv6=True))
            made.listeners[way].settimeout(10)
        lab.start_controller()
        assert lab.has_fastpath
        pools, servers = [], []
        for way, (port, *behind) in WAYS.items():
            for word, vip in (("four", VIP), ("six", VIP6)):
                name = f"{way}-{word}"
                pools += [pool(f"{name}-{member}", "ROUND_ROBIN", members(lab, member, vip == VIP6))
                          for member in behind]
                servers.append(server(name, port, f"{name}-{behind[0]}", vip, application="http", binding=way,
                                      l7_policies=[_to_pool(f"{name}-{behind[1]}", "METHOD", "POST"),
                                                   _to_pool(f"{name}-{behind[1]}", "PATH", "/bytes/"),
                                                   _to_pool(f"{name}-{behind[2]}", "PATH", "/by-hand")]))
        configure(lab, pools, servers)
        # Without TIME_WAIT a server that finishes first has nothing left that could answer the client's FIN.
        lab.server().run("sysctl", "-qw", "net.ipv4.tcp_max_tw_buckets=4096")
        running.callback(made.stop_agents)
        made.start_agents()
        running.enter_context(real_checksums([lab.client(), lab.server()]))
        # The switch's end of each wire as well: a frame that has to be cut up is, before its host sees it.
        for link in json.loads(lab.root.run("ip", "-j", "link").stdout):
            if re.fullmatch(r"lb1-eth\d+", link["ifname"]):
                lab.root.run("ethtool", "-K", link["ifname"], "tx", "off", "tso", "off")
        yield made


class Connection:
    """A client's connection to a virtual server, and both ends' captures of it.

    Args:
        site: the laboratory.
        way: the binding.
        vip: the virtual address.
        ends: the client's capture and the server's.
        isn: the client's initial sequence number; the kernel's choice where None.
        room: the client's SO_RCVBUF; the kernel's choice where 0.
    """

    def __init__(self, site: Site, way: str, vip: str, ends: list[Capture], isn: int | None = None,
                 room: int = 0) -> None:
        self._client = site.lab.client()
        self._spliced, self._ends = way != "handoff", ends
        # The switch's queue to the controller is short: what finds it full is dropped, and sent again.
        self._lossy = way == "relay"
        if way == "handoff":
            site.settled()
        self._since = site.shaken()
        with self._client.entered():
            self.socket = socket.socket(family_of(vip))
        self.socket.settimeout(30)
        if room:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        if isn is not None:
            for option, value in ((TCP_REPAIR, 1), (TCP_REPAIR_QUEUE, SEND_QUEUE), (TCP_QUEUE_SEQ, isn),
                                  (TCP_REPAIR, OFF_NO_WINDOW_PROBE)):
                self.socket.setsockopt(socket.IPPROTO_TCP, option, struct.pack("I", value & 0xFFFFFFFF))
        self.socket.connect((vip, WAYS[way][0]))
        address, self.port = self.socket.getsockname()[:2]
        self.known = (socket.inet_pton(family_of(vip), address), self.port)
        self._isn, self._left = isn, b""

    def say(self, method: str, path: str, headers: bytes = b"", body: bytes = b"") -> None:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: a.example\r\n{length}".encode() + headers
        self.socket.sendall(head + b"\r\n" + body)

    def answer(self) -> bytes:
        """The body of the next answer, which is 200."""
        while b"\r\n\r\n" not in self._left:
            self._more()
        head, _, self._left = self._left.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = next(int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n")
                      if line.startswith(b"content-length:"))
        while len(self._left) < length:
            self._more()
        body, self._left = self._left[:length], self._left[length:]
        return body

    def _more(self) -> None:
        part = self.socket.recv(1 << 20)
        assert part, "the connection ended"
        self._left += part

    def until_closed(self) -> None:
        """The other side finishes, having said no more."""
        assert self.socket.recv(1) == b"" == self._left

    def judge(self, lossy: bool = False) -> tuple[View, View]:
        """Wait for the end of the connection, and assert that all was as it has to be. Returns both ends' views."""
        self.socket.close()
        lossy = lossy or self._lossy
        upper, lower = self._ends
        client = View("client", self.known, lossy=lossy)
        client.add(upper.read())
        member = View("member", self.known, None if self._spliced else client, lossy)
        deadline, ended = time.monotonic() + 10, False
        while not ended and time.monotonic() < deadline:
            ended = client.ended and member.ended
            client.add(upper.read())
            member.add(lower.read())
            time.sleep(0.2)  # and once more: what comes behind an end is judged too
        assert upper.lost == lower.lost == 0, "the captures have all of it"
        assert client.close() + member.close() + compare(client, member, self._spliced) == []
        assert self._isn in (None, client.up.isn)
        greeted, opened = self._since()
        assert greeted >= 1 and (opened >= 1) == self._spliced, "as the virtual server's binding says"
        return client, member

    def judge_reset(self, by: str) -> None:
        """The same of a connection that one side has reset, ``client`` or ``member``: both ends have seen it, once."""
        self.socket.close()
        upper, lower = self._ends
        client = View("client", self.known, lossy=self._lossy)

        def told(view: View, wire: Capture) -> bool:
            view.add(wire.read())
            return any("RST" in fault for fault in view.faults)

        wait_until(lambda: told(client, upper), 10, "the RST at the client's end")
        member = View("member", self.known, None if self._spliced else client, self._lossy)
        wait_until(lambda: told(member, lower), 10, "the RST at the member's end")
        for view in (client, member):
            assert [fault.partition(": ")[2] for fault in view.faults] == [f"RST of the {by}"]
        assert compare(client, member, self._spliced) == []
