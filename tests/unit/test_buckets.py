# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Token buckets: ``lbapp.control.buckets``, and that ``lbapp/dataflow/fastpath/bucket.bpf.h`` says the same."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.config.model import Algorithm, Configuration, Member, Pool, Protocol, VirtualServer
from lbapp.control.buckets import (
    DEEPEST,
    SECOND,
    Buckets,
    Ration,
    Shape,
    mask,
    network,
    ration,
    ration_of,
    shape,
    take,
)
from lbapp.control.engine import ControlSegment
from lbapp.control.messages import Error, FlowSignature, Host, NeighbourSeen, Query, SwitchUp
from lbapp.control.statistics import Refusal
from lbapp.dataflow.fastpath import build

CLIENT, OTHER, VIP = bytes((10, 0, 0, 1)), bytes((10, 0, 1, 1)), bytes((10, 0, 0, 100))


def server(**more: Any) -> VirtualServer:
    return VirtualServer(**{"name": "web", "number": 5, "vip_address": "10.0.0.100", "protocol": Protocol.TCP,
                            "protocol_port": 80, "default_pool_id": "p", **more})


def query(serial: int, client: bytes = CLIENT, port: int = 4000, protocol: int = 6) -> Query:
    return Query(serial, 1, 2, bytes(6), FlowSignature(client, port, VIP, 80, protocol), 5, 2 if protocol == 6 else 0)


# ------------------------------------------------------------------ one bucket


def test_shapes() -> None:
    assert shape(-1, 5) is None
    assert shape(20, 0) == Shape(SECOND // 20, SECOND), "a second's worth"
    assert shape(20, 5) == Shape(SECOND // 20, SECOND // 4)
    assert shape(7, 1) == Shape(2_285_714_286, 2_285_714_286), "rounded up: never more than 7 a second"
    assert shape(10_000_000, 10_000_000) == Shape(1600, 16_000_000_000)
    assert shape(1, 10_000_000) == Shape(SECOND, 10_000_000 * SECOND)
    assert shape(1, 2**32 - 1) == Shape(SECOND, DEEPEST), "that of a peer which says what no configuration does"
    assert take(0, 10, shape(0, 100)) == (0, False)  # type: ignore[arg-type]


def test_masks_and_networks() -> None:
    assert [mask(bits, 4) for bits in (8, 20, 32)] == [b"\xff\0\0\0", b"\xff\xff\xf0\0", b"\xff" * 4]
    assert mask(64, 16) == b"\xff" * 8 + bytes(8) and mask(128, 16) == b"\xff" * 16
    assert network(bytes((10, 1, 2, 3)), mask(16, 4)) == bytes((10, 1, 0, 0))
    assert ration(-1, 0, -1, 0, b"") is None
    assert ration_of(server(client_rate_limit=2, client_prefix_v4=24)) == Ration(
        None, Shape(SECOND // 2, SECOND), b"\xff\xff\xff\0")
    assert ration_of(server(vip_address="fd00::1", rate_limit=2)) == Ration(
        Shape(SECOND // 2, SECOND), None, b"\xff" * 8 + bytes(8))


def test_at_once_and_then_one_by_one() -> None:
    one, full, now = Shape(100, 300), 0, 5000
    taken = []
    for now in (5000, 5000, 5000, 5000, 5099, 5100, 5100, 5350, 5350, 5350, 5400, 9999):
        full, there = take(full, now, one)
        taken.append(there)
    assert taken == [True, True, True, False, False, True, False, True, True, False, True, True]


def test_one_that_was_deeper_once_is_empty_not_closed_for_long() -> None:
    assert take(10**15, 1000, Shape(100, 300)) == (1300, False)
    assert take(1300, 1099, Shape(100, 300)) == (1300, False)
    assert take(1300, 1100, Shape(100, 300)) == (1400, True)
    assert take(1350, 1000, Shape(100, 300)) == (1350, False), "another clock was ahead: nothing is put back"


SHAPES = st.builds(Shape, st.integers(1, 1000), st.integers(0, 5000))


@given(SHAPES, st.lists(st.integers(0, 400), max_size=300))
def test_never_more_than_its_depth_and_what_was_made(one: Shape, steps: list[int]) -> None:
    """In any stretch of time: what fits in, and one for each cost that passed."""
    full, now, when = 0, 10_000, []
    for step in steps:
        now += step
        full, taken = take(full, now, one)
        if taken:
            when.append(now)
        elif one.depth >= one.cost:
            assert full + one.cost > now + one.depth, "and none is withheld"
    for first, begun in enumerate(when):
        for last in range(first, len(when)):
            assert (last - first + 1) * one.cost <= one.depth + when[last] - begun + (one.cost - 1)


# ------------------------------------------------------------------ the same in C

WRAPPER = """
#include <pthread.h>
#include <sched.h>
#include "bucket.bpf.h"
int taken(__u64 *full, __u64 now, __u64 cost, __u64 depth) { return bucket_take(full, now, cost, depth); }
void returned(__u64 *full, __u64 cost) { bucket_return(full, cost); }

struct greedy { __u64 *full; __u64 cost, depth, got; int times; };
static void *grab(void *argument)
{
	struct greedy *g = argument;
	for (int index = 0; index < g->times; index++) {
		g->got += bucket_take(g->full, 1000000 + index, g->cost, g->depth);
		if (!(index & 1023))
			sched_yield();
	}
	return 0;
}
__u64 crowd(int threads, int times, __u64 cost, __u64 depth)
{
	pthread_t made[16]; struct greedy each[16]; __u64 full = 0, got = 0;
	for (int index = 0; index < threads; index++) {
		each[index] = (struct greedy){&full, cost, depth, 0, times};
		pthread_create(&made[index], 0, grab, &each[index]);
	}
	for (int index = 0; index < threads; index++) {
		pthread_join(made[index], 0);
		got += each[index].got;
	}
	return got;
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The header alone, for this machine."""
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    if compiler is None:
        pytest.skip("no clang")
    folder = Path(tmp_path_factory.mktemp("bucket"))
    source, library = folder / "wrapper.c", folder / "wrapper.so"
    source.write_text(WRAPPER, encoding="ascii")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-pthread", f"-I{build.HERE}", str(source), "-o",
                    str(library)], check=True)
    calls = ctypes.CDLL(str(library))
    calls.crowd.restype = ctypes.c_uint64
    yield calls


def test_the_header_takes_the_same(compiled: ctypes.CDLL) -> None:
    chosen = random.Random(7)
    for _ in range(300):
        cost = chosen.choice([1, 1600, SECOND // 20, SECOND, chosen.randrange(1, 10**9)])
        one = Shape(cost, chosen.choice([0, cost - 1, cost, 3 * cost, cost * chosen.randrange(1, 1000), DEEPEST]))
        full, word = 0, ctypes.c_uint64(0)
        now = chosen.randrange(1 << 58)
        for _ in range(100):
            now += chosen.choice([0, 1, cost // 3, cost, 2 * cost, one.depth // 7])
            now = min(now, 1 << 60)
            full, there = take(full, now, one)
            assert compiled.taken(ctypes.byref(word), ctypes.c_uint64(now), ctypes.c_uint64(one.cost),
                                  ctypes.c_uint64(one.depth)) == there
            assert word.value == full
            if there and chosen.random() < 0.2:
                full -= cost
                compiled.returned(ctypes.byref(word), ctypes.c_uint64(cost))
                assert word.value == full & (1 << 64) - 1
            if chosen.random() < 0.02:
                one = Shape(one.cost, one.cost * chosen.randrange(1, 5))


def test_processors_that_race_get_no_more_than_there_is(compiled: ctypes.CDLL) -> None:
    """Four threads ask for 300 000 each; the clock goes on by as much, and makes 1 for each 1000 of it."""
    times, cost, depth = 300_000, 1000, 1000 * 50_000
    got = compiled.crowd(4, times, ctypes.c_uint64(cost), ctypes.c_uint64(depth))
    assert 50_000 <= got <= 50_000 + times // cost + 1


# ------------------------------------------------------------------ the control segment's own


def many(refuse: Callable[[int], Refusal | None], count: int) -> list[Refusal | None]:
    return [refuse(serial) for serial in range(count)]


def test_of_a_virtual_server() -> None:
    buckets, limited = Buckets(), server(rate_limit=10, rate_burst=3)
    assert many(lambda serial: buckets.refuses(limited, query(serial), 100.0), 5) == [
        None, None, None, Refusal.RATE, Refusal.RATE]
    assert buckets.refuses(limited, query(9, OTHER), 100.05) is Refusal.RATE
    assert buckets.refuses(limited, query(10, OTHER), 100.11) is None
    assert buckets.refuses(limited, query(10, OTHER), 101.0) is None, "asked again: it has had its token"
    assert many(lambda serial: buckets.refuses(limited, query(20 + serial), 200.0), 4)[2:] == [None, Refusal.RATE]


def test_of_client_networks() -> None:
    buckets, limited = Buckets(), server(client_rate_limit=1, client_rate_burst=2, client_prefix_v4=24)
    for client in (CLIENT, OTHER):
        assert many(lambda serial, client=client: buckets.refuses(  # type: ignore[misc]
            limited, query(client[2] * 100 + serial, client), 7.0), 3) == [None, None, Refusal.CLIENT_RATE]
    assert buckets.refuses(limited, query(50, bytes((10, 0, 0, 200))), 7.0) is Refusal.CLIENT_RATE, "its neighbour"
    assert buckets.refuses(limited, query(51, bytes((10, 0, 0, 200))), 8.1) is None


def test_who_floods_costs_the_others_nothing() -> None:
    buckets, limited = Buckets(), server(rate_limit=10, rate_burst=10, client_rate_limit=2, client_rate_burst=2)
    flood = many(lambda serial: buckets.refuses(limited, query(serial), 50.0), 1000)
    assert flood.count(None) == 2 and flood.count(Refusal.CLIENT_RATE) == 998
    others = [buckets.refuses(limited, query(5000 + index, bytes((10, 1, index // 2, 1))), 50.0) for index in range(8)]
    assert others == [None] * 8
    # What the virtual server's own limit refuses is no token of the client's.
    late = bytes((10, 9, 9, 9))
    assert many(lambda serial: buckets.refuses(limited, query(6000 + serial, late), 50.0), 50) == [Refusal.RATE] * 50
    assert many(lambda serial: buckets.refuses(limited, query(7000 + serial, late), 50.21), 3) == [
        None, None, Refusal.CLIENT_RATE]


def test_udp_has_one_token_for_all_that_is_asked_about_a_flow() -> None:
    buckets, limited = Buckets(), server(protocol=Protocol.UDP, rate_limit=1, rate_burst=1)
    assert many(lambda serial: buckets.refuses(limited, query(serial, protocol=17), 1.0), 4) == [None] * 4
    assert buckets.refuses(limited, query(9, port=4001, protocol=17), 1.0) is Refusal.RATE
    assert buckets.refuses(limited, query(10, protocol=17), 4.5) is None
    assert buckets.refuses(limited, query(11, port=4001, protocol=17), 4.5) is Refusal.RATE, "the flow asked anew"


def test_what_is_remembered_is_bounded_and_forgotten() -> None:
    buckets = Buckets(clients=100, lately=10)
    limited = server(client_rate_limit=1, client_rate_burst=1)
    for index in range(500):
        assert buckets.refuses(limited, query(index, bytes((10, 1, index >> 8, index & 255))), 5.0) is None
    assert len(buckets) == 100
    assert buckets.refuses(limited, query(999, bytes((10, 1, 1, 243))), 5.0) is Refusal.CLIENT_RATE
    assert buckets.refuses(limited, query(1000, bytes((10, 1, 0, 0))), 5.0) is None, "forgotten: full again"
    one = server(rate_limit=1)
    assert many(lambda serial: buckets.refuses(one, query(2000 + serial), 6.0), 2) == [None, Refusal.RATE]
    buckets.forget([5])
    assert buckets.refuses(one, query(3000), 6.0) is None


def test_a_change_of_a_limit_takes_effect_at_once() -> None:
    buckets = Buckets()
    slower = server(rate_limit=1, rate_burst=1000)
    assert many(lambda serial: buckets.refuses(slower, query(serial), 5.0), 1001)[-2:] == [None, Refusal.RATE]
    faster = server(rate_limit=10, rate_burst=1)
    assert buckets.refuses(faster, query(2000), 5.0) is Refusal.RATE
    assert buckets.refuses(faster, query(2001), 5.2) is None


# ------------------------------------------------------------------ in the engine


def segment(**limits: Any) -> ControlSegment:
    pool = Pool(name="pool", id="p", lb_algorithm=Algorithm.ROUND_ROBIN, members=(
        Member(id="m", number=7, name="m", address="10.0.0.7", protocol_port=8080),))
    control = ControlSegment(Configuration(virtual_servers={"v": server(id="v", **limits)}, pools={"p": pool}))
    control.handle(SwitchUp(1, {}), 0.0)
    control.handle(NeighbourSeen(1, "10.0.0.7", Host(b"\x02" * 6, 3)), 0.0)
    return control


def errors(control: ControlSegment, count: int, now: float = 1.0, limited: bool = False,
           serial: int = 0) -> list[Error]:
    replies = [control.query(query(serial + index, port=4000 + index), now, limited) for index in range(count)]
    return [reply.error for reply in replies if reply is not None]


def test_the_control_segment_refuses_and_counts() -> None:
    control = segment(rate_limit=5, rate_burst=2)
    assert errors(control, 4) == [Error.OK, Error.OK, Error.CONNLIMIT, Error.CONNLIMIT]
    assert control.statistics().refused == {(5, Refusal.RATE): 2}
    assert errors(control, 2, 1.3, serial=50) == [Error.OK, Error.CONNLIMIT]
    control = segment(client_rate_limit=5, client_rate_burst=1)
    assert errors(control, 2) == [Error.OK, Error.CONNLIMIT]
    assert control.statistics().refused == {(5, Refusal.CLIENT_RATE): 1}


def test_what_a_fast_path_has_let_through_takes_no_second_token() -> None:
    control = segment(rate_limit=1, rate_burst=1)
    assert errors(control, 20, limited=True) == [Error.OK] * 20
    assert errors(control, 2, serial=50) == [Error.OK, Error.CONNLIMIT]


def test_a_virtual_server_that_goes_leaves_nothing() -> None:
    control = segment(rate_limit=1, rate_burst=1)
    assert errors(control, 2) == [Error.OK, Error.CONNLIMIT]
    configuration = control._services.configuration
    control.configure(Configuration(pools=configuration.pools), 1.0)
    control.configure(configuration, 1.0)
    control.handle(NeighbourSeen(1, "10.0.0.7", Host(b"\x02" * 6, 3)), 1.0)
    assert errors(control, 2, serial=50) == [Error.OK, Error.CONNLIMIT]


def test_the_switch_does_not_decide_where_there_are_limits_but_a_fast_path_does() -> None:
    pool = Pool(name="pool", lb_algorithm=Algorithm.SOURCE_IP)
    for limits in ({"rate_limit": 5}, {"client_rate_limit": 0}):
        assert not server(**limits).switch_decides(pool)
        assert server(**limits).switch_decides(pool, limits=True)
    assert server().switch_decides(pool) and not server().limited
