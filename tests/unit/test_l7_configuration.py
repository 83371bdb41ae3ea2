# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""L7 policies on their way through REST, database, site files and differences."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lbapp import changes, site
from lbapp.config import rows
from lbapp.config.model import VirtualServer
from tests.unit.rest_process import error_of, rest_process

RULE = {"type": "PATH", "compare_type": "STARTS_WITH", "value": "/img"}
POLICY = {"name": "images", "action": "REDIRECT_TO_POOL", "redirect_pool": "img", "rules": [RULE]}
SERVER = {"name": "shop", "vip_address": "10.0.0.110", "protocol": "TCP", "protocol_port": 80, "application": "http",
          "pool": "web", "l7_policies": [POLICY]}
POOLS = [{"name": name, "members": [{"address": f"10.0.0.5{at}", "protocol_port": 80}]}
         for at, name in enumerate(("web", "img"), 1)]
SITE = {"pools": POOLS, "virtual_servers": [SERVER]}


def changed(**fields: Any) -> dict[str, Any]:
    return {**SITE, "virtual_servers": [{**SERVER, **fields}]}


def with_policy(**fields: Any) -> dict[str, Any]:
    return changed(l7_policies=[{key: value for key, value in {**POLICY, **fields}.items() if value is not None}])


def with_rule(**fields: Any) -> dict[str, Any]:
    return with_policy(rules=[{**RULE, **fields}])


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (changed(application="l4"), "application", "expected http, tls or raw with l7_policies"),
    (changed(protocol="UDP"), "protocol", "expected TCP with application http"),
    (changed(state="rules"), "state", "expected conntrack"),
    (changed(vip_address="0.0.0.0"), "vip_address", "expected no wildcard"),
    (changed(protocol_port=0), "protocol_port", "expected no wildcard"),
    (changed(snat=True), "snat", "expected false"),
    (changed(translate_address=False), "translate_address", "expected true"),
    (changed(decision="switch"), "decision", "expected auto or controller"),
    (changed(inspect_bytes=0), "inspect_bytes", ">= 1"),
    (changed(close_after_first=True, binding="handoff"), "binding", "expected auto, splice, hybrid or relay"),
    (changed(l7_policies=[POLICY, POLICY]), "l7_policies[1].name", "images is there already"),
    (with_policy(redirect_pool="imgs"), "l7_policies[0].redirect_pool", "expected the name of a pool"),
    (with_policy(redirect_pool=None), "l7_policies[0].redirect_pool", "expected a value"),
    (with_policy(action="REJECT"), "l7_policies[0].redirect_pool", "expected none with action REJECT"),
    (with_policy(action="REJCT"), "l7_policies[0].action", "REDIRECT_TO_POOL"),
    (with_policy(action="REDIRECT_TO_URL", redirect_pool=None, redirect_url="http://x/ y"),
     "l7_policies[0].redirect_url", "matching regex"),
    (with_policy(redirect_http_code=300), "l7_policies[0].redirect_http_code", "expected 301, 302, 303, 307, 308"),
    (with_rule(type="SNI"), "l7_policies[0].rules[0].type", "expected METHOD, HOST_NAME, PATH"),
    (with_rule(type="HEADER"), "l7_policies[0].rules[0].key", "expected the name of a header"),
    (with_rule(key="x"), "l7_policies[0].rules[0].key", "expected none with type PATH"),
    (with_rule(type="HEADER", key="x y"), "l7_policies[0].rules[0].key", "expected a header's name"),
    (with_rule(compare_type="REGEX", value="a("), "l7_policies[0].rules[0].value", "expected a regular expression"),
    (with_rule(compare_type="REGEX", value="(a|b)*a(a|b){900}c"), "l7_policies[0].rules[0].value",
     "expected a regular expression of at most 500 instructions"),
    (with_rule(compare_type="LIKE"), "l7_policies[0].rules[0].compare_type", "EQUAL_TO"),
    (with_rule(value="x" * 513), "l7_policies[0].rules[0].value", "512"),
    (with_rule(colour="red"), "l7_policies[0].rules[0].colour", "unknown field; expected"),
]


@pytest.mark.parametrize(("document", "field", "says"), REFUSED, ids=[f"{field}-{at}" for at, (_, field, _) in
                                                                      enumerate(REFUSED)])
def test_a_bad_policy_is_refused_with_its_field(document: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(site.SiteError) as refused:
        site.from_document(document)
    assert f"virtual_servers[0] (shop): {field}: " in str(refused.value)
    assert says in str(refused.value)


@pytest.mark.parametrize(("key", "value", "says"), [
    ("4096", "x", "each below 4096"), ("lp9:1", "x", "lp16:OFFSET"), ("0", "hex:0", "hexadecimal digits")])
def test_a_bad_rule_on_raw_data(key: str, value: str, says: str) -> None:
    rule = {"type": "DATA", "compare_type": "EQUAL_TO", "key": key, "value": value}
    with pytest.raises(site.SiteError, match=says):
        site.from_document(changed(application="raw", l7_policies=[{**POLICY, "rules": [rule]}]))
    with pytest.raises(site.SiteError, match="expected no hex: with compare_type REGEX"):
        site.from_document(changed(application="raw", l7_policies=[{**POLICY, "rules": [
            {"type": "DATA", "compare_type": "REGEX", "value": "hex:00"}]}]))


def test_only_http_is_answered() -> None:
    policy = {"name": "go", "action": "REDIRECT_TO_URL", "redirect_url": "https://x/", "rules": []}
    assert site.from_document(changed(l7_policies=[policy]))
    with pytest.raises(site.SiteError, match=r"l7_policies\[0\].action: expected REDIRECT_TO_POOL or REJECT"):
        site.from_document(changed(application="tls", l7_policies=[policy]))


def test_a_site_is_written_as_it_was_read() -> None:
    read = site.from_document(SITE)
    assert site.from_document(read.document()) == read
    assert read.document()["virtual_servers"][0]["l7_policies"] == [POLICY]


def test_differences_name_the_policy() -> None:
    other = {**POLICY, "name": "old", "action": "REJECT", "rules": []}
    del other["redirect_pool"]
    (change,) = changes.difference(site.from_document(SITE), site.from_document(changed(l7_policies=[other, POLICY])))
    assert [(one.field, one.old, one.new) for one in change.fields] == [
        ("l7_policies[old]", None, "everything: REJECT")]
    (change,) = changes.difference(site.from_document(changed(l7_policies=[other, POLICY])),
                                site.from_document(changed(l7_policies=[POLICY, other])))
    assert [(one.field, one.old, one.new) for one in change.fields] == [
        ("l7_policies, order", "old, images", "images, old")]
    (change,) = changes.difference(site.from_document(SITE), site.from_document(with_rule(value="/i", invert=True)))
    assert [(one.old, one.new) for one in change.fields] == [
        ("PATH STARTS_WITH '/img': REDIRECT_TO_POOL img", "not PATH STARTS_WITH '/i': REDIRECT_TO_POOL img")]


def test_a_row_holds_policies_as_json() -> None:
    server = msgspec.convert({key: value for key, value in SERVER.items() if key != "pool"}, VirtualServer)
    server = msgspec.structs.replace(server, number=7)
    row = rows.encode(server, 1)
    assert msgspec.json.decode(row["l7_policies"])[0]["rules"][0]["value"] == "/img"
    assert rows.decode("Virtual_Server", "x", row) == msgspec.structs.replace(server, id="x")
    with pytest.raises(ValueError, match="l7_policies: expected JSON"):
        rows.decode("Virtual_Server", "x", {**row, "l7_policies": "["})


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with rest_process(tmp_path_factory.mktemp("rest")) as running:
        yield running


def test_policies_over_rest_and_through_the_database(rest: Any) -> None:
    assert rest.ask("PUT", "/v1/config", SITE).status_code == 200
    found = rest.ask("GET", "/v1/virtual-servers/shop").json()
    assert found["l7_policies"][0]["rules"] == [{**RULE, "key": "", "invert": False}]
    # A pool that a policy names is in use, by its name.
    for method, body in (("DELETE", None), ("PATCH", {"name": "pictures"})):
        error = error_of(rest.ask(method, "/v1/pools/img", body), 409)
        assert "in use by a policy of virtual server shop" in error["message"]

    def refused(**policy: Any) -> dict[str, Any]:
        answer = rest.ask("PATCH", "/v1/virtual-servers/shop", {"l7_policies": [{**POLICY, **policy}]})
        return error_of(answer, 400)

    assert refused(redirect_pool="no")["field"] == "l7_policies[0].redirect_pool"
    assert refused(rules=[{**RULE, "n": 1}])["field"] == "l7_policies[0].rules[0].n"
    assert "expected one of METHOD" in refused(rules=[{**RULE, "type": "P"}])["message"]
    # Members of the other family do not fit, in whichever pool.
    six = {"members": [{"address": "fd00::1", "protocol_port": 80}]}
    assert "members[0].address" in str(error_of(rest.ask("PATCH", "/v1/pools/img", six), 400)["field"])
    assert rest.ask("PATCH", "/v1/virtual-servers/shop", {"l7_policies": []}).status_code == 200
    assert rest.ask("DELETE", "/v1/pools/img").status_code == 204
