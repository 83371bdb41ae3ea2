# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How a check says that the member does not do well."""

from __future__ import annotations

import errno

from lbapp.monitors.protocol import REASON_MOST

OUR_OWN = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN})
"""Errors that tell what this host lacks, and nothing of the member."""


class CheckFailed(Exception):
    """The member does not do well; the text says why, in words for people."""


def printable(value: str | bytes, most: int = REASON_MOST) -> str:
    """What a member said, fit for a log: one line, no control characters, not too long."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    text = "".join(one if one.isprintable() else " " for one in text[:4 * most])
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most - 1] + "…"
