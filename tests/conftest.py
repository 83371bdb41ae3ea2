# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the fixtures of tests/namespaces.py, and beside a failure what controller, switch and machine
had to say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any

import mininet.log  # noqa: F401
import pytest
from hypothesis import settings

from tests.machine import Watch
from topologies.namespace import file_tail

# Mininet makes all later loggers of a class of its own, which tells its parents nothing: what is logged would be
# lost to tests by the order in which modules are imported.
logging.setLoggerClass(logging.Logger)

# No example fails because this machine was busy with something else for 200 ms.
settings.register_profile("lbapp", deadline=None)
settings.load_profile("lbapp")

pytest_plugins = ["tests.namespaces"]

NEED_A_MACHINE = frozenset({"netns", "switch", "make_lab", "lab", "two_networks_lab", "two_switches_lab"})


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Tells a figure: at the end of the run, whatever becomes of the test."""
    return lambda text: request.node.user_properties.append(("told", text))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests have told, in their order."""
    figures = {(report.nodeid, text): None for reports in terminalreporter.stats.values() for report in reports
               for name, text in getattr(report, "user_properties", ()) if name == "told"}
    if figures:
        terminalreporter.section("what faults were noticed and overcome in")
        for node, text in sorted(figures):
            terminalreporter.write_line(f"{node.rpartition('/')[2]}: {text}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """See tests/namespaces.py, ``lab``."""
    if getattr(metafunc.module, "WITH_FASTPATH", False) and "lab" in metafunc.fixturenames:
        metafunc.parametrize("lab", ["_single_lab", "_fastpath_lab"], indirect=True, ids=["ovs", "fastpath"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use namespaces are integration tests (``-m "not integration"`` leaves them out)."""
    for item in items:
        if NEED_A_MACHINE.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)


WATCH = Watch()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    WATCH.begin()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Add to a failure what the machine did, and the end of the logs of each laboratory's controller and switch."""
    report = yield
    if report.failed:
        report.sections.append(("the machine meanwhile", WATCH.told()))
        for name, value in getattr(item, "funcargs", {}).items():
            controller = getattr(value, "controller", None)
            if controller is not None:
                report.sections.append((f"log of {name}'s controller", controller.log_tail()))
                switch = file_tail(value.ovs.rundir / "ovs-vswitchd.log", 10)
                report.sections.append((f"log of {name}'s switch", switch))
    return report
