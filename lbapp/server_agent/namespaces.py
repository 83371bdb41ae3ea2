# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Being in another network namespace, and back for a while.

Owns the system call. What a thread opened stays where it was opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from lbapp.server_agent.adopt import AdoptError

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)

Outside = Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def inside(namespace: Path | None) -> Iterator[Outside]:
    """The calling thread is in a network namespace for the time of the block; None: where it is.

    Yields:
        A function whose result is a block in which the thread is where it came from.

    Raises:
        AdoptError: there is no such namespace, or no permission.
    """
    if namespace is None:
        yield contextlib.nullcontext
        return
    with contextlib.ExitStack() as stack:
        before = _opened(stack, Path("/proc/thread-self/ns/net"))
        there = _opened(stack, namespace)

        @contextlib.contextmanager
        def outside() -> Iterator[None]:
            _enter(before, namespace)
            try:
                yield
            finally:
                _enter(there, namespace)

        _enter(there, namespace)
        try:
            yield outside
        finally:
            _enter(before, namespace)


def _opened(stack: contextlib.ExitStack, path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise AdoptError(f"{path}: {error.strerror}") from None
    stack.callback(os.close, descriptor)
    return descriptor


def _enter(descriptor: int, name: Path) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET):
        raise AdoptError(f"{name}: {os.strerror(ctypes.get_errno())}")
