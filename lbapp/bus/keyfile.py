# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The file with the shared key of the buses: made once, read at each start, never shown.

Never logs or returns anything of the key but the key itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from lbapp.bus.auth import KEY_BYTES

LONGEST = 4096


class KeyFileError(Exception):
    """The key file cannot be used; the text says why and what to do."""


def read(path: Path | str) -> bytes:
    """Read a shared key.

    Raises:
        KeyFileError: it is missing, no regular file, others may read or write it, or it holds too little.
    """
    path = Path(path)
    try:
        # Opened first, looked at through the descriptor: what is checked is what is read. A FIFO must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"the key file {path} is no regular file")
        if status.st_uid not in (0, os.geteuid()):
            raise KeyFileError(f"the key file {path} belongs to another user (uid {status.st_uid})")
        if stat.S_IMODE(status.st_mode) & 0o177:
            raise KeyFileError(f"the key file {path} has mode {stat.S_IMODE(status.st_mode):04o}: chmod 600 it")
        key = file.read(LONGEST + 1)
    if not KEY_BYTES <= len(key) <= LONGEST:
        raise KeyFileError(f"the key file {path} holds {len(key)} bytes, expected {KEY_BYTES} to {LONGEST}")
    return key


def ensure(path: Path | str) -> bytes:
    """Read a shared key; make it on the first run (mode 0600, 32 random bytes). For the control segment.

    Raises:
        KeyFileError: as :func:`read`, or it cannot be made.
    """
    path = Path(path)
    if not path.exists():
        # Written whole under another name, then linked: two that start at once get the same key, and nobody
        # ever reads half of one.
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise KeyFileError(f"cannot make the key file {path}: {error.strerror}") from None
    return read(path)
