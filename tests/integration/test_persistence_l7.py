# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that are known again by what they say, and that wait after they have said it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration import beside
from tests.integration.l7_site import PYTHON_PORT, TLS_PORT, laboratory, url
from tests.integration.lines import Visitor, line_of, waiting
from tests.integration.support import VIP, change_member, configure, members, pool, server, tcp
from tests.integration.test_persistence import one_after_the_other
from topologies.lab import Lab, unavailable
from topologies.namespace import wait_until

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(scope="module", params=["splice", "relay", "bus"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    splice = request.param == "splice"
    if request.param != "bus":
        yield from laboratory(tmp_path_factory, *(["--fastpath"] if splice else []), fastpath=splice)
        return
    key = beside.shared_key(tmp_path_factory)
    for made in laboratory(tmp_path_factory, "--agent", f"127.0.0.1:{beside.ONE}", "--bus-key", str(key),
                           fastpath=False):
        for _ in beside.beside(made, key):
            wait_until(partial(beside.fastpath, made), 15, "the agent is connected")
            yield made


def configured(lab: Lab, members_of: dict[str, Any], served: dict[str, Any]) -> None:
    """Wait until it shakes hands, too: an agent elsewhere hears of it a moment after the switch. Who only connects
    takes no turn, and nobody knows them again."""
    def shakes_hands() -> bool:
        try:
            tcp(lab.client(), VIP, served["protocol_port"]).close()
        except OSError:
            return False
        return True

    configure(lab, [members_of], [served])
    wait_until(shakes_hands, 10, "somebody shakes hands")


def asked(lab: Lab, *options: str, port: int = 80) -> str:
    return lab.client().run("curl", "-gsS", "-o", "/dev/null", "-w", "%header{x-server}", "--max-time", "10", *options,
                            url(VIP, port=port)).stdout


def test_an_application_cookie(lab: Lab) -> None:
    configured(lab, pool("web", "ROUND_ROBIN", members(lab, PYTHON_PORT),
                         persistence={"type": "APP_COOKIE", "key": "sid"}),
               server("web", 80, "web", application="http"))
    assert {asked(lab) for _ in range(6)} == {"s1", "s2", "s3"}, "who has none takes turns"
    first = {name: asked(lab, "-H", f"Cookie: other=1; sid={name}") for name in ("ann", "bob", "z" * 500)}
    for _ in range(4):
        assert {name: asked(lab, "-H", f"Cookie: sid={name}") for name in first} == first
        asked(lab)
    keys = {one["key"]: one["member_name"] for one in lab.rest.get("/v1/persistence?pool=web")["persistence"]}
    assert keys.pop("ann") == first["ann"] and keys.pop("bob") == first["bob"]
    assert [key.partition(":")[0] for key in keys] == ["digest"]
    change_member(lab, "web", first["ann"], admin_state_up=False)
    other = asked(lab, "-H", "Cookie: sid=ann")
    assert other != first["ann"]
    change_member(lab, "web", first["ann"], admin_state_up=True)
    assert {asked(lab, "-H", "Cookie: sid=ann") for _ in range(3)} == {other}


@pytest.mark.parametrize(("kind", "key", "application"), [
    ("HEADER", "X-User", "http"), ("QUERY", "user", "http"), ("RAW", "5:3", "raw"), ("SNI", "", "tls")])
def test_whatever_a_client_says(lab: Lab, kind: str, key: str, application: str) -> None:
    tls = application == "tls"
    configured(lab, pool("said", "ROUND_ROBIN", members(lab, TLS_PORT if tls else PYTHON_PORT),
                         persistence={"type": kind, "key": key}),
               server("said", 443 if tls else 80, "said", application=application))

    def by(who: str) -> str:
        if tls:
            return lab.client().run("curl", "-gsSk", "-o", "/dev/null", "-w", "%header{x-server}", "--max-time", "10",
                                    "--resolve", f"{who}.example:443:{VIP}", f"https://{who}.example/").stdout
        return asked(lab, *{"HEADER": ("-H", f"x-user: {who}"), "QUERY": ("--request-target", f"/?a=b&user={who}"),
                            "RAW": ("--request-target", f"/{who}")}[kind])

    first = {who: by(who) for who in ("ann", "bob", "cyd")}
    assert set(first.values()) == {"s1", "s2", "s3"}, first
    for _ in range(3):
        assert {who: by(who) for who in first} == first
        by("eve")  # so that whose turn it is changes
    listed = lab.rest.get("/v1/persistence?pool=said")["persistence"]
    assert {one["type"] for one in listed} == {kind} and len(listed) == 4
    known = {one["key"].removesuffix(".example"): one["member_name"] for one in listed}
    assert known.keys() - first.keys() == {"eve"} and {who: known[who] for who in first} == first


def test_a_tls_session(lab: Lab, tmp_path: Path) -> None:
    configured(lab, pool("tls", "ROUND_ROBIN", members(lab, TLS_PORT), persistence={"type": "TLS_SESSION_ID"}),
               server("tls", 443, "tls", application="tls"))
    session = tmp_path / "session"

    def hello(*options: str) -> str:
        found = lab.client().run("openssl", "s_client", "-connect", f"{VIP}:443", "-tls1_2", "-quiet", "-ign_eof",
                                 *options, stdin="GET / HTTP/1.0\r\n\r\n", timeout=20, check=False).stdout
        return found.partition("X-Server: ")[2].split()[0]

    hello("-sess_out", str(session))
    assert session.exists()
    first = hello("-sess_in", str(session))
    for _ in range(4):
        assert hello() in ("s1", "s2", "s3")
        assert hello("-sess_in", str(session)) == first
    assert [one["type"] for one in lab.rest.get("/v1/persistence?pool=tls")["persistence"]] == ["TLS_SESSION_ID"]


def limited(lab: Lab, inspect_timeout: int = 10, **line: object) -> None:
    one = pool("one", "ROUND_ROBIN", members(lab, PYTHON_PORT, names=["s1"], connection_limit=1), waiting=line)
    configured(lab, one, server("web", 80, "one", application="http", inspect_timeout=inspect_timeout))
    wait_until(lambda: lab.rest.get("/v1/stats?pool=one")["members"][0]["active"] == 0, 30, "nobody is there")


def test_requests_are_served_one_after_the_other(lab: Lab) -> None:
    limited(lab, limit=3, timeout=40)
    client = lab.client("c1")
    before = line_of(lab, "one")
    visitors = [Visitor(client, VIP, 80).wait()]
    assert visitors[0].server == "s1", (visitors[0].answer, visitors[0].error)
    try:
        for count in (1, 2, 3):
            visitors.append(Visitor(client, VIP, 80))
            waiting(lab, "one", count)
        turned_away = Visitor(client, VIP, 80).wait()
        assert turned_away.answer.startswith("HTTP/1.1 503 ")
        turned_away.close()
        for index, visitor in enumerate(visitors[1:], 1):
            assert not any(one.done.is_set() for one in visitors[index:]), "one at a time"
            visitors[index - 1].close()
            assert visitor.wait().server == "s1", (visitor.answer, visitor.error)
    finally:
        for visitor in visitors:
            visitor.close()
    after = waiting(lab, "one", 0)
    assert [after[name] - before[name] for name in ("waited", "refused_full", "timed_out")] == [3, 1, 0]


def test_a_wait_that_is_longer_than_reading_may_take(lab: Lab) -> None:
    limited(lab, 1, limit=3, timeout=40)
    client = lab.client("c1")
    first = Visitor(client, VIP, 80).wait()
    late = Visitor(client, VIP, 80)
    waiting(lab, "one", 1)
    time.sleep(6.5)
    assert line_of(lab, "one")["waiting"] == 1 and not late.done.is_set()
    first.close()
    assert late.wait().server == "s1", (late.answer, late.error)
    late.close()


def test_first_packets_wait_as_well(lab: Lab) -> None:
    one_after_the_other(lab, 80)


def test_who_waits_too_long_is_answered(lab: Lab) -> None:
    limited(lab, limit=3, timeout=1.5)
    client = lab.client("c1")
    first = Visitor(client, VIP, 80).wait()
    late = Visitor(client, VIP, 80).wait()
    assert late.answer.startswith("HTTP/1.1 503 "), (late.answer, late.error)
    assert late.seconds >= 1.4
    first.close()
    late.close()
