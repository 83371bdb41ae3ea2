# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``lbapp.reports`` and ``lbapp.server_agent.report``: who may report, and what of it counts."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp import reports
from lbapp.config.model import Configuration
from lbapp.config.pool import Algorithm, Distribution, Member, Pool
from lbapp.control.master import Master
from lbapp.reports import Outdated, Reports, Unsigned
from lbapp.server_agent import report
from lbapp.server_agent.report import Told, canonical, document, sign, signed

KEY = b"0123456789abcdef0123456789abcdef"
RUN, OTHER = bytes(16), b"\1" * 16
SERVERS = (("10.0.0.1", 80), ("fd00::1", 443))
WALL = 1_800_000_000.0


def told(sequence: int = 1, run: bytes = RUN, time: float = WALL, **values: Any) -> Told:
    return Told(run, sequence, time, SERVERS, values or {"cpu": 0.5})


class Place:
    """A controller's intake, with or without a key."""

    def __init__(self, key: bytes | None = None) -> None:
        self.master = Master()
        self.reports = Reports(self.master)
        self.reports.key = key

    def take(self, one: Told, name: str = "s1", key: bytes | None = None, now: float = 0.0,
             wall: float = WALL) -> tuple[str, ...]:
        return self.reports.take(name, one, None if key is None else sign(key, name, one), now, wall)

    def counted(self) -> Any:
        return self.master.of(Member(address="10.0.0.1", protocol_port=80), -math.inf)


# ------------------------------------------------------------------ the signature


def test_the_canonical_bytes() -> None:
    one = Told(bytes(range(16)), 5, 1.5, (("10.0.0.1", 80), ("fd00::1", 0)), {"b": 2.0, "a": -1.0})
    assert canonical("é", one) == (
        b"\0\2" + "é".encode() + bytes(range(16)) + struct.pack(">Qd", 5, 1.5) + b"\0\2"
        + b"\4" + bytes([10, 0, 0, 1]) + b"\0\x50" + b"\x10\xfd\0" + bytes(13) + b"\1" + b"\0\0"
        + b"\0\2" + b"\0\1a" + struct.pack(">d", -1) + b"\0\1b" + struct.pack(">d", 2))


def test_every_part_is_signed() -> None:
    one = told()
    signature = sign(KEY, "s1", one)
    assert len(signature) == report.SIGNATURE_BYTES and signed(signature, KEY, "s1", one)
    others = [one._replace(run=OTHER), one._replace(sequence=2), one._replace(time=WALL + 1),
              one._replace(endpoints=SERVERS[:1]), one._replace(endpoints=(SERVERS[0], ("fd00::1", 444))),
              one._replace(values={"cpu": 0.25}), one._replace(values={"cpv": 0.5}), one._replace(values={})]
    assert not any(signed(signature, KEY, "s1", other) for other in others)
    assert not signed(signature, KEY, "s2", one) and not signed(signature, KEY[::-1], "s1", one)
    assert not signed(b"", KEY, "s1", one) and not signed(signature[:16], KEY, "s1", one)


@given(st.lists(st.tuples(st.from_regex(report.NAME, fullmatch=True), st.floats(allow_nan=False, allow_infinity=False)),
                max_size=8), st.floats(0, 1e10))
def test_what_json_carries_has_the_same_signature(values: list[tuple[str, float]], time: float) -> None:
    one = Told(RUN, 7, time, SERVERS, dict(values))
    carried = json.loads(json.dumps(document(one, sign(KEY, "s1", one))))
    again = Told(bytes.fromhex(carried["run"]), carried["sequence"], carried["time"],
                 tuple((server["address"], server["port"]) for server in carried["servers"]), carried["values"])
    assert signed(bytes.fromhex(carried["signature"]), KEY, "s1", again)


VALUES = st.dictionaries(st.text("ab", min_size=1, max_size=4), st.floats(0, 1))


@given(st.text(max_size=5), st.text(max_size=5), VALUES)
def test_different_reports_have_different_bytes(one: str, other: str, values: dict[str, float]) -> None:
    """No name runs into what follows."""
    first, second = (canonical(name, told()._replace(values=values)) for name in (one, other))
    assert (first == second) == (one == other)
    fewer, more = (told()._replace(values=these) for these in (values, {**values, "z": 1.0}))
    assert canonical(one, fewer) != canonical(one, more)


# ------------------------------------------------------------------ who may report


def test_without_a_key_signatures_are_not_asked_for() -> None:
    place = Place()
    assert place.take(told()) == ()
    assert place.take(told(2), key=KEY) == ()
    assert not place.reports.agents(0.0)["s1"].signed
    assert place.counted().agent == "s1" and place.counted().values == {"cpu": 0.5}


def test_with_a_key_only_signed_reports_are_taken() -> None:
    place = Place(KEY)
    with pytest.raises(Unsigned, match="signed with the key of the buses"):
        place.take(told())
    with pytest.raises(Unsigned, match="expected another signature"):
        place.take(told(), key=KEY[::-1])
    assert place.reports.agents(0.0) == {} and place.counted() is None
    assert place.take(told(), key=KEY) == ()
    assert place.reports.agents(0.0)["s1"].signed
    with pytest.raises(Unsigned):
        place.reports.take("s2", told(), sign(KEY, "s1", told()), 0.0, WALL)  # another agent's


def test_a_report_is_taken_once(caplog: pytest.LogCaptureFixture) -> None:
    place = Place(KEY)
    place.take(told(5, cpu=0.1), key=KEY)
    for sequence in (5, 4, 1):
        with pytest.raises(Outdated, match="greater than 5"):
            place.take(told(sequence, cpu=0.9), key=KEY)
    assert place.counted().values == {"cpu": 0.1} and place.reports.agents(0.0)["s1"].refused == 3
    assert sum("a report was refused" in one for one in caplog.messages) == 2  # the first, and the second
    place.take(told(6, cpu=0.2), key=KEY)
    assert place.counted().values == {"cpu": 0.2}


def test_reports_of_an_earlier_run_are_refused() -> None:
    place = Place(KEY)
    place.take(told(5, time=WALL), key=KEY)
    place.take(told(1, OTHER, WALL + 3), key=KEY, wall=WALL + 3)  # it was started anew
    for late in (told(5, time=WALL), told(6, time=WALL + 3), told(99, time=WALL + 1)):
        with pytest.raises(Outdated, match="the agent's run before"):
            place.take(late, key=KEY, wall=WALL + 4)
    place.take(told(2, OTHER, WALL + 6), key=KEY, wall=WALL + 6)


def test_an_agent_whose_clock_was_ahead_is_heard_again_once_it_is_right() -> None:
    place = Place(KEY)
    assert place.take(told(time=WALL + 1e6), key=KEY) == (
        "time: expected the controller's, got one 1000000 s ahead",)
    with pytest.raises(Outdated):
        place.take(told(1, OTHER, WALL + 50), key=KEY, wall=WALL + 50)
    assert place.take(told(1, OTHER, WALL + 61), key=KEY, wall=WALL + 61) == ()


def test_after_a_restart_of_the_controller_recorded_reports_do_not_count() -> None:
    recorded = told(9)
    place = Place(KEY)
    flags = place.take(recorded, key=KEY, wall=WALL + 3600)
    assert flags == ("time: expected the controller's, got one 3600 s behind",)
    assert place.counted().flags == flags
    assert place.take(told(1, OTHER, WALL + 3601), key=KEY, wall=WALL + 3601) == ()


def test_so_many_agents_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reports.MOST_AGENTS == 4096
    monkeypatch.setattr(reports, "MOST_AGENTS", 3)
    place = Place()
    for name in "abc":
        place.take(told(), name)
    with pytest.raises(Outdated, match="3 agents report already"):
        place.take(told(), "d", now=10.0)
    place.take(told(2), "a", now=3590.0)
    place.take(told(), "d", now=3601.0)  # b and c are long silent
    assert set(place.reports.agents(3601.0)) == {"a", "d"}
    place.reports.withdraw("a")
    place.take(told(), "e", now=3602.0)
    with pytest.raises(Outdated):
        place.take(told(), "f", now=3603.0)
    place.take(told(), "f", now=3590.0 + 181)  # what ended is remembered as long as its reports could count


def test_an_agent_ends() -> None:
    place = Place()
    assert not place.reports.withdraw("s1")
    place.take(told(3))
    assert place.reports.withdraw("s1") and not place.reports.withdraw("s1")
    assert place.reports.agents(1.0) == {} and place.counted() is None
    with pytest.raises(Outdated):
        place.take(told(3))
    place.take(told(4))
    assert set(place.reports.agents(1.0)) == {"s1"} and place.counted() is not None


@pytest.mark.parametrize(("agents", "pools", "interval"), [
    (1, [], 10.0), (600, [], 12.0), (1, [(5.0, 15.0)], 5.0), (1, [(1.0, 15.0), (5.0, 60.0)], 1.0),
    (200, [(1.0, 15.0)], 4.0), (4000, [(1.0, 15.0)], 5.0), (4000, [(5.0, 300.0)], 80.0), (1, [(60.0, 15.0)], 5.0)])
def test_how_often_agents_are_to_report(agents: int, pools: list[tuple[float, float]], interval: float) -> None:
    """As often as it is looked at; less often where they are many, but never so seldom that reports are stale."""
    place = Place()
    for number in range(agents):
        place.take(told(), f"s{number}")
    place.master.distribute(Configuration(pools={str(index): Pool(
        name=f"p{index}", lb_algorithm=Algorithm.WEIGHTED_ROUND_ROBIN, distribution=Distribution(
            interval=every, stale=stale)) for index, (every, stale) in enumerate(pools)}), 0.0)
    assert place.reports.interval() == interval


# ------------------------------------------------------------------ what is absurd


@pytest.mark.parametrize(("name", "value", "flag"), [
    ("cpu", math.nan, "cpu: expected a number, got nan"), ("x", math.inf, "x: expected a number, got inf"),
    ("x", -math.inf, "x: expected a number, got -inf"), ("cpu", 1.01, "cpu: expected 0 to 1, got 1.01"),
    ("cpu", -0.01, "cpu: expected 0 to 1, got -0.01"), ("memory", 7.0, "memory: expected 0 to 1, got 7"),
    ("utilization", 2.0, "utilization: expected 0 to 1, got 2"),
    ("load", -1.0, "load: expected no less than 0, got -1"),
    ("clients", -1.0, "clients: expected no less than 0, got -1"),
    ("execution_time", -0.1, "execution_time: expected no less than 0, got -0.1"),
    ("requests_per_second", 1e16, "requests_per_second: expected at most 1e+15, got 1e+16"),
    ("x", -1e16, "x: expected at most 1e+15, got -1e+16")])
def test_a_report_with_an_absurd_value_does_not_count(name: str, value: float, flag: str,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    place = Place()
    assert place.take(told(1, RUN, WALL, **{name: value, "y": 1.0})) == (flag,)
    assert place.take(told(2, RUN, WALL, **{name: value, "y": 1.0})) == (flag,)
    assert place.counted().flags == (flag,) and place.reports.agents(0.0)["s1"].flags == (flag,)
    assert [one for one in caplog.messages if "does not count" in one] == [
        f"agent s1: its report does not count: {flag}"]
    assert place.take(told(3, y=1.0)) == () and place.counted().flags == ()


@pytest.mark.parametrize("values", [
    {"cpu": 0.0, "memory": 1.0, "load": 12.5, "clients": 1e6}, {"temperature": -40.0}, {"x": -1e15}])
def test_what_can_be_is_believed(values: dict[str, float]) -> None:
    assert reports.absurd(values) == []


@pytest.mark.parametrize(("ahead", "words"), [(61.0, "61 s ahead"), (-61.0, "61 s behind"), (59.0, ""), (-59.0, "")])
def test_a_clock_that_is_far_off(ahead: float, words: str) -> None:
    place = Place()
    flags = place.take(told(time=WALL + ahead))
    assert bool(flags) == bool(words) and words in "".join(flags)


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf])
def test_a_clock_that_is_none(time: float) -> None:
    place = Place()
    assert place.take(told(time=time)) == ("time: expected a number",)
    place.take(told(1, OTHER, WALL + 1), wall=WALL + 1)
