# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A laboratory with virtual servers that read what clients say, and what its tests have in common."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support import VIP, VIP6, configure, members, pool, server
from topologies.controller import RestError
from topologies.hosts import LabHost
from topologies.lab import Lab
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

PYTHON_PORT, TLS_PORT, DEAD_PORT = 9000, 9443, 9001
WEB_SERVER = Path(__file__).with_name("web_server.py")


def rule(kind: str, compare: str, value: str, **more: Any) -> dict[str, Any]:
    """An L7 rule."""
    return {"type": kind, "compare_type": compare, "value": value, **more}


def to_pool(name: str, *rules: dict[str, Any]) -> dict[str, Any]:
    """A policy that leads to a pool."""
    return {"name": f"to-{name}", "action": "REDIRECT_TO_POOL", "redirect_pool": name, "rules": list(rules)}


def laboratory(tmp_path_factory: pytest.TempPathFactory, *options: str, fastpath: bool = True) -> Iterator[Lab]:
    """One switch, with nginx and a server of ours on each server, plain and TLS. ``fastpath``: wait for one, where
    there are options."""
    directory = tmp_path_factory.mktemp("l7")
    certificate = directory / "server.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=lab",
                    "-keyout", str(certificate), "-out", str(directory / "only.pem")], check=True, capture_output=True)
    certificate.write_bytes(certificate.read_bytes() + (directory / "only.pem").read_bytes())
    with contextlib.ExitStack() as running:
        made = running.enter_context(Lab(SingleTopo(), directory=directory / "lab", options=list(options)))
        files = made.directory / "files"
        for name in ("one/x", "one.txt", "two", "three", "half"):
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_text(f"{name}\n")
        made.start_servers()
        for host in made.servers:
            for extra in ([str(PYTHON_PORT)], [str(TLS_PORT), str(certificate)]):
                process = host.popen(sys.executable, str(WEB_SERVER), host.name, *extra)
                running.callback(end, process)
        made.start_controller()
        if options and fastpath:
            assert made.has_fastpath
        yield made


def configured(lab: Lab, **more: Any) -> Lab:
    """Three pools by path and host; by SNI and ALPN; by the first bytes. Both families."""
    pools, servers = [], []
    for six, vip in ((False, VIP), (True, VIP6)):
        word = "six" if six else "four"
        for index, name in enumerate(("s1", "s2", "s3"), 1):
            pools += [pool(f"{name}-{word}", "ROUND_ROBIN", members(lab, six=six, names=[name])),
                      pool(f"tls{index}-{word}", "ROUND_ROBIN", members(lab, TLS_PORT, six, names=[name]))]
        pools += [pool(f"all-{word}", "ROUND_ROBIN", members(lab, six=six)),
                  pool(f"python-{word}", "ROUND_ROBIN", members(lab, PYTHON_PORT, six)),
                  pool(f"dead-{word}", "ROUND_ROBIN", members(lab, DEAD_PORT, six)),
                  pool(f"half-{word}", "ROUND_ROBIN", [*members(lab, DEAD_PORT, six, names=["s1"]),
                                                       *members(lab, 80, six, names=["s2"])])]
        servers += [
            server(f"web-{word}", 80, f"all-{word}", vip, application="http", **more, l7_policies=[
                to_pool(f"s1-{word}", rule("PATH", "STARTS_WITH", "/one/")),
                to_pool(f"s2-{word}", rule("HOST_NAME", "EQUAL_TO", "two.example")),
                to_pool(f"s3-{word}", rule("COOKIE", "EQUAL_TO", "yes", key="third")),
                to_pool(f"dead-{word}", rule("PATH", "EQUAL_TO", "/dead")),
                to_pool(f"half-{word}", rule("PATH", "EQUAL_TO", "/half")),
                to_pool(f"python-{word}", rule("PATH", "STARTS_WITH", "/python")),
                {"name": "away", "action": "REDIRECT_TO_URL", "redirect_url": "https://elsewhere.example/",
                 "redirect_http_code": 308, "rules": [rule("PATH", "EQUAL_TO", "/away")]},
                {"name": "teapot", "action": "FIXED_RESPONSE", "response_status": 418, "response_body": "short\n",
                 "rules": [rule("PATH", "EQUAL_TO", "/tea")]},
                {"name": "never", "action": "REJECT", "rules": [rule("METHOD", "EQUAL_TO", "TRACE")]}]),
            server(f"tls-{word}", 443, f"tls3-{word}", vip, application="tls", **more, l7_policies=[
                to_pool(f"tls1-{word}", rule("SNI", "EQUAL_TO", "one.example")),
                to_pool(f"tls2-{word}", rule("SNI", "ENDS_WITH", ".two.example")),
                {**to_pool(f"tls1-{word}", rule("ALPN", "EQUAL_TO", "acme-tls/1")), "name": "by-protocol"}]),
            server(f"raw-{word}", 7000, f"s3-{word}", vip, application="raw", **more, inspect_bytes=8, l7_policies=[
                to_pool(f"s1-{word}", rule("DATA", "STARTS_WITH", "GET /one")),
                to_pool(f"s2-{word}", rule("DATA", "EQUAL_TO", "hex:474554202f74776f"))])]
    configure(lab, pools, servers)
    return lab


both = pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])


def url(vip: str, path: str = "/", port: int = 80, scheme: str = "http") -> str:
    """Where a virtual server is."""
    return f"{scheme}://{f'[{vip}]' if ':' in vip else vip}:{port}{path}"


def named(vip: str, name: str) -> str:
    """A resource's name, by family."""
    return f"{name}-{'six' if ':' in vip else 'four'}"


def counters(lab: Lab) -> dict[str, int]:
    """Of the fast path."""
    found = lab.rest.get("/v1/stats")["switches"][0]["fastpath"]
    return {**found["handshakes"], "queries": found["queries"]}


def connect(host: LabHost, vip: str, port: int, timeout: float = 5.0) -> socket.socket:
    """A client's connection."""
    with host.entered():
        made = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET)
    made.settimeout(timeout)
    made.connect((vip, port))
    return made


def shown(lab: Lab, end_of: socket.socket, binding: str) -> dict[str, Any]:
    """A client's connection, as REST lists it, once, with this binding, and shows it by its id."""
    host, port = end_of.getsockname()[:2]
    client = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def listed() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = lab.rest.get(f"/v1/connections?client={client}")["connections"]
        return found

    wait_until(lambda: [one["binding"] for one in listed()] == [binding], 5, f"a connection of {client}, by {binding}")
    (one,) = listed()
    by_id: dict[str, Any] = lab.rest.get(f"/v1/connections/{one['id']}")
    moving = {"idle_seconds", "age_seconds", "packets", "bytes"}
    assert by_id.items() - {(key, by_id[key]) for key in moving} == one.items() - {(key, one[key]) for key in moving}
    return by_id


def shows_why(lab: Lab, vip: str, binding: str) -> None:
    """REST says of a connection why it went where it went: one that a policy led to s2, and one that none did."""
    for host, policy in (("two.example", named(vip, "to-s2")), ("other.example", "")):
        with connect(lab.client(), vip, 80) as it:
            it.sendall(f"GET /about HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            name = it.recv(4096).partition(b"X-Server: ")[2][:2].decode()
            one = shown(lab, it, binding)
            assert (one["policy"], one["key"]) == (policy, f"GET {host}/about")
            assert (one["virtual_server"], one["decided_by"]) == (named(vip, "web"), "controller")
            it_has = lab.server(name)
            assert one["member"] == (f"[{it_has.address6}]:80" if ":" in vip else f"{it_has.address}:80")
            assert name == "s2" or not policy
        wait_until(partial(unknown, lab, one["id"]), 5, "REST does not know it any more")


def unknown(lab: Lab, identifier: str) -> bool:
    """Whether REST has no such connection."""
    try:
        lab.rest.get(f"/v1/connections/{identifier}")
    except RestError as error:
        assert " 404" in str(error)
        return True
    return False


def everything(end_of: socket.socket) -> bytes:
    """All that comes."""
    found = b""
    while part := end_of.recv(65536):
        found += part
    return found


def is_reset(host: LabHost, vip: str, port: int, said: bytes) -> bool:
    """Whether a client who says this is reset, and told nothing before."""
    with connect(host, vip, port) as it:
        it.sendall(said)
        try:
            it.recv(65536)
        except ConnectionResetError:
            return True
    return False
