# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What has to be done to a switch, one job at a time, so that no change overtakes another.

Whoever does a job may be interrupted; what is being done is still to be done for everybody else.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from eventlet.queue import Queue

MOST_PACKETS = 1024
"""That wait for other jobs; who sent more repeats it."""


class Jobs:
    """Jobs in their order: what kind, and about what.

    Attributes:
        moving: addresses of hosts whose rules are to be changed by jobs that are not done yet.

    Args:
        most: jobs that can wait.
    """

    def __init__(self, most: int) -> None:
        self.moving: Counter[str] = Counter()
        self._queue = Queue(most)
        self._packets = 0

    def __len__(self) -> int:
        """How many are left, the one that is being done among them."""
        left: int = self._queue.unfinished_tasks
        return left

    def put(self, job: str, argument: Any) -> bool:
        """A job, behind all others; false where there is no room."""
        if self._queue.full():
            return False
        if job == "host":
            self.moving[argument] += 1
        self._queue.put((job, argument))
        return True

    def hold(self, packet: bytes) -> bool:
        """Have a message sent behind all jobs; false where too many wait."""
        if self._packets >= MOST_PACKETS or not self.put("packet", packet):
            return False
        self._packets += 1
        return True

    def next(self) -> tuple[str, Any]:
        """The next job; waits for one."""
        job, argument = self._queue.get()
        return job, argument

    def done(self, job: str, argument: Any) -> None:
        """It is done."""
        self._queue.task_done()
        if job == "packet":
            self._packets -= 1
        elif job == "host":
            self.moving[argument] -= 1
            if not self.moving[argument]:
                del self.moving[argument]


__all__ = ["Jobs"]
