# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a failed test's report says of the machine."""

from __future__ import annotations

from pathlib import Path

from tests.machine import Watch


def test_what_happened_since_the_beginning_is_told(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  1000 0 1000 1000 0 0 0 1000 7 7\ncpu0 1 2 3\n")
    watch = Watch(stat)
    stat.write_text("cpu  2000 0 1000 1000 0 0 0 1000 7 7\n")
    watch.begin()
    stat.write_text("cpu  2010 0 1040 1010 10 0 0 1030 7 7\n")
    assert "CPUs 10 % idle, 10 % waiting for disks, 30 % taken by other machines; load " in watch.told()
