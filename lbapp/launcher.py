# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Starts Ryu with this application: sane defaults, the store, the REST server.

Ryu 4.34 needs a name that eventlet has dropped, listens on all addresses, and does not watch
its switches unless told; all of that is set here. Importing this module changes nothing;
:func:`run` patches the process for eventlet and does not return before the controller ends.
"""

from __future__ import annotations

import gc
import importlib
import logging
import logging.handlers
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbapp.client import Client
    from lbapp.server_agent.process import Settings as ServerAgentSettings

UNREPLIED_ECHO_REQUESTS = 3
ECHO_SECONDS = 5.0
GARBAGE_OBJECTS = 10_000
"""New objects after which the young ones are looked at for cycles (Python's own: 700)."""
FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``lbapp run`` was told.

    Attributes:
        state_dir: database, token and logs.
        openflow, api: host and port to listen on.
        tls_certificate, tls_key: for the REST server.
        openflow_certificate, openflow_key, openflow_ca: for switches that connect with TLS.
        database: remote of an existing OVSDB server; by default one is started in ``state_dir``.
        token_file: where the bearer token is kept.
        fastpath: whether switches of this host get a fast path, with the agent in this process.
        max_connections: the size of each of their tables.
        agents: agents on other hosts, and the file with the key that is shared with them.
        queries: whether agents ask by message bus; otherwise first packets come as packet-ins.
        monitor_scripts: the directory of external checks.
        ryu_apps: other Ryu applications to run beside.
    """

    state_dir: Path
    openflow: tuple[str, int]
    api: tuple[str, int]
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    openflow_certificate: Path | None = None
    openflow_key: Path | None = None
    openflow_ca: Path | None = None
    database: str | None = None
    token_file: Path | None = None
    fastpath: bool = False
    max_connections: int = 1 << 20
    agents: tuple[tuple[str, int], ...] = ()
    bus_key: Path | None = None
    queries: bool = True
    log_level: str = "INFO"
    log_file: Path | None = None
    monitor_scripts: Path | None = None
    ryu_apps: tuple[str, ...] = ()


class StartError(Exception):
    """The controller cannot start; the message says why."""


def run(settings: Settings) -> None:
    """Run the controller until it is told to stop (SIGINT, SIGTERM).

    Raises:
        StartError: an address is in use, a file is missing, the database cannot be opened.
    """
    _patch()
    _log(settings.log_level, settings.log_file)
    from lbapp.bus import keyfile  # both after the process was patched
    from lbapp.service import Service

    service = Service(settings)
    _stop_on_signals()
    try:
        service.open()
        _ryu(settings, service)
    except KeyboardInterrupt:
        logging.getLogger("lbapp").info("stopping; switches go on forwarding")
    except keyfile.KeyFileError as error:
        raise StartError(str(error)) from None
    finally:
        service.close()


def run_agent(*, bridge: str, listen: tuple[str, int], key: Path | None, state_dir: Path, max_connections: int,
              leave: bool, remove: bool, log_level: str, log_file: Path | None) -> None:
    """Run an agent until it is told to stop; or, with ``remove``, take down what one has left.

    Raises:
        StartError: there can be no agent here; the message says why.
    """
    _patch()
    _log(log_level, log_file)
    from lbapp import agent_process  # after the process was patched
    from lbapp.bus import keyfile
    from lbapp.dataflow.fastpath.fastpath import FastPathUnavailable
    from lbapp.dataflow.fastpath.removal import PortsError
    from lbapp.dataflow.ovs import OvsError

    try:
        if remove:
            agent_process.remove(bridge)
            return
        _stop_on_signals()
        _spare_garbage_collection()
        agent_process.run(agent_process.Settings(
            bridge, listen, keyfile.read(key or state_dir / "bus.key"), max_connections, leave))
    except KeyboardInterrupt:
        pass
    except (FastPathUnavailable, PortsError, OvsError, keyfile.KeyFileError) as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"cannot listen on {listen[0]}:{listen[1]}: {error.strerror or error}") from error


def run_server_agent(*, settings: ServerAgentSettings, connect: Callable[[], Client], remove: bool, log_level: str,
                     log_file: Path | None) -> None:
    """Run an agent beside servers until it is told to stop; or, with ``remove``, take down what one has left.

    Raises:
        StartError: there can be none here; the message says why.
    """
    _log(log_level, log_file)
    from lbapp.server_agent import process
    from lbapp.server_agent.adopt import AdoptError

    try:
        if remove:
            for name in process.remove(settings.namespace):
                logging.getLogger("lbapp").info("no connections are adopted at %s any more", name)
            return
        process.run(settings, connect)
    except AdoptError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"connections cannot be adopted: {error.strerror or error}") from error


def _patch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eventlet says that it is deprecated; Ryu needs it
        import eventlet
        eventlet.monkey_patch()
        import eventlet.wsgi
    if not hasattr(eventlet.wsgi, "ALREADY_HANDLED"):
        eventlet.wsgi.ALREADY_HANDLED = []


def _log(level: str, file: Path | None) -> None:
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.handlers.RotatingFileHandler(file, maxBytes=10_000_000, backupCount=3)
        except OSError as error:
            raise StartError(f"log file {file}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("lbapp").setLevel(level.upper())


def _ryu(settings: Settings, service: Any) -> None:
    from ryu import cfg
    from ryu import log as ryu_log

    # Ryu would put its own handlers beside ours.
    ryu_log.init_log = ryu_log.early_init_log = lambda *_: None
    from ryu.app import wsgi
    from ryu.cmd import manager

    host, port = settings.openflow
    arguments = ["lbapp.app", *settings.ryu_apps, "--ofp-listen-host", host, "--ofp-tcp-listen-port", str(port)]
    if settings.openflow_certificate is not None:
        arguments += ["--ofp-ssl-listen-port", str(port), "--ctl-cert", str(settings.openflow_certificate),
                      "--ctl-privkey", str(settings.openflow_key)]
        if settings.openflow_ca is not None:
            arguments += ["--ca-certs", str(settings.openflow_ca)]
    for module in ("ryu.controller.controller", "lbapp.app"):  # the first registers the options that are set below
        importlib.import_module(module)

    cfg.CONF.set_default("maximum_unreplied_echo_requests", UNREPLIED_ECHO_REQUESTS)
    cfg.CONF.set_default("echo_request_interval", ECHO_SECONDS)
    wsgi.start_service = service.start_rest
    _spare_garbage_collection()
    try:
        manager.main(args=arguments, prog="lbapp run")
    except ImportError as error:
        raise StartError(f"Ryu application cannot be loaded: {error}") from error
    except OSError as error:
        raise StartError(f"cannot listen: {error.strerror or error}") from error


def _spare_garbage_collection() -> None:
    """Have the collector leave alone what was imported, and look less often: packets make few cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, 20, 50)


def _stop_on_signals() -> None:
    """Have SIGTERM and SIGINT end the main greenlet, and only it: the others are needed to close in order."""
    import greenlet
    from eventlet import hubs

    main = greenlet.getcurrent()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # once is enough
        hubs.get_hub().schedule_call_global(0, main.throw, KeyboardInterrupt)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
