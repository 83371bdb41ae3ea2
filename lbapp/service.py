# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What runs besides OpenFlow in the controller's process: the store, the REST server, the readings.

Owns their lifetimes. Ryu makes the application itself; this puts it together with the rest once
Ryu asks for its REST server, which is the moment when all applications exist.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryu.base import app_manager
from ryu.lib import hub

from lbapp.api.auth import Tokens
from lbapp.api.controller import register
from lbapp.api.server import Server, serve
from lbapp.bus import keyfile
from lbapp.config.database import EmbeddedDatabase
from lbapp.config.store import Store
from lbapp.control.events import EventKind
from lbapp.dataflow.ovs import Ovs
from lbapp.dataflow.ryu_shim import tls_context
from lbapp.health import HealthService
from lbapp.monitors.place import Place
from lbapp.persistence_store import Keeper, PersistenceStore
from lbapp.readings import Readings
from lbapp.runtime import ControllerRuntime
from lbapp.vantages import OnChanged, OnLatencies, Vantages, Wanted

if TYPE_CHECKING:
    from lbapp.launcher import Settings

LOG = logging.getLogger("lbapp.service")


class Service:
    """The controller's parts.

    Args:
        settings: what ``lbapp run`` was told.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database: EmbeddedDatabase | None = None
        self._store: Store | None = None
        self._tokens: Tokens | None = None
        self._server: Server | None = None
        self._health: HealthService | None = None
        self._keeper: Keeper | None = None
        self._bus_key: bytes | None = None
        self._close_fastpaths: Callable[[], None] = lambda: None

    def open(self) -> None:
        """Open the database and the token file, before anything listens.

        Raises:
            OSError: the OpenFlow address is in use or not of this host; a certificate cannot be read.
            lbapp.bus.keyfile.KeyFileError: the key of the buses cannot be used.
        """
        settings = self._settings
        _check_free(settings.openflow)
        if settings.openflow_certificate is not None:
            _check_tls(settings.openflow_certificate, settings.openflow_key, settings.openflow_ca)
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        remote = settings.database
        revive = None
        if remote is None:
            self._database = EmbeddedDatabase(settings.state_dir)
            self._database.start()
            remote, revive = self._database.remote, self._database.start
        self._tokens = Tokens(settings.token_file or settings.state_dir / "token")
        key = settings.bus_key or settings.state_dir / "bus.key"
        if settings.agents or settings.bus_key is not None or key.exists():
            self._bus_key = keyfile.ensure(key)
        self._store = Store(remote, revive)
        self._store.start()

    def _fastpaths(self, application: Any) -> None:
        """Have switches of this host get a fast path when they are ready."""
        settings, fastpaths = self._settings, application.fastpaths
        fastpaths.queries = settings.queries
        self._close_fastpaths = fastpaths.close
        if not settings.fastpath:
            return
        from lbapp.agents import local_link  # its netlink and eBPF parts only where they are wanted

        ovs = Ovs()
        opening: set[int] = set()

        def ready(switch: int) -> None:
            if switch in fastpaths or switch in opening:
                return  # the switch was away; its fast path was not
            opening.add(switch)
            try:
                link = local_link(switch, fastpaths, ovs, max_connections=settings.max_connections)
            finally:
                opening.discard(switch)
            if link is not None:
                fastpaths.add(switch, link)

        application.on_ready = ready

    def close(self) -> None:
        """Stop what was started here."""
        if self._health is not None:
            self._health.close()
        if self._keeper is not None:
            self._keeper.stop()
        self._close_fastpaths()
        if self._server is not None:
            self._server.stop()
        if self._store is not None:
            self._store.stop()
        if self._database is not None:
            self._database.stop()

    def _agents(self, application: Any) -> None:
        """Connect to the agents of other hosts. Not before there is a configuration: they are told what they are to
        hold, and let go of everything else."""
        settings = self._settings
        if settings.agents:
            from lbapp.remote_agents import RemoteAgents, own_identity

            assert self._bus_key is not None
            remote = RemoteAgents(application.fastpaths, self._bus_key, own_identity(settings.state_dir / "identity"))
            for address in settings.agents:
                remote.connect(address)

    def _vantages(self, on_changed: OnChanged, on_latencies: OnLatencies) -> Vantages:
        return Vantages(on_changed, on_latencies, self._settings.monitor_scripts, _spot)

    def _watch_bridges(self, application: Any, health: HealthService) -> None:
        """Members are checked from the first bridge of this host that connects."""
        ovs, ready = Ovs(), application.on_ready

        def on_ready(switch: int) -> None:
            ready(switch)
            bridge = ovs.bridge_of(switch)
            if bridge is not None:
                health.attach(bridge)

        application.on_ready = on_ready

    def start_rest(self, _manager: Any) -> None:
        """Put application, store and REST together; stands in for Ryu's own REST server."""
        assert self._store is not None and self._tokens is not None
        settings = self._settings
        application = app_manager.lookup_service_brick("lbapp")
        readings = Readings(application)
        application.on_connect = readings.prepare
        application.reports.key = self._bus_key
        self._fastpaths(application)
        self._health = health = HealthService(
            application.configure, self._vantages, lambda: _drained(application.control.failures),
            lambda pairs: application.control.response_times(pairs, time.monotonic()),
            application.master)
        guard = register(application.wsgi, self._store, ControllerRuntime(application, readings, health), self._tokens)
        self._keeper = keeper = Keeper(application.control.clients, PersistenceStore(settings.state_dir))
        kept = keeper.read()
        self._store.subscribe(health.configure)
        health.configure(self._store.configuration)
        self._agents(application)
        keeper.start(kept)
        application.on_change = lambda text: health.happened(EventKind.SWITCH, text)
        self._watch_bridges(application, health)
        health.start()
        hub.spawn(readings.watch)
        certificate, key = (None if path is None else str(path)
                            for path in (settings.tls_certificate, settings.tls_key))
        self._server = serve(guard, *settings.api, certificate, key)
        LOG.info("REST on %s://%s:%d, OpenFlow on %s:%d", "https" if certificate else "http", *settings.api,
                 *settings.openflow)


def _spot(wanted: Wanted) -> Place:
    place = Place(Ovs(), wanted.bridge, wanted.addresses, gateways=wanted.gateways)
    place.ensure()
    return place


def _drained(queue: deque[Any]) -> Iterator[Any]:
    while queue:
        yield queue.popleft()


def _check_tls(certificate: Path, key: Path | None, ca: Path | None) -> None:
    """Ryu reads certificates in a greenlet of its own, whose failure would only be logged."""
    try:
        tls_context(str(certificate), str(key), None if ca is None else str(ca))
    except OSError as error:
        raise OSError(error.errno, f"cannot be used for OpenFlow over TLS: {error.strerror or error}",
                      str(error.filename or certificate)) from None


def _check_free(address: tuple[str, int]) -> None:
    """Ryu only logs that it cannot listen; this says so before anything is started."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen for switches: {error.strerror}",
                          f"{address[0]}:{address[1]}") from None
