# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Resources over real HTTP: every method, every refusal, and that a refusal changes nothing.

Runs lbapp/api/resources.py, lbapp/api/members.py, lbapp/api/requests.py and lbapp/api/errors.py in
a process of their own (tests/unit/rest_server.py).
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.rest_process import error_of, rest_process

MEMBERS = [{"address": "10.0.0.1", "protocol_port": 80}, {"address": "10.0.0.2", "protocol_port": 80, "name": "two"}]
SERVER = {"name": "web", "vip_address": "10.0.0.100", "protocol": "TCP", "protocol_port": 80}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with rest_process(tmp_path_factory.mktemp("rest")) as running:
        yield running


@pytest.fixture
def rest(process):
    assert process.ask("PUT", "/v1/config", {}).status_code == 200
    return process


@pytest.fixture
def site(rest):
    """A virtual server with a pool of two members, by one POST."""
    answer = rest.ask("POST", "/v1/virtual-servers", {**SERVER, "pool": {"name": "farm", "members": MEMBERS}})
    assert answer.status_code == 201, answer.text
    return rest


# ------------------------------------------------------------------ the ordinary way


def test_one_post_makes_a_virtual_server_its_pool_and_its_members(site):
    server = site.ask("GET", "/v1/virtual-servers/web").json()
    pool = site.ask("GET", f"/v1/pools/{server['default_pool_id']}").json()
    assert pool["name"] == "farm"
    assert [(m["address"], m["protocol_port"], m["name"]) for m in pool["members"]] == [
        ("10.0.0.1", 80, ""), ("10.0.0.2", 80, "two")]
    assert (server["provisioning_status"], server["operating_status"]) == ("ACTIVE", "ONLINE")
    assert pool["operating_status"] == "ONLINE"
    assert pool["members"][0]["operating_status"] == "NO_MONITOR"
    assert server["number"] > 0
    assert all(member["number"] > 0 for member in pool["members"])


def test_post_answers_201_with_location_and_tag(rest):
    answer = rest.ask("POST", "/v1/networks", {"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254"})
    assert answer.status_code == 201
    assert answer.headers["ETag"] == '"1"'
    again = rest.client.get(answer.headers["Location"])
    assert again.json() == answer.json()
    assert again.json()["gateway"] is None


@pytest.mark.parametrize("reference", ["10.0.0.2:80", "two", "id"])
def test_members_are_found_by_id_address_and_name(site, reference):
    members = site.ask("GET", "/v1/pools/farm/members").json()["members"]
    reference = members[1]["id"] if reference == "id" else reference
    assert site.ask("GET", f"/v1/pools/farm/members/{reference}").json() == members[1]


@pytest.mark.parametrize("reference", ["[2001:db8::1]:443", "2001:db8::1:443", "[2001:DB8:0::1]:443",
                                       "%5B2001%3Adb8%3A%3A1%5D%3A443"])
def test_an_ipv6_member_is_found_by_its_address(rest, reference):
    rest.ask("POST", "/v1/pools", {"name": "six", "members": [{"address": "2001:db8::1", "protocol_port": 443}]})
    assert rest.ask("GET", f"/v1/pools/six/members/{reference}").json()["address"] == "2001:db8::1"


def test_put_gives_defaults_to_what_is_left_out_and_keeps_the_number(site):
    before = site.ask("PATCH", "/v1/virtual-servers/web", {"description": "x", "connection_limit": 5}).json()
    answer = site.ask("PUT", "/v1/virtual-servers/web", {**SERVER, "name": "renamed", "pool": "farm"})
    assert answer.status_code == 200
    after = answer.json()
    assert (after["name"], after["description"], after["connection_limit"]) == ("renamed", "", -1)
    assert (after["id"], after["number"], after["default_pool_id"]) == (
        before["id"], before["number"], before["default_pool_id"])
    error_of(site.ask("GET", "/v1/virtual-servers/web"), 404)


def test_patch_changes_what_it_has_and_null_is_the_default(site):
    answer = site.client.patch("/v1/virtual-servers/web", content=b'{"connection_limit":7,"default_pool_id":null}',
                               headers={"Content-Type": "application/merge-patch+json"})
    assert answer.status_code == 200
    assert (answer.json()["connection_limit"], answer.json()["default_pool_id"]) == (7, None)
    assert answer.json()["protocol_port"] == 80
    assert site.ask("PATCH", "/v1/virtual-servers/web", {"connection_limit": None}).json()["connection_limit"] == -1


def test_members_come_go_and_change_one_by_one(site):
    pool = site.ask("GET", "/v1/pools/farm").json()
    answer = site.ask("POST", "/v1/pools/farm/members", {"address": "10.0.0.3", "protocol_port": 8080})
    assert answer.status_code == 201
    assert answer.headers["Location"].endswith(f"/v1/pools/{pool['id']}/members/{answer.json()['id']}")
    changed = site.ask("PATCH", "/v1/pools/farm/members/two", {"weight": 9, "draining": True}).json()
    assert (changed["weight"], changed["operating_status"], changed["revision"]) == (9, "DRAINING", 2)
    put = site.ask("PUT", "/v1/pools/farm/members/two", {"name": "zwei"}).json()
    assert (put["weight"], put["draining"], put["name"], put["address"]) == (1, False, "zwei", "10.0.0.2")
    assert site.ask("DELETE", "/v1/pools/farm/members/10.0.0.1:80").status_code == 204
    after = site.ask("GET", "/v1/pools/farm").json()
    assert [m["address"] for m in after["members"]] == ["10.0.0.2", "10.0.0.3"]
    assert after["members"][0]["number"] == pool["members"][1]["number"]
    assert after["revision"] == 5


def test_a_pools_put_keeps_members_that_stay(site):
    before = site.ask("GET", "/v1/pools/farm").json()["members"]
    site.ask("PUT", "/v1/pools/farm", {"name": "farm", "members": [
        {"address": "10.0.0.2", "protocol_port": 80, "weight": 3}, {"address": "10.0.0.4", "protocol_port": 80}]})
    after = site.ask("GET", "/v1/pools/farm").json()["members"]
    assert (after[0]["id"], after[0]["number"], after[0]["weight"]) == (before[1]["id"], before[1]["number"], 3)
    assert after[1]["address"] == "10.0.0.4"


def test_delete_answers_204_and_nothing(site):
    answer = site.ask("DELETE", "/v1/virtual-servers/web")
    assert (answer.status_code, answer.content) == (204, b"")
    assert site.ask("DELETE", "/v1/pools/farm").status_code == 204
    error_of(site.ask("DELETE", "/v1/pools/farm"), 404)


def test_lists_filter_and_page_in_the_order_of_names(rest):
    rest.ask("PUT", "/v1/config", {"pools": [{"name": f"p{index:02d}"} for index in range(25)]})
    seen, path, pages = [], "/v1/pools?limit=10", 0
    while path:
        answer = rest.ask("GET", path).json()
        seen += [one["name"] for one in answer["pools"]]
        path, pages = answer["next"], pages + 1
    assert seen == [f"p{index:02d}" for index in range(25)]
    assert pages == 3
    identifier = rest.ask("GET", "/v1/pools/p21").json()["id"]
    assert [one["name"] for one in rest.ask("GET", f"/v1/pools?marker={identifier}").json()["pools"]] == [
        "p22", "p23", "p24"]
    assert [one["name"] for one in rest.ask("GET", "/v1/pools?name=p07").json()["pools"]] == ["p07"]
    assert rest.ask("GET", "/v1/pools?name=none").json() == {"pools": [], "next": None}


def test_a_pools_members_page_too(rest):
    members = [{"address": f"10.0.0.{last}", "protocol_port": 80} for last in range(1, 8)]
    rest.ask("POST", "/v1/pools", {"name": "farm", "members": members})
    seen, path = [], "/v1/pools/farm/members?limit=3"
    while path:
        answer = rest.ask("GET", path).json()
        seen += [one["address"] for one in answer["members"]]
        path = answer["next"]
    assert seen == [one["address"] for one in members]


def test_head_answers_without_a_body(site):
    answer = site.ask("HEAD", "/v1/virtual-servers/web")
    assert (answer.status_code, answer.content, answer.headers["ETag"]) == (200, b"", '"1"')


# ------------------------------------------------------------------ 400: which field, and what was expected


@pytest.mark.parametrize(("method", "path", "body", "field", "says"), [
    ("POST", "/v1/virtual-servers", {}, "name", "required"),
    ("POST", "/v1/virtual-servers", {**SERVER, "vip_address": "10.0.0.300"}, "vip_address", "IPv4 or IPv6 address"),
    ("POST", "/v1/virtual-servers", {**SERVER, "vip_address": "224.0.0.1"}, "vip_address", "unicast"),
    ("POST", "/v1/virtual-servers", {**SERVER, "protocol_port": 65536}, "protocol_port", "65535"),
    ("POST", "/v1/virtual-servers", {**SERVER, "protocol_port": "80"}, "protocol_port", "expected int, got str"),
    ("POST", "/v1/virtual-servers", {**SERVER, "protocol": "SCTP"}, "protocol", "expected one of TCP, UDP"),
    ("POST", "/v1/virtual-servers", {**SERVER, "colour": 1}, "colour", "unknown field; expected one of name"),
    ("POST", "/v1/virtual-servers", {**SERVER, "id": "x"}, "id", "read-only"),
    ("POST", "/v1/virtual-servers", {**SERVER, "number": 5}, "number", "read-only"),
    ("POST", "/v1/virtual-servers", {**SERVER, "name": "a\n"}, "name", "regex"),
    ("POST", "/v1/virtual-servers", {**SERVER, "name": "a" * 256}, "name", "255"),
    ("POST", "/v1/virtual-servers", {**SERVER, "name": "0f0e0d0c-0000-4000-8000-000000000000"}, "name", "UUID"),
    ("POST", "/v1/virtual-servers", {**SERVER, "description": "a\u0000b"}, "description", "regex"),
    ("POST", "/v1/virtual-servers", {**SERVER, "default_pool_id": "farm"}, "default_pool_id", "id of a pool"),
    ("POST", "/v1/virtual-servers", {**SERVER, "pool": "none"}, "pool", "pool that exists"),
    ("POST", "/v1/virtual-servers", {**SERVER, "pool": 3}, "pool", "name of a pool"),
    ("POST", "/v1/virtual-servers", {**SERVER, "pool": {"name": "p"}, "default_pool_id": "x"}, "default_pool_id",
     "either"),
    ("POST", "/v1/virtual-servers", {**SERVER, "pool": {"name": "p", "members": [{**MEMBERS[0], "weight": 257}]}},
     "pool.members[0].weight", "<= 256"),
    ("POST", "/v1/virtual-servers", {**SERVER, "pool": {"name": "p", "members": [{"address": "2001:db8::1",
                                                                                  "protocol_port": 80}]}},
     "pool.members[0].address", "IPv4 members"),
    ("POST", "/v1/virtual-servers", {**SERVER, "decision": "switch", "pool": {
        "name": "p", "lb_algorithm": "LEAST_CONNECTIONS"}}, "pool.lb_algorithm", "CONSISTENT_HASH"),
    ("POST", "/v1/virtual-servers", {**SERVER, "state": "rules", "idle_timeout": 0}, "idle_timeout", "above 0"),
    ("POST", "/v1/virtual-servers", {**SERVER, "route_by_destination": False}, "next_hop", "expected an address"),
    ("POST", "/v1/pools", {"name": "p", "lb_algorithm": "BEST"}, "lb_algorithm", "ROUND_ROBIN"),
    ("POST", "/v1/pools", {"name": "p", "members": {}}, "members", "expected array, got object"),
    ("POST", "/v1/pools", {"name": "p", "members": [{**MEMBERS[0], "address": "x"}]}, "members[0].address", "'x'"),
    ("POST", "/v1/pools", {"name": "p", "members": [{**MEMBERS[0], "wait": 1}]}, "members[0].wait", "weight"),
    ("POST", "/v1/pools", {"name": "p", "members": [{"address": "10.0.0.1"}]}, "members[0].protocol_port", "required"),
    ("POST", "/v1/pools", {"name": "p", "members": [{**MEMBERS[0], "number": 1}]}, "members[0].number", "read-only"),
    ("POST", "/v1/pools", {"name": "p", "members": [MEMBERS[0]] * 2}, "members[1]", "already a member"),
    ("POST", "/v1/pools/farm/members", {"address": "10.0.0.3", "protocol_port": 1, "name": "a b"}, "name", "regex"),
    ("POST", "/v1/pools/farm/members", {"address": "2001:db8::3", "protocol_port": 1}, "address", "IPv4 members"),
    ("POST", "/v1/networks", {"name": "n", "cidr": "10.0.0.1/24", "address": "10.0.0.1"}, "cidr", "no host bits"),
    ("POST", "/v1/networks", {"name": "n", "cidr": "10.0.0.0/24", "address": "10.1.0.1"}, "address", "inside"),
    ("PUT", "/v1/virtual-servers/web", {"name": "web"}, "vip_address", "required"),
    ("PUT", "/v1/virtual-servers/web", {**SERVER, "revision": 1}, "revision", "read-only"),
    ("PATCH", "/v1/virtual-servers/web", {"operating_status": "ONLINE"}, "operating_status", "read-only"),
    ("PATCH", "/v1/virtual-servers/web", {"id": None}, "id", "read-only"),
    ("PATCH", "/v1/virtual-servers/web", {"vip_address": None}, "vip_address", "required"),
    ("PATCH", "/v1/virtual-servers/web", {"vip_address": "2001:db8::1"}, "default_pool_id", "IPv6 members"),
    ("PATCH", "/v1/pools/farm", {"members": [{"address": "2001:db8::1", "protocol_port": 1}]}, "members[0].address",
     "IPv4 members"),
    ("PATCH", "/v1/pools/farm/members/two", {"address": "10.0.0.9"}, "address", "cannot be changed"),
    ("PATCH", "/v1/pools/farm/members/two", {"weight": True}, "weight", "expected int, got bool"),
    ("PUT", "/v1/pools/farm/members/two", {"protocol_port": 81}, "protocol_port", "cannot be changed"),
    ("POST", "/v1/pools", [], None, "JSON object"),
    ("GET", "/v1/pools?limit=0", None, "limit", "1 to 1000"),
    ("GET", "/v1/pools?limit=x", None, "limit", "1 to 1000"),
    ("GET", "/v1/pools?limit=1&limit=2", None, "limit", "once"),
    ("GET", "/v1/pools?colour=red", None, "colour", "expected one of name, limit, marker"),
    ("DELETE", "/v1/pools/farm?force=true", None, "force", "none"),
])
def test_400_names_the_field_and_what_was_expected(site, method, path, body, field, says):
    before = site.ask("GET", "/v1/config").json()
    error = error_of(site.ask(method, path, body), 400)
    assert (error["code"], error["field"]) == ("invalid", field)
    assert says in error["message"]
    assert site.ask("GET", "/v1/config").json() == before


@pytest.mark.parametrize("body", [b"", b"{", b'{"name": "a"} x', b"\xff", b'{"name": "\\ud800"}', b"[" * 100_000,
                                  b'{"name": NaN}', b"null"])
def test_what_is_not_json_is_a_400(rest, body):
    answer = rest.client.post("/v1/pools", content=body, headers={"Content-Type": "application/json"})
    assert "expected" in error_of(answer, 400)["message"]
    assert rest.ask("GET", "/v1/pools").json()["pools"] == []


# ------------------------------------------------------------------ 404, 405, 409, 415


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/virtual-servers/none", "/v1/pools/none/members",
                                  "/v1/pools/farm/members/none", "/v1/pools/farm/members/10.0.0.1:81",
                                  "/v1/pools/farm/members/9.9.9.9:x", "/v1/nothing", "/v1/pools/%ff", "/v1/pools/%00",
                                  "/v1/pools/a%2Fb", "/v1/pools/farm/members/%20", "//v1/pools", "/../etc/passwd",
                                  "/v1/pools/00000000-0000-4000-8000-000000000000"])
def test_404(site, path):
    assert error_of(site.ask("GET", path), 404)["code"] == "not_found"


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("DELETE", "/v1/virtual-servers", "GET, POST, HEAD"),
    ("POST", "/v1/virtual-servers/web", "GET, PUT, PATCH, DELETE, HEAD"),
    ("PATCH", "/v1/config", "GET, PUT, HEAD"),
    ("POST", "/v1/stats", "GET, HEAD"),
    ("OPTIONS", "/v1/pools", "GET, POST, HEAD"),
    ("BREW", "/v1/pools", "GET, POST, HEAD"),
    ("PUT", "/healthz", "GET, HEAD"),
])
def test_405_says_what_is_allowed(site, method, path, allow):
    answer = site.ask(method, path, {} if method in ("POST", "PATCH", "PUT") else None)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["Allow"] == allow


@pytest.mark.parametrize(("method", "path", "body", "field"), [
    ("POST", "/v1/virtual-servers", {**SERVER, "name": "other"}, "vip_address"),
    ("POST", "/v1/virtual-servers", {**SERVER, "protocol_port": 81}, "name"),
    ("POST", "/v1/virtual-servers", {**SERVER, "name": "x", "protocol_port": 81, "pool": {"name": "farm"}},
     "pool.name"),
    ("POST", "/v1/virtual-servers", {**SERVER, "pool": {"name": "new", "members": MEMBERS}}, "name"),
    ("POST", "/v1/pools", {"name": "farm"}, "name"),
    ("DELETE", "/v1/pools/farm", None, None),
    ("POST", "/v1/pools/farm/members", MEMBERS[0], "address"),
])
def test_409_for_what_is_taken_or_in_use(site, method, path, body, field):
    before = site.ask("GET", "/v1/config").json()
    error = error_of(site.ask(method, path, body), 409)
    assert (error["code"], error["field"]) == ("conflict", field)
    assert site.ask("GET", "/v1/config").json() == before


@pytest.mark.parametrize("path", ["/v1/virtual-servers/web", "/v1/pools/farm", "/v1/pools/farm/members/two"])
def test_a_stale_tag_is_a_409_and_the_current_one_goes_through(site, path):
    tag = site.ask("GET", path).headers["ETag"]
    change = {"weight": 2} if "members" in path else {"description": "mine"}
    assert site.ask("PATCH", path, change, If_Match=tag).status_code == 200
    for stale in (tag, f"W/{tag}", '"a", "b"'):
        for method in ("PATCH", "PUT", "DELETE"):
            assert error_of(site.ask(method, path, None if method == "DELETE" else change, If_Match=stale),
                            409)["field"] == "If-Match"
    assert site.ask("PATCH", path, change, If_Match=f'"0", {site.ask("GET", path).headers["ETag"]}').status_code == 200
    assert site.ask("PATCH", path, change, If_Match="*").status_code == 200
    error_of(site.ask("PATCH", path, change, If_Match="3"), 400)


def test_several_members_of_one_name_must_be_told_apart(site):
    site.ask("PATCH", "/v1/pools/farm/members/10.0.0.1:80", {"name": "two"})
    assert "address:port" in error_of(site.ask("DELETE", "/v1/pools/farm/members/two"), 409)["message"]


@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {"Content-Type": "application/x-yaml"},
                                     {"Content-Type": "application/merge-patch+json"},
                                     {"Content-Type": "application/json", "Content-Encoding": "gzip"}])
def test_415(rest, headers):
    answer = rest.client.post("/v1/pools", content=b'{"name": "x"}', headers=headers)
    assert error_of(answer, 415)["code"] == "unsupported_media_type"


# ------------------------------------------------------------------ many at once, and the inside failing


def test_of_many_who_create_the_same_exactly_one_succeeds(rest):
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: rest.ask("POST", "/v1/virtual-servers", SERVER).status_code, range(16)))
    assert sorted(statuses) == [201] + [409] * 15


def test_of_many_changes_none_is_lost(site):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: site.ask("POST", "/v1/pools/farm/members", {
            "address": f"10.0.1.{index + 1}", "protocol_port": 80}), range(24)))
    assert {answer.status_code for answer in answers} == {201}
    members = site.ask("GET", "/v1/pools/farm").json()["members"]
    assert len(members) == len({member["number"] for member in members}) == 26


def test_of_many_with_the_same_tag_exactly_one_succeeds(site):
    tag = site.ask("GET", "/v1/pools/farm").headers["ETag"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: site.ask("PATCH", "/v1/pools/farm", {"description": str(index)},
                                                       If_Match=tag).status_code, range(12)))
    assert sorted(answers) == [200] + [409] * 11


def test_500_tells_nothing_of_the_inside_and_the_log_does(site):
    site.ask("PATCH", "/v1/pools/farm", {"description": "explode"})
    answer = site.ask("GET", "/v1/pools/farm")
    error = error_of(answer, 500)
    assert (error["code"], error["message"]) == ("internal", "internal error, see the log")
    assert "secret" not in answer.text
    assert "a secret of the inside" in site.log


def test_what_was_answered_2xx_survives_kill_9_of_the_database(site):
    identifier = site.ask("POST", "/v1/pools", {"name": "durable"}).json()["id"]
    os.kill(site.database_pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while site.ask("POST", "/v1/pools", {"name": "after"}).status_code != 201:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert site.ask("GET", "/v1/pools/durable").json()["id"] == identifier


def test_503_while_the_database_is_away_and_reading_goes_on(tmp_path):
    with rest_process(tmp_path, "--no-revive") as rest:
        rest.ask("POST", "/v1/virtual-servers", SERVER)
        os.kill(rest.database_pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while rest.ask("GET", "/healthz").json()["database"] != "away":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        answer = rest.ask("DELETE", "/v1/virtual-servers/web")
        assert error_of(answer, 503)["code"] == "unavailable"
        assert answer.headers["Retry-After"]
        assert rest.ask("GET", "/v1/virtual-servers/web").status_code == 200
