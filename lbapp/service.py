# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What runs besides OpenFlow in the controller's process: the store, the REST server, the readings.

Owns their lifetimes. Ryu makes the application itself; this puts it together with the rest once
Ryu asks for its REST server, which is the moment when all applications exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ryu.base import app_manager
from ryu.lib import hub

from lbapp.api.auth import Tokens
from lbapp.api.server import register, serve
from lbapp.config.database import EmbeddedDatabase
from lbapp.config.store import Store
from lbapp.readings import Readings
from lbapp.runtime import ControllerRuntime

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

    def open(self) -> None:
        """Open the database and the token file, before anything listens."""
        settings = self._settings
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        remote = settings.database
        if remote is None:
            self._database = EmbeddedDatabase(settings.state_dir)
            self._database.start()
            remote = self._database.remote
        self._tokens = Tokens(settings.token_file or settings.state_dir / "token")
        self._store = Store(remote)
        self._store.start()

    def close(self) -> None:
        """Stop what was started here."""
        if self._store is not None:
            self._store.stop()
        if self._database is not None:
            self._database.stop()

    def start_rest(self, _manager: Any) -> Callable[[], None]:
        """Put application, store and REST together; stands in for Ryu's own REST server."""
        assert self._store is not None and self._tokens is not None
        application = app_manager.lookup_service_brick("lbapp")
        readings = Readings(application)
        application.on_connect = readings.prepare
        register(application.wsgi, self._store, ControllerRuntime(application, readings), self._tokens)
        self._store.subscribe(application.configure)
        hub.spawn(readings.watch)
        host, port = self._settings.api
        return lambda: serve(application.wsgi, host, port, self._settings.tls_certificate, self._settings.tls_key)
