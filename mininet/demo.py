# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""``make demo``: the load balancer at work in Mininet, told on the terminal.

Real curl, wrk and UDP clients reach real nginx and UDP servers through virtual servers that were
added by REST calls. Each claim is checked while it is told: exit status 1 and one line say which
did not hold. The scenes are in ``topologies/scenes.py``.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

# This directory has the name of Mininet's package, but is none; the project's root is one up.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.markup import escape  # noqa: E402

from lbapp.dataflow.ovs import OvsError  # noqa: E402
from topologies.controller import RestError  # noqa: E402
from topologies.lab import Lab, unavailable  # noqa: E402
from topologies.namespace import CommandError  # noqa: E402
from topologies.scenes import Demo  # noqa: E402
from topologies.single import SingleTopo  # noqa: E402
from topologies.story import NotHeld, Story  # noqa: E402

PROBLEMS = (NotHeld, CommandError, RestError, OvsError, TimeoutError, RuntimeError, OSError)


def _ended(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    """Play the demonstration; the exit status is 0 if all that it claims held."""
    story = Story()
    reason = unavailable()
    if reason:
        story.console.print(f"[red]the demonstration cannot run here:[/] {reason}")
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    lab: Lab | None = None
    log = ""
    try:
        with Lab(SingleTopo()) as lab:
            try:
                Demo(lab, story).play()
            except (NotHeld, CommandError, RestError, OvsError, TimeoutError, RuntimeError, OSError):
                log = lab.controller.log_tail(20)
                raise
            finally:
                # A second Ctrl-C must not leave half of it behind.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        story.console.print("\ninterrupted; all of it is gone again")
        return 130
    except (NotHeld, CommandError, RestError, OvsError, TimeoutError, RuntimeError, OSError) as problem:
        if log:
            story.console.rule("end of the controller's log")
            story.console.print(log, markup=False)
            story.console.rule()
        line = next(iter(str(problem).splitlines()), type(problem).__name__)
        story.console.print(f"[bold red]this did not hold:[/] {escape(line)}", soft_wrap=True)
        return 1
    story.console.print(f"\n[bold green]All {story.claims} claims held[/], in {story.seconds:.0f} s; "
                        "nothing is left running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
