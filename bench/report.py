# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: tables on the terminal, a plot, ``latest.json`` and ``samples.json``.

Computes nothing that is not in the samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.goals import REFERENCE, Goal
from bench.machine import QUIET_CORES
from bench.rounds import METRICS, Sample, Spread

RESULTS = Path(__file__).resolve().parent / "results"
RATES = ("new_conn_per_s", "keepalive_req_per_s", "big_mb_per_s", "up_gbit_per_s", "down_gbit_per_s", "p99_ms")
LATENCY = ("first_byte_p50_ms", "first_byte_p99_ms", "first_byte_added_p99_ms")
COSTS = ("controller_us_per_conn", "asking_per_conn", "naive_per_conn", "messages_per_conn", "flow_mods_per_conn",
         "packet_ins_per_conn")
SYN_SHARE = 0.0005
"""More SYNs sent again than this share of the connections, and the reader is told."""
COLOURS = {"bare": "#9aa0a6", "nft": "#5f6368", "haproxy-tcp": "#e8710a", "haproxy-http": "#f9ab00",
           "nginx-http": "#188038"}
OURS = "#1a73e8"


def number(value: float) -> str:
    """A figure as people read it: three significant digits, thousands apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u00a0")
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value else "0"


def figure(name: str, value: float) -> str:
    """A figure of the scale measurement, memory in MB."""
    return f"{number(value / 1e6)} MB" if name.endswith(("_rss_before", "_rss_after")) else number(value)


def _cell(summary: Spread, target: str, metric: str) -> str:
    triple = summary.get(target, {}).get(metric)
    if triple is None:
        return "-"
    median, least, most = triple
    lines = [number(median)]
    if least != most:
        lines.append(f"[dim]{number(least)}..{number(most)}[/dim]")
    reference = summary.get(REFERENCE, {}).get(metric)
    if reference is not None and reference[0] and target != REFERENCE:
        lines.append(f"[cyan]{median / reference[0]:.2f}x[/cyan]")
    return "\n".join(lines)


def tables(summary: Spread, names: Sequence[str]) -> list[Table]:
    """Median, smallest to largest, and the share of HAProxy's TCP figure, a cell each."""
    result = []
    for title, metrics in (("Rates", RATES), ("First byte of new connections at a fixed rate", LATENCY),
                           ("What the controller has to do", COSTS)):
        shown = [name for name in names if any(metric in summary.get(name, {}) for metric in metrics)]
        if not shown:
            continue
        table = Table(title=f"{title} (median, smallest to largest, times {REFERENCE})", title_justify="left",
                      show_lines=True)
        table.add_column("target")
        for metric in metrics:
            table.add_column(METRICS[metric], justify="right")
        for name in shown:
            table.add_row(name, *(_cell(summary, name, metric) for metric in metrics))
        result.append(table)
    return result


def goal_lines(goals: Sequence[Goal]) -> list[str]:
    """The "to reach" list, one line a goal; what this run did not measure is only counted."""
    words = {True: "[green]met    [/green]", False: "[red]not met[/red]"}
    lines = [f"  {words[goal.met]}  {goal.text}: {goal.measured}" for goal in goals if goal.met is not None]
    unknown = sum(goal.met is None for goal in goals)
    return [*lines, f"  [dim]{unknown} not measured in this run[/dim]"] if unknown else lines


def loss_lines(samples: Sequence[Sample]) -> list[str]:
    """A warning where clients had to send SYNs again: each time a connection waited for a second."""
    lost: dict[str, int] = {}
    for sample in samples:
        again = sample.detail.get("kernel", {}).get("TCPSynRetrans", 0)
        if again > SYN_SHARE * sample.detail.get("requests", 0):
            lost[sample.target] = max(again, lost.get(sample.target, 0))
    return [f"[yellow]{target}: up to {again} SYNs were sent again while new connections were measured; "
            "connections waited for them.[/yellow]" for target, again in lost.items()]


def busy_lines(samples: Sequence[Sample]) -> list[str]:
    """A warning where other work used the machine while we measured."""
    busy = [sample for sample in samples if sample.others_cores > QUIET_CORES]
    if not busy:
        return []
    worst = max(busy, key=lambda sample: sample.others_cores)
    return [f"[yellow]Other work used the processors during {len(busy)} of {len(samples)} measurements "
            f"(at most {worst.others_cores:.1f} cores, {worst.target}, round {worst.round}): "
            "do not trust these figures.[/yellow]"]


def plot(summary: Spread, names: Sequence[str], path: Path) -> None:
    """Bars with their spread, one field a metric."""
    import matplotlib as mpl  # here, because it takes a second to load and needs no display
    mpl.use("Agg")
    from matplotlib import pyplot

    metrics = [metric for metric in (*RATES, *LATENCY, "controller_us_per_conn", "messages_per_conn")
               if any(metric in summary.get(name, {}) for name in names)]
    if not metrics:
        return
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(metrics):]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        shown = [name for name in names if metric in summary.get(name, {})]
        triples = [summary[name][metric] for name in shown]
        middle = [triple[0] for triple in triples]
        axis.barh(shown, middle, color=[COLOURS.get(name, OURS) for name in shown],
                  xerr=[[median - least for median, least, _ in triples],
                        [most - median for median, _, most in triples]],
                  ecolor="#202124", capsize=2)
        reference = summary.get(REFERENCE, {}).get(metric)
        if reference is not None:
            axis.axvline(reference[0], color=COLOURS[REFERENCE], linestyle="--", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(METRICS[metric], fontsize=9)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _replace(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def save_samples(samples: Sequence[Sample], meta: Mapping[str, Any], results: Path = RESULTS) -> None:
    """Write ``samples.json``: every turn of every target."""
    _replace(results / "samples.json", {"meta": meta, "samples": [sample.as_dict() for sample in samples]})


def read_latest(results: Path = RESULTS) -> dict[str, Any]:
    """What ``latest.json`` holds; empty where there is none, or none that can be read."""
    try:
        found = json.loads((results / "latest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def update_latest(part: Mapping[str, Any], results: Path = RESULTS) -> dict[str, Any]:
    """Replace the given keys of ``latest.json`` and keep the others; returns the whole."""
    whole = {**read_latest(results), **part}
    _replace(results / "latest.json", whole)
    return whole


def console() -> Console:
    """The terminal; wide enough for the tables where output goes to a file."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=max(plain.width, 132))
