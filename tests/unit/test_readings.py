# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Readings of switches, with Open vSwitch's commands played by a stand-in."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import cast

import pytest

import tests.fake_frames  # noqa: F401  (prepares eventlet for Ryu)

# isort: split
from ryu.lib import hub

from lbapp import readings as module
from lbapp.dataflow.ovs import Ovs, OvsError
from lbapp.dataflow.pipeline import Label, zones
from lbapp.readings import Readings


class Commands:
    """Answers of Open vSwitch; an exception in the place of an answer is raised."""

    def __init__(self, bridges: str | Exception = "0000000000000001\n", dump: str | Exception = "",
                 drops: int = 0) -> None:
        self.bridges, self.dump, self.drops = bridges, dump, drops
        self.asked = 0
        self.meanwhile: Callable[[], object] = lambda: None
        self.timeouts: list[tuple[int, int]] = []

    def bridge_of(self, switch: int) -> str | None:
        self.asked += 1
        return "br0" if f"{switch:016x}" in self._answer(self.bridges) else None

    def appctl(self, *arguments: str) -> str:
        self.meanwhile()
        assert arguments == ("dpctl/dump-conntrack", f"zone={zones(1).service}")
        return self._answer(self.dump)

    def controller_queue_drops(self) -> int:
        if self.drops < 0:
            raise OvsError("gone")
        return self.drops

    def set_conntrack_timeouts(self, zones) -> None:
        if isinstance(self.dump, OvsError):
            raise self.dump
        self.timeouts.append(tuple(zones))

    @staticmethod
    def _answer(answer: str | Exception) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer


def made(commands: Commands, **application) -> Readings:
    nobody = types.SimpleNamespace(live=lambda switch: ())
    readings = Readings(types.SimpleNamespace(**{"switches": {}, "relays": nobody, **application}))
    readings._ovs = cast(Ovs, commands)
    return readings


def line(serial: int, member: int = 3, *, tracked: bool = True, state: str = "ESTABLISHED") -> str:
    label = serial << Label.SERIAL | 5 << Label.VIRTUAL_SERVER | tracked << Label.TRACKED
    return (f"tcp,orig=(src=10.0.0.1,dst=10.0.0.100,sport=40000,dport=80),reply=(src=10.0.0.2,dst=10.0.0.1,sport=80,"
            f"dport=40000),zone={zones(1).service},mark={member},labels={label:#x},protoinfo=(state={state})")


def test_a_local_switch_is_looked_up_once():
    commands = Commands()
    readings = made(commands)
    assert readings.is_local(1) and readings.is_local(1) and not readings.is_local(2)
    assert commands.asked == 2
    readings.prepare(1)
    assert commands.asked == 3 and commands.timeouts == [zones(1)]


def test_a_passing_error_is_no_answer():
    commands = Commands(bridges=OvsError("no"))
    readings = made(commands)
    assert not readings.is_local(1)
    commands.bridges = "0000000000000001"
    assert readings.is_local(1)


def test_a_switch_elsewhere_gets_no_timeouts():
    commands = Commands(bridges="")
    made(commands).prepare(1)
    assert commands.timeouts == []


@pytest.mark.parametrize("commands", [Commands(bridges=OvsError("no")), Commands(dump=OvsError("no")),
                                      Commands(drops=-1)])
def test_what_fails_is_said_and_no_more(commands):
    readings = made(commands)
    readings.prepare(1)
    assert readings.queue_drops(1) == 0


def test_drops_count_from_when_the_switch_connected_first():
    commands = Commands(drops=10)
    readings = made(commands)
    readings.prepare(1)
    commands.drops = 17
    readings.prepare(1)  # the controller stood still, and lost it
    assert readings.queue_drops(1) == 7
    commands.drops = 2  # Open vSwitch was started again
    assert readings.queue_drops(1) == 2
    assert readings.queue_drops(2) == 0


def test_drops_that_could_not_be_read_at_first_count_from_when_they_can():
    commands = Commands(drops=-1)
    readings = made(commands)
    readings.prepare(1)
    commands.drops = 5
    assert readings.queue_drops(1) == 0
    commands.drops = 6
    assert readings.queue_drops(1) == 1


def test_conntrack_is_read():
    many = "\n".join(line(number) for number in range(1, 1200))
    entries = list(made(Commands(dump=many)).conntrack(1))
    assert [entry.serial for entry in entries] == list(range(1, 1200))
    with pytest.raises(OvsError):
        list(made(Commands(dump=OvsError("gone"))).conntrack(1))


class Session:
    """Answers after a while, or never."""

    def __init__(self, answers: bool = True, ready: bool = True) -> None:
        self.ready, self.answers = ready, answers
        self.asked = self.polled = 0

    def read_counters(self) -> None:
        self.asked += 1
        self.polled = 0

    @property
    def counting(self) -> bool:
        self.polled += 1
        return not self.answers or self.polled < 3


def test_counters_are_read_at_most_once_a_second():
    session, late = Session(), Session(ready=False)
    readings = made(Commands())
    readings._application.switches = {1: types.SimpleNamespace(session=session), 2: types.SimpleNamespace(session=late)}
    readings.count()
    readings.count()
    assert (session.asked, late.asked) == (1, 0)
    readings._counted -= 2 * module.FRESH_SECONDS
    readings.count()
    assert session.asked == 2


def test_a_switch_that_does_not_answer_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.02)
    session = Session(answers=False)
    readings = made(Commands())
    readings._application.switches = {1: types.SimpleNamespace(session=session)}
    readings.count()
    assert session.polled < 50


class StopError(Exception):
    """Ends an endless loop."""


def watched(commands: Commands, monkeypatch, *, counting: bool = True, fast=()) -> list:
    told: list = []
    turns = iter([None, None])

    def sleep(seconds: float) -> None:
        if seconds and next(turns, StopError) is StopError:
            raise StopError

    monkeypatch.setattr(hub, "sleep", sleep)
    fastpaths = types.SimpleNamespace(live=lambda switch: fast)
    readings = made(commands, control=types.SimpleNamespace(counting=counting), fastpaths=fastpaths,
                    live=lambda *said: told.append(said))
    readings._application.switches = {1: None, 2: None}
    with pytest.raises(StopError):
        readings.watch()
    return told


def test_what_lives_is_told(monkeypatch):
    dump = "\n".join([line(1), line(2, tracked=False), line(3, state="TIME_WAIT"), line(4, member=9)])
    told = watched(Commands(dump=dump), monkeypatch)
    assert told == [(1, ((1, 5, 3), (4, 5, 9)), True)] * 2


def test_what_lives_in_the_fast_path_is_told_with_it(monkeypatch):
    told = watched(Commands(dump=line(1)), monkeypatch, fast=[(7, 5, 3)])
    assert told == [(1, ((7, 5, 3), (1, 5, 3)), True)] * 2
    held, commands = [(7, 5, 3), (9, 5, 3)], Commands(dump=line(1))
    commands.meanwhile = held.pop
    told = watched(commands, monkeypatch, fast=held)
    assert told == [(1, ((7, 5, 3), (1, 5, 3)), True), (1, ((1, 5, 3),), True)], "not what ended during the dump"
    told = watched(Commands(dump=line(2)), monkeypatch, fast=None)
    assert told == [(1, ((2, 5, 3),), False)] * 2, "an agent elsewhere has to be asked about its own"


def test_nothing_is_told_where_nobody_counts_or_nothing_is_known(monkeypatch):
    assert watched(Commands(dump=line(1)), monkeypatch, counting=False) == []
    assert watched(Commands(dump=OvsError("gone")), monkeypatch) == []
    assert watched(Commands(dump=RuntimeError("odd")), monkeypatch) == []
