# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Waiting, where everything else goes on meanwhile in green threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import eventlet


def until(condition: Callable[..., Any], what: str = "it did not happen in time", seconds: float = 5.0) -> None:
    """Wait until something is so; fail, saying ``what``, if it is not within ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        eventlet.sleep(0.005)
