# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What is asked of switches over real HTTP: lbapp/api/switches.py, in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.rest_process import RestProcess, error_of, rest_process

ONE, AWAY = f"{1:016x}", "00000000deadbeef"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestProcess]:
    with rest_process(tmp_path_factory.mktemp("rest")) as running:
        yield running


@pytest.fixture
def rest(process: RestProcess) -> RestProcess:
    """Nothing is asked of any switch."""
    for one in process.ask("GET", "/v1/switches").json()["switches"]:
        process.ask("DELETE", f"/v1/switches/{one['dpid']}")
    return process


def shown(rest: RestProcess, dpid: str = ONE) -> tuple[bool, int, bool]:
    one: dict[str, Any] = rest.ask("GET", f"/v1/switches/{dpid}").json()
    return one["draining"], one["drain_timeout"], one["connected"]


def test_a_switch_is_drained_and_taken_back(rest: RestProcess) -> None:
    assert shown(rest) == (False, 0, True)
    answer = rest.ask("PUT", f"/v1/switches/{ONE}", {"draining": True, "drain_timeout": 30})
    assert (answer.status_code, answer.headers["ETag"]) == (200, '"1"')
    assert answer.json() == rest.ask("GET", f"/v1/switches/{ONE}").json()
    assert shown(rest) == (True, 30, True)
    listed = {one["dpid"]: one["draining"] for one in rest.ask("GET", "/v1/switches").json()["switches"]}
    assert listed == {ONE: True, f"{2:016x}": False}
    (one,) = rest.ask("GET", "/v1/draining?switch=0x1").json()["draining"]
    assert (one["kind"], one["switch"], one["drain_timeout"], one["connections"]) == ("switch", ONE, 30, None)
    assert ONE not in [one["switch"] for one in rest.ask("GET", "/v1/draining?pool=odd").json()["draining"]]
    assert rest.ask("PATCH", f"/v1/switches/{ONE}", {"draining": False}).status_code == 200
    assert shown(rest) == (False, 30, True)
    assert rest.ask("PUT", f"/v1/switches/{ONE}", {"draining": True}).status_code == 200
    assert shown(rest) == (True, 0, True), "what is left out gets its default"
    assert rest.ask("DELETE", f"/v1/switches/{ONE}").status_code == 204
    assert shown(rest) == (False, 0, True)


@pytest.mark.parametrize("text", ["1", "0x1", "0X01", ONE])
def test_any_spelling_of_a_datapath_id(rest: RestProcess, text: str) -> None:
    assert rest.ask("PATCH", f"/v1/switches/{text}", {"draining": True, "name": "01"}).json()["dpid"] == ONE
    assert shown(rest, text) == (True, 0, True)


def test_a_switch_that_is_not_connected(rest: RestProcess) -> None:
    error = error_of(rest.ask("GET", f"/v1/switches/{AWAY}"), 404)
    assert error["message"] == f"no switch {AWAY} is connected, and nothing is asked of it"
    assert rest.ask("PUT", "/v1/switches/DEADBEEF", {"draining": True}).status_code == 200
    assert shown(rest, AWAY) == (True, 0, False)
    back = rest.ask("PATCH", f"/v1/switches/{AWAY}", {"draining": None})
    assert (back.status_code, back.json()["draining"]) == (200, False), "nothing is asked of it, nothing is kept"
    error_of(rest.ask("GET", f"/v1/switches/{AWAY}"), 404)
    assert rest.ask("PATCH", f"/v1/switches/{AWAY}", {"draining": False}).status_code == 200
    error_of(rest.ask("DELETE", f"/v1/switches/{AWAY}"), 404)


@pytest.mark.parametrize(("body", "field"), [
    ({"draining": "yes"}, "draining"), ({"drain_timeout": -1}, "drain_timeout"),
    ({"drain_timeout": 65536}, "drain_timeout"), ({"name": "2"}, "name"), ({"name": "lb1"}, "name"),
    ({"id": "x"}, "id"), ({"weight": 1}, "weight")])
def test_what_is_refused(rest: RestProcess, body: dict[str, Any], field: str) -> None:
    for method in ("PUT", "PATCH"):
        assert error_of(rest.ask(method, f"/v1/switches/{ONE}", body), 400)["field"] == field
    assert shown(rest) == (False, 0, True)


def test_no_datapath_ids(rest: RestProcess) -> None:
    for method in ("GET", "DELETE"):
        assert error_of(rest.ask(method, "/v1/switches/lb1"), 400)["field"] == "id"
    assert error_of(rest.ask("PUT", f"/v1/switches/{'1' * 17}", {}), 400)["field"] == "id"
    assert error_of(rest.ask("GET", "/v1/draining?switch=lb1"), 400)["field"] == "switch"
    error_of(rest.ask("POST", "/v1/switches", {"name": ONE}), 405)


def test_only_what_has_not_changed(rest: RestProcess) -> None:
    assert rest.ask("GET", f"/v1/switches/{ONE}").headers["ETag"] == '"0"'
    error_of(rest.ask("PUT", f"/v1/switches/{ONE}", {"draining": True}, If_Match='"1"'), 409)
    assert rest.ask("PUT", f"/v1/switches/{ONE}", {"draining": True}, If_Match='"0"').headers["ETag"] == '"1"'
    error_of(rest.ask("DELETE", f"/v1/switches/{ONE}", If_Match='"7"'), 409)
    assert rest.ask("DELETE", f"/v1/switches/{ONE}", If_Match='"1"').status_code == 204


def test_whoever_applies_a_site_does_not_end_it(rest: RestProcess) -> None:
    rest.ask("PUT", f"/v1/switches/{ONE}", {"draining": True})
    before = rest.ask("GET", "/v1/config").json()
    assert "switches" not in before
    assert rest.ask("PUT", "/v1/config", before).status_code == 200
    assert rest.ask("PUT", "/v1/config", {}).status_code == 200
    assert shown(rest) == (True, 0, True)


def test_it_is_on_disk(rest: RestProcess) -> None:
    rest.ask("PUT", f"/v1/switches/{ONE}", {"draining": True, "drain_timeout": 7})
    os.kill(rest.database_pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (answer := rest.ask("PATCH", f"/v1/switches/{ONE}", {"drain_timeout": 8})).status_code == 503:
        assert time.monotonic() < deadline, "the database is not back"
        time.sleep(0.05)
    assert answer.status_code == 200 and shown(rest) == (True, 8, True)
