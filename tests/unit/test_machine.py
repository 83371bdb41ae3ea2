# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a failed test's report says of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from tests.machine import Watch


def test_what_happened_since_the_beginning_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(*times: int) -> None:
        names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
        monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(**dict(zip(names, times, strict=True))))

    spent(1000, 0, 1000, 1000, 0, 0, 0, 1000, 7, 7)
    watch = Watch()
    spent(2000, 0, 1000, 1000, 0, 0, 0, 1000, 7, 7)
    watch.begin()
    spent(2010, 0, 1040, 1010, 10, 0, 0, 1030, 7, 7)
    assert "CPUs 10 % idle, 10 % waiting for disks, 30 % taken by other machines; load " in watch.told()
