# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m bench``: options, order of things, exit status.

0: all that was asked for has been measured (whether or not the goals are met); 1: something could
not be measured; 2: wrong usage; 130: interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console

from bench import lab, machine, report
from bench.goals import goals
from bench.rounds import METRICS, Sample, medians, orders, spread, turn
from bench.targets import BASELINES, Target

ALL: tuple[Target, ...] = BASELINES
BY_NAME = {target.name: target for target in ALL}


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _chosen(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[Target]:
    if not value:
        return list(ALL)
    names = list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(BY_NAME)}")
    return [target for target in ALL if target.name in names]


def _prepare() -> None:
    if os.geteuid() != 0:
        raise click.UsageError("network namespaces need root")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    lab.raise_open_files(20_000)
    lab.sweep()


def _line(sample: Sample, rounds: int) -> str:
    head = f"round {sample.round}/{rounds}  {sample.target:<13}"
    if sample.error is not None:
        return f"{head} [red]failed[/red]: {sample.error}"
    figures = [f"{report.number(sample.metrics[metric])} {unit}" for metric, unit in (
        ("new_conn_per_s", "conn/s"), ("keepalive_req_per_s", "req/s"), ("big_mb_per_s", "MB/s"),
        ("up_gbit_per_s", "Gbit/s up"), ("down_gbit_per_s", "down"), ("p99_ms", "ms p99"),
        ("controller_us_per_conn", "µs/conn")) if metric in sample.metrics]
    return f"{head} {', '.join(figures)}"


def _measure(screen: Console, targets: Sequence[Target], rounds: int, seconds: int, seed: int,
             meta: dict[str, Any]) -> tuple[list[Sample], bool]:
    samples: list[Sample] = []
    try:
        with screen.status("") as status:
            for number, order in enumerate(orders(targets, rounds, seed), 1):
                for target in order:
                    head = f"round {number}/{rounds}  {target.name}: "
                    samples.append(turn(target, number, seconds, lambda what, head=head: status.update(head + what)))  # type: ignore[misc]
                    screen.print(_line(samples[-1], rounds), soft_wrap=True)
                report.save_samples(samples, meta)
    except KeyboardInterrupt:
        screen.print("[yellow]Interrupted; what was measured so far:[/yellow]")
        return samples, True
    return samples, False


@click.group(invoke_without_command=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True,
              help="How often each target has its turn.")
@click.option("--targets", callback=_chosen, metavar="A,B", help=f"Only these of: {', '.join(BY_NAME)}.")
@click.option("--seconds", type=click.IntRange(1, 60), default=3, show_default=True,
              help="How long each figure is measured.")
@click.option("--seed", type=int, default=None, help="Of the order of targets, to repeat a run's.")
@click.pass_context
def main(context: click.Context, rounds: int, targets: list[Target], seconds: int, seed: int | None) -> None:
    """Compare lbapp with a bare wire, nftables and HAProxy on this machine (see docs/benchmarks.md)."""
    if context.invoked_subcommand is not None:
        return
    _prepare()
    screen = report.console()
    seed = time.time_ns() % 1_000_000 if seed is None else seed
    meta = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "rounds": rounds, "seconds": seconds, "seed": seed,
            "machine": machine.describe()}
    facts = meta["machine"]
    assert isinstance(facts, dict)
    screen.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    samples, interrupted = _measure(screen, targets, rounds, seconds, seed, meta)
    summary = spread(samples)
    names = [target.name for target in targets]
    failures = [sample for sample in samples if sample.error is not None]
    if samples:
        report.save_samples(samples, meta)
        latest = report.update_latest({"targets": medians(summary), "meta": {**meta, "metrics": METRICS}})
        for table in report.tables(summary, names):
            screen.print(table)
        screen.print("To reach:")
        for line in report.goal_lines(goals(latest["targets"], latest.get("scale", {}))):
            screen.print(line, soft_wrap=True)
        report.plot(summary, names, report.RESULTS / "latest.png")
        for line in report.busy_lines(samples):
            screen.print(line)
        screen.print(f"Written: {report.RESULTS}/latest.json, samples.json, latest.png")
    for sample in failures:
        screen.print(f"[red]{sample.target}, round {sample.round}: {sample.error}[/red]", soft_wrap=True)
    sys.exit(130 if interrupted else 1 if failures else 0)


if __name__ == "__main__":
    main(prog_name="python -m bench")
