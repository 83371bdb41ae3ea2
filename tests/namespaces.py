# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests on real namespaces, a real switch and the real controller.

``netns(name)``       a namespace; gone after the test.
``switch``            a private Open vSwitch for the session, in a namespace of its own.
``make_lab(topo)``    a laboratory of its own for one test, without controller and servers running.
``lab``               the session's: single switch, three clients, three servers, controller connected,
                      configuration empty, servers running; put in order again before each test. In a module
                      with ``WITH_FASTPATH = True`` every test that uses it runs twice, without and with a fast path.
``two_networks_lab``  the same on topologies/two_networks.py, for a module.
``two_switches_lab``  the same on topologies/two_switches.py, for a module.

All skip with a reason where they cannot be had. A failed test shows the end of the controller's log.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lbapp.dataflow.ovs import PrivateOvs
from topologies.namespace import Namespace, unavailable

if TYPE_CHECKING:
    from topologies.lab import Lab

EMPTY_SITE: dict[str, Any] = {"networks": [], "pools": [], "virtual_servers": []}


def require(*programs: str) -> None:
    """Skip the test unless namespaces can be made and all programs are installed."""
    reason = unavailable()
    if reason:
        pytest.skip(f"network namespaces: {reason}")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture
def netns() -> Iterator[Callable[[str], Namespace]]:
    """Make namespaces by name."""
    require()
    with ExitStack() as cleanup:
        def make(name: str) -> Namespace:
            namespace = Namespace.create(name)
            cleanup.callback(namespace.close)
            return namespace

        yield make


@pytest.fixture(scope="session")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateOvs]:
    """A private Open vSwitch; tests name their bridges themselves and delete them."""
    require("ovs-vswitchd", "ovsdb-server", "ovs-vsctl")
    with ExitStack() as cleanup:
        namespace = Namespace.create("switch")
        cleanup.callback(namespace.close)
        ovs = PrivateOvs(tmp_path_factory.mktemp("ovs"), namespace.prefix)
        cleanup.callback(ovs.stop)
        ovs.ensure_running()
        yield ovs


def _new_lab(topo: str, directory: Path, **options: Any) -> Lab:
    pytest.importorskip("mininet.net", reason="Mininet's Python package is not installed")
    from topologies.lab import Lab, unavailable
    from topologies.single import SingleTopo
    from topologies.two_networks import TwoNetworksTopo
    from topologies.two_switches import TwoSwitchesTopo

    reason = unavailable()
    if reason:
        pytest.skip(f"laboratory: {reason}")
    kind = {"single": SingleTopo, "two_networks": TwoNetworksTopo, "two_switches": TwoSwitchesTopo}[topo]
    return Lab(kind(), directory, **options)


@pytest.fixture
def make_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Lab]]:
    """Make laboratories: ``make_lab("single", applications=["ryu.app.simple_switch_13"])``."""
    with ExitStack() as cleanup:
        def make(topo: str = "single", **options: Any) -> Lab:
            lab = _new_lab(topo, tmp_path_factory.mktemp("lab"), **options)
            cleanup.callback(lab.close)
            return lab

        yield make


def put_in_order(lab: Lab) -> Lab:
    """Whatever the test before did: switch, servers and controller run, the configuration is empty."""
    lab.ovs.ensure_running()
    lab.start_servers()
    lab.start_controller()
    lab.apply(EMPTY_SITE)
    # A client's port that comes back would meet its earlier connection: the server's, which nobody told of its end (it
    # would answer a SYN with an ACK, which is invalid to conntrack), or conntrack's own (UDP).
    for host in lab.servers:
        host.run("ss", "--kill", "--tcp", "state", "connected", check=False)
    lab.ovs.appctl("dpctl/flush-conntrack")
    return lab


@pytest.fixture(scope="session")
def _single_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with _new_lab("single", tmp_path_factory.mktemp("single")) as made:
        yield made


@pytest.fixture(scope="session")
def _fastpath_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with _new_lab("single", tmp_path_factory.mktemp("fastpath"), options=["--fastpath"]) as made:
        made.start_controller()
        if made.controller.has_no_fastpath:
            pytest.skip("no fast path on this machine")
        yield made


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Lab:
    """The session's laboratory."""
    return put_in_order(request.getfixturevalue(getattr(request, "param", "_single_lab")))


@pytest.fixture(scope="module")
def _two_networks_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with _new_lab("two_networks", tmp_path_factory.mktemp("two_networks")) as made:
        yield made


@pytest.fixture
def two_networks_lab(_two_networks_lab: Lab) -> Lab:
    """External and internal network."""
    return put_in_order(_two_networks_lab)


@pytest.fixture(scope="module")
def _two_switches_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with _new_lab("two_switches", tmp_path_factory.mktemp("two_switches")) as made:
        yield made


@pytest.fixture
def two_switches_lab(_two_switches_lab: Lab) -> Lab:
    """Clients on one switch, servers on another."""
    return put_in_order(_two_switches_lab)
