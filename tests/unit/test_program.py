# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a switch should hold, and the changes that lead there: one after the other, whatever happens."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lbapp.config.model import (
    Algorithm,
    Application,
    Configuration,
    Decision,
    L7Policy,
    Member,
    PolicyAction,
    Protocol,
    VirtualServer,
)
from lbapp.control.messages import Host
from lbapp.control.services import Services
from lbapp.dataflow.facts import Neighbour
from lbapp.dataflow.matches import to_relay
from lbapp.dataflow.openflow import GROUP_DELETE, Load, add_flow, delete_flow, encode_match, group_mod
from lbapp.dataflow.pipeline import Kind, Priority, Register, Table, check, kind_of, owner_of
from lbapp.dataflow.program import Change, SwitchProgram
from tests import sites
from tests.fake_switch import FakeSwitch

SWITCH = 1


def apply(switch: FakeSwitch, change: Change) -> None:
    """A change as a session sends it: groups, deletes, adds, groups deleted."""
    messages = [group_mod(command, group) for command, group in change.groups]
    messages += [delete_flow(flow.table, flow.priority, encode_match(flow.match)) for flow in change.delete]
    messages += [add_flow(flow) for flow in change.add]
    messages += [group_mod(GROUP_DELETE, group) for group in change.delete_groups]
    switch.receive(b"".join(messages))
    assert not switch.outbox, "refused"


def content(switch: FakeSwitch) -> tuple[dict, dict]:
    return ({key: (rule.cookie, rule.instructions) for key, rule in switch.rules.items()}, dict(switch.groups))


def whole(program: SwitchProgram) -> tuple[dict, dict]:
    """What a program says a switch should hold, in a switch of its own."""
    switch = FakeSwitch()
    groups, flows = list(program.groups()), list(program.flows())
    switch.receive(b"".join([*(group_mod(0, group) for group in groups), *(add_flow(flow) for flow in flows)]))
    assert not switch.outbox
    assert len(switch.rules) == len(flows), "two rules in one place"
    assert len(switch.groups) == len(groups)
    return content(switch)


def differences(one: tuple[dict, dict], other: tuple[dict, dict]) -> list:
    """Rules and groups that only one of two switches has."""
    return [(key, side) for a, b in zip(one, other, strict=True)
            for side, x, y in (("only first", a, b), ("only second", b, a)) for key in x if x[key] != y.get(key)]


class ProgramMachine(RuleBasedStateMachine):
    """Configurations and neighbours come and go; the switch that took every change equals a fresh one."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: dict[str, Host] = {address: sites.host(2) for address in sites.HOPS}
        self.switch = FakeSwitch()
        self.relayed: set[int] = set()
        self.program = SwitchProgram(SWITCH, self.hosts, self.relays)
        self.configuration = Configuration()

    def relays(self, server: VirtualServer) -> bool:
        return server.number in self.relayed

    @initialize()
    def start(self) -> None:
        self.switch.receive(b"".join(add_flow(flow) for flow in self.program.flows()))

    @rule(configuration=sites.configurations())
    def configure(self, configuration: Configuration) -> None:
        self.configuration = configuration
        for change in self.program.configure(configuration):
            assert change
            apply(self.switch, change)

    @rule(number=st.integers(1, 3))
    def relay(self, number: int) -> None:
        """Somebody else shakes hands with its clients now."""
        self.relayed ^= {number}
        self.configure(self.configuration)

    @rule(address=st.sampled_from(sites.HOPS), number=st.none() | st.integers(2, 4))
    def host(self, address: str, number: int | None) -> None:
        if number is None:
            self.hosts.pop(address, None)
        else:
            self.hosts[address] = sites.host(number)
        apply(self.switch, self.program.host_changed(address))

    @invariant()
    def same(self) -> None:
        fresh = SwitchProgram(SWITCH, self.hosts, self.relays)
        fresh.begin(self.configuration)
        expected = whole(fresh)
        assert differences(whole(self.program), expected) == []
        assert differences(content(self.switch), expected) == []


ProgramMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=10)
TestProgram = ProgramMachine.TestCase


# ------------------------------------------------------------------ cases that went wrong, or nearly


def run(*configurations: Configuration, hosts: dict[str, Host] | None = None) -> SwitchProgram:
    """Take configurations one after the other; the switch must hold what a fresh program says."""
    known = sites.reachable(configurations[0]) if hosts is None else hosts
    switch, program = FakeSwitch(), SwitchProgram(SWITCH, known)
    switch.receive(b"".join(add_flow(flow) for flow in program.flows()))
    for configuration in configurations:
        for other in configurations:
            known.update(sites.reachable(other))
        for change in program.configure(configuration):
            apply(switch, change)
    fresh = SwitchProgram(SWITCH, known)
    fresh.begin(configurations[-1])
    assert differences(content(switch), whole(fresh)) == []
    return program


def test_two_virtual_servers_swap_their_addresses():
    one, two = "10.0.0.100", "10.0.0.101"
    run(sites.configuration([sites.server("a", 1, one), sites.server("b", 2, two)], [sites.pool()]),
        sites.configuration([sites.server("a", 1, two), sites.server("b", 2, one)], [sites.pool()]))


def test_an_address_passes_from_one_that_is_removed():
    for order in (("a", "b"), ("b", "a")):
        numbers = {"a": 1, "b": 2}
        vips = {"a": "10.0.0.100", "b": "10.0.0.101"}
        run(sites.configuration([sites.server(n, numbers[n], vips[n]) for n in order], [sites.pool()]),
            sites.configuration([sites.server("b", 2, vips["a"])], [sites.pool()]))


def test_a_shared_member_gets_another_address():
    before = sites.pool(of=sites.members(2))
    after = sites.pool(of=sites.members(2, prefix="10.0.1."))
    servers = [sites.server("a", 1), sites.server("b", 2, port=81)]
    run(sites.configuration(servers, [before]), sites.configuration(servers, [after]))


def test_a_member_that_is_shared_by_both_sides_has_rules_for_both():
    inside, outside = sites.server("a", 1), sites.server("b", 2, "192.168.1.100")
    site = sites.configuration([inside, outside], [sites.pool(of=sites.members(1))], (*sites.LAN, *sites.OUTSIDE))
    program = run(site)
    rules = [flow for flow in program.flows() if flow.table == Table.FORWARD and ("ct_mark", 1) in flow.match]
    assert {flow.priority for flow in rules} == {Priority.ROUTED, Priority.NORMAL, Priority.FALLBACK}
    run(site, sites.configuration([inside], [sites.pool(of=sites.members(1))], (*sites.LAN, *sites.OUTSIDE)))
    run(site, sites.configuration([outside], [sites.pool(of=sites.members(1))], (*sites.LAN, *sites.OUTSIDE)))


def test_members_that_only_a_policy_leads_to_are_watched_and_reached():
    policy = L7Policy(name="other", action=PolicyAction.REDIRECT_TO_POOL, redirect_pool="q")
    reads = sites.server(application=Application.HTTP, l7_policies=(policy,))
    one, two = sites.pool(of=sites.members(1)), sites.pool("q", of=sites.members(1, first=2))
    site = sites.configuration([reads], [one, two], sites.LAN)
    program = run(site)
    forwarded = {one[1] for flow in program.flows() if flow.table == Table.FORWARD for one in flow.match
                 if one[0] == "ct_mark"}
    assert forwarded == {1, 2}
    assert {fact.address for fact in program._facts if isinstance(fact, Neighbour)} == {"10.0.0.11", "10.0.0.12"}
    # A pool that a policy names gets another member; nobody's default.
    changed = sites.configuration([reads], [one, sites.pool("q", of=sites.members(1, first=3))], sites.LAN)
    run(site, changed)
    run(changed, site)


def test_who_has_connections_keeps_them_when_a_fallback_comes_and_goes():
    own, other = sites.pool(of=sites.members(1), fallback_pool="q"), sites.pool("q", of=sites.members(1, first=2))
    asked = sites.server(decision=Decision.SWITCH)
    before = sites.configuration([asked], [own, other], sites.LAN)
    instead = sites.configuration([sites.server(use="q", decision=Decision.SWITCH)], [own, other], sites.LAN)
    instead = msgspec.structs.replace(instead, redirected={asked.number: asked})
    program = run(before)
    services = Services()
    assert services.update(before).wanted == ["10.0.0.11", "10.0.0.12"]
    for configuration, chosen in ((instead, 2), (before, 1)):
        changes = list(program.configure(configuration))
        assert changes and not [flow for change in changes for flow in change.delete
                                if flow.table in (Table.FORWARD, Table.CLASSIFY)]
        (group,) = program.groups()
        assert [bucket.actions[0] for bucket in group.buckets] == [Load(Register.MEMBER, chosen)], "new ones"
        told = services.update(configuration)
        assert (told.wanted, told.unwanted, told.gone_members) == ([], [], set())
    run(before, instead, before)


def test_what_stands_by_does_not_say_how_connections_are_counted():
    standby = sites.pool("q", Algorithm.LEAST_CONNECTIONS, sites.members(1, first=2))
    asked, own = sites.server(), sites.pool(algorithm=Algorithm.SOURCE_IP, of=sites.members(1), fallback_pool="q")
    services = Services()
    services.update(sites.configuration([asked], [own, standby], sites.LAN))
    assert not services.by_number[1].follows and set(services.by_number[1].farms) == {"p", "q"}
    instead = sites.configuration([sites.server(use="q")], [own, standby], sites.LAN)
    services.update(msgspec.structs.replace(instead, redirected={1: asked}))
    assert services.by_number[1].follows and set(services.by_number[1].farms) == {"p", "q"}


def test_pools_that_fall_back_are_looked_up_in_the_configuration_they_are_of():
    asked = sites.server()
    one = sites.configuration([asked], [sites.pool(fallback_pool="q"), sites.pool("q", of=sites.members(1, first=9))])
    assert list(one.pools_reached(asked)) == ["p", "q"]
    other = msgspec.structs.replace(one, pools={"p": one.pools["p"], "x": sites.pool("q", fallback_pool="p")})
    assert list(other.pools_reached(asked)) == ["p", "x"]


def test_of_two_gateways_one_is_used():
    networks = (sites.OUTSIDE[0], sites.network("more", "192.168.2.0/24", "192.168.2.254", "192.168.2.1"))
    for chosen in (networks, networks[::-1]):
        program = run(sites.configuration(networks=chosen))
        assert sum(flow.table == Table.ROUTE and flow.priority == Priority.GATEWAY for flow in program.flows()) == 1
    run(sites.configuration(networks=networks), sites.configuration(networks=networks[:1]))
    run(sites.configuration(networks=networks), sites.configuration(networks=networks[1:]))


@pytest.mark.parametrize("algorithm", [Algorithm.ROUND_ROBIN, Algorithm.WEIGHTED_ROUND_ROBIN, Algorithm.SOURCE_IP,
                                       Algorithm.CONSISTENT_HASH])
@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("count", [41, 257, 1001])
def test_large_pools(algorithm, protocol, count):
    many = tuple(Member(address=f"10.1.{n // 250}.{n % 250 + 1}", protocol_port=80, number=n + 1, id=str(n))
                 for n in range(count))
    run(sites.configuration([sites.server(protocol=protocol, decision=Decision.SWITCH)],
                            [sites.pool(algorithm=algorithm, of=many)]))


def test_a_member_that_cannot_be_reached_gets_nothing():
    site = sites.configuration([sites.server(decision=Decision.SWITCH)], [sites.pool(of=sites.members(3))])
    hosts = {"10.0.0.11": sites.host(2), "10.0.0.13": sites.host(3)}
    program = SwitchProgram(SWITCH, hosts)
    program.begin(site)
    (group,) = program.groups()
    assert [bucket.actions[0] for bucket in group.buckets] == [Load(Register.MEMBER, number) for number in (1, 3)]
    hosts.clear()
    assert program.host_changed("10.0.0.11").delete_groups == [group]
    assert list(program.groups()) == []


def test_nothing_changes_nothing():
    site = next(iter(sites.covering().values()))
    program = SwitchProgram(SWITCH, sites.reachable(site))
    assert list(program.configure(site))
    assert list(program.configure(site)) == []


def test_facts_are_forgotten_with_the_configuration():
    for site in sites.covering().values():
        program = SwitchProgram(SWITCH, sites.reachable(site))
        program.begin(site)
        list(program.configure(Configuration()))
        assert not any((program._facts, program._by_hop, program._by_member, program._installed,
                        program._decided_by_hop))


def test_what_is_relayed_comes_to_the_controller_from_both_sides():
    site = sites.configuration([sites.server("a", 1), sites.server("b", 2, port=81)],
                               [sites.pool(of=sites.members(2))])
    program = SwitchProgram(SWITCH, sites.reachable(site), lambda server: server.number == 1)
    program.begin(site)
    punting = [flow for flow in program.flows() if kind_of(flow.cookie) is Kind.RELAY]
    assert {Table(flow.table) for flow in punting} == {Table.VIRTUAL_SERVER, Table.CLASSIFY}
    assert [owner_of(flow.cookie) for flow in punting if flow.table == Table.VIRTUAL_SERVER] == [1]
    assert len([flow for flow in punting if flow.table == Table.CLASSIFY]) == 2, "a rule a member"
    for flow in punting:
        check(flow)
        assert flow.actions == (to_relay(),)
