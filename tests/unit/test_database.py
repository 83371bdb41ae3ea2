# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The embedded database process: created, adopted, upgraded, refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from lbapp.config.database import SCHEMA, DatabaseError, EmbeddedDatabase
from lbapp.config.model import Algorithm, Switch, VirtualServer
from lbapp.config.rows import COLUMNS, MONITORED
from lbapp.config.store import Create, Store


@pytest.fixture
def database(tmp_path):
    database = EmbeddedDatabase(tmp_path / "state")
    yield database
    database.stop()


def transact(database: EmbeddedDatabase, *operations: dict) -> list[dict]:
    text = json.dumps(["lbapp", *operations])
    done = subprocess.run(["ovsdb-client", "transact", database.remote, text], capture_output=True, text=True,
                          check=True, timeout=20)
    return json.loads(done.stdout)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    with contextlib.suppress(OSError):  # nobody has its number any more
        while Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def older_schema(tmp_path: Path, version: str, *left_out: tuple[str, str], tables: tuple[str, ...] = ()) -> Path:
    """A schema like ours without some columns, and without some tables."""
    schema = json.loads(SCHEMA.read_text())
    schema["version"] = version
    for table, column in left_out:
        del schema["tables"][table]["columns"][column]
    for table in tables:
        del schema["tables"][table]
    path = tmp_path / f"{version}.ovsschema"
    path.write_text(json.dumps(schema))
    return path


def test_schema_has_the_columns_of_the_model():
    tables = json.loads(SCHEMA.read_text())["tables"]
    assert set(tables) == set(MONITORED)
    for table, columns in MONITORED.items():
        assert set(tables[table]["columns"]) == set(columns)
    assert set(COLUMNS["Virtual_Server"]) == set(VirtualServer.__struct_fields__) - {"id"}


def test_start_creates_a_private_directory_and_answers(database):
    database.start()
    assert stat.S_IMODE(database.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(database.file.stat().st_mode) & 0o077 == 0
    assert transact(database, {"op": "select", "table": "Pool", "where": []}) == [{"rows": []}]


def test_a_running_server_is_adopted(database):
    database.start()
    pid = database.pid
    EmbeddedDatabase(database.directory).start()
    database.start()
    assert database.pid == pid


def test_stop_ends_it_and_a_second_stop_is_nothing(database):
    database.start()
    pid = database.pid
    database.stop()
    wait_for_end(pid)
    database.stop()
    assert database.pid is None


def test_rows_survive_kill_9_of_the_server(database):
    database.start()
    transact(database, {"op": "insert", "table": "Pool", "row": {"name": "kept"}}, {"op": "commit", "durable": True})
    pid = database.pid
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    database.start()
    assert database.pid != pid
    [answer] = transact(database, {"op": "select", "table": "Pool", "where": [], "columns": ["name"]})
    assert answer == {"rows": [{"name": "kept"}]}


def test_a_stale_pidfile_of_another_process_is_not_believed(database):
    database.directory.mkdir(mode=0o700)
    database.pidfile.write_text(f"{os.getpid()}\n")
    assert database.pid is None
    database.start()
    assert database.pid not in (None, os.getpid())


def test_a_server_that_hangs_is_replaced(database, monkeypatch):
    database.start()
    pid = database.pid
    monkeypatch.setattr(EmbeddedDatabase, "_answers", lambda self, seconds=0.3: _answers(self, 0.3))
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr("lbapp.config.database.STOP_SECONDS", 0.3)
    database.start()
    assert database.pid not in (None, pid)
    wait_for_end(pid)


_answers = EmbeddedDatabase._answers


def test_upgrade_from_an_older_schema_keeps_rows_and_fills_in_defaults(database, tmp_path):
    old = EmbeddedDatabase(database.directory, older_schema(
        tmp_path, "0.9.0", ("Virtual_Server", "connection_limit"), ("Virtual_Server", "maintenance"),
        ("Pool", "lb_algorithm"), ("Member", "draining")))
    old.start()
    answer = transact(
        old,
        {"op": "insert", "table": "Settings", "row": {"generation": 7, "next_virtual_server_number": 5,
                                                      "next_member_number": 9}},
        {"op": "insert", "table": "Pool", "uuid-name": "farm", "row": {"name": "farm", "revision": 3}},
        {"op": "insert", "table": "Member", "row": {"pool_id": ["named-uuid", "farm"], "address": "10.0.0.1",
                                                    "protocol_port": 80, "number": 8}},
        {"op": "insert", "table": "Virtual_Server", "row": {
            "name": "web", "number": 4, "revision": 2, "vip_address": "10.0.0.100", "protocol": "TCP",
            "protocol_port": 80, "default_pool_id": ["named-uuid", "farm"]}},
        {"op": "commit", "durable": True})
    assert not any("error" in one for one in answer), answer

    database.start()  # adopts nothing: the running server has the old schema

    store = Store(database.remote)
    store.start()
    try:
        [server] = store.configuration.virtual_servers.values()
        pool = store.configuration.pool_of(server)
        assert pool is not None
        assert (server.name, server.number, server.connection_limit, server.maintenance) == ("web", 4, -1, False)
        assert pool.lb_algorithm is Algorithm.ROUND_ROBIN
        assert pool.members[0].draining is False
        assert store.snapshot.revisions[server.id] == 2
        assert store.snapshot.settings.next_member_number == 9
    finally:
        store.stop()
    [backup] = database.directory.glob("lbapp.db.backup-0.9.0-*")
    assert b"10.0.0.100" in backup.read_bytes()


def test_a_database_from_before_switches_were_asked_anything(database, tmp_path):
    old = EmbeddedDatabase(database.directory, older_schema(tmp_path, "1.2.0", tables=("Switch",)))
    old.start()
    assert "error" not in str(transact(old, {"op": "insert", "table": "Pool", "row": {"name": "kept"}}))
    database.start()
    store = Store(database.remote)
    store.start()
    try:
        assert [pool.name for pool in store.configuration.pools.values()] == ["kept"]
        assert store.configuration.switches == {}
        store.apply([Create(Switch(name="7", draining=True))])
        assert store.configuration.draining == {7}
    finally:
        store.stop()


def test_a_newer_database_is_refused_and_left_alone(database, tmp_path):
    newer = EmbeddedDatabase(database.directory, older_schema(tmp_path, "99.0.0"))
    newer.start()
    newer.stop()
    before = database.file.read_bytes()
    with pytest.raises(DatabaseError, match=r"99\.0\.0 is newer than \d+\.\d+\.\d+, the newest.*use a newer lbapp"):
        database.start()
    assert database.file.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(database):
    database.directory.mkdir(mode=0o700)
    database.file.write_text("nonsense")
    with pytest.raises(DatabaseError, match=r"lbapp\.db"):
        database.start()
    assert database.file.read_text() == "nonsense"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(DatabaseError, match="shorter path"):
        EmbeddedDatabase(tmp_path / ("x" * 120)).start()
