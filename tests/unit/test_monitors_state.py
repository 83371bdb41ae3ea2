# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.monitors.state and .protocol: what results mean, when the next check is due, how both sides speak."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from lbapp.config.monitor import Header, Monitor, MonitorType
from lbapp.monitors import protocol
from lbapp.monitors.protocol import Lines, ProtocolError, Target
from lbapp.monitors.state import Health


def health(up: bool | None = None, **fields: object) -> Health:
    return Health(msgspec.convert({"type": "TCP", **fields}, Monitor), up)


def told(of: Health, results: str) -> str:
    """What the state is after each result: ``+`` up, ``-`` down; capital letters U and D where it changed."""
    out = ""
    for one in results:
        changed = of.take(one == "+", 0.1)
        out += ("U" if of.up else "D") if changed else ("+" if of.up else "-")
    return out


@pytest.mark.parametrize(("results", "states"), [
    ("+", "U"),
    ("-", "D"),
    ("+--+---", "U++++" + "+D"),  # what comes in between counts from the beginning again
    ("-+-++", "D---U"),
    ("---+++--", "D---U+++"),
])
def test_so_many_in_a_row_change_a_state_and_the_first_one_makes_it(results: str, states: str) -> None:
    assert told(health(rise=2, fall=3), results) == states


def test_a_known_state_is_not_changed_by_one_result() -> None:
    assert told(health(True, fall=3), "---") == "++D"
    assert told(health(False, rise=2), "++") == "-U"


def test_checks_hurry_while_the_state_is_changing() -> None:
    of = health(interval=5, fast_interval=1, jitter=0, rise=2, fall=2)
    of.take(True, 0.1)
    of.take(True, 0.1)
    assert (of.changing, of.pause(0.5)) == (False, 5)
    of.take(False, None)
    assert (of.changing, of.pause(0.5)) == (True, 1)
    of.take(False, None)
    assert (of.up, of.changing, of.pause(0.5)) == (False, False, 5)


def test_jitter_and_the_second_check_spread() -> None:
    of = health(interval=5, jitter=0.1)
    of.take(True, None)
    assert [of.pause(chance) for chance in (0, 0.5)] == [0.05, 2.5]
    of.take(True, None)
    assert [of.pause(chance) for chance in (0, 0.5, 1)] == pytest.approx([4.5, 5, 5.5])


def test_first_checks_spread_over_the_interval_where_there_are_many() -> None:
    of = health(interval=5)
    assert of.first(1, 1) == 1 / 2000
    assert of.first(0.5, 10_000) == 2.5
    assert of.first(1, 1_000_000) == 5


def test_latency_is_that_of_good_checks_smoothed() -> None:
    of = health()
    of.take(False, 9.0)
    assert of.latency is None
    of.take(True, 1.0)
    of.take(True, None)
    of.take(True, 2.0)
    assert of.latency == 1.25


@given(some.text("+-", max_size=60), some.integers(1, 5), some.integers(1, 5))
def test_a_state_never_changes_without_its_results(results: str, rise: int, fall: int) -> None:
    of = health(rise=rise, fall=fall)
    for index, one in enumerate(results):
        if of.take(one == "+", None) and index:
            needed = rise if of.up else fall
            assert results[max(0, index + 1 - needed):index + 1] == one * needed


# ------------------------------------------------------------------ protocol


def target(index: int = 1, **fields: object) -> Target:
    return Target(address=f"10.0.{index >> 8}.{index & 255}", port=80,
                  monitor=msgspec.convert({"type": "TCP", **fields}, Monitor))


def test_a_monitor_travels_whole() -> None:
    monitor = Monitor(type=MonitorType.HTTP, interval=7.5, headers=(Header(name="a", value='"\\é'),),
                      body_regex=r"\d+", expected_codes="200-299", admin_state_up=False, domain_name="x.example")
    assert protocol.decode_monitor(protocol.encode_monitor(monitor)) == monitor
    assert len(protocol.encode_monitor(Monitor(type=MonitorType.TCP))) < 40


def test_commands_are_lines_of_bounded_length_that_hold_everything() -> None:
    keys = [f"pool/{index:05}/tcp" for index in range(10_000)]
    lines = list(protocol.commands([(key, target(index), index, None) for index, key in enumerate(keys)], ["a", "b"]))
    assert len(lines) > 4
    assert max(map(len, lines)) < protocol.BATCH_BYTES + 2048
    heard = [protocol.decode_command(line) for line in Lines().feed(b"".join(lines))]
    assert [key for one in heard for key in one.remove] == ["a", "b"]
    assert [(one.key, one.serial) for command in heard for one in command.set] == list(zip(keys, range(10_000),
                                                                                          strict=True))


@given(some.lists(some.binary(max_size=40)), some.integers(1, 30))
def test_lines_are_the_same_however_they_are_cut(parts: list[bytes], size: int) -> None:
    wanted = [part.replace(b"\n", b"") for part in parts]
    stream = b"".join(part + b"\n" for part in wanted)
    lines = Lines()
    got = [line for start in range(0, len(stream), size) for line in lines.feed(stream[start:start + size])]
    assert got == [part for part in wanted if part]


def test_a_line_without_end_is_refused() -> None:
    lines = Lines()
    with pytest.raises(ProtocolError, match="more than"):
        for _ in range(10):
            lines.feed(b"x" * (1 << 20))


@pytest.mark.parametrize("line", [b"x", b"[]", b'{"set":[{"key":"a"}]}', b'{"remove":[1]}', b"\xff",
                                  b'{"set":[{"key":"","address":"a","port":1,"monitor":{}}]}'])
def test_what_is_no_command_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_command(line)


@pytest.mark.parametrize("raw", [b"{}", b"[]", b'{"type":"TCP","timeout":100}'])
def test_what_is_no_monitor_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="no monitor"):
        protocol.decode_monitor(raw)
