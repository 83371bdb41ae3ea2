# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The whole configuration as one document: applied, compared, refused as a whole: lbapp/api/sites.py"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.unit.rest_process import error_of, rest_process

DOCUMENT: dict[str, Any] = {
    "networks": [{"name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254"}],
    "pools": [
        {"name": "a", "lb_algorithm": "SOURCE_IP", "members": [
            {"address": "10.0.0.1", "protocol_port": 80, "weight": 2}, {"address": "10.0.0.2", "protocol_port": 80}]},
        {"name": "b"},
    ],
    "virtual_servers": [
        {"name": "dns", "vip_address": "10.0.0.100", "protocol": "UDP", "protocol_port": 53},
        {"name": "web", "vip_address": "10.0.0.100", "protocol": "TCP", "protocol_port": 80, "pool": "a"},
    ],
}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with rest_process(tmp_path_factory.mktemp("rest")) as running:
        yield running


@pytest.fixture
def rest(process):
    assert process.ask("PUT", "/v1/config", {}).status_code == 200
    return process


def test_a_document_comes_back_as_it_was_applied(rest):
    assert rest.ask("PUT", "/v1/config", DOCUMENT).json() == {
        "created": ["network/lan", "pool/a", "pool/b", "virtual-server/dns", "virtual-server/web"],
        "updated": [], "deleted": []}
    assert rest.ask("GET", "/v1/config").json() == DOCUMENT


def test_applying_it_again_changes_nothing(rest):
    rest.ask("PUT", "/v1/config", DOCUMENT)
    before = rest.ask("GET", "/v1/pools").json()
    for document in (DOCUMENT, rest.ask("GET", "/v1/config").json()):
        assert rest.ask("PUT", "/v1/config", document).json() == {"created": [], "updated": [], "deleted": []}
    assert rest.ask("GET", "/v1/pools").json() == before


def test_only_the_difference_is_changed(rest):
    rest.ask("PUT", "/v1/config", DOCUMENT)
    before = {one["name"]: one for one in rest.ask("GET", "/v1/virtual-servers").json()["virtual_servers"]}
    members = rest.ask("GET", "/v1/pools/a").json()["members"]
    wanted = copy.deepcopy(DOCUMENT)
    wanted["pools"][0]["members"] = [{"address": "10.0.0.3", "protocol_port": 80},
                                     {"address": "10.0.0.2", "protocol_port": 80, "weight": 5}]
    wanted["pools"][1]["name"] = "c"
    wanted["virtual_servers"][0]["pool"] = "c"
    wanted["networks"] = []
    assert rest.ask("PUT", "/v1/config", wanted).json() == {
        "created": ["pool/c"], "updated": ["pool/a", "virtual-server/dns"], "deleted": ["pool/b", "network/lan"]}
    after = {one["name"]: one for one in rest.ask("GET", "/v1/virtual-servers").json()["virtual_servers"]}
    assert after["web"] == before["web"]
    assert (after["dns"]["id"], after["dns"]["revision"]) == (before["dns"]["id"], 2)
    kept, new = rest.ask("GET", "/v1/pools/a").json()["members"]
    assert (kept["id"], kept["number"], kept["weight"]) == (members[1]["id"], members[1]["number"], 5)
    assert new["number"] > kept["number"]


def test_an_address_can_pass_from_one_name_to_another(rest):
    rest.ask("PUT", "/v1/config", DOCUMENT)
    wanted = copy.deepcopy(DOCUMENT)
    wanted["virtual_servers"][1]["name"] = "www"
    assert rest.ask("PUT", "/v1/config", wanted).json() == {
        "created": ["virtual-server/www"], "updated": [], "deleted": ["virtual-server/web"]}


def test_a_dry_run_tells_and_changes_nothing(rest):
    rest.ask("PUT", "/v1/config", DOCUMENT)
    assert rest.ask("PUT", "/v1/config?dry_run=true", {"pools": [{"name": "z"}]}).json() == {
        "created": ["pool/z"], "updated": [],
        "deleted": ["virtual-server/dns", "virtual-server/web", "pool/a", "pool/b", "network/lan"]}
    assert rest.ask("GET", "/v1/config").json() == DOCUMENT


def test_a_dry_run_refuses_what_applying_would_refuse(rest):
    bad = copy.deepcopy(DOCUMENT)
    bad["virtual_servers"][1] = {**bad["virtual_servers"][0], "name": "again"}
    for path in ("/v1/config?dry_run=true", "/v1/config"):
        assert error_of(rest.ask("PUT", path, bad), 409)["field"] == "virtual_servers[1].vip_address"
    assert rest.ask("GET", "/v1/config").json() == {"networks": [], "pools": [], "virtual_servers": []}


def test_a_document_may_say_what_it_was_made_from(rest):
    rest.ask("PUT", "/v1/config", DOCUMENT)
    shown = rest.ask("GET", "/v1/config")
    assert rest.ask("GET", "/v1/config").headers["ETag"] == shown.headers["ETag"]
    rest.ask("PATCH", "/v1/pools/a", {"description": "by someone else"})
    for path in ("/v1/config", "/v1/config?dry_run=true"):
        error_of(rest.ask("PUT", path, {}, If_Match=shown.headers["ETag"]), 409)
    fresh = rest.ask("GET", "/v1/config")
    assert rest.ask("PUT", "/v1/config", DOCUMENT, If_Match=fresh.headers["ETag"]).json()["updated"] == ["pool/a"]


def _with(path: str, value: object) -> dict:
    document = copy.deepcopy(DOCUMENT)
    *parents, last = path.split(".")
    place: Any = document
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[int(last) if last.isdigit() else last] = value
    return document


@pytest.mark.parametrize(("document", "field", "says"), [
    ({"pool": []}, "pool", "expected one of networks, pools, virtual_servers"),
    ({"pools": {}}, "pools", "array"),
    ({"pools": [3]}, "pools[0]", "object"),
    (_with("pools.0.members.1.weight", 300), "pools[0].members[1].weight", "<= 256"),
    (_with("pools.0.members.1.number", 3), "pools[0].members[1].number", "read-only"),
    (_with("pools.1.name", "a"), "pools[1].name", "pools[0]"),
    (_with("pools.1.colour", "a"), "pools[1].colour", "unknown field"),
    (_with("virtual_servers.1.pool", "none"), "virtual_servers[1].pool", "in this document"),
    (_with("virtual_servers.1.pool", {}), "virtual_servers[1].pool", "name of a pool"),
    (_with("virtual_servers.1.default_pool_id", None), "virtual_servers[1].default_pool_id", "expected pool"),
    (_with("virtual_servers.0.vip_address", "x"), "virtual_servers[0].vip_address", "IPv4 or IPv6"),
    (_with("virtual_servers.1.vip_address", "2001:db8::1"), "pools[0].members[0].address", "IPv6 members"),
    (_with("networks.0.gateway", "10.0.0.254"), "networks[0].gateway", "own"),
])
def test_a_bad_document_is_refused_as_a_whole(rest, document, field, says):
    error = error_of(rest.ask("PUT", "/v1/config", document), 400)
    assert error["field"] == field
    assert says in error["message"]
    assert rest.ask("GET", "/v1/config").json() == {"networks": [], "pools": [], "virtual_servers": []}


def test_a_thousand_virtual_servers_in_one_document(rest):
    count = 1000
    document = {
        "pools": [{"name": f"p{i}", "members": [{"address": f"10.{i // 250}.{i % 250}.{j}", "protocol_port": 80}
                                                for j in range(1, 6)]} for i in range(count)],
        "virtual_servers": [{"name": f"v{i}", "vip_address": f"10.100.{i // 250}.{i % 250 + 1}", "protocol": "TCP",
                             "protocol_port": 80, "pool": f"p{i}"} for i in range(count)],
    }
    assert len(rest.ask("PUT", "/v1/config", document).json()["created"]) == 2 * count
    answer = rest.ask("GET", "/v1/config").json()
    assert sum(len(pool["members"]) for pool in answer["pools"]) == 5 * count
    assert rest.ask("PUT", "/v1/config", answer).json() == {"created": [], "updated": [], "deleted": []}
