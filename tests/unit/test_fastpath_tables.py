# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Sweeping, reaping, pins, rings: ``lbapp.dataflow.fastpath.tables``, ``lbapp.dataflow.fastpath.kernel``,
``lbapp.dataflow.fastpath.build``; program sweep of ``lbapp/dataflow/fastpath/fastpath.bpf.c``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbapp.dataflow.fastpath import build, kernel, layout
from lbapp.dataflow.fastpath.layout import FlowKey, Mode, Reason, Service, ServiceKey, Wanted
from lbapp.dataflow.fastpath.tables import HALF_CLOSED_MS, HANDSHAKE_MS, all_pins
from tests.fastpath_packets import ACK, FIN, MEMBER_MAC, RST, TCP, UDP, Bench, entries, frame, packed, require_programs

pytest_plugins = ["tests.fastpath_packets"]

CLIENT, VIRTUAL, MEMBER = "10.0.0.1", "10.0.0.100", "10.0.1.7"


def key(port: int = 40000, protocol: int = TCP) -> FlowKey:
    return FlowKey(packed(CLIENT), packed(VIRTUAL), port, 80, protocol)


def open_one(tables: Bench, port: int = 40000, protocol: int = TCP, **more: Any) -> FlowKey:
    """An established connection; its serial is the port."""
    tables.connect(CLIENT, VIRTUAL, MEMBER, protocol, port, serial=port, **more)
    if protocol == TCP:
        tables.walk(frame(CLIENT, VIRTUAL, protocol, port, flags=ACK))
    return key(port, protocol)


def told(tables: Bench) -> dict[int, Reason]:
    return {one.serial: Reason(one.reason) for one in tables.closed()}


# ------------------------------------------------------------------ sweeping


def test_live_ones_stay(tables: Bench) -> None:
    for port in range(1, 11):
        open_one(tables, port)
    swept = tables.sweep()
    assert (swept.live, swept.lingering, swept.idle, swept.shutdown, swept.overflow) == (10, 0, 0, 0, 0)
    assert sum(swept.histogram) == 10
    assert len(tables.flows(100)) == 20


def test_closed_ones_linger(tables: Bench) -> None:
    one = open_one(tables)
    tables.walk(frame(CLIENT, VIRTUAL, flags=RST))
    assert told(tables) == {40000: Reason.SHUTDOWN}
    swept = tables.sweep(1000)
    assert (swept.live, swept.lingering, swept.shutdown) == (0, 1, 0)
    tables.age(one, 1100)
    # A spoofed RST must not hurt: what is used goes on.
    tables.walk(frame(MEMBER, CLIENT, TCP, 8080, 40000, flags=ACK))
    assert tables.sweep(1000).lingering == 1
    tables.age(one, 1100)
    swept = tables.sweep(1000)
    assert (swept.lingering, swept.shutdown) == (0, 1)
    assert tables.flows(10) == [] and told(tables) == {}


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_idle_ones_go(tables: Bench, protocol: int) -> None:
    one = open_one(tables, 1, protocol, idle=60)
    open_one(tables, 2, protocol, idle=60)
    tables.age(one, 59_500)
    assert tables.sweep().idle == 0
    tables.age(one, 1_000)
    swept = tables.sweep()
    assert (swept.idle, swept.live) == (1, 1)
    assert told(tables) == {1: Reason.IDLE}
    assert {flow.serial for _, flow in tables.flows(10)} == {2}


def test_one_direction_is_enough_to_be_alive(tables: Bench) -> None:
    """A download: the client says little."""
    one = open_one(tables, idle=60)
    tables.age(one, 70_000)
    tables.walk(frame(MEMBER, CLIENT, TCP, 8080, 40000, flags=ACK))
    assert tables.sweep().live == 1


def test_an_unfinished_handshake_goes_soon(tables: Bench) -> None:
    tables.connect(CLIENT, VIRTUAL, MEMBER, idle=7440)
    tables.walk(frame(CLIENT, VIRTUAL))
    tables.age(key(), HANDSHAKE_MS - 1000)
    assert tables.sweep().live == 1
    tables.age(key(), 1100)
    assert tables.sweep().idle == 1
    assert told(tables) == {1: Reason.IDLE}


def test_a_half_closed_connection_goes_sooner(tables: Bench) -> None:
    one = open_one(tables, idle=7440)
    tables.walk(frame(CLIENT, VIRTUAL, flags=FIN | ACK))
    tables.age(one, HALF_CLOSED_MS - 1000)
    assert tables.sweep().live == 1
    tables.age(one, 1100)
    assert tables.sweep().idle == 1


def test_eviction_takes_the_oldest(tables: Bench) -> None:
    for port in range(1, 101):
        one = open_one(tables, port)
        tables.age(one, 60_000 if port <= 10 else 5_000 if port <= 30 else 0)
    swept = tables.sweep()
    assert swept.live == 100
    evict = swept.older_than(10)
    swept = tables.sweep(evict_ms=evict)
    assert (swept.overflow, swept.live) == (10, 90)
    assert told(tables) == dict.fromkeys(range(1, 11), Reason.OVERFLOW)
    swept = tables.sweep(evict_ms=1000, evict_most=5)
    assert (swept.overflow, swept.live) == (5, 85)


def test_a_lonely_direction_of_a_connection_goes_as_well(tables: Bench) -> None:
    """Somebody deleted its way back."""
    one = open_one(tables, idle=60)
    tables._flows.delete(FlowKey(packed(MEMBER), packed(CLIENT), 8080, 40000, TCP).pack())
    flow = tables.lookup(one)
    assert flow is not None
    tables._flows.update(one.pack(), flow._replace(used=flow.used - layout.ticks(61_000) & 0xFFFFFFFF).pack())
    assert tables.sweep().idle == 1


def test_deletion_by_what_is_given(tables: Bench) -> None:
    for port, number in ((1, 5), (2, 5), (3, 6)):
        open_one(tables, port, number=number)
    assert tables.delete(virtual_server=7).deleted == 0
    assert tables.delete(virtual_server=6, member=78).deleted == 0
    assert tables.delete(virtual_server=6, member=77).deleted == 1
    assert told(tables) == {3: Reason.DELETED}
    assert tables.delete(ifindex=2).deleted == 0
    assert tables.delete(serial=1).deleted == 1
    assert tables.delete(ifindex=1).deleted == 1
    assert told(tables) == {1: Reason.DELETED, 2: Reason.DELETED}
    assert tables.flows(10) == []


def _many(count: int) -> Iterator[tuple[FlowKey, layout.Flow]]:
    """Established connections with serials from 1, both directions of each."""
    client = packed(CLIENT)
    for serial in range(1, count + 1):
        virtual, target, port = bytes([10, 0, 1, serial >> 15]), bytes([10, 0, 2, serial >> 15]), 1 + (serial & 0x7FFF)
        yield (FlowKey(client, virtual, port, 80, TCP),
               layout.Flow(client, target, port, 80, MEMBER_MAC, MEMBER_MAC, 1, layout.ESTABLISHED, serial, 5, 77, 100))
        yield (FlowKey(target, client, 80, port, TCP),
               layout.Flow(virtual, client, 80, port, MEMBER_MAC, MEMBER_MAC, 1, layout.OUTBOUND, serial, 5, 77, 100))


def test_everything_at_once(tables: Bench) -> None:
    """More than the ring holds: nobody is forgotten, nobody is told of twice."""
    many = tables.maps["closed"].max_entries // layout.CLOSED_RECORD.size + 5000
    assert set(tables.install(entries(list(_many(many))))) == {layout.Result.OPENED}
    assert tables.delete(everything=True).deleted == many
    serials: Counter[int] = Counter()
    while some := tables.closed(7000):
        assert len(some) <= 7000
        serials.update(one.serial for one in some)
    assert len(serials) == many and set(serials.values()) == {1}
    assert tables.counted()["closed_count"] == many and tables.flows(1) == []


def test_a_full_ring_keeps_what_it_cannot_tell(tables: Bench) -> None:
    """A connection that ends meanwhile goes on, and is told of by a later sweep."""
    many = tables.maps["closed"].max_entries // layout.CLOSED_RECORD.size + 500
    tables.install(entries(list(_many(many))))
    for serial in range(1, many + 1):
        kernel.run(tables.programs["wire"], frame(CLIENT, f"10.0.1.{serial >> 15}", TCP, 1 + (serial & 0x7FFF),
                                                  flags=RST))
    assert tables.sweep(60_000).lingering == many
    untold = {flow.serial for _, flow in tables.flows(2 * many)
              if not flow.state & (layout.OUTBOUND | layout.REPORTED)}
    assert len(untold) >= 500
    time.sleep(0.05)
    assert tables.sweep(20).kept == 1
    first = {one.serial for one in tables.closed(many)}
    assert first.isdisjoint(untold) and len(first) == many - len(untold)
    assert tables.sweep(20).kept == 0
    assert {one.serial for one in tables.closed(many)} == untold
    assert tables.flows(1) == []


def test_walks_beside_each_other_keep_their_orders_apart(tables: Bench) -> None:
    """One thread sweeps all the while; what the other one deletes and asks about is what it named."""
    many, done, seen = 1000, threading.Event(), []
    tables.install(entries(list(_many(many))))

    def sweep() -> None:
        while not done.is_set():
            seen.append(tables.sweep(60_000))

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        for serial in range(1, many, 100):
            swept, missing = tables.reap({serial: Wanted(final=True), many + serial: Wanted()})
            assert (swept.deleted, missing) == (1, {many + serial})
            assert tables.delete(member=54_321).deleted == 0
            assert tables.lookup(FlowKey(packed(CLIENT), packed("10.9.9.9"), 1, 2, TCP)) is None
        until = time.monotonic() + 5
        while len(seen) < 10 and time.monotonic() < until:
            time.sleep(0.001)
    finally:
        done.set()
        thread.join()
    assert len(seen) >= 10
    assert all(swept.deleted == swept.idle == swept.overflow == swept.kept == 0 for swept in seen), "not its orders"
    assert all(many - many // 100 <= swept.live <= many for swept in seen)
    assert tables.sweep().live == many - many // 100


def test_reap(tables: Bench) -> None:
    """003, FIGURES 19 and 20: a live flow is told of as alive, a closed one goes, a final one goes in any case."""
    for port in (1, 2, 3):
        open_one(tables, port)
    tables.walk(frame(CLIENT, VIRTUAL, TCP, 2, flags=RST))
    assert told(tables) == {2: Reason.SHUTDOWN}
    swept, missing = tables.reap({1: Wanted(), 2: Wanted(), 3: Wanted(final=True), 4: Wanted()})
    assert missing == {4}
    assert (swept.deleted, swept.shutdown, swept.live) == (1, 1, 1)
    records = {one.serial: one for one in tables.closed()}
    assert {serial: one.reason for serial, one in records.items()} == {1: Reason.ALIVE, 3: Reason.DELETED}
    assert records[1].packets_in == 1
    assert tables.service_stats()[5, 77].closed == 2
    assert {flow.serial for _, flow in tables.flows(10)} == {1}
    assert list(tables.maps["wanted"].items()) == []


@pytest.mark.parametrize("state", [0, layout.SPLICE])
@pytest.mark.parametrize("ends", [(CLIENT, VIRTUAL, MEMBER), ("fd00::1", "fd00::100", "fd00:1::7")], ids=["4", "6"])
def test_whether_a_member_has_said_anything(tables: Bench, ends: tuple[str, str, str], state: int) -> None:
    client, virtual, member = ends
    tables.connect(client, virtual, member, TCP, 40000, serial=9, state=state)
    if state:
        assert tables.set_splices({9: layout.Splice(77)}) == set()

    def answered() -> bool:
        tables.reap({9: Wanted()})
        (told,) = tables.closed()
        assert (told.serial, told.reason) == (9, Reason.ALIVE)
        return bool(told.state & layout.ANSWERED)

    tables.walk(frame(client, virtual, TCP, 40000, flags=ACK, payload=b"a request"))
    assert not answered()
    tables.walk(frame(member, client, TCP, 8080, 40000, flags=ACK))
    assert not answered(), "an acknowledgment is no answer"
    tables.walk(frame(member, client, TCP, 8080, 40000, flags=ACK, payload=b"x"))
    assert answered()
    tables.walk(frame(member, client, TCP, 8080, 40000, flags=ACK))
    assert answered()


def test_a_new_idle_time_out(tables: Bench) -> None:
    """003, TIMEOUT."""
    one = open_one(tables, 1, idle=100)
    _, missing = tables.reap({1: Wanted(idle_seconds=1000), 2: Wanted(idle_seconds=5)})
    assert missing == {2}
    assert told(tables) == {}
    tables.age(one, 200_000)
    assert tables.sweep().live == 1
    tables.reap({1: Wanted(idle_seconds=10)})
    assert told(tables) == {1: Reason.IDLE}


def test_a_member_that_moved_takes_its_connections_along(tables: Bench) -> None:
    open_one(tables)
    mac = bytes.fromhex("0200000000aa")
    assert tables.relocate(78, mac, 1).relocated == 0
    assert tables.relocate(77, mac, 1).relocated == 1
    assert tables.walk(frame(CLIENT, VIRTUAL, flags=ACK)).eth_dst == mac
    assert tables.walk(frame(MEMBER, CLIENT, TCP, 8080, 40000, flags=ACK)).eth_dst != mac


def test_tracked_ones(tables: Bench) -> None:
    open_one(tables, 1, state=layout.TRACKED)
    open_one(tables, 2)
    open_one(tables, 3, state=layout.TRACKED)
    tables.walk(frame(CLIENT, VIRTUAL, TCP, 3, flags=RST))
    assert tables.tracked() == [(1, 5, 77)]


# ------------------------------------------------------------------ told and read


def test_services_and_targets(tables: Bench) -> None:
    one, other = (ServiceKey(packed(address), 80, TCP) for address in ("10.0.0.100", "fd00::100"))
    tables.set_services({one: Service(1, Mode.PASS, 0, 1), other: Service(2, Mode.PASS, 0, 1)})
    assert tables.services() == {one: 1, other: 2}
    tables.set_services({one: None, ServiceKey(packed("10.0.0.9"), 1, 1): None})
    assert tables.services() == {other: 2}
    tables.set_targets({number: layout.Target(None, 0, MEMBER_MAC, 1, 1) for number in range(1, 5001)})
    tables.set_targets({7: None, 9999: None})
    assert set(tables.targets()) == set(range(1, 5001)) - {7}


def test_kernel_memory(tables: Bench) -> None:
    before = tables.kernel_memory()["flows"]
    for port in range(1, 1001):
        tables.connect(CLIENT, VIRTUAL, MEMBER, TCP, port)
    assert 0 < tables.kernel_memory()["flows"] - before <= 1000 * 480


def test_statistics_of_what_is_no_more(tables: Bench) -> None:
    open_one(tables)
    assert tables.service_stats()[5, 77].opened == 1
    tables.forget_stats([(5, 77), (1, 1)])
    assert tables.service_stats() == {}


# ------------------------------------------------------------------ pins


@pytest.fixture
def pins() -> Iterator[Path]:
    require_programs()
    kernel.mount()
    folder = kernel.BPFFS / "lbapp-test" / f"{os.getpid()}"
    yield folder
    kernel.unpin(folder)
    assert not folder.parent.exists()


def test_another_process_takes_over(pins: Path) -> None:
    """Connections, tables and counters go on; so does the secret of the hashes."""
    first = Bench(pins, max_connections=500)
    assert not first.adopted
    first.serve(VIRTUAL, [MEMBER])
    first.walk(frame(CLIENT, VIRTUAL))
    seed = first.maps["layout"].lookup(bytes(4))
    first.close(keep=True)
    assert {"flows", "services", "layout"} <= {path.name for path in pins.iterdir()}
    second = Bench(pins, max_connections=1000)
    try:
        assert second.adopted and second.max_flows == 500
        assert second.walk(frame(CLIENT, VIRTUAL, flags=ACK)).destination == MEMBER
        assert second.counters()["opened_here"] == 1
        assert second.maps["layout"].lookup(bytes(4)) == seed
        assert second.services() == {ServiceKey(packed(VIRTUAL), 80, TCP): 5}
        second.walk(frame(CLIENT, VIRTUAL, flags=RST))
        assert len(second.closed()) == 1
    finally:
        second.close()
    assert not pins.exists()


def test_pins_of_another_version_make_room(pins: Path) -> None:
    first = Bench(pins, max_connections=10)
    first.serve(VIRTUAL, [MEMBER])
    old = layout.Layout.unpack(first.maps["layout"].lookup(bytes(4)) or b"")
    first.maps["layout"].update(bytes(4), old._replace(version=old.version + 1).pack())
    first.close(keep=True)
    second = Bench(pins, max_connections=20)
    try:
        assert not second.adopted and second.services() == {} and second.max_flows == 20
    finally:
        second.close()


def test_the_folders_of_all_pins(tmp_path: Path) -> None:
    assert list(all_pins(tmp_path)) == []
    (tmp_path / "lbapp" / "0001").mkdir(parents=True)
    assert list(all_pins(tmp_path)) == [tmp_path / "lbapp" / "0001"]


# ------------------------------------------------------------------ kernel


def test_errors_say_what_and_why(tmp_path: Path) -> None:
    require_programs()
    with pytest.raises(kernel.KernelError, match="No such file"):
        kernel.Object(tmp_path / "missing.o")
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"not an object")
    with pytest.raises(kernel.KernelError, match="broken"):
        kernel.Object(broken)


def test_a_map_that_needs_more_room_for_a_bucket(tables: Bench) -> None:
    for port in range(1, 200):
        tables.connect(CLIENT, VIRTUAL, MEMBER, TCP, port)
    found = [bytes(keys) for keys, _ in tables._flows.chunks(1)]
    assert len(b"".join(found)) == 199 * 2 * layout.KEY.size


def test_one_missing_element(tables: Bench) -> None:
    assert tables._flows.lookup(bytes(40)) is None
    assert not tables._flows.delete(bytes(40))
    assert tables._flows.update(bytes(40), bytes(96), kernel.NOEXIST)
    assert not tables._flows.update(bytes(40), bytes(96), kernel.NOEXIST)


# ------------------------------------------------------------------ build


def test_build_makes_it_once(tmp_path: Path) -> None:
    require_programs()
    target = tmp_path / "made.o"
    assert build.build(target) and target.read_bytes()[:4] == b"\x7fELF"
    assert build.up_to_date(target) and not build.build(target)
    os.utime(target, (0, 0))
    assert not build.up_to_date(target) and build.build(target)
    assert [path.name for path in tmp_path.iterdir()] == ["made.o"]


def test_build_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="clang is not installed"):
        build.build(tmp_path / "made.o")
    compiler = tmp_path / "clang"
    compiler.write_text("#!/bin/sh\necho \"fatal error: 'bpf/bpf_helpers.h' file not found\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(build.BuildError, match="libbpf-dev"):
        build.build(tmp_path / "made.o")
    assert not (tmp_path / "made.o").exists()


def test_the_command() -> None:
    require_programs()
    done = subprocess.run([sys.executable, "-m", "lbapp.dataflow.fastpath.build"], capture_output=True, text=True,
                          check=False, cwd=Path(__file__).resolve().parents[2])
    assert (done.returncode, done.stderr) == (0, "")
