# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the algorithms make of skewed sizes, slow and dying members, large pools: ``python -m bench.distribution``.

Prints a table a trace: simulated members, the real control segment, statistics in batches
(:mod:`bench.queueing`). With ``--real``, HAProxy and lbapp in namespaces as well
(:mod:`bench.distribution_real`). Keeps nothing.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table

from bench import report
from bench.lab import BenchError, raise_open_files, sweep
from bench.queueing import BATCH_SECONDS, Machine, Outcome, Trace, simulate
from lbapp.config.model import Algorithm
from lbapp.config.pool import Synthesis

HOW: dict[str, Algorithm | Synthesis] = {
    one.value: one for one in (*Algorithm, Synthesis.EVEN_LOAD, Synthesis.CAPABILITY, Synthesis.DYNAMIC_RATIO)}
"""The algorithms, and turns by weights that follow what servers report."""


def traces(requests: int) -> tuple[Trace, ...]:
    """The traces, with so many requests for ten members."""
    ten = (Machine(),) * 10
    return (
        Trace("skewed", "10 members alike, sizes bounded Pareto (1 to 1000, exponent 1.2)", ten, requests),
        Trace("slow", "the same, one member at a tenth of the speed", (Machine(speed=0.1), *ten[1:]), requests),
        Trace("dying", "the same, one member falls to a tenth half-way", ten, requests, changes=((0.5, 0, 0.1),)),
        Trace("dead", "the same, one member dies half-way; its checks notice after 2.5 s", ten, requests,
              deaths=((0.5, 0),)),
        Trace("large", "1000 members of weights and capacities 1 to 4",
              tuple(Machine(workers=1 + number % 4, weight=1 + number % 4) for number in range(1000)), 3 * requests),
    )


def table(trace: Trace, outcomes: Sequence[tuple[Algorithm | Synthesis, Outcome]]) -> Table:
    """The outcomes of a trace, a row each."""
    result = Table(title=f"{trace.name}: {trace.text}; {trace.requests} requests, {100 * trace.load:.0f} % load",
                   title_justify="left")
    result.add_column("algorithm")
    for heading in ("imbalance", "p50 ms", "p99 ms", *(("lost",) if trace.deaths else ())):
        result.add_column(heading, justify="right")
    for how, outcome in outcomes:
        result.add_row(how.value, f"{outcome.imbalance:.2f}",
                       *(report.number(1000 * outcome.percentile(percent)) for percent in (50, 99)),
                       *((str(outcome.lost),) if trace.deaths else ()))
    return result


def _chosen(names: str, known: Sequence[str], option: str) -> list[str]:
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(known)}", param_hint=option)
    return [name for name in known if name in wanted]


def _real(screen: Console, rounds: int, seconds: int, seed: int) -> None:
    from bench import distribution_real as real

    sweep()
    raise_open_files(20_000)
    turns: dict[str, list[real.Turn]] = {}
    with screen.status("HAProxy and lbapp in namespaces"):
        for one in real.run(rounds, seconds, seed):
            turns.setdefault(one.target, []).append(one)
            screen.print(f"round {one.round}/{rounds}  {one.target:<26} p50 {report.number(one.p50)} ms, "
                         f"p99 {report.number(one.p99)} ms, {one.requests} requests", highlight=False)
    result = Table(title=f"real servers, one at a tenth of the speed; {rounds} rounds of {seconds} s, medians",
                   title_justify="left")
    result.add_column("target")
    for heading in ("p50 ms", "p99 ms", "p99, smallest to largest"):
        result.add_column(heading, justify="right")
    for name, mine in turns.items():
        high = [one.p99 for one in mine]
        result.add_row(name, report.number(statistics.median(one.p50 for one in mine)),
                       report.number(statistics.median(high)),
                       f"{report.number(min(high))}..{report.number(max(high))}")
    screen.print(result)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--requests", type=click.IntRange(100, 10_000_000), default=20_000, show_default=True,
              help="Simulated for ten members; three times as many for a thousand.")
@click.option("--traces", "names", default="", help="Some of skewed, slow, dying, dead, large.")
@click.option("--algorithms", default="", help="Some of the algorithms and syntheses.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed, the same figures.")
@click.option("--batch", type=click.FloatRange(0.001, 10), default=BATCH_SECONDS, show_default=True,
              help="Seconds from one batch of ended connections to the next.")
@click.option("--real", is_flag=True, help="HAProxy and lbapp with real servers instead (needs root).")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="With --real.")
@click.option("--seconds", type=click.IntRange(5, 600), default=20, show_default=True,
              help="With --real: of load, a turn.")
def main(requests: int, names: str, algorithms: str, seed: int, batch: float, real: bool, rounds: int,
         seconds: int) -> None:
    """Compare the algorithms by what they make of slow, dying and many members (see docs/benchmarks.md)."""
    screen = report.console()
    if real:
        if os.geteuid() != 0:
            raise click.UsageError("network namespaces need root")
        try:
            _real(screen, rounds, seconds, seed)
        except BenchError as error:
            raise click.ClickException(str(error)) from None
        return
    known = traces(requests)
    wanted = [HOW[name] for name in _chosen(algorithms.upper(), list(HOW), "--algorithms")]
    chosen = _chosen(names, [trace.name for trace in known], "--traces")
    for trace in known:
        if trace.name in chosen:
            with screen.status(trace.name):
                outcomes = [(how, simulate(trace, how, seed, batch)) for how in wanted]
            screen.print(table(trace, outcomes))


if __name__ == "__main__":
    try:
        main(prog_name="python -m bench.distribution")
    except KeyboardInterrupt:
        sys.exit(130)
