# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What is made for every packet and every connection."""

from __future__ import annotations

from typing import Self

import msgspec
from msgspec.structs import astuple, replace


class Value(msgspec.Struct, frozen=True, gc=False):
    """A value that cannot be changed, and holds nothing that holds it.

    It is made in a third of the time that a named tuple takes (46 against 151 ns of six fields), and the collector of
    garbage never looks at it.
    """

    def _replace(self, **changed: object) -> Self:
        """The same with other values of some fields.

        Raises:
            TypeError: there is no such field.
        """
        return replace(self, **changed)


__all__ = ["Value", "astuple"]
