# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who may call, TLS, and fault 17: huge bodies, slow senders, nonsense; nothing changes, nobody else notices.

And what only reads: lbapp/api/live.py, lbapp/api/happenings.py and lbapp/api/openapi.py
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import time

import httpx
import pytest

from lbapp.api.auth import TokenError, Tokens
from tests.unit.rest_process import error_of, read_all, rest_process

SECONDS = 1.0
"""The server's time limits in these tests."""


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    with rest_process(tmp_path_factory.mktemp("rest"), "--seconds", str(SECONDS), "--connections", "250") as running:
        yield running


@pytest.fixture(autouse=True)
def untouched(request):
    """Whatever a test here does, the configuration stays as it is, and the server answers at once."""
    rest = request.getfixturevalue("rest") if "rest" in request.fixturenames else None
    if rest is None:
        yield
        return
    before = rest.ask("GET", "/v1/config").json()
    yield
    started = time.monotonic()
    assert rest.ask("GET", "/v1/config").json() == before
    assert time.monotonic() - started < 1.0
    assert "Traceback" not in rest.log


def head(rest, method: str = "POST", path: str = "/v1/pools", *lines: str, token: bool = True) -> str:
    authorization = [f"Authorization: Bearer {rest.token}"] if token else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *authorization,
                        *lines, "", ""])


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
    assert found is not None, answer
    return int(found[1])


# ------------------------------------------------------------------ who may


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer wrong", "Basic dXNlcjpwYXNz", "Token {token}",
                                   "Bearer {token}x", "Bearer {token},{token}", "Bearer \u00e9"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/pools"), ("PUT", "/v1/config"), ("GET", "/nothing"),
                                              ("GET", "/v1/openapi.json"), ("DELETE", "/v1/pools/x")])
def test_401_without_a_valid_token(rest, method, path, value):
    headers = {} if value is None else {"Authorization": value.format(token=rest.token).encode("latin-1")}
    answer = httpx.request(method, f"http://127.0.0.1:{rest.port}{path}", headers=headers, trust_env=False,
                           content=b"{}" if method == "PUT" else None)
    assert error_of(answer, 401)["code"] == "unauthorized"
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_token_works_whatever_the_case_of_its_scheme(rest):
    answer = httpx.get(f"http://127.0.0.1:{rest.port}/v1/pools", trust_env=False,
                       headers={"Authorization": f"bearer {rest.token}"})
    assert answer.status_code == 200


def test_healthz_needs_no_token(rest):
    answer = httpx.get(f"http://127.0.0.1:{rest.port}/healthz", trust_env=False)
    assert answer.json() == {"status": "ok", "database": "connected"}


def test_routes_reached_without_the_guard_are_401_too(rest):
    for headers in ({}, {"Authorization": f"Bearer {rest.token}"}):
        answer = httpx.get(f"http://127.0.0.1:{rest.bare_port}/v1/pools", trust_env=False, headers=headers)
        error_of(answer, 401)


def test_the_token_file_is_private_from_the_start_and_kept(tmp_path):
    path = tmp_path / "token"
    os.umask(os.umask(0))  # whatever the umask is, the mode is ours
    first = Tokens(path).first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(first) >= 40
    assert Tokens(path).first == first
    assert list(tmp_path.iterdir()) == [path]


def test_tokens_follow_their_file(tmp_path):
    path = tmp_path / "token"
    tokens = Tokens(path)
    old = tokens.first
    path.write_text("one\ntwo\n")
    assert [tokens.valid(token) for token in (old, "one", "two", "", "on")] == [False, True, True, False, False]
    path.chmod(0o644)
    assert not tokens.valid("one")
    path.unlink()
    assert not tokens.valid("one")
    with pytest.raises(TokenError):
        _ = tokens.first


def test_a_token_file_that_others_can_read_or_that_is_empty_is_refused(tmp_path):
    path = tmp_path / "token"
    path.write_text("one\n")
    path.chmod(0o640)
    with pytest.raises(TokenError, match="0600"):
        Tokens(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(TokenError, match="at least one"):
        Tokens(path)
    with pytest.raises(TokenError):
        Tokens(tmp_path / "none" / "token")


# ------------------------------------------------------------------ too much


@pytest.mark.parametrize(("path", "length", "status"), [
    ("/v1/pools", 16 * 2**20 + 1, 413),
    ("/v1/pools", 10**18, 413),
    ("/v1/pools/x", 64 * 2**20, 413),
    ("/v1/config", 64 * 2**20 + 1, 413),
])
def test_413_before_the_body_is_read(rest, path, length, status):
    started = time.monotonic()
    answer = rest.say(head(rest, "PUT", path, f"Content-Length: {length}") + "{")
    assert status_of(answer) == status
    assert b'"too_large"' in answer
    assert time.monotonic() - started < 3


def test_a_client_that_sends_a_huge_body_still_reads_its_413(rest):
    answer = rest.client.post("/v1/pools", content=b" " * (17 * 2**20), headers={"Content-Type": "application/json"})
    error_of(answer, 413)


def test_411_without_a_length(rest):
    for line in ("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "X: y"):
        answer = rest.say(head(rest, "POST", "/v1/pools", line) + "2\r\n{}\r\n0\r\n\r\n")
        assert status_of(answer) == 411, line
        assert b'"length_required"' in answer


@pytest.mark.parametrize("text", [
    "GET /" + "a" * 9000 + " HTTP/1.1\r\n\r\n",
    "GET / HTTP/1.1\r\nX: " + "a" * 70000 + "\r\n\r\n",
    "GET / HTTP/1.1\r\n" + "X: y\r\n" * 20000 + "\r\n",
    "nonsense\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "GET / HTTP/9.9\r\n\r\n",
    "POST /v1/pools HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "POST /v1/pools HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    "POST /v1/pools HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
])
def test_what_is_not_a_request_is_refused_and_closed(rest, text):
    answer = rest.say(text)
    assert b"Traceback" not in answer
    assert not answer or b"<html" in answer.lower() or 400 <= status_of(answer) <= 505
    assert b"HTTP/1.1 200" not in answer


@pytest.mark.parametrize("length", ["1_0", "\u0661", "+2"])
def test_a_strange_length_is_a_400(rest, length):
    answer = rest.say(head(rest, "POST", "/v1/pools", f"Content-Length: {length}") + "{}")
    assert status_of(answer) == 400


# ------------------------------------------------------------------ too slow


def test_a_slow_head_is_a_408(rest):
    with rest.connect() as connection:
        connection.sendall(b"GET /v1/pools HTTP/1.1\r\n")
        started = time.monotonic()
        for _ in range(20):
            time.sleep(0.25)
            try:
                connection.sendall(b"X: y\r\n")
            except OSError:
                break
        assert time.monotonic() - started < 4 * SECONDS
        assert status_of(read_all(connection)) == 408


def test_a_slow_request_line_is_a_408(rest):
    with rest.connect() as connection:
        connection.sendall(b"GE")
        started = time.monotonic()
        assert status_of(read_all(connection)) == 408
        assert time.monotonic() - started < 3 * SECONDS


def test_a_slow_body_is_a_408_and_changes_nothing(rest):
    with rest.connect() as connection:
        connection.sendall((head(rest, "POST", "/v1/pools", "Content-Length: 30") + '{"name": ').encode())
        started = time.monotonic()
        for character in '"slow"}                 ':
            time.sleep(0.2)
            try:
                connection.sendall(character.encode())
            except OSError:
                break
        answer = read_all(connection)
        assert time.monotonic() - started < 4 * SECONDS + 3
        assert not answer or status_of(answer) == 408


def test_a_body_that_ends_early_changes_nothing(rest):
    with rest.connect() as connection:
        connection.sendall((head(rest, "POST", "/v1/pools", "Content-Length: 100") + '{"name": "half"}').encode())
        connection.shutdown(socket.SHUT_WR)
        assert status_of(read_all(connection)) == 408


def test_an_idle_kept_connection_is_closed_without_a_word(rest):
    with rest.connect() as connection:
        connection.sendall(head(rest, "GET", "/v1/stats").encode())
        assert status_of(connection.recv(65536)) == 200
        assert read_all(connection) == b""


def test_hundreds_of_slow_senders_keep_nobody_out(rest):
    slow = []
    try:
        for _ in range(400):
            connection = rest.connect()
            connection.sendall(b"POST /v1/pools HTTP/1.1\r\nX-")
            slow.append(connection)
        started = time.monotonic()
        for _ in range(20):
            assert rest.ask("GET", "/v1/pools").status_code == 200
        assert time.monotonic() - started < 2
        assert [status_of(read_all(connection)) for connection in slow] == [408] * len(slow)
    finally:
        for connection in slow:
            connection.close()


def test_more_connections_than_there_is_room_for_wait_their_turn(rest):
    several = []
    try:
        for _ in range(560):
            several.append(rest.connect())
        answer = httpx.get(f"http://127.0.0.1:{rest.port}/healthz", trust_env=False, timeout=8 * SECONDS)
        assert answer.status_code == 200
    finally:
        for connection in several:
            connection.close()


# ------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-keyout", key, "-out", certificate, "-days", "1", "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=30)
    return str(certificate), str(key)


@pytest.fixture(scope="module")
def secure(tmp_path_factory, certificate):
    with rest_process(tmp_path_factory.mktemp("rest"), "--certificate", certificate[0], "--key", certificate[1],
                      "--seconds", str(SECONDS), verify=certificate[0]) as running:
        yield running


def test_tls_carries_requests_of_every_size(secure):
    assert secure.ask("POST", "/v1/pools", {"name": "farm", "description": "x" * 1000}).status_code == 201
    document = {"pools": [{"name": f"p{i}", "description": "y" * 1000} for i in range(500)]}
    assert len(secure.ask("PUT", "/v1/config", document).json()["created"]) == 500
    assert secure.ask("GET", "/v1/config").json()["pools"] == sorted(document["pools"], key=lambda one: one["name"])
    answer = secure.ask("POST", "/v1/pools", {"name": "farm"})
    assert answer.headers["Location"].startswith("https://")


def test_plain_text_and_old_tls_get_nowhere(secure):
    assert b"200" not in secure.say("GET /healthz HTTP/1.1\r\n\r\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with secure.connect() as connection, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(connection)


def test_handshakes_that_never_come_hold_up_nobody(secure):
    idle = [secure.connect() for _ in range(50)]
    try:
        started = time.monotonic()
        assert secure.ask("GET", "/healthz").status_code == 200
        assert time.monotonic() - started < SECONDS
        for connection in idle:
            assert read_all(connection) == b""
        assert time.monotonic() - started < 4 * SECONDS
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("which", ["certificate", "key", "mixed", "port"])
def test_a_server_that_cannot_start_says_why(tmp_path, certificate, which, rest):
    arguments = {"certificate": ("/none", certificate[1], 0), "key": (certificate[0], None, 0),
                 "mixed": (None, certificate[1], 0), "port": (None, None, rest.port)}[which]
    script = ("import eventlet.wsgi, sys, json; eventlet.wsgi.ALREADY_HANDLED = []\n"
              "from lbapp.api.server import Server, ServerError\n"
              "certificate, key, port = json.loads(sys.argv[1])\n"
              "try: Server(lambda *_: [], port=port, certificate=certificate, key=key)\n"
              "except ServerError as error: print(error)")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, json.dumps(arguments)],
                          capture_output=True, text=True, timeout=30, check=True)
    assert {"certificate": "/none", "key": certificate[0], "mixed": "expected a certificate",
            "port": f"port {rest.port}"}[which] in done.stdout


# ------------------------------------------------------------------ live views, and the description


def test_switches_and_counters(rest):
    switches = rest.ask("GET", "/v1/switches").json()["switches"]
    assert [one["dpid"] for one in switches] == [f"{1:016x}", f"{2:016x}"]
    assert switches[0]["hosts"] == {"10.0.0.2": {"mac": "02:00:00:00:00:02", "port": 2}}
    stats = rest.ask("GET", "/v1/stats").json()
    assert stats["virtual_servers"][0]["refused"] == {"CONNLIMIT": 2}
    assert stats["virtual_servers"][0]["messages_per_connection"] is None
    assert stats["switches"][0]["packet_ins"] == 4
    only = rest.ask("GET", "/v1/stats?virtual_server=web").json()
    assert ([one["name"] for one in only["virtual_servers"]], only["members"]) == (["web"], [])
    assert len(rest.ask("GET", "/v1/stats?pool=farm").json()["members"]) == 1


def test_connections_page_in_the_order_of_their_ids(rest):
    seen, path = [], "/v1/connections?limit=60"
    while path:
        answer = rest.ask("GET", path).json()
        seen += [int(one["id"], 16) for one in answer["connections"]]
        path = answer["next"]
    assert seen == list(range(1, 251))


@pytest.mark.parametrize(("query", "count"), [
    ("virtual_server=web", 125), ("virtual_server=none", 0), ("protocol=udp", 125), ("state=established", 250),
    ("member=10.0.0.1:80", 83), ("member=10.0.0.1", 83), ("client=192.0.2.3", 50), ("client=192.0.2.3:1003", 1),
    ("virtual_server=web&client=192.0.2.3&member=10.0.0.1:80", 9), ("switch=0000000000000001", 250),
])
def test_connections_are_filtered(rest, query, count):
    seen, path = [], f"/v1/connections?limit=7&{query}"
    while path:
        answer = rest.ask("GET", path).json()
        assert len(answer["connections"]) <= 7
        seen += answer["connections"]
        path = answer["next"]
    assert len(seen) == len({one["id"] for one in seen}) == count


@pytest.mark.parametrize(("query", "field"), [("marker=xyz", "marker"), ("marker=" + "f" * 40, "marker"),
                                              ("limit=1001", "limit"), ("colour=red", "colour")])
def test_bad_filters_are_a_400(rest, query, field):
    assert error_of(rest.ask("GET", f"/v1/connections?{query}"), 400)["field"] == field


def test_the_description_is_generated_from_what_validates(rest):
    description = rest.ask("GET", "/v1/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    schemas = description["components"]["schemas"]
    member = schemas["Member"]["properties"]
    assert (member["weight"]["minimum"], member["weight"]["maximum"]) == (0, 256)
    assert member["number"]["readOnly"] is True
    assert schemas["Member"]["additionalProperties"] is False
    assert set(schemas["Algorithm"]["enum"]) >= {"ROUND_ROBIN", "CONSISTENT_HASH"}
    text = json.dumps(description)
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', text)):
        assert name in schemas


def test_every_described_path_and_method_is_there(rest):
    description = rest.ask("GET", "/v1/openapi.json").json()
    assert len(description["paths"]) >= 17
    for path, operations in description["paths"].items():
        concrete = path.replace("{id}", "none").replace("{member}", "none")
        allowed = rest.ask("OPTIONS", concrete).headers["Allow"].split(", ")
        assert {method.upper() for method in operations} == set(allowed) - {"HEAD"}, path


def test_answers_match_the_description(rest):
    schemas = rest.ask("GET", "/v1/openapi.json").json()["components"]["schemas"]
    shown = {"SwitchView": rest.ask("GET", "/v1/switches").json()["switches"][0],
             "ConnectionView": rest.ask("GET", "/v1/connections?limit=1").json()["connections"][0],
             "StatisticsView": rest.ask("GET", "/v1/stats").json()}
    for name, value in shown.items():
        assert set(value) == set(schemas[name]["properties"])


# ------------------------------------------------------------------ what happened


def test_events_page_by_page(rest):
    first = rest.ask("GET", "/v1/events?limit=3").json()
    assert [one["number"] for one in first["events"]] == [1, 2, 3]
    assert first["next"] == "/v1/events?limit=3&marker=3"
    second = rest.ask("GET", first["next"]).json()
    assert ([one["number"] for one in second["events"]], second["next"]) == ([4, 5], None)
    assert [one["number"] for one in rest.ask("GET", "/v1/events?pool=even").json()["events"]] == [2, 4]
    assert rest.ask("GET", "/v1/events?marker=x").status_code == 400


def test_who_is_draining(rest):
    assert [one["pool"] for one in rest.ask("GET", "/v1/draining").json()["draining"]] == ["odd", "even"]
    assert [one["connections"] for one in rest.ask("GET", "/v1/draining?pool=odd").json()["draining"]] == [3]
    assert {one["kind"] for one in rest.ask("GET", "/v1/draining").json()["draining"]} == {"member"}
