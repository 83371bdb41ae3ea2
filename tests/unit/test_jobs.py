# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What is left to be done to a switch, and what that is about."""

from __future__ import annotations

from lbapp import jobs as module
from lbapp.jobs import Jobs


def test_jobs_are_left_until_they_are_done() -> None:
    jobs = Jobs(10)
    assert not jobs
    assert jobs.put("configure", "all") and jobs.put("host", "10.0.0.1") and jobs.put("host", "10.0.0.1")
    assert set(jobs.moving) == {"10.0.0.1"}
    for about, moving in (("all", {"10.0.0.1"}), ("10.0.0.1", {"10.0.0.1"}), ("10.0.0.1", set())):
        job = jobs.next()
        assert job[1] == about and jobs, "it is being done"
        jobs.done(*job)
        assert set(jobs.moving) == moving
    assert not jobs


def test_there_is_room_for_so_many() -> None:
    jobs = Jobs(2)
    assert [jobs.put("configure", number) for number in range(3)] == [True, True, False]
    assert jobs.next() == ("configure", 0)


def test_so_many_packets_wait() -> None:
    jobs = Jobs(10_000)
    assert jobs.put("configure", None)
    assert [jobs.hold(b"packet") for _ in range(module.MOST_PACKETS + 1)] == [True] * module.MOST_PACKETS + [False]
    assert jobs.put("host", "10.0.0.1"), "they take no other job's place"
    for _ in range(2):
        jobs.done(*jobs.next())
    assert jobs.hold(b"packet") and not jobs.hold(b"packet")
