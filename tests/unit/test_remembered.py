# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who is known again, over REST and on the command line (lbapp/api/remembered.py, lbapp/remembering.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from lbapp import remembering
from lbapp.cli import cli
from lbapp.client import Client
from lbapp.config.model import Configuration, Pool, Protocol, VirtualServer
from lbapp.config.pool import Persistence, PersistenceType, Waiting
from lbapp.control.engine import ControlSegment
from tests.playbook import member, query, up
from tests.unit.rest_process import error_of, rest_process


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with rest_process(tmp_path_factory.mktemp("rest")) as running:
        yield running


# ------------------------------------------------------------------ over HTTP


def test_page_by_page(rest: Any) -> None:
    first = rest.ask("GET", "/v1/persistence?limit=2").json()
    assert [one["id"] for one in first["persistence"]] == ["p:01", "p:02"]
    second = rest.ask("GET", first["next"]).json()
    third = rest.ask("GET", second["next"]).json()
    assert [one["id"] for one in [*second["persistence"], *third["persistence"]]] == ["p:03", "p:04", "p:05"]
    assert third["next"] is None
    odd = rest.ask("GET", "/v1/persistence?pool=odd&limit=1").json()
    assert "pool=odd" in odd["next"]
    assert rest.ask("GET", "/v1/persistence?key=10.0.0.2/32").json()["persistence"][0]["pool"] == "even"


@pytest.mark.parametrize("what", ["limit=0", "what=1", "pool=", f"key={'x' * 4097}"])
def test_what_cannot_be_asked(rest: Any, what: str) -> None:
    error_of(rest.ask("GET", f"/v1/persistence?{what}"), 400)


def test_forgetting(rest: Any) -> None:
    assert rest.ask("DELETE", "/v1/persistence?pool=odd").json() == {"removed": 3}
    assert rest.ask("DELETE", "/v1/persistence?all=true").json() == {"removed": 5}
    error_of(rest.ask("DELETE", "/v1/persistence?pool=nobody"), 404)
    for what in ("", "?all=false", "?all=true&pool=odd", "?all=yes"):
        assert error_of(rest.ask("DELETE", f"/v1/persistence{what}"), 400)["field"] == "all"
    assert rest.ask("POST", "/v1/persistence", {}).status_code == 405


def test_it_is_described(rest: Any) -> None:
    described = rest.ask("GET", "/v1/openapi.json").json()
    assert set(described["paths"]["/v1/persistence"]) == {"get", "delete"}
    assert {"PersistenceView", "Removed", "PoolStatistics"} <= set(described["components"]["schemas"])


# ------------------------------------------------------------------ from names to numbers, and back


@pytest.fixture
def site() -> tuple[ControlSegment, Configuration]:
    servers = {str(number): VirtualServer(name=f"v{number}", id=str(number), vip_address="192.0.2.1", number=number,
                                          protocol=Protocol.TCP, protocol_port=79 + number, default_pool_id=pool)
               for number, pool in ((1, "p"), (2, "q"), (3, "r"))}
    persistence = Persistence(type=PersistenceType.SOURCE_IP)
    made = Configuration(virtual_servers=servers, pools={
        "p": Pool(name="one", id="p", persistence=persistence, members=(member(1, name="a"), member(2, name="b"))),
        "q": Pool(name="two", id="q", persistence=persistence, waiting=Waiting(),
                  members=(member(3, address="10.0.0.1", name="a", connection_limit=2),)),
        "r": Pool(name="three", id="r", members=(member(4),))})
    control = ControlSegment(made)
    control.handle(up(4), 0.0)
    for serial in range(1, 5):
        for number in (1, 2, 3):
            first = query(10 * serial + number, client=serial, virtual_server=number)
            control.query(first._replace(signature=first.signature._replace(destination_port=79 + number)),
                          float(serial))
    return control, made


def asked(site: tuple[ControlSegment, Configuration], **wanted: str) -> list[tuple[str, str, str]]:
    return sorted((one.pool, one.key, one.member) for one in remembering.clients(*site, wanted, 10.0))


def test_who_is_known(site: tuple[ControlSegment, Configuration]) -> None:
    everybody = asked(site)
    assert len(everybody) == 6 and {pool for pool, _, _ in everybody} == {"one", "two"}
    (one,) = remembering.clients(*site, {"pool": "one", "key": "198.51.100.3"}, 10.0)
    assert (one.member, one.member_name, one.type, one.idle_seconds, one.expires_in) == (
        "10.0.0.1:8080", "a", "SOURCE_IP", 7.0, 3593.0)
    assert asked(site, pool="p") == asked(site, pool="one") == [one for one in everybody if one[0] == "one"]
    assert asked(site, member="10.0.0.2:8080") == asked(site, member="b") == [
        ("one", "198.51.100.2/32", "10.0.0.2:8080"), ("one", "198.51.100.4/32", "10.0.0.2:8080")]
    assert len(asked(site, member="10.0.0.1:8080")) == 4, "in both pools"
    assert asked(site, pool="nobody") == asked(site, member="nobody") == asked(site, pool="three") == []
    assert list(remembering.clients(*site, {}, 10_000.0)) == [], "their time is over"


def test_a_member_that_is_gone_is_not_shown(site: tuple[ControlSegment, Configuration]) -> None:
    control, made = site
    less = Configuration(virtual_servers=made.virtual_servers, pools={**made.pools, "p": Pool(
        name="one", id="p", persistence=made.pools["p"].persistence, members=(member(1, name="a"),))})
    control.configure(less, 10.0)
    assert {one.member for one in remembering.clients(control, less, {"pool": "one"}, 10.0)} == {"10.0.0.1:8080"}


@pytest.mark.parametrize(("wanted", "removed"), [
    ({}, 6), ({"pool": "one"}, 4), ({"pool": "two", "key": "198.51.100.1"}, 1), ({"key": "198.51.100.1"}, 2),
    ({"member": "b"}, 2), ({"member": "a", "pool": "one"}, 2), ({"member": "a"}, 4),
    ({"member": "10.0.0.1:8080", "key": "198.51.100.2"}, 1), ({"key": "nobody"}, 0)])
def test_who_is_forgotten(site: tuple[ControlSegment, Configuration], wanted: dict[str, str], removed: int) -> None:
    assert remembering.forget(*site, wanted) == removed
    assert len(asked(site)) == 6 - removed


@pytest.mark.parametrize("wanted", [{"pool": "nobody"}, {"pool": "three"}, {"member": "nobody"},
                                    {"pool": "two", "member": "b"}])
def test_nobody_is_forgotten_by_mistake(site: tuple[ControlSegment, Configuration], wanted: dict[str, str]) -> None:
    assert remembering.forget(*site, wanted) is None
    assert len(asked(site)) == 6


def test_lines_are_counted(site: tuple[ControlSegment, Configuration]) -> None:
    one, two = remembering.pools(*site, 10.0)
    assert (one.name, one.clients, one.waiting, one.line) == ("one", 4, 0, [])
    assert (two.name, two.clients, two.waiting, two.waited, two.longest_seconds) == ("two", 2, 2, 2, 7.0)
    assert [(each.position, each.virtual_server, each.client, each.seconds) for each in two.line] == [
        (1, "v2", "198.51.100.3:1027", 7.0), (2, "v2", "198.51.100.4:1028", 6.0)]


# ------------------------------------------------------------------ the command


def test_lbapp_show_persistence(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    clients = [{"id": f"p:{number}", "pool": "web", "type": "APP_COOKIE", "key": f"session-{number}",
                "member": "10.0.0.51:80", "member_name": "s1", "idle_seconds": 3.0, "expires_in": 3597.0}
               for number in range(60)]

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url).partition("/v1")[2])
        if "/stats" in request.url.path:
            return httpx.Response(200, json={"virtual_servers": [], "pools": [{
                "name": "web", "clients": 60, "waiting": 2, "longest_seconds": 1.5, "waited": 9, "timed_out": 3,
                "refused_full": 4}]})
        limit = int(request.url.params["limit"])
        return httpx.Response(200, json={"persistence": clients[:limit], "next": None})

    def run(*words: str) -> str:
        result = CliRunner().invoke(cli, ["--token", "t", "show", *words], obj=lambda url, token, ca: Client(
            url, token, ca, transport=httpx.MockTransport(answer)))
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = run("persistence", "web")
    assert "session-49" in shown and "session-50" not in shown and "--limit shows more" in shown
    assert seen == ["/persistence?pool=web&limit=50"]
    assert len(json.loads(run("persistence", "-o", "json", "--filter", "key=session-1"))) == 60
    assert "key=session-1" in seen[-1]
    assert "clients known" in run("stats")
