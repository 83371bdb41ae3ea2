# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 with prior knowledge on every binding: curl, and an nginx that speaks nothing else."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.hellos import h2
from tests.integration.handed_over import Site
from tests.integration.l7_site import DEAD_PORT, both, connect, laboratory, named, rule, to_pool, url
from tests.integration.support import VIP, VIP6, configure, members, pool, server
from topologies.lab import Lab, unavailable
from topologies.namespace import end, wait_until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

PORT = 8090
SAID = "%{http_version} %{http_code} %{num_connects} %header{x-server}\n"
QUIETLY = ("-gsS", "--max-time", "10")
CURL = ("curl", *QUIETLY, "--http2-prior-knowledge")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with contextlib.ExitStack() as running:
        for made in laboratory(tmp_path_factory, "--fastpath"):
            for host in made.servers:
                running.callback(end, host.nginx(made.directory / "files", (PORT,), http2=True))
            yield made


@pytest.fixture(scope="module", params=["splice", "handoff", "hybrid", "relay"])
def binding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def site(lab: Lab, binding: str) -> Iterator[Lab]:
    """Three pools, by path and by host; the default one has all servers."""
    pools, servers = [], []
    for vip in (VIP, VIP6):
        six = vip == VIP6
        one, two, every, dead = (named(vip, word) for word in ("one", "two", "all", "dead"))
        pools += [pool(one, "ROUND_ROBIN", members(lab, PORT, six, names=["s1"])),
                  pool(two, "ROUND_ROBIN", members(lab, PORT, six, names=["s2"])),
                  pool(every, "ROUND_ROBIN", members(lab, PORT, six)),
                  pool(dead, "ROUND_ROBIN", members(lab, DEAD_PORT, six, names=["s1"]))]
        servers.append(server(named(vip, "web"), 80, every, vip, application="http", binding=binding, l7_policies=[
            to_pool(one, rule("PATH", "STARTS_WITH", "/one/")),
            to_pool(two, rule("HOST_NAME", "EQUAL_TO", "two.example")),
            to_pool(dead, rule("PATH", "EQUAL_TO", "/dead")),
            {"name": "away", "action": "REDIRECT_TO_URL", "redirect_url": "https://elsewhere.example/",
             "rules": [rule("PATH", "EQUAL_TO", "/away")]}]))
    configure(lab, pools, servers)
    agents = Site(lab, (PORT,))
    if binding == "handoff":
        agents.start_agents()
    yield lab
    agents.stop_agents()


def asked(site: Lab, first: tuple[str, ...], *more: tuple[str, ...]) -> list[str]:
    """What became of the requests of one connection: version, status, connections that it took, and who answered.

    Only the first one says ``--http2-prior-knowledge``: curl 7.88 would send its preface again on the same connection.
    """
    said = "-o", "/dev/null", "-w", SAID
    later = [word for request in more for word in ("--next", *QUIETLY, *said, *request)]
    return site.client().run(*CURL, *said, *first, *later).stdout.splitlines()


@both
def test_path_and_authority_decide(site: Lab, vip: str) -> None:
    for _ in range(2):
        assert asked(site, (url(vip, "/one/x"),)) == ["2 200 1 s1"]
        assert asked(site, (url("two.example", "/about"), "--resolve", f"two.example:80:{vip}")) == ["2 200 1 s2"]
    assert Counter(line for _ in range(6) for line in asked(site, (url(vip),))) == Counter(
        {f"2 200 1 s{number}": 2 for number in (1, 2, 3)}), "the default pool, in turns"


@both
def test_later_requests_stay_where_the_first_one_went(site: Lab, vip: str) -> None:
    to_one, to_two = (url(vip, "/one/x"),), (url(vip, "/about"), "-H", "Host: two.example")
    assert asked(site, to_one, to_two, (url(vip),)) == ["2 200 1 s1", "2 200 0 s1", "2 200 0 s1"]
    assert asked(site, to_two, to_one) == ["2 200 1 s2", "2 200 0 s2"]


@both
def test_no_answers_are_made(site: Lab, vip: str) -> None:
    """A redirect, and a pool without a member that could be reached: reset."""
    for path in ("/away", "/dead"):
        done = site.client().run(*CURL, url(vip, path), check=False)
        assert (done.returncode, done.stdout) == (56, "") and "reset" in done.stderr
    assert asked(site, (url(vip, "/one/x"),)) == ["2 200 1 s1"]


@both
def test_a_body_arrives_whole(site: Lab, vip: str) -> None:
    digest, target = site.make_file("one/body", 3_000_000), site.directory / "got"
    site.client().run(*CURL, "-o", str(target), url(vip, "/one/body"))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest


@both
def test_who_has_a_connection(site: Lab, vip: str, binding: str) -> None:
    name = named(vip, "web")
    with connect(site.client(), vip, 80) as it:
        it.sendall(h2([(":method", "GET"), (":scheme", "http"), (":authority", "a.example"), (":path", "/one/x")]))
        found = b""
        while not found.endswith(b"one/x\n"):
            found += it.recv(4096)
        wait_until(lambda: [(one["binding"], one["policy"], one["key"])
                            for one in site.rest.get(f"/v1/connections?virtual_server={name}&limit=1000")["connections"]
                            if one["client"].endswith(f":{it.getsockname()[1]}")] == [
            (binding, f"to-{named(vip, 'one')}", "GET a.example/one/x")], 5, "its binding, and why")
