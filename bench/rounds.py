# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Who is measured when: rounds over all targets, in a new order each time; samples and their medians.

A target is built anew for each of its turns and removed after it, so that none ever runs beside
another and none inherits anything.
"""

from __future__ import annotations

import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import load
from bench.lab import BenchError, Lab
from bench.machine import Others, wait_until_quiet
from bench.targets import Target

METRICS: dict[str, str] = {
    "new_conn_per_s": "new connections/s",
    "keepalive_req_per_s": "keep-alive requests/s",
    "big_mb_per_s": "100 MB objects, MB/s",
    "up_gbit_per_s": "bulk up, Gbit/s",
    "down_gbit_per_s": "bulk down, Gbit/s",
    "p99_ms": "p99 of a new connection, ms",
    "first_byte_p50_ms": "first byte, p50, ms",
    "first_byte_p99_ms": "first byte, p99, ms",
    "first_byte_added_p99_ms": "added p99 of the first byte, ms",
    "controller_us_per_conn": "controller CPU, µs/connection",
    "messages_per_conn": "OpenFlow messages/connection",
    "flow_mods_per_conn": "flow-mods/connection",
    "packet_ins_per_conn": "packet-ins/connection",
    "messages_per_closed": "messages/closed connection",
    "asking_per_conn": "messages to the control segment/connection",
    "naive_per_conn": "the same, were it asked for each packet",
}
QUIET_PATIENCE = 5.0
NOTHING_BETWEEN = "bare"
"""The target that others' added latency is counted from."""


@dataclass
class Sample:
    """One target's turn in one round."""

    target: str
    round: int
    metrics: dict[str, float] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    others_cores: float = 0.0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``samples.json``."""
        return asdict(self)


def orders(targets: Sequence[Target], rounds: int, seed: int) -> list[list[Target]]:
    """The order of the targets in every round: shuffled, but none has the same place twice in a row."""
    generator = random.Random(seed)
    order = list(targets)
    generator.shuffle(order)
    result = []
    for _ in range(rounds):
        result.append(order)
        step = generator.randrange(1, len(order)) if len(order) > 1 else 0
        order = order[step:] + order[:step]
    return result


def turn(target: Target, number: int, seconds: int, progress: Callable[[str], None]) -> Sample:
    """Build one target, measure it, remove it. A failure is part of the sample, with what was measured before it."""
    sample = Sample(target.name, number)
    try:
        progress("waiting for a quiet machine")
        sample.others_cores = wait_until_quiet(QUIET_PATIENCE)
        with Lab() as lab:
            progress("starting")
            site = target.build(lab)
            others = Others(namespace.inode for namespace in lab.namespaces)
            _measure(lab, site, target, seconds, sample, progress)
            sample.others_cores = others.cores()
    except BenchError as error:
        sample.error = str(error)
    except Exception as error:  # of a tool, a library or our own: it must not cost the others their turn
        sample.error = f"{type(error).__name__}: {error}"
        sample.detail["traceback"] = traceback.format_exc()
    return sample


def _measure(lab: Lab, site: load.Site, target: Target, seconds: int, sample: Sample,
             progress: Callable[[str], None]) -> None:
    metrics, detail = sample.metrics, sample.detail
    load.check(lab, site)
    progress("warming up")
    load.new_connections(lab, site, 1)
    time.sleep(site.settle_seconds)

    progress("new connections")
    controller = site.controller
    before = controller.messages() if controller else None
    cpu = controller.cpu_seconds() if controller else 0.0
    kernel = load.kernel_counters(site)
    result, took = load.new_connections(lab, site, seconds)
    metrics["new_conn_per_s"] = result.per_second
    metrics["p99_ms"] = load.percentile(took, 99)
    detail.update(requests=result.requests, errors=result.errors, probes=len(took), p50_ms=load.percentile(took, 50),
                  request_p99_ms=result.percentile_ms(99))
    detail["kernel"] = {name: value - kernel[name] for name, value in load.kernel_counters(site).items()}
    if controller and before:
        time.sleep(site.settle_seconds)  # what belongs to these connections but comes late, such as flow-removed
        made = result.requests + len(took)
        metrics["controller_us_per_conn"] = (controller.cpu_seconds() - cpu) / made * 1e6
        after = controller.messages()
        metrics["messages_per_conn"] = (after.total - before.total) / made
        metrics["flow_mods_per_conn"] = (after.flow_mods - before.flow_mods) / made
        metrics["packet_ins_per_conn"] = (after.packet_ins - before.packet_ins) / made
        metrics["asking_per_conn"] = (after.asking - before.asking) / made
        if after.packets > before.packets:
            metrics["naive_per_conn"] = (after.packets - before.packets) / made
        if after.closed > before.closed:
            metrics["messages_per_closed"] = (after.closed_messages - before.closed_messages) / (
                after.closed - before.closed)

    if target.first_byte:
        progress("first byte")
        took = load.first_byte(lab, site, seconds)
        metrics["first_byte_p50_ms"] = load.percentile(took, 50)
        metrics["first_byte_p99_ms"] = load.percentile(took, 99)
        detail["first_byte_per_s"] = len(took) / seconds

    progress("keep-alive")
    result = load.keep_alive(lab, site, seconds)
    metrics["keepalive_req_per_s"] = result.per_second
    detail["keepalive_p99_ms"] = result.percentile_ms(99)

    progress("100 MB objects")
    metrics["big_mb_per_s"] = load.big_objects(lab, site, seconds).bytes_per_second / 1e6
    if target.bulk:
        progress("bulk up")
        metrics["up_gbit_per_s"] = load.bulk(lab, site, seconds, down=False)
        progress("bulk down")
        metrics["down_gbit_per_s"] = load.bulk(lab, site, seconds, down=True)


def add_latency(samples: Sequence[Sample]) -> None:
    """Add to each sample by how much its p99 of the first byte exceeds that of no balancer in the same round."""
    least = {sample.round: sample.metrics["first_byte_p99_ms"] for sample in samples
             if sample.target == NOTHING_BETWEEN and "first_byte_p99_ms" in sample.metrics}
    for sample in samples:
        if sample.target != NOTHING_BETWEEN and "first_byte_p99_ms" in sample.metrics and sample.round in least:
            sample.metrics["first_byte_added_p99_ms"] = sample.metrics["first_byte_p99_ms"] - least[sample.round]


Spread = dict[str, dict[str, tuple[float, float, float]]]
"""Target -> metric -> (median, smallest, largest)."""


def spread(samples: Iterable[Sample]) -> Spread:
    """Median, smallest and largest of every metric of every target that has samples."""
    values: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        for metric, value in sample.metrics.items():
            values.setdefault(sample.target, {}).setdefault(metric, []).append(value)
    return {target: {metric: (statistics.median(seen), min(seen), max(seen)) for metric, seen in metrics.items()}
            for target, metrics in values.items()}


def medians(summary: Spread) -> dict[str, dict[str, float]]:
    """The ``targets`` of ``latest.json``."""
    return {target: {metric: float(f"{triple[0]:.6g}") for metric, triple in metrics.items()}
            for target, metrics in summary.items()}
