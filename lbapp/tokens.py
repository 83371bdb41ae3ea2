# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The token file as the operator's tools use it: read the first token, replace all of them by a new one.

The file is the controller's (:mod:`lbapp.api.auth`): one token a line, mode 0600. The controller
looks at it again whenever it changed. A token is never part of a message.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

LARGEST_FILE = 64 * 1024


class TokenFileError(Exception):
    """The token file cannot be read or written; the text says why."""


def read(path: Path) -> str:
    """The first token of the file.

    Raises:
        TokenFileError: with the reason, for people.
    """
    try:
        with path.open("rb") as file:
            words = file.read(LARGEST_FILE).decode("ascii").split()
    except FileNotFoundError:
        raise TokenFileError(f"{path} does not exist; the first `lbapp run` makes it") from None
    except OSError as error:
        raise TokenFileError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TokenFileError(f"{path}: expected tokens of ASCII characters") from None
    if not words or not words[0].isprintable():
        raise TokenFileError(f"{path}: holds no token")
    return words[0]


def rotate(path: Path) -> str:
    """Replace every token of the file by a new one, at once and for good, and return it.

    The new file belongs to whom the old one belonged to, so that a controller without root's
    rights can still read it.

    Raises:
        TokenFileError: with the reason, for people; the old file is untouched.
    """
    token = secrets.token_urlsafe(32)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path = path.resolve()
        temporary = path.with_name(temporary.name)
        old = path.stat() if path.exists() else path.parent.stat()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            os.fchmod(file.fileno(), 0o600)
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TokenFileError(f"{path}: {error.strerror}") from None
    return token
