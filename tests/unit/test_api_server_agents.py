# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Agents beside servers, and single connections, over real HTTP (lbapp/api/live.py)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.api.live import MOST_REPORT
from lbapp.server_agent.report import Told, document, sign
from tests.unit.rest_process import error_of, rest_process
from topologies.namespace import wait_until

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


def test_the_command_reports_alone(rest: Any, tmp_path: Path) -> None:
    """``lbapp server-agent --report-only`` as a process of its own, until it is told to end."""
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)

    def shown() -> dict[str, Any]:
        listed = rest.ask("GET", "/v1/server-agents").json()["server_agents"]
        return next((one["report"] for one in listed if one["name"] == "alone"), {})

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        agent = subprocess.Popen([
            str(Path(sys.executable).with_name("lbapp")), "--url", f"http://127.0.0.1:{rest.port}", "server-agent",
            "--report-only", "--name", "alone", "--listener", f"127.0.0.1:{port}", "--report-interval", "0.2",
            "--bus-key", str(key), "--value", "five=command:/bin/echo 5"],
            env={**os.environ, "LBAPP_TOKEN": rest.token}, stderr=subprocess.PIPE, text=True)
        try:
            with socket.create_connection(("127.0.0.1", port)):
                wait_until(lambda: {"cpu", "memory", "five"} <= shown().get("values", {}).keys() or
                           agent.poll() is not None, 60, "its reports")
                assert agent.poll() is None, agent.communicate()[1]
                wait_until(lambda: shown()["values"]["clients"] == 1, 60, "the client that is counted")
            assert shown()["signed"] and shown()["flags"] == [] and shown()["values"]["five"] == 5
            agent.terminate()
            said = agent.communicate(timeout=60)[1]
            assert agent.returncode == 0 and "Traceback" not in said
            assert shown() == {}
        finally:
            agent.kill()
            agent.wait()


# ------------------------------------------------------------------ how loaded their servers are

KEY = b"the key of the buses, 32 bytes.."  # the server's in rest_server.py
RUN = bytes(16)


def loads(sequence: int = 1, name: str = "s1", key: bytes | None = KEY, **values: float) -> dict[str, Any]:
    told = Told(RUN, sequence, time.time(), (("10.0.0.51", 80), ("fd00::51", 0)), values or {"cpu": 0.5})
    return document(told, None if key is None else sign(key, name, told))


def test_reports_are_taken_signed_and_once(rest: Any) -> None:
    error = error_of(rest.ask("PUT", f"{PATH}/report", loads(key=None)), 401)
    assert error["field"] == "signature" and "key of the buses" in error["message"]
    error_of(rest.ask("PUT", f"{PATH}/report", loads(key=KEY[::-1])), 401)
    error_of(rest.ask("PUT", "/v1/server-agents/s2/report", loads()), 401)
    first = loads()
    answer = rest.ask("PUT", f"{PATH}/report", first)
    assert answer.status_code == 200 and answer.json() == {"flags": [], "interval": 0.5}
    assert "greater than 1" in error_of(rest.ask("PUT", f"{PATH}/report", first), 409)["message"]
    assert rest.ask("PUT", f"{PATH}/report", loads(2, cpu=7.0)).json()["flags"] == ["cpu: expected 0 to 1, got 7"]
    error_of(rest.ask("GET", f"{PATH}/report"), 405)


def test_the_token_is_asked_for_first(rest: Any) -> None:
    assert rest.ask("PUT", f"{PATH}/report", loads(9), Authorization="Bearer no").status_code == 401
    assert rest.ask("PUT", f"{PATH}/report", loads(9)).status_code == 200  # the number was not used up


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in loads(100).items() if key != name}


@pytest.mark.parametrize(("body", "field"), [
    ({}, "run"), *((without(name), name) for name in ("run", "sequence", "time", "servers", "values")),
    ({**loads(), "run": "0" * 31}, "run"), ({**loads(), "sequence": 0}, "sequence"),
    ({**loads(), "sequence": 2**53}, "sequence"), ({**loads(), "sequence": 1.5}, "sequence"),
    ({**loads(), "time": "now"}, "time"), ({**loads(), "signature": "0"}, "signature"),
    ({**loads(), "more": 1}, "more"),
    ({**loads(), "values": {"CPU": 1}}, "values"), ({**loads(), "values": {"cpu": "much"}}, "values"),
    ({**loads(), "values": {"cpu": None}}, "values"), ({**loads(), "values": {"cpu\n": 1}}, "values"),
    ({**loads(), "values": {"a" * 65: 1}}, "values"),
    ({**loads(), "values": {f"v{n}": 1 for n in range(65)}}, "values"),
    ({**loads(), "servers": [{"address": "no"}]}, "servers[0].address"),
    ({**loads(), "servers": [{"address": "10.0.0.1", "port": 65536}]}, "servers[0].port"),
    ({**loads(), "servers": [{"address": "10.0.0.1"}] * 257}, "servers")])
def test_a_bad_report_is_a_400_that_names_the_field(rest: Any, body: dict[str, Any], field: str) -> None:
    found = error_of(rest.ask("PUT", f"{PATH}/report", body), 400)["field"]
    assert found.startswith(field), found


def test_a_report_is_not_read_beyond_its_bounds(rest: Any) -> None:
    values = {f"v{number}" + "x" * 60: 1.0000000000000002 for number in range(64)}
    largest = Told(RUN, 2**53 - 1, time.time(), (("fd00:1234:5678:9abc:def0:1234:5678:9abc", 65535),) * 256,
                   {name[:64]: value for name, value in values.items()})
    assert len(json.dumps(document(largest, sign(KEY, "s1", largest)), indent=1)) < MOST_REPORT
    error_of(rest.ask("PUT", f"{PATH}/report", {**loads(), "values": {"x" * MOST_REPORT: 1}}), 413)


@pytest.mark.parametrize("name", ["x" * 256, "a%0Ab", "%00"])
def test_names_are_bounded_and_printable(rest: Any, name: str) -> None:
    assert error_of(rest.ask("PUT", f"/v1/server-agents/{name}/report", loads()), 400)["field"] == "name"


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_in_json_is_refused_whole(rest: Any, text: str) -> None:
    body = json.dumps(loads(200)).replace("0.5", text)
    answer = rest.client.put(f"{PATH}/report", content=body, headers={"Content-Type": "application/json"})
    error_of(answer, 400)


def test_one_connection(rest: Any) -> None:
    some = rest.ask("GET", "/v1/connections?limit=1").json()["connections"][0]
    assert rest.ask("GET", f"/v1/connections/{some['id']}").json() == some
    error_of(rest.ask("GET", "/v1/connections/fffffff"), 404)
    error_of(rest.ask("GET", "/v1/connections/xyz"), 400)
