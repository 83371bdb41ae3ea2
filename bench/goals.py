# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""What the figures have to reach, and whether they do: pure, computed from ``latest.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

REFERENCE = "haproxy-tcp"

NFT = "nft"
HTTP = "haproxy-http"
BULK = ("up_gbit_per_s", "down_gbit_per_s")

RATIOS: tuple[tuple[str, str, str, float], ...] = (
    ("lbapp-switch", "new_conn_per_s", REFERENCE, 0.95),
    ("lbapp-punted", "new_conn_per_s", REFERENCE, 0.95),
    *((target, metric, REFERENCE, 1.0) for target in ("lbapp-switch", "lbapp-punted")
      for metric in ("keepalive_req_per_s", "big_mb_per_s", *BULK)),
    ("lbapp-fastpath", "new_conn_per_s", NFT, 1.15),
    ("lbapp-fastpath", "new_conn_per_s", REFERENCE, 1.4),
    ("lbapp-fastpath", "keepalive_req_per_s", NFT, 0.95),
    *(("lbapp-fastpath", metric, NFT, 1.0) for metric in BULK),
    *(("lbapp-fastpath", metric, REFERENCE, 1.8) for metric in BULK),
    ("lbapp-agent", "new_conn_per_s", REFERENCE, 1.2),
    ("lbapp-handoff", "new_conn_per_s", HTTP, 1.3),
    *((target, metric, HTTP, least) for target in ("lbapp-splice", "lbapp-handoff")
      for metric, least in (("keepalive_req_per_s", 1.3), ("big_mb_per_s", 1.8))),
    ("lbapp-splice", "new_conn_per_s", HTTP, 1.0),
)
"""Target, metric, the target it is compared with, and the least share of that one's figure."""

MESSAGES_PER_CLOSED = 1 / 64
ASKING_PER_CONNECTION = 1 + MESSAGES_PER_CLOSED
"""One question, and its share of a message about connections that have ended."""
CONTROLLER_US = 25.0
READING_US = 45.0
"""The same of a connection whose client was read."""
SCALE_CONNECTIONS = 100_000
SCALE_RULES = 60
SCALE_BYTES_PER_CONNECTION = 20.0
"""Growth of the controller below this is not growth per connection: 2 MB at 100 000."""

FAST_CONNECTIONS = 1_000_000
FAST_BYTES = 512
IDLE_PERCENT = 1.0
WATCHING_PERCENT = 3.0


@dataclass(frozen=True)
class Goal:
    """One line of the list. ``met`` is None where nothing was measured."""

    text: str
    measured: str
    met: bool | None


def _ratio(targets: Mapping[str, Mapping[str, float]], target: str, metric: str, reference: str,
           least: float) -> Goal:
    text = f"{target} {metric} at least {least:.2f} times {reference}"
    ours, theirs = targets.get(target, {}).get(metric), targets.get(reference, {}).get(metric)
    if ours is None or not theirs:
        return Goal(text, "not measured", None)
    return Goal(text, f"{ours / theirs:.2f}x", ours >= least * theirs)


def _most(text: str, value: float | None, most: float, unit: str) -> Goal:
    if value is None:
        return Goal(text, "not measured", None)
    return Goal(text, f"{value:.4g}{unit}", value <= most)


def goals(targets: Mapping[str, Mapping[str, float]], scale: Mapping[str, float]) -> list[Goal]:
    """All goals.

    Args:
        targets: target -> metric -> median.
        scale: what ``bench scale`` measured; empty if it was not run.
    """
    held, fast = scale.get("connections_held"), scale.get("fast_connections_held")
    naive = targets.get("lbapp-handoff", {}).get("naive_per_conn")
    beside = "" if naive is None else f", against {naive:.1f} of a controller that is asked for each packet"
    return [
        *(_ratio(targets, *row) for row in RATIOS),
        _most(f"lbapp-ovs: controller at most {CONTROLLER_US:.0f} µs CPU a punted connection",
              targets.get("lbapp-ovs", {}).get("controller_us_per_conn"), CONTROLLER_US, " µs"),
        *(_most(f"{target}: controller at most {READING_US:.0f} µs CPU a connection",
                targets.get(target, {}).get("controller_us_per_conn"), READING_US, " µs")
          for target in ("lbapp-handoff", "lbapp-splice")),
        _most("lbapp-fastpath: at most 1/64 message to the control segment a closed connection",
              targets.get("lbapp-fastpath", {}).get("messages_per_closed"), MESSAGES_PER_CLOSED, ""),
        _most("lbapp-handoff: at most 1 + 1/64 messages to the control segment a connection",
              targets.get("lbapp-handoff", {}).get("asking_per_conn"), ASKING_PER_CONNECTION, beside),
        Goal(f"{SCALE_CONNECTIONS} concurrent connections held",
             "not measured" if held is None else f"{held:.0f}", None if held is None else held >= SCALE_CONNECTIONS),
        _most(f"at most {SCALE_RULES} OpenFlow rules a virtual server while they are held",
              scale.get("held_rules_per_virtual_server"), SCALE_RULES, " rules"),
        _most("controller does not grow with connections decided by the switch",
              scale.get("held_controller_bytes_per_connection"), SCALE_BYTES_PER_CONNECTION, " bytes/connection"),
        Goal(f"{FAST_CONNECTIONS} concurrent connections held in the fast path",
             "not measured" if fast is None else f"{fast:.0f}", None if fast is None else fast >= FAST_CONNECTIONS),
        _most(f"at most {FAST_BYTES} bytes of kernel memory each",
              scale.get("fast_bytes_per_connection"), FAST_BYTES, " bytes"),
        _most(f"lbapp agent, idle: at most {IDLE_PERCENT:.0f} % of a core", scale.get("idle_agent_percent"),
              IDLE_PERCENT, " %"),
        _most(f"lbapp run --fastpath, idle: at most {IDLE_PERCENT:.0f} % of a core",
              scale.get("idle_fastpath_percent"), IDLE_PERCENT, " %"),
        _most(f"looking after members costs at most {WATCHING_PERCENT:.0f} % of new connections/s",
              scale.get("watching_percent"), WATCHING_PERCENT,
              f" %, standard error {scale.get('watching_percent_error', 0):.2g}"),
    ]
