# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Handoff to servers other than nginx, none of them changed: ``openssl s_server``, Node's, Python's."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.handed_over import Site
from tests.integration.support import VIP, VIP6, configure, members, pool, server
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until
from topologies.single import SingleTopo

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

WEB_SERVER = Path(__file__).with_name("web_server.py")
SIZE = 3_000_000
NODE_PORT, PYTHON_PORT = 9002, 9000
TLS_PORTS = {VIP: 9443, VIP6: 9444}
"""``s_server`` listens for one family."""
NODE = """
const crypto = require('crypto');
require('http').createServer((request, response) => {
    const digest = crypto.createHash('sha256');
    request.on('data', (part) => digest.update(part));
    request.on('end', () => {
        response.setHeader('X-Server', process.argv[1]);
        response.end(request.method === 'GET' ? Buffer.alloc(Number(request.url.slice(1)), 'n') : digest.digest('hex'));
    });
}).listen(Number(process.argv[2]), '::');
"""
both = pytest.mark.parametrize("vip", [VIP, VIP6], ids=["ipv4", "ipv6"])


def _virtual_server(port: int, vip: str, application: str, member: int, lab: Lab) -> tuple[dict[str, object], ...]:
    name = f"{application}-{member}-{'six' if vip == VIP6 else 'four'}"
    return (pool(name, "ROUND_ROBIN", members(lab, member, vip == VIP6)),
            server(name, port, name, vip, application=application, binding="handoff"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("servers")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=lab",
                    "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60)
    with contextlib.ExitStack() as running:
        lab = running.enter_context(Lab(SingleTopo(clients=1, servers=2), directory=directory / "lab",
                                        options=["--fastpath"]))
        lab.start_servers()
        for host in lab.servers:
            commands: list[tuple[str, ...]] = [(sys.executable, str(WEB_SERVER), host.name, str(PYTHON_PORT))]
            commands += [("openssl", "s_server", "-4" if vip == VIP else "-6", "-accept", str(port), "-key", str(key),
                          "-cert", str(certificate), "-WWW", "-quiet", "-alpn", "http/1.1")
                         for vip, port in TLS_PORTS.items()]
            if shutil.which("node"):
                commands.append(("node", "-e", NODE, host.name, str(NODE_PORT)))
            for command in commands:
                running.callback(end, host.popen(*command, cwd=lab.directory / "files", stdout=subprocess.DEVNULL,
                                                 stderr=subprocess.DEVNULL))
        lab.start_controller()
        assert lab.has_fastpath
        pairs = [_virtual_server(port, vip, application, member, lab) for vip in (VIP, VIP6)
                 for port, application, member in ((443, "tls", TLS_PORTS[vip]), (8002, "http", NODE_PORT),
                                                   (8000, "http", PYTHON_PORT))]
        configure(lab, [dict(one) for one, _ in pairs], [dict(one) for _, one in pairs])
        made = Site(lab, [*TLS_PORTS.values(), NODE_PORT, PYTHON_PORT])
        running.callback(made.stop_agents)
        made.start_agents()
        yield made


def all_adopted(since: Callable[[], tuple[int, int]], number: int) -> None:
    """So many handshakes with the client, none with a member."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: since() == (number, 0), 5, "")
    assert since() == (number, 0)


@both
@pytest.mark.parametrize("version", ["--tlsv1.2 --tls-max 1.2", "--tlsv1.3"])
@pytest.mark.parametrize("hello", ["small", "large"])
def test_openssl(site: Site, vip: str, version: str, hello: str, tmp_path: Path) -> None:
    """A file over TLS. A ClientHello of two segments is acknowledged here if need be: then it is no handoff."""
    site.announces(*TLS_PORTS.values())
    client, since, got = site.lab.client(), site.shaken(), tmp_path / "got"
    digest = site.lab.make_file("secret", SIZE)
    name = "a.example" if hello == "small" else ".".join(["x" * 60] * 4)
    for _ in range(4):
        client.run("curl", "-gsSf", "-k", "-m", "10", *version.split(), "-o", str(got), "--connect-to",
                   f"::{f'[{vip}]' if ':' in vip else vip}:443", f"https://{name}/secret")
        assert hashlib.sha256(got.read_bytes()).hexdigest() == digest
    all_adopted(since, 4)


@both
def test_openssl_after_a_hello_of_two_segments(site: Site, vip: str) -> None:
    site.announces(*TLS_PORTS.values())
    site.lab.make_file("short", 20)
    done = site.lab.client().run(
        "openssl", "s_client", "-connect", f"{f'[{vip}]' if ':' in vip else vip}:443", "-servername", "a.example",
        "-alpn", ",".join(["http/1.1", *(f"protocol-{number:03}-{'x' * 200}" for number in range(9))]), "-quiet",
        "-ign_eof", stdin="GET /short HTTP/1.0\r\n\r\n", timeout=15, check=False)
    assert "HTTP/1.0 200" in done.stdout


@pytest.mark.skipif(shutil.which("node") is None, reason="not installed: nodejs")
@both
def test_node(site: Site, vip: str, tmp_path: Path) -> None:
    """Bodies both ways, and several requests of one connection."""
    site.announces(NODE_PORT)
    _both_ways(site, vip, 8002, f"/{SIZE}", tmp_path, b"n" * SIZE)


@both
def test_python(site: Site, vip: str, tmp_path: Path) -> None:
    site.announces(PYTHON_PORT)
    _both_ways(site, vip, 8000, f"/bytes/{SIZE - SIZE % 256}", tmp_path, bytes(range(256)) * (SIZE // 256))


def _both_ways(site: Site, vip: str, port: int, path: str, directory: Path, expected: bytes) -> None:
    client, since, got, body = site.lab.client(), site.shaken(), directory / "got", directory / "body"
    base = f"http://{f'[{vip}]' if ':' in vip else vip}:{port}"
    body.write_bytes(expected[:1_000_000])
    served: Counter[str] = Counter()
    for _ in range(4):
        said = client.run("curl", "-gsSf", "-m", "10", "-o", str(got), "-w", "%header{x-server} ", base + path,
                          "--next", "-sSf", "-m", "10", "--data-binary", f"@{body}", "-H", "Expect:",
                          "-w", " %{num_connects}", base + "/").stdout
        name, digest, connects = said.split()
        assert got.read_bytes() == expected
        assert digest == hashlib.sha256(expected[:1_000_000]).hexdigest() and connects == "0"
        served[name] += 1
    assert served == Counter({"s1": 2, "s2": 2})
    all_adopted(since, 4)
