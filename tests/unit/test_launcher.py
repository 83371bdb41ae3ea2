# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How the controller is started: what Ryu is told, what a user is told when it cannot be."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from ryu import cfg
from ryu import log as ryu_log
from ryu.app import wsgi
from ryu.controller import ofp_handler  # noqa: F401  (its own imports want this order)

from lbapp import launcher
from lbapp.bus import keyfile
from lbapp.launcher import Settings, StartError

ROOT = Path(__file__).resolve().parent.parent.parent


def settings(tmp_path: Path, **more) -> Settings:
    return Settings(state_dir=tmp_path, openflow=("127.0.0.1", 6653), api=("127.0.0.1", 8080), **more)


@pytest.fixture
def ryu(monkeypatch):
    """Ryu's entry, which remembers how it was called and fails as it is told to.

    Importing the real one patches the process for eventlet.
    """
    calls = types.SimpleNamespace(arguments=None, error=None)

    def main(args, prog):
        calls.arguments = args
        if calls.error is not None:
            raise calls.error

    monkeypatch.setitem(sys.modules, "ryu.cmd.manager", types.SimpleNamespace(main=main))
    monkeypatch.setattr(wsgi, "start_service", wsgi.start_service)
    monkeypatch.setattr(ryu_log, "init_log", ryu_log.init_log)
    monkeypatch.setattr(ryu_log, "early_init_log", ryu_log.early_init_log)
    return calls


def test_ryu_listens_where_it_is_told_and_watches_its_switches(tmp_path, ryu):
    service = types.SimpleNamespace(start_rest=lambda manager: None)
    launcher._ryu(settings(tmp_path, ryu_apps=("ryu.app.simple_switch_13",)), service)
    assert ryu.arguments == ["lbapp.app", "ryu.app.simple_switch_13", "--ofp-listen-host", "127.0.0.1",
                             "--ofp-tcp-listen-port", "6653"]
    assert wsgi.start_service is service.start_rest
    assert cfg.CONF.maximum_unreplied_echo_requests == launcher.UNREPLIED_ECHO_REQUESTS > 0
    assert cfg.CONF.echo_request_interval == launcher.ECHO_SECONDS


def test_tls_for_switches(tmp_path, ryu):
    service = types.SimpleNamespace(start_rest=None)
    certificate, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    launcher._ryu(settings(tmp_path, openflow_certificate=certificate, openflow_key=key, openflow_ca=ca), service)
    told = dict(zip(ryu.arguments[1::2], ryu.arguments[2::2], strict=True))
    assert told["--ofp-ssl-listen-port"] == "6653"
    assert (told["--ctl-cert"], told["--ctl-privkey"], told["--ca-certs"]) == (str(certificate), str(key), str(ca))


@pytest.mark.parametrize(("error", "words"), [
    (ImportError("no such app"), "Ryu application cannot be loaded: no such app"),
    (OSError(98, "Address already in use"), "cannot listen: Address already in use")])
def test_what_goes_wrong_is_said_in_words(tmp_path, ryu, error, words):
    ryu.error = error
    with pytest.raises(StartError, match=words):
        launcher._ryu(settings(tmp_path), types.SimpleNamespace(start_rest=None))


@pytest.fixture
def root_log():
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.getLogger("lbapp").level)
    yield root
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    logging.getLogger("lbapp").setLevel(before[2])


def test_the_log_goes_to_its_file(tmp_path, root_log):
    path = tmp_path / "deep" / "lbapp.log"
    launcher._log("debug", path)
    # Mininet, once imported, makes all new loggers of a class of its own: these two are older.
    logging.getLogger("lbapp").debug("a word")
    logging.getLogger().info("not this")
    text = path.read_text()
    assert "DEBUG   lbapp: a word" in text and "not this" not in text


def test_a_log_file_that_cannot_be_is_said_in_words(tmp_path, root_log):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StartError, match=r"log file .*lbapp\.log"):
        launcher._log("INFO", blocker / "lbapp.log")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=30, check=False)


def test_importing_changes_nothing():
    done = python("import sys, lbapp.launcher; print('eventlet' in sys.modules, 'ryu' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_once_is_enough(number):
    done = python(f"""
import os
from lbapp import launcher
from lbapp.bus import keyfile
launcher._patch()
import eventlet, eventlet.wsgi
assert eventlet.wsgi.ALREADY_HANDLED == []
launcher._stop_on_signals()
ended = []
def other():
    try:
        eventlet.sleep(60)
    except BaseException as error:
        ended.append(error)
eventlet.spawn(other)
eventlet.spawn_after(0.05, os.kill, os.getpid(), {int(number)})
try:
    eventlet.sleep(20)
except KeyboardInterrupt:
    os.kill(os.getpid(), {int(number)})
    eventlet.sleep(0.05)
    print("in order", len(ended))
""")
    assert done.stdout.split() == ["in", "order", "0"], done.stderr


@pytest.mark.parametrize("fails", [None, StartError("no"), KeyboardInterrupt()])
def test_what_was_opened_is_closed(tmp_path, monkeypatch, root_log, fails):
    order = []

    class Service:
        """Stands in for the controller's parts."""

        def __init__(self, settings: Settings) -> None:
            order.append("made")

        def open(self) -> None:
            order.append("open")

        def close(self) -> None:
            order.append("closed")

    def ryu_main(settings: Settings, service: Service) -> None:
        order.append("ryu")
        if fails is not None:
            raise fails

    monkeypatch.setitem(sys.modules, "lbapp.service", types.SimpleNamespace(Service=Service))
    monkeypatch.setattr(launcher, "_patch", lambda: None)
    monkeypatch.setattr(launcher, "_stop_on_signals", lambda: None)
    monkeypatch.setattr(launcher, "_ryu", ryu_main)
    if isinstance(fails, StartError):
        with pytest.raises(StartError):
            launcher.run(settings(tmp_path))
    else:
        launcher.run(settings(tmp_path))
    assert order == ["made", "open", "ryu", "closed"]


def test_a_key_of_the_buses_that_cannot_be_used_is_said(tmp_path, monkeypatch, root_log):
    key = tmp_path / "key"
    key.write_bytes(b"short")
    key.chmod(0o600)

    class Service:
        """Stands in for the controller's parts."""

        def __init__(self, settings: Settings) -> None:
            self.key = settings.bus_key or tmp_path

        def open(self) -> None:
            keyfile.ensure(self.key)

        def close(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "lbapp.service", types.SimpleNamespace(Service=Service))
    monkeypatch.setattr(launcher, "_patch", lambda: None)
    monkeypatch.setattr(launcher, "_stop_on_signals", lambda: None)
    with pytest.raises(StartError, match="holds 5 bytes"):
        launcher.run(settings(tmp_path, bus_key=key))
