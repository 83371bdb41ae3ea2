# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A control segment of its own at somebody else's agent: the buses, and nothing of a controller.

    python -m tests.integration.second_segment HOST:PORT KEY STATE < ANNOUNCED

ANNOUNCED is JSON: virtual servers with their targets. Every query is answered with the targets in turn. STATE is
rewritten as things happen. SIGUSR1: every member that was announced is gone (REAP of all its flows).
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import eventlet

from lbapp.bus import csmb, keyfile
from lbapp.bus.transport import CsClient
from lbapp.control.messages import Delete, Error, Host, Query, Reap, Refused, Reply, Translation


class Segment:
    """Answers in turn and counts."""

    def __init__(self, address: tuple[str, int], key: Path, state: Path, announced: list[dict[str, Any]]) -> None:
        self.state, self.draft = state, state.with_suffix(".draft")
        self.counted: Counter[str] = Counter()
        self.deleted: Counter[str] = Counter()
        self.traffic: dict[str, list[int]] = {}
        self.turn = 0
        self.targets = {one["number"]: [self.target(target) for target in one["targets"]] for one in announced}
        self.client = CsClient(address, keyfile.read(key), 0x5EC0_11D, self.event, self.messages)
        self.client.replace([csmb.VirtualServer(
            one["number"], socket.inet_aton(one["address"]), one["port"], 6, csmb.Flag.TRANSLATE_ADDR,
            mode=csmb.Mode[one["mode"]], hash=csmb.Hash.TURN, idle_seconds=600) for one in announced], self.targets)

    @staticmethod
    def target(said: dict[str, Any]) -> csmb.Target:
        return csmb.Target(said["member"], socket.inet_aton(said["address"]), said["port"],
                           bytes.fromhex(said["mac"].replace(":", "")), said["out_port"], 1)

    def event(self, _client: CsClient, event: Any) -> None:
        self.counted[type(event).__name__.lower()] += 1
        if hasattr(event, "traffic"):
            self.traffic = {f"{row.number}/{row.member}": list(row[2:]) for row in event.traffic}
        self.write()

    def messages(self, client: CsClient, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, Query):
                targets = self.targets[message.virtual_server]
                target = targets[self.turn % len(targets)]
                self.turn += 1
                self.counted["queries"] += 1
                client.send_replies([Reply(message, Error.OK, target.member, Translation(
                    target.address, target.port, Host(target.mac, target.out_port)))])
            elif isinstance(message, Delete):
                self.deleted.update(f"{closed.virtual_server}/{closed.member}" for closed in message.closed)
            elif isinstance(message, Refused):
                self.counted["refused"] += 1
        client.flush(urgent=True)
        self.write()

    def members_are_gone(self, *_: Any) -> None:
        members = {target.member for targets in self.targets.values() for target in targets}
        self.client.send_reaps([Reap(self.client.identity, 0, 0, member, final=True) for member in sorted(members)])

    def write(self) -> None:
        self.draft.write_text(json.dumps({**self.counted, "deleted": self.deleted, "traffic": self.traffic}))
        self.draft.rename(self.state)


def main(address: str, key: str, state: str) -> None:
    host, _, port = address.rpartition(":")
    segment = Segment((host, int(port)), Path(key), Path(state), json.load(sys.stdin))
    signal.signal(signal.SIGUSR1, segment.members_are_gone)
    segment.write()
    while True:
        eventlet.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
