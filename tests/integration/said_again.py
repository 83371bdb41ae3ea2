# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Somebody on a client's wire who says again what the client said. Asserts nothing: that is what the tests are for."""

from __future__ import annotations

import time

from tests.integration.capture import Capture


class Echo(Capture):
    """A capture of what one interface of a host sends, that can send it once more."""

    def heard(self, text: bytes, within: float = 1.0) -> bytes:
        """The next frame that the host sends with this in it, as soon as it is on the wire.

        Raises:
            TimeoutError: there is none.
        """
        end = time.monotonic() + within
        while time.monotonic() < end:
            for frame, sent in self.frames():
                if sent and text in frame:
                    return frame
        raise TimeoutError(f"nothing with {text!r} was sent")

    def say(self, frame: bytes) -> None:
        """Send it."""
        self._socket.send(frame)

    def forget(self) -> None:
        """Whatever was on the wire so far is not heard any more."""
        for _ in self.frames():
            pass
