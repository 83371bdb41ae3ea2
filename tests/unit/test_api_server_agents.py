# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Agents beside servers, and single connections, over real HTTP (lbapp/api/live.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.rest_process import error_of, rest_process

PATH = "/v1/server-agents/s1"


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with rest_process(tmp_path_factory.mktemp("rest"), "--connections", "3") as running:
        yield running


def announcement(address: str = "10.0.0.51", port: Any = 80) -> dict[str, Any]:
    return {"listeners": [{"address": address, "port": port}]}


def test_an_agent_announces_itself_and_gets_the_keys(rest: Any) -> None:
    answer = rest.ask("PUT", PATH, {"listeners": [{"address": "fd00:0::51", "port": 8080}]})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"cookie_keys": ["00" * 16, None], "window_scale": 7, "lease_seconds": 10.0}
    assert rest.ask("GET", "/v1/server-agents").json() == {
        "server_agents": [{"name": "s1", "listeners": ["fd00::51:8080"], "expires_in": 9.0, "report": None}]}
    assert rest.ask("PUT", "/v1/server-agents/s2", announcement()).status_code == 200
    error_of(rest.ask("PUT", "/v1/server-agents/s3", announcement()), 409)
    assert rest.ask("DELETE", "/v1/server-agents/s2").status_code == 204
    error_of(rest.ask("DELETE", "/v1/server-agents/s2"), 404)


@pytest.mark.parametrize(("body", "field"), [
    ({}, "listeners"), ({"listeners": 1}, "listeners"), (announcement(port=0), "listeners[0].port"),
    (announcement("no"), "listeners[0].address"), ({"listeners": [], "more": 1}, "more"),
    ({"listeners": [{"address": "10.0.0.1", "port": 80}] * 257}, "listeners")])
def test_a_bad_announcement_is_a_400_that_names_the_field(rest: Any, body: dict[str, Any], field: str) -> None:
    assert error_of(rest.ask("PUT", PATH, body), 400)["field"] == field


def test_one_connection(rest: Any) -> None:
    some = rest.ask("GET", "/v1/connections?limit=1").json()["connections"][0]
    assert rest.ask("GET", f"/v1/connections/{some['id']}").json() == some
    error_of(rest.ask("GET", "/v1/connections/fffffff"), 404)
    error_of(rest.ask("GET", "/v1/connections/xyz"), 400)
