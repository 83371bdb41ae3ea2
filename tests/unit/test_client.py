# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket
import subprocess
import sys
import threading

import httpx
import pytest

from lbapp.client import ApiError, Client, ClientError, Unreachable
from tests.fake_api import TOKEN, FakeApi

URL = "http://127.0.0.1:8080"


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
def client(api):
    with Client(URL, TOKEN, transport=api.transport) as client:
        yield client


def answering(status=200, **content):
    return Client(URL, TOKEN, transport=httpx.MockTransport(lambda request: httpx.Response(status, **content)))


def raising(error):
    def answer(request):
        raise error
    return Client(URL, TOKEN, transport=httpx.MockTransport(answer))


def test_a_resource_is_created_read_changed_and_deleted(client, api):
    pool = client.create("pools", {"name": "web", "members": [{"address": "10.0.0.1", "protocol_port": 80}]})
    assert client.get("pools", "web") == client.get("pools", pool["id"]) == pool
    assert client.update("pools", "web", {"lb_algorithm": "SOURCE_IP"})["lb_algorithm"] == "SOURCE_IP"
    client.delete("pools", "web")
    with pytest.raises(ApiError) as refused:
        client.get("pools", "web")
    assert (refused.value.status, str(refused.value)) == (404, "no pool web")
    assert all(request.headers["Authorization"] == f"Bearer {TOKEN}" for request in api.requests)


def test_members_are_found_by_address_and_port(client):
    client.create("pools", {"name": "six"})
    client.create("members", {"address": "fd00::1", "protocol_port": 80}, pool="six")
    changed = client.update("members", "[fd00::1]:80", {"admin_state_up": False}, pool="six")
    assert changed["admin_state_up"] is False
    client.delete("members", "[fd00::1]:80", pool="six")
    assert client.list("members", "six") == []
    with pytest.raises(ValueError, match="of a pool"):
        client.list("members")


def test_lists_are_followed_page_by_page(client, api):
    for index in range(2500):
        api.connections.append({"id": f"{index:x}", "client": "10.0.0.9:1", "state": "ESTABLISHED"})
    assert [one["id"] for one in client.list("connections")] == [f"{index:x}" for index in range(2500)]
    assert api.asked == ["GET /v1/connections"] * 3
    assert len(client.list("connections", limit=1200)) == 1200
    assert len(api.requests) == 5
    assert client.list("connections", filters={"state": "CLOSED"}) == []


@pytest.mark.parametrize("answer, message", [
    ({"connections": [{"id": "1"}], "next": "/v1/connections?limit=1000"}, None),
    ({"connections": [{"id": "1"}], "next": "http://elsewhere/"}, "next page elsewhere"),
    ({"switches": []}, "without connections"),
    ([], "without connections"),
])
def test_a_confused_server_is_not_followed_for_ever(answer, message):
    asked = []

    def respond(request):
        asked.append(request)
        return httpx.Response(200, json=answer)

    client = Client(URL, transport=httpx.MockTransport(respond))
    if message is None:
        client.list("connections")
        assert len(asked) == 2
    else:
        with pytest.raises(ClientError, match=message):
            client.list("connections")


def test_a_refusal_carries_code_message_and_field():
    client = answering(400, json={"error": {"code": "invalid", "message": "expected 0 to 65535",
                                            "field": "protocol_port"}})
    with pytest.raises(ApiError) as refused:
        client.create("networks", {})
    error = refused.value
    assert (error.status, error.code, error.message, error.field) == (400, "invalid", "expected 0 to 65535",
                                                                     "protocol_port")
    assert str(error) == "protocol_port: expected 0 to 65535"


@pytest.mark.parametrize("content", [{"text": "<html>bad gateway"}, {"json": ["no"]}, {"json": {"error": "no"}}, {}])
def test_a_refusal_by_something_else_is_told_as_well(content):
    with pytest.raises(ApiError, match=r"^GET /v1/stats was answered with 502 Bad Gateway$") as refused:
        answering(502, **content).stats()
    assert refused.value.code == 502


@pytest.mark.parametrize("error, message", [
    (httpx.ConnectError("refused"), "no controller answers at http://127.0.0.1:8080; start one with `lbapp run`"),
    (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "no TLS connection .* self-signed .*--ca"),
    (httpx.ReadTimeout("slow"), "did not answer in time"),
    (httpx.RemoteProtocolError("gone"), "speaks no HTTP"),
    (httpx.ReadError("reset"), "http://127.0.0.1:8080: reset"),
])
def test_no_answer_is_one_line(error, message):
    with pytest.raises(Unreachable, match=message):
        raising(error).stats()


def test_an_answer_that_is_no_json():
    with pytest.raises(ClientError, match="other than JSON"):
        answering(200, text="hello").stats()
    with pytest.raises(ClientError, match="other than a configuration"):
        answering(200, json=[]).config()


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host", "http://", "http://[::1", ""])
def test_a_bad_url_is_refused_at_once(url):
    with pytest.raises(ClientError, match="expected a URL"):
        Client(url)


def test_bad_certificates_are_refused_at_once(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ClientError, match="CA certificates"):
        Client("https://127.0.0.1:1", ca=tmp_path / "ca.pem")
    with pytest.raises(ClientError, match="CA certificates"):
        Client("https://127.0.0.1:1", ca=tmp_path / "missing.pem")


def test_the_token_is_not_sent_to_where_a_redirect_leads():
    client = answering(302, headers={"Location": "http://elsewhere/"})
    with pytest.raises(ApiError, match="302"):
        client.stats()


def test_applying_reports_what_was_done_and_guards_against_others(client, api):
    document = {"pools": [{"name": "web"}], "virtual_servers": []}
    before = client.config()
    assert client.apply(document, dry_run=True) == (1, 0, 0)
    assert client.config() == before
    applied = client.apply(document, etag=before.etag)
    assert applied == (1, 0, 0) and applied.total == 1
    assert client.config().document["pools"] == [{"name": "web"}]
    with pytest.raises(ApiError) as refused:
        client.apply(document, etag=before.etag)
    assert (refused.value.status, refused.value.field) == (409, "If-Match")


def test_waiting_ends_when_it_holds_or_in_time(client, api):
    calls = []

    def until(_):
        calls.append(1)
        if len(calls) < 3:
            raise ApiError(404, "not there")
        return "there"

    assert client.wait(5, until) == "there" and len(calls) == 3
    assert client.wait(1) is True
    with pytest.raises(Unreachable, match=r"waited 0.1 s for a switch: not yet"):
        client.wait(0.1, lambda _: False, "a switch")


def test_a_controller_that_wants_another_token_answers():
    assert answering(401, json={"error": {"message": "no"}}).answers()
    assert not answering(503).answers()
    assert not raising(httpx.ConnectError("no")).answers()


def test_nobody_listens_and_somebody_else_does():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def hang_up():
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(Unreachable, match=r"ended the connection or speaks no HTTP|reset"), \
                Client(f"http://127.0.0.1:{port}") as client:
            client.stats()
        thread.join(5)
    with pytest.raises(Unreachable, match="start one with `lbapp run`"), Client(f"http://127.0.0.1:{port}") as client:
        client.stats()


TLS_SERVER = """
import http.server, ssl, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"uptime_seconds": 1}')

    def log_message(self, *args):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_https_verifies_the_certificate(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)

    # In a process of its own: eventlet, once imported by any test, gives every TLS context sockets of its kind.
    server = subprocess.Popen([sys.executable, "-c", TLS_SERVER, certificate, key], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = f"https://127.0.0.1:{int(server.stdout.readline())}"
        with Client(url) as client, pytest.raises(Unreachable, match=r"no TLS connection .*--ca"):
            client.stats()
        with Client(url, ca=certificate) as client:
            assert client.stats() == {"uptime_seconds": 1}
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
