# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A REST server in a process of its own, for the tests of the API: real store, real sockets.

The runtime behind it knows two switches and as many connections as it is told to. Prints the
port once it serves.
"""

from __future__ import annotations

import sys

import eventlet

eventlet.monkey_patch()

import eventlet.wsgi  # noqa: E402

eventlet.wsgi.ALREADY_HANDLED = []

import argparse  # noqa: E402
import logging  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402

from ryu.app.wsgi import WSGIApplication  # noqa: E402

from lbapp.api import controller, server, views  # noqa: E402
from lbapp.api.auth import Tokens  # noqa: E402
from lbapp.config.database import EmbeddedDatabase  # noqa: E402
from lbapp.config.model import Member, Pool, VirtualServer  # noqa: E402
from lbapp.config.store import Store  # noqa: E402
from lbapp.control.master import Master  # noqa: E402
from lbapp.reports import Reports  # noqa: E402
from lbapp.server_agent.report import Told  # noqa: E402


class Runtime:
    """A controller with made-up facts that tests can recognise."""

    def __init__(self, connections: int, store: Store) -> None:
        self._connections = connections
        self._store = store
        self._agents: dict[str, list[tuple[str, int]]] = {}
        self._reports = Reports(Master())
        self._reports.key = b"the key of the buses, 32 bytes.."

    def virtual_server_status(self, vs: VirtualServer) -> tuple[str, str]:
        return ("ACTIVE", "ONLINE" if vs.admin_state_up else "DISABLED")

    def pool_status(self, pool: Pool) -> tuple[str, str]:
        if pool.description == "explode":
            raise RuntimeError("a secret of the inside")
        return ("ACTIVE", "ONLINE" if pool.members else "OFFLINE")

    def member_status(self, pool: Pool, member: Member) -> tuple[str, str]:
        return ("ACTIVE", "DRAINING" if member.draining else "NO_MONITOR")

    def member_health(self, member: Member) -> views.HealthView | None:
        if member.draining:
            return None
        return views.HealthView(state="up", since="2026-01-01T00:00:00.000+00:00", reason="", share=1.0,
                                monitors={"tcp": views.MonitorView(state="up", reason="")})

    def effective_weight(self, pool: Pool, member: Member) -> int:
        return member.weight

    def events(self, after: int) -> Iterator[views.EventView]:
        for number in range(after + 1, 6):
            yield views.EventView(number=number, at="2026-01-01T00:00:00.000+00:00", kind="member_down", text="why",
                                  pool="odd" if number % 2 else "even", member="10.0.0.1:80")

    def persistence(self, wanted: Mapping[str, str]) -> Iterator[views.PersistenceView]:
        for number in range(5, 0, -1):
            one = views.PersistenceView(id=f"p:{number:02x}", pool="odd" if number % 2 else "even", type="SOURCE_IP",
                                        key=f"10.0.0.{number}/32", member="10.0.0.1:80", expires_in=5.0)
            if wanted.get("pool", one.pool) == one.pool and wanted.get("key", one.key) == one.key:
                yield one

    def forget(self, wanted: Mapping[str, str]) -> int | None:
        if wanted.get("pool") == "nobody":
            return None
        return len(list(self.persistence(wanted)))

    def draining(self) -> list[views.DrainingView]:
        return [views.DrainingView(pool=name, member="10.0.0.1:80", name="one", seconds=1.5, drain_timeout=30,
                                   connections=3) for name in ("odd", "even")] + [
            views.DrainingView(kind="switch", switch=one.name, pool="", member="", name="", seconds=2.5,
                               drain_timeout=one.drain_timeout, connections=None)
            for one in self._store.configuration.switches.values() if one.draining]

    def switches(self) -> list[views.SwitchView]:
        hosts = {"10.0.0.2": views.HostView(mac="02:00:00:00:00:02", port=2)}
        asked = {one.name: one for one in self._store.configuration.switches.values()}
        known = [views.SwitchView(dpid=f"{number:016x}", address=f"127.0.0.1:{40000 + number}", connected=True,
                                  connected_seconds=1.5, flows=9, hosts=hosts,
                                  draining=(one := asked.pop(f"{number:016x}", None)) is not None and one.draining,
                                  drain_timeout=one.drain_timeout if one is not None else 0) for number in (2, 1)]
        return known + [views.SwitchView(dpid=one.name, address="", connected=False, draining=one.draining,
                                         drain_timeout=one.drain_timeout) for one in asked.values()]

    def connections(self) -> Iterator[views.ConnectionView]:
        for serial in range(self._connections, 0, -1):
            yield views.ConnectionView(
                id=f"{serial:x}", switch=f"{1:016x}", virtual_server="web" if serial % 2 else "dns",
                member=f"10.0.0.{serial % 3 + 1}:80", protocol="TCP" if serial % 2 else "UDP",
                client=f"192.0.2.{serial % 5}:{1000 + serial}", destination="10.0.0.100:80", state="ESTABLISHED")

    def server_agents(self) -> list[views.ServerAgentView]:
        now = time.monotonic()
        reports = {name: views.ReportView(
            age_seconds=now - heard.at, sequence=heard.told.sequence, servers=[one for one, _ in heard.told.endpoints],
            values=dict(heard.told.values), flags=list(heard.flags), signed=heard.signed, refused=heard.refused)
            for name, heard in self._reports.agents(now).items()}
        return [*(views.ServerAgentView(name=name, listeners=[f"{address}:{port}" for address, port in told],
                                        expires_in=9.0) for name, told in self._agents.items()),
                *(views.ServerAgentView(name=name, listeners=[], expires_in=None, report=report)
                  for name, report in reports.items() if name not in self._agents)]

    def announce(self, name: str, listeners: list[tuple[str, int]]) -> views.Lease | None:
        if len(self._agents) >= 2 and name not in self._agents:
            return None
        self._agents[name] = listeners
        return views.Lease(cookie_keys=("00" * 16, None), window_scale=7, lease_seconds=10.0)

    def report(self, name: str, told: Told, signature: bytes | None) -> views.ReportAnswer:
        flags = self._reports.take(name, told, signature, time.monotonic(), time.time())
        return views.ReportAnswer(flags=list(flags), interval=0.5)

    def withdraw(self, name: str) -> bool:
        return bool((self._agents.pop(name, None) is not None) | self._reports.withdraw(name))

    def statistics(self) -> views.StatisticsView:
        return views.StatisticsView(
            uptime_seconds=2.0,
            virtual_servers=[views.VirtualServerStatistics(id="1", name="web", opened=4, refused={"CONNLIMIT": 2}),
                             views.VirtualServerStatistics(id="2", name="dns")],
            members=[views.MemberStatistics(id="3", pool="farm", member="10.0.0.1:80", opened=4)],
            switches=[views.SwitchStatistics(dpid=f"{1:016x}", packet_ins=4)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--certificate")
    parser.add_argument("--key")
    parser.add_argument("--connections", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="the time limits for slow senders")
    parser.add_argument("--no-revive", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if options.seconds:
        server.SOCKET_SECONDS = controller.BODY_SECONDS = options.seconds
    database = EmbeddedDatabase(options.directory)
    database.start()
    store = Store(database.remote, revive=None if options.no_revive else database.start)
    store.start()
    wsgi = WSGIApplication()
    guard = controller.register(wsgi, store, Runtime(options.connections, store), Tokens(options.directory / "token"))
    running = server.serve(guard, port=0, certificate=options.certificate, key=options.key)
    # The same routes without the guard, as Ryu's own server would serve them.
    bare = server.serve(wsgi, port=0)
    print(running.port, bare.port, flush=True)
    eventlet.hubs.trampoline(sys.stdin.fileno(), read=True)  # until the test closes its end
    running.stop()
    store.stop()


if __name__ == "__main__":
    main()
