# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A bounded memory of what was the case lately, where it does not matter how long exactly.

Two dictionaries, of which the older one is forgotten as a whole: a third of what an ordered one costs. Pure.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Key = TypeVar("Key")
What = TypeVar("What")


class Lately(Generic[Key, What]):
    """What was put lately: at least so many of the last, at most twice as many. None cannot be put."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._new: dict[Key, What] = {}
        self._old: dict[Key, What] = {}

    def __len__(self) -> int:
        return len(self._new.keys() | self._old.keys())

    def put(self, key: Key, what: What) -> None:
        """Remember it."""
        self._new[key] = what
        if len(self._new) >= self._most:
            self._old, self._new = self._new, {}

    def get(self, key: Key) -> What | None:
        """The last that was put; None where that was not lately."""
        found = self._new.get(key)
        return self._old.get(key) if found is None else found
