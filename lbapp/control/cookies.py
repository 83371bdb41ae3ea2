# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The keys of the cookies with which fast paths shake hands, and when they change.

There are two places. The next key is told to everybody some seconds before anybody makes cookies with it, so that a
cookie is good wherever the client's next packet comes; it takes the place of the key before the last, whose cookies
end with that. So no clock has to be shared, and a cookie is good for :data:`VALID_SECONDS` at least. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

ROTATE_SECONDS = 60.0
"""How long new cookies are made with one key."""
AHEAD_SECONDS = 10.0
"""How long before that everybody is told of it."""
VALID_SECONDS = ROTATE_SECONDS - AHEAD_SECONDS


class CookieKeys:
    """The keys, and which of them makes new cookies.

    Args:
        draw: makes a key of 16 random bytes.
        now: seconds that only grow.
    """

    def __init__(self, draw: Callable[[], bytes], now: float) -> None:
        self._draw = draw
        self.keys: tuple[bytes | None, bytes | None] = (draw(), None)
        self.current = 0
        self._since = now
        self._announced = False

    def tick(self, now: float) -> bool:
        """Do what it is time for; returns whether everybody has to be told."""
        age = now - self._since
        if not self._announced and age >= ROTATE_SECONDS - AHEAD_SECONDS:
            self._announced = True
            new = self._draw()
            self.keys = (new, self.keys[1]) if self.current else (self.keys[0], new)
            return True
        if self._announced and age >= ROTATE_SECONDS:
            self.current, self._since, self._announced = 1 - self.current, now, False
            return True
        return False
