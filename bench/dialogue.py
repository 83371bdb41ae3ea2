# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A program that is asked by lines on its standard input, and answers with one JSON object on a line each."""

from __future__ import annotations

import json
import subprocess

from bench.lab import BenchError, die_with_parent, tail


class Dialogue:
    """Such a program, as a child; ended on exit from the ``with`` block."""

    def __init__(self, argv: list[str]) -> None:
        self._popen = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True, start_new_session=True, preexec_fn=die_with_parent)

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.communicate()

    def ask(self, what: str) -> None:
        """Send a command."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(f"{what}\n")
            self._popen.stdin.flush()
        except OSError:
            raise BenchError(self._last_words()) from None

    def answer(self) -> dict[str, int]:
        """The next answer. The program itself gives up what makes no progress, so this comes back."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise BenchError(self._last_words())
        found: dict[str, int] = json.loads(line)
        return found

    def _last_words(self) -> str:
        self._popen.kill()
        # Not communicate(): it would write what is still buffered into the broken pipe.
        assert self._popen.stderr is not None
        return f"a program that makes connections ended: {tail(self._popen.stderr.read())}"
