# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from lbapp.changes import Action, FieldChange, difference, tally
from lbapp.config.model import Algorithm, Protocol, VirtualServer
from lbapp.site import Site, SiteError, from_config, read

TOPOLOGIES = Path(__file__).parents[2] / "topologies"

SITE = """\
networks:
  - {name: lan, cidr: 10.0.0.0/24, address: 10.0.0.254}
pools:
  - name: web
    lb_algorithm: SOURCE_IP
    members:
      - {address: 10.0.0.1, protocol_port: 80, weight: 3}
      - {address: 10.0.0.2, protocol_port: 80}
virtual_servers:
  - {name: web, vip_address: 10.0.0.100, protocol: TCP, protocol_port: 80, pool: web}
"""


def problems(text, source="site.yaml"):
    with pytest.raises(SiteError) as error:
        read(text, source)
    return str(error.value).splitlines()


def server(**fields):
    values = {"name": "web", "vip_address": "10.0.0.100", "protocol": "TCP", "protocol_port": 80, **fields}
    return json.dumps({"virtual_servers": [{key: value for key, value in values.items() if value != "absent"}]})


def test_a_document_becomes_resources_by_name():
    site = read(SITE)
    assert list(site.networks) == ["lan"] and list(site.pools) == ["web"]
    assert site.pools["web"].lb_algorithm is Algorithm.SOURCE_IP
    assert [member.weight for member in site.pools["web"].members] == [3, 1]
    assert site.virtual_servers["web"] == VirtualServer(name="web", vip_address="10.0.0.100", protocol=Protocol.TCP,
                                                        protocol_port=80, default_pool_id="web")


def test_json_and_flow_style_yaml_are_accepted():
    assert read(json.dumps(yaml.safe_load(SITE))) == read(SITE)
    assert read("{pools: [{name: web}]}").pools.keys() == {"web"}


@pytest.mark.parametrize("file", sorted(TOPOLOGIES.glob("*.yaml")), ids=lambda file: file.name)
def test_the_topologies_sites_are_read_and_survive_a_round_trip(file):
    site = read(file.read_text(), file.name)
    assert site.virtual_servers and site.pools and site.networks
    document = site.document()
    again = from_config(json.loads(json.dumps(document)))
    assert again == site and difference(again, site) == []
    assert all(server["pool"] in site.pools for server in document["virtual_servers"])


def test_what_the_controller_shows_can_be_applied_again():
    shown: dict[str, list[dict[str, object]]] = {
        "networks": [{"id": "n", "revision": 1, "name": "lan", "cidr": "10.0.0.0/24", "address": "10.0.0.254",
                      "provisioning_status": "ACTIVE", "operating_status": "ONLINE"}],
        "pools": [{"id": "p", "name": "web", "lb_algorithm": "SOURCE_IP", "members": [
            {"id": "a", "number": 7, "address": "10.0.0.1", "protocol_port": 80, "weight": 3},
            {"id": "b", "number": 8, "address": "10.0.0.2", "protocol_port": 80, "weight": 1}]}],
        "virtual_servers": [{"id": "v", "number": 3, "name": "web", "vip_address": "10.0.0.100", "protocol": "TCP",
                             "protocol_port": 80, "default_pool_id": "p"}],
    }
    assert from_config(shown) == read(SITE)
    shown["virtual_servers"][0]["default_pool_id"] = "web"
    assert read(json.dumps(shown)) == read(SITE)


def test_an_inline_pool_is_named_after_its_virtual_server():
    site = read(server(pool={"members": [{"address": "10.0.0.1", "protocol_port": 80}]}))
    assert site.virtual_servers["web"].default_pool_id == "web"
    assert len(site.pools["web"].members) == 1
    assert site.document()["pools"] == [{"name": "web", "members": [{"address": "10.0.0.1", "protocol_port": 80}]}]


@pytest.mark.parametrize("text, expected", [
    (server(protocol_port="eighty"),
     "virtual_servers[0] (web): protocol_port: expected int, got 'eighty'"),
    (server(protocol_port=70000), "virtual_servers[0] (web): protocol_port: expected int <= 65535, got 70000"),
    (server(protocol="SCTP"), "virtual_servers[0] (web): protocol: expected TCP, UDP, got 'SCTP'"),
    (server(protocol="absent"), "virtual_servers[0] (web): protocol: expected a value, it is missing"),
    (server(vip_address="10.0.0.300"),
     "virtual_servers[0] (web): vip_address: expected an IPv4 or IPv6 address, got '10.0.0.300'"),
    (server(vip_adress="10.0.0.1"), "virtual_servers[0] (web): vip_adress: unknown field; did you mean vip_address?"),
    (server(next_hop="10.0.0.1"),
     "virtual_servers[0] (web): next_hop: expected none while route_by_destination is true"),
    (server(pool="wbe"), "virtual_servers[0] (web): pool: expected the name of a pool of this document, got 'wbe'"),
    (server(pool=3), "virtual_servers[0] (web): pool: expected a pool's name or a pool, got 3"),
    (server(pool={"members": [{"address": "10.0.0.1", "protocol_port": 80, "weight": 300}]}),
     "virtual_servers[0] (web): pool: members[0].weight: expected int <= 256, got 300"),
    (server(name=True), "virtual_servers[0]: name: expected str, got True; quote it in YAML"),
    ('{"virtual_servers": ["web"]}', "virtual_servers[0]: expected a mapping of fields, got 'web'"),
    ('{"virtual_servers": {}}', "virtual_servers: expected a list, got dict"),
    ('{"servers": []}', "servers: unknown section; expected networks, pools, virtual_servers"),
    ('{"pools": [{"name": "p"}, {"name": "p"}]}', "pools[1] (p): name: pool p is there already"),
    ('{"pools": [{"name": "p", "members": [{"address": "0.0.0.0", "protocol_port": 1}]}]}',
     "pools[0] (p): members[0].address: expected a unicast address that hosts can have, got '0.0.0.0'"),
    ('{"pools": [{"name": "p", "members": [{"adress": "10.0.0.1", "protocol_port": 1, "address": "10.0.0.1"}]}]}',
     "pools[0] (p): members[0].adress: unknown field; did you mean address?"),
    ('{"pools": [{"name": "p", "members": 5}]}', "pools[0] (p): members: expected array, got 5"),
    ('{"networks": [{"name": "n", "cidr": "10.0.0.1/24", "address": "10.0.0.2"}]}',
     "networks[0] (n): cidr: expected no host bits, such as 10.0.0.0/24, got '10.0.0.1/24'"),
    ("", ": expected a mapping with networks, pools, virtual_servers; got an empty document"),
    ("- a", ": expected a mapping with networks, pools, virtual_servers; got list"),
])
def test_each_problem_is_named(text, expected):
    expected = expected.removeprefix(": ")
    assert problems(text) == [f"site.yaml: {expected}"]


def test_problems_tell_their_line_in_yaml():
    assert problems(SITE.replace("weight: 3", "weight: many")) == [
        "site.yaml: pools[0] (web): members[0].weight: expected int, got 'many' (line 7)",
    ]
    assert problems("pools:\n  - name: a\n    name: b\n") == ["site.yaml: 'name' is given twice (line 2)"]
    assert problems("pools:\n  - [\n")[0].startswith("site.yaml: ")
    assert problems("pools: !!python/object:os.system {}\n")[0].endswith("(line 1)")


def test_two_resources_cannot_be_one():
    text = SITE + "  - {name: again, vip_address: 10.0.0.100, protocol: TCP, protocol_port: 80}\n"
    assert problems(text) == [
        "site.yaml: virtual_servers[1] (again): vip_address: 10.0.0.100 TCP 80 belongs to web already"]


def test_many_problems_are_not_all_told():
    text = json.dumps({"pools": [{"name": f"p{index}", "lb_algorithm": "NONE"} for index in range(50)]})
    told = problems(text)
    assert len(told) == 11 and told[-1] == "site.yaml: and 40 more"


def changed(edit):
    old = read(SITE)
    return difference(old, read(edit(SITE)))


def test_nothing_differs_when_only_the_order_of_members_does():
    first, second = SITE.splitlines(keepends=True)[6:8]
    assert changed(lambda text: text.replace(first + second, second + first)) == []


def test_a_changed_field_has_its_old_and_new_value():
    (change,) = changed(lambda text: text.replace("SOURCE_IP", "ROUND_ROBIN"))
    assert (change.action, change.what) == (Action.CHANGE, "pool web")
    assert change.fields == (FieldChange("lb_algorithm", "SOURCE_IP", "ROUND_ROBIN"),)


def test_members_are_compared_one_by_one():
    (change,) = changed(lambda text: text.replace("weight: 3", "weight: 4, draining: true")
                        .replace("10.0.0.2,", "10.0.0.3,"))
    assert change.fields == (
        FieldChange("members[10.0.0.1:80].weight", 3, 4),
        FieldChange("members[10.0.0.1:80].draining", False, True),
        FieldChange("members[10.0.0.3:80]", None, "weight 1"),
        FieldChange("members[10.0.0.2:80]", "weight 1", None),
    )


def test_added_removed_and_moved_to_another_pool():
    changes = changed(lambda text: text.replace("- name: web", "- name: other").replace("pool: web", "pool: other"))
    assert [(change.action, change.what) for change in changes] == [
        (Action.ADD, "pool other"), (Action.REMOVE, "pool web"), (Action.CHANGE, "virtual server web")]
    assert changes[0].fields[0] == FieldChange("lb_algorithm", None, "SOURCE_IP")
    assert changes[2].fields == (FieldChange("pool", "web", "other"),)
    assert tally(changes) == {Action.ADD: 1, Action.CHANGE: 1, Action.REMOVE: 1}
    assert difference(read(SITE), Site())[0].action is Action.REMOVE


def test_ten_thousand_virtual_servers_are_read_in_seconds():
    count = 10_000
    text = "pools:\n" + "".join(
        f"- name: p{index}\n  members:\n" + "".join(
            f"  - {{address: 10.{1 + each}.{index // 250}.{1 + index % 250}, protocol_port: 80}}\n"
            for each in range(5))
        for index in range(count)) + "virtual_servers:\n" + "".join(
        f"- name: v{index}\n  vip_address: 10.100.{index // 250}.{1 + index % 250}\n  protocol: TCP\n"
        f"  protocol_port: 80\n  pool: p{index}\n" for index in range(count))
    begun = time.process_time()
    site = read(text)
    assert len(difference(Site(), site)) == 2 * count
    assert time.process_time() - begun < 15
    assert sum(len(pool.members) for pool in site.pools.values()) == 5 * count
