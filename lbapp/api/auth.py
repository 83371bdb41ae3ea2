# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Bearer tokens: one file, mode 0600, one token a line.

Owns the file. A token is never logged, and compared in constant time. The file may be changed
at any time; without a readable file no token is valid.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import stat
from pathlib import Path

LOG = logging.getLogger(__name__)

_MOST = 64
_LARGEST_FILE = 64 * 1024


class TokenError(Exception):
    """The token file cannot be created, or others may read it; the text says why."""


class Tokens:
    """The tokens that the REST API accepts.

    Args:
        path: created with one random token on first run, readable by its owner alone from the
            moment it exists.

    Raises:
        TokenError: with the reason, for people.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tokens: tuple[bytes, ...] = ()
        self._seen: tuple[int, ...] = ()
        self._complained = ""
        try:
            self._create()
            self._refresh()
        except OSError as error:
            raise TokenError(f"{self.path}: {error.strerror}") from None
        if not self._tokens:
            raise TokenError(f"{self.path}: expected at least one token")

    @property
    def first(self) -> str:
        """The token to hand to the operator's own tools."""
        self._follow()
        if not self._tokens:
            raise TokenError(f"{self.path}: no valid token")
        return self._tokens[0].decode()

    def valid(self, token: str) -> bool:
        """Whether a client that sends this token may do anything."""
        self._follow()
        offered = token.encode("utf-8", "surrogatepass")
        # All of them, always: the time taken tells nothing.
        return sum(hmac.compare_digest(offered, one) for one in self._tokens) > 0

    def _create(self) -> None:
        if self.path.exists():
            return
        # Under another name first: nobody, not even after a crash, ever finds it without its token.
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(draft, self.path)
        finally:
            draft.unlink()

    def _follow(self) -> None:
        try:
            self._refresh()
            self._complained = ""
        except (OSError, TokenError) as error:
            self._tokens, self._seen = (), ()
            if self._complained != str(error):
                self._complained = str(error)
                LOG.error("no token is valid: %s", error)

    def _refresh(self) -> None:
        found = self.path.stat()
        seen = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)
        if seen == self._seen:
            return
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise TokenError(f"{self.path}: expected mode 0600, others may read or write it")
        with self.path.open("rb") as file:
            lines = file.read(_LARGEST_FILE).split()
        self._tokens = tuple(lines[:_MOST])
        self._seen = seen
