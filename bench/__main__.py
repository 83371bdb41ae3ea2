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
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape

from bench import lab, machine, report, scale
from bench.goals import goals
from bench.lab import BenchError
from bench.lbapp_targets import OURS
from bench.rounds import METRICS, Sample, add_latency, medians, orders, spread, turn
from bench.targets import BASELINES, Target

ALL: tuple[Target, ...] = (*BASELINES, *OURS)
SIZES = {"configuration": 10_000, "held": 100_000, "fastpath": 1_000_000, "idle": 20, "watching": 12}
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    lab.raise_open_files(20_000)
    lab.sweep()


def _line(sample: Sample, rounds: int) -> str:
    head = f"round {sample.round}/{rounds}  {sample.target:<13}"
    if sample.error is not None:
        return f"{head} [red]failed[/red]: {escape(sample.error)}"
    figures = [f"{report.number(sample.metrics[metric])} {unit}" for metric, unit in (
        ("new_conn_per_s", "conn/s"), ("keepalive_req_per_s", "req/s"), ("big_mb_per_s", "MB/s"),
        ("up_gbit_per_s", "Gbit/s up"), ("down_gbit_per_s", "down"), ("p99_ms", "ms p99"),
        ("first_byte_p99_ms", "ms p99 of the first byte"),
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
        return samples, True
    return samples, False


def _scale(screen: Console, sizes: Mapping[str, int]) -> tuple[dict[str, float], list[str], bool]:
    """Run parts of the scale measurement, and replace their figures in ``latest.json``.

    Returns:
        this run's figures, the failures, and whether it was interrupted.
    """
    figures: dict[str, float] = {}
    failures: list[str] = []
    interrupted = False
    try:
        for name, size in sizes.items():
            part = scale.PARTS[name]
            with screen.status("") as status:
                try:
                    found = part.measure(size, lambda what, name=name: status.update(f"scale, {name}: {what}"))  # type: ignore[misc]
                except Exception as error:  # the other part is measured still
                    why = str(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {error}"
                    failures.append(f"scale, {name}: {why}")
                    continue
            for key, value in found.items():
                screen.print(f"  {part.figures[key]:<42} {report.figure(key, value)}", highlight=False)
            figures |= found
    except KeyboardInterrupt:
        interrupted = True
    dropped = {key for name in sizes for key in scale.PARTS[name].figures}
    kept = {key: value for key, value in report.read_latest().get("scale", {}).items() if key not in dropped}
    report.update_latest({"scale": {**kept, **figures}})
    return figures, failures, interrupted


def _finish(screen: Console, targets: Mapping[str, Mapping[str, float]], figures: Mapping[str, float],
            failures: Sequence[str], interrupted: bool) -> NoReturn:
    screen.print("To reach:")
    for line in report.goal_lines(goals(targets, figures)):
        screen.print(line, soft_wrap=True)
    for failure in failures:
        screen.print(f"[red]{escape(failure)}[/red]", soft_wrap=True)
    if interrupted:
        screen.print("[yellow]Interrupted: the above is what had been measured.[/yellow]")
    sys.exit(130 if interrupted else 1 if failures else 0)


@click.group(invoke_without_command=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True,
              help="How often each target has its turn.")
@click.option("--targets", callback=_chosen, metavar="A,B", help=f"Only these of: {', '.join(BY_NAME)}.")
@click.option("--seconds", type=click.IntRange(1, 60), default=3, show_default=True,
              help="How long each figure is measured.")
@click.option("--seed", type=int, default=None, help="Of the order of targets, to repeat a run's.")
@click.option("--scale/--no-scale", "with_scale", default=None,
              help="Also measure size; by default only where all targets are measured.")
@click.pass_context
def main(context: click.Context, rounds: int, targets: list[Target], seconds: int, seed: int | None,
         with_scale: bool | None) -> None:
    """Compare lbapp with a bare wire, nftables and HAProxy on this machine (see docs/benchmarks.md)."""
    if context.invoked_subcommand is not None:
        return
    _prepare()
    screen = report.console()
    seed = time.time_ns() % 1_000_000 if seed is None else seed
    facts = machine.describe()
    meta = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "rounds": rounds, "seconds": seconds, "seed": seed,
            "machine": facts, "metrics": METRICS}
    screen.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    samples, interrupted = _measure(screen, targets, rounds, seconds, seed, meta)
    failures = [f"{sample.target}, round {sample.round}: {sample.error}" for sample in samples if sample.error]
    measured = _report(screen, samples, [target.name for target in targets], meta) if samples else {}
    figures: dict[str, float] = {}
    if not interrupted and (with_scale or (with_scale is None and len(targets) == len(ALL))):
        figures, failed, interrupted = _scale(screen, SIZES)
        failures += failed
    _finish(screen, measured, figures, failures, interrupted)


def _report(screen: Console, samples: Sequence[Sample], names: Sequence[str],
            meta: dict[str, Any]) -> dict[str, dict[str, float]]:
    add_latency(samples)
    summary = spread(samples)
    measured = medians(summary)
    report.save_samples(samples, meta)
    report.update_latest({"targets": measured, "meta": meta})
    for table in report.tables(summary, names):
        screen.print(table)
    for line in (*report.loss_lines(samples), *report.busy_lines(samples)):
        screen.print(line)
    report.plot(summary, names, report.RESULTS / "latest.png")
    screen.print(f"Written: latest.json, samples.json, latest.png in {report.RESULTS}", soft_wrap=True)
    return measured


@main.command("scale")
@click.option("--virtual-servers", type=click.IntRange(1, 50_000), default=SIZES["configuration"], show_default=True,
              help="Applied at once, with 5 members each.")
@click.option("--connections", type=click.IntRange(1, 3_000_000), default=SIZES["fastpath"], show_default=True,
              help=f"Held at once in the fast path; without it at most {SIZES['held']}.")
@click.option("--seconds", type=click.IntRange(1, 600), default=SIZES["idle"], show_default=True,
              help="For how long idle processes are watched.")
@click.option("--pairs", type=click.IntRange(2, 1000), default=SIZES["watching"], show_default=True,
              help="How often new connections are counted with and without members being looked after.")
@click.option("--only", type=click.Choice(list(SIZES)), default=None, help="One part of it.")
def scale_command(virtual_servers: int, connections: int, seconds: int, pairs: int, only: str | None) -> None:
    """Measure size: many virtual servers, many connections held, what idle processes use, what health checks cost."""
    _prepare()
    screen = report.console()
    sizes = {"configuration": virtual_servers, "held": min(connections, SIZES["held"]),
             "fastpath": connections, "idle": seconds, "watching": pairs}
    figures, failures, interrupted = _scale(
        screen, {part: size for part, size in sizes.items() if only in (None, part)})
    _finish(screen, {}, figures, failures, interrupted)


if __name__ == "__main__":
    main(prog_name="python -m bench")
