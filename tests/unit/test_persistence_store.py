# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who is known again, on disk (:mod:`lbapp.persistence_store`): files that are good, broken, and cannot be written."""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eventlet
import pytest

from lbapp import persistence_store as module
from lbapp.config.pool import Persistence, PersistenceType, Pool
from lbapp.control.persistence import Changes, Clients, Kept
from lbapp.persistence_store import Keeper, Pending, PersistenceStore

POOLS = {name: Pool(name=name, persistence=Persistence(type=PersistenceType.SOURCE_IP, timeout=1000))
         for name in ("p", "q")}


def kept(last: int, pool: str = "p", member: int = 1, age: float = 0.0) -> Kept:
    return Kept(pool, bytes((10, 0, 0, last)), "SOURCE_IP 32 128", member, age, 1000.0)


def written(store: PersistenceStore, *entries: Kept, cleared: tuple[tuple[str, int], ...] = (),
            clock: float = 1000.0) -> None:
    pending = Pending()
    pending.add(Changes(cleared, entries), clock)
    store.write(pending)


def clients() -> Clients:
    made = Clients()
    made.configure(POOLS)
    return made


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def keeper(directory: Path, known: Clients) -> Keeper:
    return Keeper(known, PersistenceStore(directory), here)


def last_of(found: list[Kept]) -> list[tuple[str, int, int]]:
    return sorted((one.pool, one.key[-1], one.member) for one in found)


# ------------------------------------------------------------------ the file


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    store = PersistenceStore(tmp_path)
    assert store.load(1000.0) == []
    written(store, kept(1, age=100.0), kept(2, member=2), kept(1, "q", 3))
    store.close()
    again = PersistenceStore(tmp_path)
    assert last_of(again.load(1000.0)) == [("p", 1, 1), ("p", 2, 2), ("q", 1, 3)]
    assert [one.age for one in again.load(1050.0)] == [150.0, 50.0, 50.0]
    assert last_of(again.load(1950.0)) == [("p", 2, 2), ("q", 1, 3)], "the other's time is over"
    assert {one.age for one in again.load(0.0)} == {0.0}, "a clock that was set back"
    written(again, kept(2, member=0), kept(1, member=7))
    assert last_of(again.load(1000.0)) == [("p", 1, 7), ("q", 1, 3)]


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    (tmp_path / module.FILE).touch(0o644)
    store = PersistenceStore(tmp_path)
    written(store, kept(1))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_clearings(tmp_path: Path) -> None:
    store = PersistenceStore(tmp_path)
    everybody = [kept(1), kept(2, member=2), kept(1, "q"), kept(2, "q", 2)]
    for cleared, left in ((("p", 0), [("q", 1, 1), ("q", 2, 2)]), (("", 2), [("p", 1, 1), ("q", 1, 1)]),
                          (("q", 1), [("p", 1, 1), ("p", 2, 2), ("q", 2, 2)]), (("", 0), [])):
        written(store, *everybody)
        written(store, cleared=(cleared,))
        assert last_of(store.load(1000.0)) == left
    written(store, kept(9), cleared=(("", 0),))
    assert last_of(store.load(1000.0)) == [("p", 9, 1)], "who came since is there"


def test_what_is_over_is_deleted(tmp_path: Path) -> None:
    store = PersistenceStore(tmp_path)
    written(store, kept(1, age=500.0), kept(2))
    store.write(Pending(), 1600.0)
    assert last_of(store.load(0.0)) == [("p", 2, 1)]


def broken_text(path: Path) -> None:
    path.write_bytes(b"this is no database\n" * 300)


def broken_inside(path: Path) -> None:
    store = PersistenceStore(path.parent)
    written(store, *(kept(n, member=n + 1, pool="p" * 300) for n in range(200)))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)



@pytest.mark.parametrize("spoil", [broken_text, broken_inside])
def test_a_broken_file_is_put_aside(tmp_path: Path, spoil: Callable[[Path], None],
                                    caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / module.FILE
    spoil(path)
    store = PersistenceStore(tmp_path)
    assert store.load(1000.0) == []
    assert path.with_suffix(".broken").exists()
    assert len([one for one in caplog.records if "put aside" in one.getMessage()]) == 1
    written(store, kept(1))
    assert last_of(store.load(1000.0)) == [("p", 1, 1)]


def test_a_file_that_breaks_while_it_is_used(tmp_path: Path) -> None:
    store = PersistenceStore(tmp_path)
    written(store, *(kept(n, pool="p" * 300) for n in range(200)))
    store.close()
    written(store, kept(201))
    data = bytearray((tmp_path / module.FILE).read_bytes())
    store.close()
    (tmp_path / module.FILE).write_bytes(data[:100] + bytes(len(data) - 100))
    with_new = PersistenceStore(tmp_path)
    written(with_new, kept(1))
    assert last_of(with_new.load(1000.0)) == [("p", 1, 1)]


# ------------------------------------------------------------------ what waits to be written


def test_what_is_pending_is_one_change_an_entry() -> None:
    pending = Pending()
    assert not pending
    pending.add(Changes((), (kept(1), kept(2, member=2))), 1000.0)
    pending.add(Changes((), (kept(1, member=3, age=10.0),)), 1000.0)
    assert [None if row is None else row[3:] for row in pending.entries.values()] == [
        (2, 1000.0, 2000.0), (3, 990.0, 1990.0)]
    pending.add(Changes((("p", 2),), (kept(4, member=0),)), 1000.0)
    assert [key[1][-1] for key in pending.entries] == [1, 4]
    assert list(pending.cleared) == [("p", 2)]


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 2)
    pending = Pending()
    pending.add(Changes((), tuple(kept(n) for n in range(5))), 0.0)
    assert [key[1][-1] for key in pending.entries] == [3, 4] and pending.lost == 3


# ------------------------------------------------------------------ the keeper


def test_a_restart(tmp_path: Path) -> None:
    known = clients()
    one = keeper(tmp_path, known)
    one.start(one.read())
    now = time.monotonic()
    known.bind("p", b"\x0a\0\0\1", 7, now)
    known.bind("q", b"\x0a\0\0\2", 8, now - 990)
    one.keep()
    known.bind("p", b"\x0a\0\0\3", 9, now)
    one.stop()
    again = clients()
    other = keeper(tmp_path, again)
    other.start(other.read())
    assert again.member("p", b"\x0a\0\0\1", time.monotonic()) == 7
    assert again.member("p", b"\x0a\0\0\3", time.monotonic()) == 9, "written at the end"
    assert again.member("q", b"\x0a\0\0\2", time.monotonic() + 11) == 0, "its age was kept"
    assert again.changes(time.monotonic()).entries[0].member == 0, "and that it is over now"
    other.stop()


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    ahead = 0.0
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead)
    known = clients()
    one = keeper(tmp_path, known)
    one.start(one.read())
    now = time.monotonic()
    known.bind("p", b"\x0a\0\0\1", 7, now - 400)
    one.keep()
    ahead = jump
    known.bind("p", b"\x0a\0\0\2", 8, now)
    one.keep()
    one.keep()
    found = PersistenceStore(tmp_path).load(time.time())
    assert {entry.key[-1]: entry.member for entry in found} == {1: 7, 2: 8}
    assert {entry.key[-1]: entry.age for entry in found} == pytest.approx({1: 400, 2: 0}, abs=5)
    one.stop()


def test_what_waits_for_a_disk_moves_with_the_clock(tmp_path: Path) -> None:
    store, pending = PersistenceStore(tmp_path), Pending()
    written(store, kept(1), clock=1000.0)
    pending.add(Changes((), (kept(2), kept(3, member=0))), 1000.0)
    pending.move(50.0)
    assert pending
    pending.add(Changes((), (kept(4),)), 1050.0)
    store.write(pending)
    assert [(one.key[-1], one.age) for one in store.load(1050.0)] == [(1, 0.0), (2, 0.0), (4, 0.0)]


def test_many_changes_are_gathered_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)
    known = clients()
    one = keeper(tmp_path, known)
    for number in range(10):
        known.bind("p", bytes((10, 0, 0, number)), 1, time.monotonic())
    turns: list[float] = []
    monkeypatch.setattr(eventlet, "sleep", turns.append)
    one.keep()
    assert turns == [0, 0, 0]
    assert len(PersistenceStore(tmp_path).load(time.time())) == 10


def test_nothing_is_written_where_nothing_changed(tmp_path: Path) -> None:
    calls: list[Any] = []
    known = clients()
    one = Keeper(known, PersistenceStore(tmp_path), lambda *call: calls.append(call))
    one.keep()
    one.keep()
    assert len(calls) == 1, "the first one deletes what is over"
    known.bind("p", b"\x0a\0\0\1", 7, time.monotonic())
    one.keep()
    assert len(calls) == 2


def test_a_disk_that_takes_nothing_is_told_of_once_and_tried_again(tmp_path: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / module.FILE).mkdir()
    known = clients()
    one = keeper(tmp_path, known)
    one.start(one.read())
    for last in (1, 2, 3):
        known.bind("p", bytes((10, 0, 0, last)), last, time.monotonic())
        one.keep()
    assert one.failing
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    (tmp_path / module.FILE).rmdir()
    one.keep()
    assert not one.failing
    assert "again" in caplog.records[-1].getMessage()
    assert last_of(PersistenceStore(tmp_path).load(time.time())) == [("p", 1, 1), ("p", 2, 2), ("p", 3, 3)]
    one.stop()


def test_a_full_disk(tmp_path: Path) -> None:
    known = clients()
    store = PersistenceStore(tmp_path)
    one = Keeper(known, store, here)
    one.keep()
    assert store._connection is not None
    store._connection.execute("PRAGMA max_page_count=3")
    for number in range(2000):
        known.bind("p", number.to_bytes(4, "big"), 1, time.monotonic())
    one.keep()
    assert one.failing and store.load(time.time()) == [], "all or none"
    store._connection.execute("PRAGMA max_page_count=100000")
    one.keep()
    assert not one.failing and len(store.load(time.time())) == 2000
    one.stop()


def test_it_works_beside_greenlets(tmp_path: Path) -> None:
    """As in the controller: the disk's work is a native thread's, and the hub goes on."""
    known = clients()
    one = Keeper(known, PersistenceStore(tmp_path))
    one.start(one.read())
    known.bind("p", b"\x0a\0\0\1", 7, time.monotonic())
    deadline = time.monotonic() + 30
    other = PersistenceStore(tmp_path)
    while not other.load(time.time()) and time.monotonic() < deadline:
        eventlet.sleep(0.05)
    assert last_of(other.load(time.time())) == [("p", 1, 7)]
    one.stop()
    assert (tmp_path / module.FILE).exists()
