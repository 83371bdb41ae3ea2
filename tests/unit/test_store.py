# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The store against a real ovsdb-server: transactions, checks across resources, other processes.

With it what it is made of: lbapp/config/changes.py, lbapp/config/snapshot.py and lbapp/config/mirror.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time

import msgspec
import pytest

from lbapp.config.changes import plan
from lbapp.config.database import EmbeddedDatabase
from lbapp.config.model import (
    Algorithm,
    Configuration,
    Decision,
    Member,
    Network,
    Pool,
    Protocol,
    Switch,
    VirtualServer,
)
from lbapp.config.ovsdb import _Frames
from lbapp.config.store import (
    Conflict,
    Create,
    Delete,
    Expect,
    Invalid,
    NotFound,
    Snapshot,
    Store,
    Unavailable,
    Update,
    new_id,
)

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    database = EmbeddedDatabase(tmp_path_factory.mktemp("db"))
    database.start()
    yield database
    database.stop()


@pytest.fixture
def store(database):
    store = Store(database.remote)
    store.start()
    wipe(store)
    yield store
    store.stop()


def wipe(store: Store) -> None:
    for identifier in store.rejected:  # what a failed test left behind
        for table in ("Virtual_Server", "Member", "Pool"):
            subprocess.run(["ovsdb-client", "transact", store.remote, json.dumps(["lbapp", {
                "op": "delete", "table": table, "where": [["_uuid", "==", ["uuid", identifier]]]}])],
                check=True, capture_output=True, timeout=20)
    configuration = store.configuration
    store.apply([*(Delete(VirtualServer, one) for one in configuration.virtual_servers),
                 *(Delete(Pool, one) for one in configuration.pools),
                 *(Delete(Network, one) for one in configuration.networks),
                 *(Delete(Switch, one) for one in configuration.switches)])


def transact(database: EmbeddedDatabase, *operations: dict) -> list[dict]:
    done = subprocess.run(["ovsdb-client", "transact", database.remote, json.dumps(["lbapp", *operations])],
                          capture_output=True, text=True, check=True, timeout=20)
    answer = json.loads(done.stdout)
    assert not any("error" in one for one in answer), answer
    return answer


def eventually(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def a_pool(name: str = "farm", *last: int, **fields) -> Pool:
    members = tuple(Member(address=f"10.0.0.{one}", protocol_port=80) for one in last or (1, 2))
    return Pool(**{"id": new_id(), "name": name, "members": members, **fields})


def a_server(name: str = "web", pool: Pool | None = None, **fields) -> VirtualServer:
    return VirtualServer(**{"id": new_id(), "name": name, "vip_address": "10.0.0.100", "protocol": Protocol.TCP,
                            "protocol_port": 80, "default_pool_id": pool.id if pool else None, **fields})


def site(store: Store) -> tuple[VirtualServer, Pool]:
    """One virtual server with a pool of two, in the store."""
    pool = a_pool()
    server = a_server(pool=pool)
    snapshot = store.apply([Create(server), Create(pool)])
    found, found_pool = snapshot.find(VirtualServer, "web"), snapshot.find(Pool, "farm")
    assert found is not None
    assert found_pool is not None
    return found, found_pool


# ------------------------------------------------------------------ changes


def test_created_resources_come_back_with_numbers_and_revisions(store):
    server, pool = site(store)
    network = Network(name="lan", cidr="10.0.0.0/24", address="10.0.0.254")
    snapshot = store.apply([Create(network)])
    assert server.number > 0
    assert [member.number for member in pool.members] == sorted({member.number for member in pool.members})
    assert all(snapshot.revisions[one] == 1 for one in (server.id, pool.id, *(m.id for m in pool.members)))
    assert snapshot.find(Network, "lan").cidr == "10.0.0.0/24"
    assert store.configuration.pool_of(server) is pool


def test_every_field_survives_the_database(store, database):
    pool = a_pool("all", description='quotes " \\ braces }{ and ümlauts\n', lb_algorithm=Algorithm.SOURCE_IP,
                  admin_state_up=False,
                  members=(Member(address="2001:db8::1", protocol_port=1, name="one", weight=0, draining=True,
                                  admin_state_up=False),))
    server = a_server("all", pool, vip_address="2001:db8::100", protocol=Protocol.UDP, protocol_port=0,
                      maintenance=True, connection_limit=5, translate_port=False, route_by_destination=False,
                      next_hop="2001:db8::9", arp=False, snat=True, decision=Decision.CONTROLLER, idle_timeout=0,
                      hard_timeout=9, admin_state_up=False)
    network = Network(id=new_id(), name="all", cidr="2001:db8::/64", address="2001:db8::2", gateway="2001:db8::3",
                      description="x")
    switch = Switch(id=new_id(), name="0xBEEF", draining=True, drain_timeout=90)
    store.apply([Create(pool), Create(server), Create(network), Create(switch)])
    other = Store(database.remote)
    other.start()
    try:
        assert other.configuration == store.configuration
    finally:
        other.stop()
    found = store.snapshot.find(VirtualServer, "all")
    assert found == replace(server, number=found.number)
    assert store.snapshot.find(Network, "all") == network
    assert store.snapshot.find(Switch, "000000000000beef") == switch
    [member] = store.snapshot.find(Pool, "all").members
    assert member == replace(pool.members[0], id=member.id, number=member.number)


def test_what_is_asked_of_switches(store, database):
    one = Switch(id=new_id(), name="1", draining=True)
    before = store.apply([Create(one)])
    assert before.revisions[one.id] == 1
    with pytest.raises(Conflict, match="name 0000000000000001 belongs to switch 0000000000000001"):
        store.apply([Create(Switch(name="0x01"))])
    after = store.apply([Update(replace(one, drain_timeout=9))])
    assert (after.find(Switch, one.name).drain_timeout, after.revisions[one.id]) == (9, 2)
    assert after.configuration.virtual_servers is before.configuration.virtual_servers
    assert site(store) and store.configuration.switches is after.configuration.switches, "nobody else's change"
    transact(database, {"op": "insert", "table": "Switch", "row": {"name": "0xA"}},
             {"op": "insert", "table": "Switch", "row": {"name": "000000000000000b"}})
    eventually(lambda: len(store.configuration.switches) == 2 and len(store.rejected) == 1)
    [(identifier, why)] = store.rejected.items()
    assert why == "switch 0xA: name: expected the canonical text '000000000000000a', got '0xA'"
    assert not store.snapshot.find(Switch, "000000000000000b").draining, "empty columns are defaults"
    transact(database, {"op": "delete", "table": "Switch", "where": [["_uuid", "==", ["uuid", identifier]]]})
    eventually(lambda: not store.rejected)
    assert not store.apply([Delete(Switch, one.id)]).find(Switch, one.name)


def test_numbers_are_never_used_again(store):
    server, pool = site(store)
    store.apply([Delete(VirtualServer, server.id), Delete(Pool, pool.id)])
    again, pool_again = site(store)
    assert again.number > server.number
    assert min(m.number for m in pool_again.members) > max(m.number for m in pool.members)


def test_an_update_changes_only_what_it_says(store):
    _, pool = site(store)
    before = store.snapshot
    changed = replace(pool, members=(replace(pool.members[0], weight=7), pool.members[1]))
    after = store.apply([Update(changed)])
    assert after.find(Pool, "farm") == changed
    assert after.revisions[pool.id] == 2
    assert after.revisions[pool.members[0].id] == 2
    assert after.revisions[pool.members[1].id] == 1
    assert after.configuration.virtual_servers is before.configuration.virtual_servers
    assert before.configuration.pools[pool.id] == pool


def test_members_given_by_address_keep_their_numbers(store):
    _, pool = site(store)
    first = pool.members[0]
    wanted = (Member(address="10.0.0.9", protocol_port=80), Member(address="10.0.0.1", protocol_port=80, weight=3))
    after = store.apply([Update(replace(pool, members=wanted))]).find(Pool, "farm")
    assert after.members[0] == replace(first, weight=3)
    assert after.members[1].address == "10.0.0.9"
    assert after.members[1].number > pool.members[1].number


def test_an_update_that_changes_nothing_writes_nothing(store):
    server, pool = site(store)
    before = store.snapshot
    assert store.apply([Update(server), Update(pool)]) is before


def test_names_can_be_swapped_in_one_transaction(store):
    one, two = a_pool("one"), a_pool("two", 3)
    store.apply([Create(one), Create(two)])
    snapshot = store.apply([Update(replace(store.snapshot.find(Pool, "one"), name="two")),
                            Update(replace(store.snapshot.find(Pool, "two"), name="one"))])
    assert snapshot.find(Pool, "two").id == one.id
    assert snapshot.find(Pool, "one").id == two.id


def test_every_transaction_is_asked_to_be_durable():
    operations = [msgspec.json.decode(one) for one in plan(Snapshot(), [Create(a_pool())]).operations]
    assert operations[-1] == {"op": "commit", "durable": True}


# ------------------------------------------------------------------ refusals: nothing changes


@pytest.mark.parametrize(("changes", "error", "field", "index"), [
    (lambda s, p: [Create(a_pool("fine")), Create(a_pool("farm", 5))], Conflict, "name", 1),
    (lambda s, p: [Create(a_server("other"))], Conflict, "vip_address", 0),
    (lambda s, p: [Create(a_server("x", protocol_port=81, default_pool_id=new_id()))], Invalid, "default_pool_id", 0),
    (lambda s, p: [Create(a_pool("fine")), Delete(Pool, p.id)], Conflict, None, 1),
    (lambda s, p: [Update(replace(s, id=new_id()))], NotFound, None, 0),
    (lambda s, p: [Delete(Network, new_id())], NotFound, None, 0),
    (lambda s, p: [Update(replace(s, description="x"), revision=9)], Conflict, None, 0),
    (lambda s, p: [Delete(VirtualServer, s.id, revision=2)], Conflict, None, 0),
    (lambda s, p: [Create(a_pool("fine")), Expect(p.members[0].id, 2)], Conflict, None, 1),
    (lambda s, p: [Create(a_pool(new_id(), 5))], Invalid, "name", 0),
    (lambda s, p: [Update(replace(p, members=(Member(address="2001:db8::1", protocol_port=80),)))],
     Invalid, "members[0].address", 0),
    (lambda s, p: [Create(Network(name="a", cidr="10.0.0.0/24", address="10.0.0.1")),
                   Create(Network(name="b", cidr="10.0.0.0/24", address="10.0.0.2"))], Conflict, "cidr", 1),
])
def test_refused_changes_leave_everything_as_it_was(store, database, changes, error, field, index):
    before_change = site(store)
    before = store.snapshot
    with pytest.raises(error) as caught:
        store.apply(changes(*before_change))
    assert (caught.value.field, caught.value.change) == (field, index)
    assert caught.value.message
    assert store.snapshot is before
    [row] = transact(database, {"op": "select", "table": "Settings", "where": [], "columns": ["generation"]})
    assert row["rows"][0]["generation"] == before.settings.generation


def test_decision_switch_needs_an_algorithm_the_switch_can_do_from_either_side(store):
    server, _ = site(store)
    slow = a_pool("slow", 5, lb_algorithm=Algorithm.LEAST_CONNECTIONS)
    store.apply([Create(slow), Update(replace(server, decision=Decision.SWITCH))])
    server = store.snapshot.find(VirtualServer, "web")
    with pytest.raises(Invalid, match=r"CONSISTENT_HASH.*LEAST_CONNECTIONS") as caught:
        store.apply([Update(replace(server, default_pool_id=slow.id))])
    assert caught.value.field == "decision"
    with pytest.raises(Invalid) as caught:
        store.apply([Update(replace(store.snapshot.find(Pool, "farm"), lb_algorithm=Algorithm.RANDOM_TWO_CHOICES))])
    assert caught.value.field == "lb_algorithm"
    # Both at once is fine.
    store.apply([Update(replace(store.snapshot.find(Pool, "farm"), lb_algorithm=Algorithm.RANDOM_TWO_CHOICES)),
                 Update(replace(server, decision=Decision.CONTROLLER))])


def test_members_of_another_family_need_translate_address_false(store):
    six = Pool(id=new_id(), name="six", members=(Member(address="2001:db8::1", protocol_port=80),))
    with pytest.raises(Invalid) as caught:
        store.apply([Create(six), Create(a_server(pool=six))])
    assert (caught.value.change, caught.value.field) == (0, "members[0].address")
    store.apply([Create(six)])
    with pytest.raises(Invalid) as caught:
        store.apply([Create(a_server(pool=six))])
    assert caught.value.field == "default_pool_id"
    store.apply([Create(a_server(pool=six, translate_address=False))])
    assert store.snapshot.find(VirtualServer, "web").default_pool_id == six.id


def test_a_pool_can_go_together_with_what_uses_it(store):
    server, pool = site(store)
    snapshot = store.apply([Delete(Pool, pool.id), Delete(VirtualServer, server.id)])
    assert snapshot.configuration == Configuration()
    assert not snapshot.revisions


# ------------------------------------------------------------------ subscribers


def test_subscribers_see_each_configuration_in_order_before_apply_returns(store):
    seen: list[Configuration] = []

    def broken(_: Configuration) -> None:
        raise RuntimeError("not mine to handle")

    store.subscribe(broken)
    end = store.subscribe(seen.append)
    for index in range(5):
        snapshot = store.apply([Create(a_pool(f"p{index}", index + 1))])
        assert seen[-1] is snapshot.configuration
    assert [len(one.pools) for one in seen] == [1, 2, 3, 4, 5]
    end()
    store.apply([Create(a_pool("last", 9))])
    assert len(seen) == 5


# ------------------------------------------------------------------ other processes


def test_rows_written_by_another_process_show_up(store, database):
    seen: list[Configuration] = []
    store.subscribe(seen.append)
    transact(database,
             {"op": "insert", "table": "Pool", "uuid-name": "p", "row": {"name": "byhand"}},
             {"op": "insert", "table": "Member", "row": {"pool_id": ["named-uuid", "p"], "address": "10.0.0.7",
                                                         "protocol_port": 81, "number": 4001}},
             {"op": "insert", "table": "Virtual_Server", "row": {
                 "name": "byhand", "vip_address": "10.0.0.200", "protocol": "TCP", "protocol_port": 80,
                 "number": 3001, "default_pool_id": ["named-uuid", "p"]}})
    eventually(lambda: seen)
    assert len(seen) == 1
    server = store.snapshot.find(VirtualServer, "byhand")
    assert (server.connection_limit, server.idle_timeout) == (-1, 60)
    assert store.configuration.pool_of(server).members[0].number == 4001
    # Numbers that are given out later lie above those written by hand.
    _, pool = site(store)
    assert min(member.number for member in pool.members) > 4001
    transact(database, {"op": "update", "table": "Member", "where": [["number", "==", 4001]], "row": {"weight": 9}})
    eventually(lambda: store.snapshot.find(Pool, "byhand").members[0].weight == 9)
    transact(database, {"op": "delete", "table": "Member", "where": [["number", "==", 4001]]})
    eventually(lambda: store.snapshot.find(Pool, "byhand").members == ())


@pytest.mark.parametrize("row", [
    {"vip_address": "banana"},
    {"vip_address": "10.0.0.201/8"},
    {"vip_address": "2001:DB8::1"},
    {"protocol": "SCTP"},
    {"name": "no spaces"},
    {"connection_limit": -7},
    {"state": "rules", "idle_timeout": 0},
])
def test_a_row_that_does_not_validate_is_left_out_until_it_does(store, database, caplog, row):
    good = {"name": "hand", "vip_address": "10.0.0.201", "protocol": "TCP", "protocol_port": 80, "number": 3002}
    [answer] = transact(database, {"op": "insert", "table": "Virtual_Server", "row": {**good, **row}})
    identifier = answer["uuid"][1]
    where = [["_uuid", "==", ["uuid", identifier]]]
    try:
        eventually(lambda: identifier in store.rejected)
        assert identifier not in store.configuration.virtual_servers
        assert next(iter(row)) in store.rejected[identifier]
        assert "left out" in caplog.text
        site(store)  # the rest goes on
        transact(database, {"op": "update", "table": "Virtual_Server", "where": where, "row": {
            **good, "connection_limit": ["set", []], "state": ["set", []], "idle_timeout": ["set", []]}})
        eventually(lambda: identifier in store.configuration.virtual_servers)
        assert identifier not in store.rejected
    finally:
        transact(database, {"op": "delete", "table": "Virtual_Server", "where": where})
    eventually(lambda: identifier not in store.configuration.virtual_servers)


def test_a_pool_left_out_takes_its_virtual_server_along_and_both_come_back(store, database):
    server, pool = site(store)
    where = [["_uuid", "==", ["uuid", pool.id]]]
    transact(database, {"op": "update", "table": "Pool", "where": where, "row": {"lb_algorithm": "BY_TASTE"}})
    eventually(lambda: pool.id in store.rejected)
    assert server.id in store.rejected
    assert store.configuration.virtual_servers == {}
    transact(database, {"op": "update", "table": "Member", "where": [["number", "==", pool.members[1].number]],
                        "row": {"weight": 0}})
    transact(database, {"op": "update", "table": "Pool", "where": where, "row": {"lb_algorithm": "ROUND_ROBIN"}})
    eventually(lambda: pool.id in store.configuration.pools)
    assert [member.weight for member in store.configuration.pools[pool.id].members] == [1, 0]
    assert store.configuration.virtual_servers[server.id] == server
    assert not store.rejected


def test_a_virtual_server_that_does_not_fit_its_pool_is_left_out_until_it_does(store, database):
    server, pool = site(store)
    transact(database, {"op": "insert", "table": "Member", "row": {
        "pool_id": ["uuid", pool.id], "address": "2001:db8::5", "protocol_port": 80, "number": 4100}})
    eventually(lambda: server.id in store.rejected)
    assert server.id not in store.configuration.virtual_servers
    transact(database, {"op": "delete", "table": "Member", "where": [["number", "==", 4100]]})
    eventually(lambda: server.id in store.configuration.virtual_servers)


def test_two_processes_that_change_at_the_same_time_both_succeed(store, database):
    """Each transaction takes the settings row, so the loser of every race derives its changes again."""
    _, pool = site(store)
    other = Store(database.remote)
    other.start()

    def raise_weight(which: Store, index: int) -> None:
        def changes(snapshot):
            current = snapshot.find(Pool, "farm")
            members = list(current.members)
            members[index] = replace(members[index], weight=members[index].weight + 1)
            return [Update(replace(current, members=tuple(members)))]
        for _ in range(10):
            which.apply(changes)

    threads = [threading.Thread(target=raise_weight, args=(store, 0)),
               threading.Thread(target=raise_weight, args=(store, 0)),
               threading.Thread(target=raise_weight, args=(other, 1))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        eventually(lambda: [m.weight for m in store.snapshot.find(Pool, "farm").members] == [21, 11])
        assert store.snapshot.revisions[pool.id] == 31
    finally:
        other.stop()


def test_two_processes_cannot_break_a_check_that_spans_resources(store, database):
    """One makes the switch decide, the other picks an algorithm the switch cannot do: one of them is told."""
    outcomes = []
    other = Store(database.remote)
    other.start()
    try:
        for _ in range(5):
            wipe(store)
            site(store)
            eventually(lambda: other.snapshot.settings == store.snapshot.settings)
            barrier = threading.Barrier(2)

            def attempt(which, changes, barrier=barrier):
                barrier.wait()
                try:
                    which.apply(changes)
                    outcomes.append("done")
                except Invalid:
                    outcomes.append("refused")

            threads = [
                threading.Thread(target=attempt, args=(store, lambda s: [
                    Update(replace(s.find(VirtualServer, "web"), decision=Decision.SWITCH))])),
                threading.Thread(target=attempt, args=(other, lambda s: [
                    Update(replace(s.find(Pool, "farm"), lb_algorithm=Algorithm.LEAST_CONNECTIONS))])),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
    finally:
        other.stop()
    assert outcomes.count("done") == outcomes.count("refused") == 5
    assert not store.rejected


# ------------------------------------------------------------------ the database goes away


def test_a_committed_change_survives_kill_9_and_the_store_comes_back(tmp_path):
    database = EmbeddedDatabase(tmp_path)
    database.start()
    store = Store(database.remote, revive=database.start)
    store.start()
    try:
        seen: list[Configuration] = []
        server, _ = site(store)
        store.subscribe(seen.append)
        assert database.pid is not None
        os.kill(database.pid, signal.SIGKILL)
        eventually(lambda: not store.available)
        assert store.configuration.virtual_servers[server.id] == server
        eventually(lambda: store.available)
        assert store.configuration.virtual_servers[server.id] == server
        assert seen == []  # nothing changed, so nobody is told
        store.apply([Update(replace(server, description="after"))])
        assert [one.virtual_servers[server.id].description for one in seen] == ["after"]
    finally:
        store.stop()
        database.stop()


def test_what_vanished_while_the_database_was_away_is_gone_afterwards(tmp_path):
    database = EmbeddedDatabase(tmp_path)
    database.start()
    store = Store(database.remote)
    store.start()
    try:
        server, _ = site(store)
        with pytest.raises(Unavailable):
            database.stop()
            eventually(lambda: not store.available)
            store.apply([Update(replace(server, description="x"))])
        database.file.unlink()
        database.start()
        eventually(lambda: store.available)
        assert store.configuration == Configuration()
        assert not store.snapshot.revisions
        again, _ = site(store)
        assert again.number > server.number  # it remembers them longer than that database did
    finally:
        store.stop()
        database.stop()


def test_no_database_at_all_is_said_so(tmp_path):
    with pytest.raises(Unavailable, match="no configuration database"):
        Store(f"unix:{tmp_path}/none").start(0.3)
    with pytest.raises(ValueError, match="expected unix:PATH"):
        Store("carrier-pigeon:coop")


# ------------------------------------------------------------------ many


def test_one_change_among_many_touches_only_itself(store):
    count = 1000
    pools = [a_pool(f"p{index}", *range(1, 4)) for index in range(count)]
    servers = [a_server(f"v{index}", pools[index], vip_address=f"10.1.{index // 250}.{index % 250 + 1}")
               for index in range(count)]
    before = store.apply([*map(Create, pools), *map(Create, servers)])
    assert len(before.configuration.virtual_servers) == len(before.configuration.pools) == count
    pool = before.find(Pool, "p500")
    after = store.apply([Update(replace(pool, members=pool.members[:2]))])
    changed = [one for one, value in after.configuration.pools.items()
               if value is not before.configuration.pools[one]]
    assert changed == [pool.id]
    assert len(after.revisions) == len(before.revisions) - 1


def test_frames_are_cut_wherever_chunks_end():
    chance = random.Random(7)
    alphabet = 'ab"\\{}[]\n,: ü'

    def value(depth=0):
        kind = chance.randrange(5 if depth < 4 else 2)
        if kind < 2:
            return "".join(chance.choice(alphabet) for _ in range(chance.randrange(10)))
        if kind == 2:
            return [value(depth + 1) for _ in range(chance.randrange(3))]
        return {value(9): value(depth + 1) for _ in range(chance.randrange(3))}

    for _ in range(300):
        sent = [{"id": index, "method": None, "error": value()} for index in range(chance.randrange(1, 5))]
        text = chance.choice(["", " ", "\n"]).join(json.dumps(one, ensure_ascii=False) for one in sent).encode()
        frames, received, at = _Frames(), [], 0
        while at < len(text):
            size = chance.choice([1, 2, 5, 40, 500])
            received += frames.feed(text[at:at + size])
            at += size
        assert [(one.id, one.error) for one in received] == [(one["id"], one["error"]) for one in sent]
