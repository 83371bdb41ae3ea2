# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""layout.py against fastpath.h: every size, offset, bit and enumerator, as the compiler of the programs sees them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.control.buckets import Ration, Shape, mask
from lbapp.dataflow.fastpath import build, entries, layout
from lbapp.dataflow.fastpath.layout import Flow, FlowKey, Layout, Service, ServiceKey, Swept, Target
from lbapp.dataflow.fastpath.requests import State


def words(text: str) -> list[str]:
    return text.split()


FLOW_FIELDS = words("source destination source_port destination_port destination_mac source_mac ifindex state used "
                    "opened packets bytes serial virtual_server member idle_seconds request")
KEY_FIELDS = words("source destination source_port destination_port protocol")
FIELDS = {
    ("fp_key", layout.KEY.format): KEY_FIELDS,
    ("fp_flow", layout.FLOW.format): FLOW_FIELDS,
    ("fp_install", layout.INSTALL.format): [
        *(f"key.{name}" for name in KEY_FIELDS), *(f"flow.{name}" for name in FLOW_FIELDS), "client_mac",
        "client_ifindex"],
    ("fp_departure", layout.DEPARTURE.format): words("ifindex isn length kind options"),
    ("fp_service_key", layout.SERVICE_KEY.format): ["address", "port", "protocol"],
    ("fp_service", layout.SERVICE_HEAD.format): ["number", "mode", "hash", "next", "idle_seconds", "slot_count", "mss",
                                                 "window_scale", "sack", "cost", "depth", "client_cost",
                                                 "client_depth", "client_mask"],
    ("fp_rate", layout.RATE.format): ["full", "over", "over_client"],
    ("fp_client_key", layout.CLIENT_KEY.format): ["virtual_server", "network"],
    ("fp_target", layout.TARGET.format): ["address", "port", "mac", "ifindex", "member", "flags"],
    ("fp_stats_key", layout.STATS_KEY.format): ["virtual_server", "member"],
    ("fp_stats", layout.STATS.format): words("opened closed packets_in bytes_in packets_out bytes_out"),
    ("fp_query", layout.QUERY.format): ["ifindex", "virtual_server", "length", "kind", "options"],
    ("fp_cookies", layout.COOKIES.format): ["keys[0]", "keys[1]", "current", "valid"],
    ("fp_pending", layout.PENDING.format): ["isn", "cookie"],
    ("fp_splice", layout.SPLICE_VALUE.format): ["serial", "offset", "shift", "shift_in", "ready"],
    ("fp_request", layout.REQUEST.format): words("state serial isn cookie sum window length scale flags own"),
    ("fp_wanted", layout.WANTED.format): ["final", "idle_seconds", "found"],
    ("fp_layout", layout.LAYOUT.format): ["version", "flow_size", "service_size", "target_size", "seed[0]", "seed[1]",
                                          "mac"],
    ("fp_closed", "=" + layout.CLOSED_RECORD.format.removeprefix("=I4x")): [
        *(f"key.{name}" for name in KEY_FIELDS),
        *words("virtual_server member serial reason state duration packets_in bytes_in packets_out bytes_out")],
    ("fp_sweep", layout.SWEEP_WHAT.format + layout.SWEEP_DONE.format.removeprefix("=")): [
        *words("linger handshake half_closed evict evict_most match virtual_server member ifindex wanted relocate "
               "place mac now live lingering kept shutdown idle overflow deleted relocated"),
        *(f"histogram[{index}]" for index in range(layout.HISTOGRAM))],
}
NUMBERS = {
    "FP_VERSION": layout.VERSION, "FP_TICK_SHIFT": layout.TICK_SHIFT, "FP_SLOTS": layout.SLOTS,
    "FP_INSTALLS": layout.INSTALLS, "FP_FRAME": layout.FRAME, "FP_FRAME_SMALL": layout.FRAME_SMALL,
    "FP_FRAME_MIDDLE": layout.FRAME_MIDDLE, "FP_FRAME_LARGE": layout.FRAME_LARGE, "FP_WINDOW": layout.WINDOW,
    "FP_OUT_MARK": layout.OUT_MARK, "FP_DEPARTURE": layout.DEPARTURE_FRAME,
    **{f"FP_{one.name}": one.value for one in entries.Departs},
    "FP_REQUESTS": layout.REQUESTS, "FP_REQUEST": layout.REQUEST_DATA,
    **{f"FP_REQUEST_{one.name}": one.value for one in State},
    "FP_HISTOGRAM": layout.HISTOGRAM, "FP_SWEEPS": layout.SWEEPS,
    "FP_TARGET_ROUTED": layout.TARGET_ROUTED, "FP_COUNTERS": len(layout.Counter),
    **{f"FP_{name}": getattr(layout, name) for name in
       words("OUTBOUND ROUTED ESTABLISHED FIN PEER_FIN RST CLOSED REPORTED DECIDED TRACKED SPLICE ANSWERED HELD ANEW")},
    **{f"FP_MATCH_{name}": getattr(layout, f"MATCH_{name}") for name in words("VIRTUAL_SERVER MEMBER IFINDEX ALL")},
    **{f"FP_{one.name}": one.value for kind in (layout.Mode, layout.Hash, layout.Reason, layout.Result)
       for one in kind},
    **{f"FP_ASK_{one.name}": one.value for one in layout.Ask},
    **{f"FP_{one.name}": one.value for one in layout.Counter if one is not layout.Counter.OPENED_HERE},
}


def offsets(form: str) -> list[int]:
    """Where each value of a struct's format lies."""
    found, position = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", form):
        times = int(count or 1)
        if kind == "x":
            position += times
        elif kind == "s":
            found.append(position)
            position += times
        else:
            for _ in range(times):
                found.append(position)
                position += struct.calcsize(f"={kind}")
    return found


def test_the_header_says_the_same() -> None:
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    if compiler is None:
        pytest.skip("no clang")
    lines = ["#include <stddef.h>", f'#include "{build.HERE / "fastpath.h"}"']
    for (name, form), fields in FIELDS.items():
        places = offsets(form)
        assert len(places) == len(fields), name
        lines += [f'_Static_assert(offsetof(struct {name}, {field}) == {place}, "{name}.{field}");'
                  for field, place in zip(fields, places, strict=True)]
    for name, size in layout.structs():
        lines.append(f'_Static_assert(sizeof(struct {name}) == {size}, "size of {name}");')
    lines.append(f'_Static_assert(offsetof(struct fp_install, result) == {layout.INSTALL_RESULT}, "result");')
    lines.append(f'_Static_assert(offsetof(struct fp_departure, frame) == {layout.DEPARTURE.size}, "frame");')
    lines.append(f'_Static_assert(offsetof(struct fp_service, slots) == {layout.SERVICE_HEAD.size}, "slots");')
    lines += [f'_Static_assert({name} == {value}, "{name}");' for name, value in NUMBERS.items()]
    done = subprocess.run([compiler, "-target", "bpf", "-x", "c", "-fsyntax-only", *build._includes(), "-"],
                          input="\n".join(lines) + "\n", text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_struct_and_enumerator_of_the_header_is_compared() -> None:
    header = (build.HERE / "fastpath.h").read_text(encoding="utf-8")
    # These two never leave the kernel.
    assert set(re.findall(r"^struct (\w+)", header, re.M)) - {"fp_fragment", "fp_fragment_key"} == {
        name for name, _ in layout.structs()} == {name for name, _ in FIELDS}
    enumerators = {word for body in re.findall(r"^enum \w+ \{(.*?)\}", re.sub(r"/\*.*?\*/", "", header, flags=re.S),
                                               re.M | re.S)
                   for word in re.findall(r"FP_\w+", body)}
    assert enumerators - {"FP_OPENED_HERE"} <= NUMBERS.keys()
    assert layout.Counter.OPENED_HERE == layout.Counter.MISS_QUERY + 1


def test_a_connection_needs_no_more_memory_than_promised() -> None:
    """Two elements of a hash map, with the kernel's 48 bytes in front, from caches of 192 bytes; and two buckets."""
    assert 48 + layout.KEY.size + layout.FLOW.size + 8 <= 192


ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16).filter(
    lambda one: not one.startswith(bytes(10) + b"\xff\xff")))
PORTS = st.integers(0, 0xFFFF)
WORDS = st.integers(0, 0xFFFFFFFF)
MACS = st.binary(min_size=6, max_size=6)
SHAPES = st.builds(Shape, st.integers(1, 2**63 - 1), st.integers(0, 2**63 - 1))
MASKS = st.one_of(st.integers(8, 32).map(lambda bits: mask(bits, 4)),
                  st.integers(16, 128).map(lambda bits: mask(bits, 16)))


@given(st.builds(FlowKey, ADDRESSES, ADDRESSES, PORTS, PORTS, st.integers(0, 255)))
def test_keys_come_back(key: FlowKey) -> None:
    assert FlowKey.unpack(key.pack()) == key
    assert key.pack()[32:34] == key.source_port.to_bytes(2, "big")


@given(st.builds(Flow, ADDRESSES, ADDRESSES, PORTS, PORTS, MACS, MACS, WORDS, WORDS, WORDS, WORDS, WORDS, PORTS,
                 WORDS, WORDS, WORDS, WORDS))
def test_flows_come_back(flow: Flow) -> None:
    assert Flow.unpack(flow.pack()) == flow


@given(st.builds(Target, st.one_of(st.none(), ADDRESSES.filter(any)), PORTS, MACS, WORDS, WORDS, st.booleans()))
def test_targets_come_back(target: Target) -> None:
    assert Target.unpack(target.pack()) == target


@given(st.builds(Service, WORDS, st.integers(0, 3), st.integers(0, 2), PORTS,
                 st.lists(WORDS, max_size=layout.SLOTS).map(tuple), PORTS, st.one_of(st.none(), st.integers(0, 14)),
                 st.booleans(), st.one_of(st.none(), st.builds(Ration, st.none(), SHAPES, MASKS), st.builds(
                     Ration, SHAPES, st.one_of(st.none(), SHAPES), MASKS))))
def test_services_come_back(service: Service) -> None:
    assert Service.unpack(service.pack()) == service
    assert len(service.pack()) == layout.SERVICE_SIZE


def test_too_many_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="1022 slots"):
        Service(1, 1, 1, 1, (1,) * 1022).pack()


@given(st.builds(ServiceKey, ADDRESSES, PORTS, st.integers(0, 255)))
def test_service_keys_come_back(key: ServiceKey) -> None:
    assert ServiceKey.unpack(key.pack()) == key


def test_another_version_is_told_from_this_one() -> None:
    now = Layout.current((1, 2), bytes(6))
    assert Layout.unpack(now.pack()) == now and now.fits()
    assert not now._replace(version=now.version + 1).fits()
    assert not now._replace(flow_size=now.flow_size + 8).fits()


def test_ticks_and_milliseconds() -> None:
    assert layout.ticks(1048.576) == 1000
    assert layout.milliseconds(1000) == 1048
    assert layout.ticks(1e18) == 0x7FFFFFFF


def test_how_old_the_oldest_are() -> None:
    """What is silent for longer than that, is at least as many as were asked for."""
    histogram = [0] * layout.HISTOGRAM
    histogram[3], histogram[10], histogram[20] = 100, 50, 5
    swept = Swept.nothing()._replace(live=155, histogram=tuple(histogram))
    assert (1 << 10) + 1 < layout.ticks(swept.older_than(5)) < 1 << 20
    assert 1 << 3 < layout.ticks(swept.older_than(6)) < 1 << 10
    assert layout.ticks(swept.older_than(56)) < 1 << 3
    assert swept.older_than(1000) == 1
