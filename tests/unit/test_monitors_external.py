# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""lbapp.monitors.external: scripts that do well, ill, nothing, too much."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lbapp.monitors.checks import Surroundings
from lbapp.monitors.errors import CheckFailed
from lbapp.monitors.external import executable
from lbapp.monitors.process import Checker
from tests.monitored import HASTY, command, finds, target
from topologies.namespace import wait_until


def script(directory: Path, text: str, name: str = "check", mode: int = 0o755) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def found(directory: Path | None, text: str = "", address: str = "127.0.0.1", **fields: Any) -> str:
    if directory is not None:
        script(directory, text)
    return finds(target(80, address, type="EXTERNAL", command="check", **fields), directory)


@pytest.mark.parametrize(("text", "reason"), [
    ("exit 0", "up"),
    ("echo all is fine; exit 0", "up"),
    ("echo; echo the disk is full; echo more; exit 1", "the disk is full"),
    ("echo bad news >&2; exit 2", "bad news"),
    ("exit 3", "exit status 3"),
    ("kill -9 $$", "ended by signal 9"),
    ("printf '\\033[31mred\\033[0m\\n'; exit 1", "[31mred [0m"),
    ("head -c 100000 /dev/zero | tr '\\0' x; exit 1", "x" * 199 + "…"),
    ("exec 1>&- 2>&-; exit 4", "exit status 4"),
    ("cat; exit 0", "up"),  # there is nothing to read
])
def test_scripts(tmp_path: Path, text: str, reason: str) -> None:
    assert found(tmp_path, text) == reason


def test_what_a_script_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert found(tmp_path, f'printf "%s|" "$@" > {out}; pwd >> {out}; env | sort | cut -d= -f1 >> {out}', "2001:db8::1",
                 port=8080, arguments=["a b", "$(id)", ""]) == "up"
    first, *rest = out.read_text().splitlines()
    assert first == "2001:db8::1|8080|a b|$(id)||/"
    assert set(rest) <= {"LANG", "PATH", "PWD", "OLDPWD", "SHLVL", "_"} and {"LANG", "PATH"} <= set(rest)


def test_its_limits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert found(tmp_path, f"ulimit -n > {out}; ulimit -v >> {out}; ulimit -t >> {out}; ulimit -c >> {out}",
                 interval=30, timeout=30) == "up"
    files, memory, seconds, core = (int(line) for line in out.read_text().split())
    assert files <= 256 and memory <= 1 << 20 and seconds == 31 and core == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_when_its_time_is_over_all_of_it_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    assert found(tmp_path, f"trap '' TERM; echo $$ > {pids}; sleep 300 & echo $! >> {pids}; wait",
                 interval=6, timeout=5) == "no end within 5 s"
    wait_until(lambda: not any(map(alive, map(int, pids.read_text().split()))), 20, "all of it is gone")


def test_what_it_leaves_behind_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    begun = time.monotonic()
    assert found(tmp_path, f"sleep 300 & echo $! > {pids}; exit 0", interval=60, timeout=60) == "up"
    assert time.monotonic() - begun < 50  # though the sleeper held its output open
    wait_until(lambda: not alive(int(pids.read_text())), 20, "it is gone")


def test_output_without_end_does_not_fill_anything(tmp_path: Path) -> None:
    assert found(tmp_path, "yes", interval=2, timeout=1) == "no end within 1 s"


def test_what_is_not_started(tmp_path: Path) -> None:
    assert found(None) == "no directory of scripts was given to the controller"
    assert finds(target(80, type="EXTERNAL", command="none"), tmp_path) == "none: no such file or directory"
    script(tmp_path, "", mode=0o644)
    assert finds(target(80, type="EXTERNAL", command="check"), tmp_path) == "check is not executable"
    script(tmp_path, "", mode=0o777)
    assert finds(target(80, type="EXTERNAL", command="check"), tmp_path) == (
        "check may be written by everybody, so it is not started")
    (tmp_path / "check").unlink()
    (tmp_path / "check").mkdir()
    assert finds(target(80, type="EXTERNAL", command="check"), tmp_path) == "check is not executable"
    script(tmp_path, "", "text").write_text("no program\n")
    assert finds(target(80, type="EXTERNAL", command="text"), tmp_path) == (
        "text cannot be started: exec format error")


def test_a_host_that_can_start_nothing_says_nothing_of_the_member(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "exit 0")
    started: list[int] = []
    popen = subprocess.Popen

    def fail_once(*arguments: Any, **options: Any) -> Any:
        started.append(1)
        if len(started) == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", fail_once)
    assert finds(target(80, type="EXTERNAL", command="check", interval=2, timeout=2, jitter=0), tmp_path) == "up"
    assert len(started) == 2


@pytest.mark.parametrize("name", ["../check", "/bin/true", "..", ".", "a/b"])
def test_no_name_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    script(tmp_path, "exit 0")
    with pytest.raises(CheckFailed, match="is no name of a script"):
        executable(tmp_path / "in", name)


def test_only_so_many_at_once_and_who_waits_does_not_fail(tmp_path: Path) -> None:
    counted = tmp_path / "counted"
    counted.mkdir()
    script(tmp_path, f"touch {counted}/$$; ls {counted} | wc -l >> {tmp_path}/seen; sleep 0.3; rm {counted}/$$")

    async def run() -> list[bool]:
        around = Surroundings(asyncio.get_running_loop(), tmp_path, asyncio.Semaphore(2))
        checker = Checker(around, 100)
        checker.take(command(*((f"{index}", target(80, type="EXTERNAL", command="check"))
                               for index in range(8))))
        up: list[bool] = []
        try:
            async with asyncio.timeout(100):
                while len(up) < 8:
                    await checker.news.wait()
                    checker.news.clear()
                    up += [one.up for one in checker.changed.values()]
                    checker.changed.clear()
        finally:
            checker.close()
        return up

    assert asyncio.run(run()) == [True] * 8
    assert max(map(int, (tmp_path / "seen").read_text().split())) <= 2
    assert not list(counted.iterdir())


def test_a_hasty_one_is_told_what_was_lacking(tmp_path: Path) -> None:
    script(tmp_path, "sleep 60")
    assert finds(target(80, type="EXTERNAL", command="check", **HASTY), tmp_path) == "no end within 0.4 s"
