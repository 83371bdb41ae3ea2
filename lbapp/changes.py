# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""How one site differs from another, as values.

Owns the comparison. Never prints and never talks to a controller. Resources are the same if
their names are, members if their address and port are; the order of members means nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

from lbapp.config.model import L7Policy, Member, PolicyAction
from lbapp.config.monitor import Monitor
from lbapp.site import DEFAULTS, FIELDS, KINDS, WORDS, Resource, Site, plain_value


class Action(enum.Enum):
    """What happens to a resource."""

    ADD = "added"
    CHANGE = "changed"
    REMOVE = "removed"


class FieldChange(NamedTuple):
    """A field with its values before and after; None where there is none."""

    field: str
    old: Any
    new: Any


class Change(NamedTuple):
    """What happens to one resource. An added one lists the fields that are not at their defaults."""

    action: Action
    kind: type[Any]
    name: str
    fields: tuple[FieldChange, ...] = ()

    @property
    def what(self) -> str:
        """Such as ``virtual server web``."""
        return f"{WORDS[self.kind]} {self.name}"


def difference(old: Site, new: Site) -> list[Change]:
    """Everything that has to happen to ``old`` so that it becomes ``new``; empty if nothing."""
    changes: list[Change] = []
    for section, kind in KINDS.items():
        before, after = getattr(old, section), getattr(new, section)
        for name, resource in after.items():
            if name not in before:
                changes.append(Change(Action.ADD, kind, name, _described(resource)))
            elif before[name] != resource:
                fields = _compared(before[name], resource)
                if fields:
                    changes.append(Change(Action.CHANGE, kind, name, fields))
        changes += [Change(Action.REMOVE, kind, name) for name in before if name not in after]
    return changes


def tally(changes: list[Change]) -> dict[Action, int]:
    """How many resources are added, changed and removed."""
    return {action: sum(change.action is action for change in changes) for action in Action}


def _shown_field(field: str) -> str:
    return "pool" if field == "default_pool_id" else field


def _described(resource: Resource) -> tuple[FieldChange, ...]:
    defaults = DEFAULTS[type(resource)]
    described: list[FieldChange] = []
    for field in FIELDS[type(resource)]:
        value = getattr(resource, field)
        if field == "members":
            described += [FieldChange(f"members[{member.endpoint}]", None, summary(member)) for member in value]
        elif field in NAMED:
            described += [FieldChange(f"{field}[{one.name}]", None, NAMED[field](one)) for one in value]
        elif field != "name" and not (field in defaults and defaults[field] == value):
            described.append(FieldChange(_shown_field(field), None, plain_value(value)))
    return tuple(described)


def summary(member: Member) -> str:
    """A member's fields in a line, without its address and port."""
    words = [f"weight {member.weight}"]
    words += [f"name {member.name}"] if member.name else []
    words += [] if member.admin_state_up else ["disabled"]
    words += ["draining"] if member.draining else []
    defaults = DEFAULTS[Member]
    words += [f"{field} {plain_value(getattr(member, field))}" for field in (
        "drain_timeout", "priority", "connection_limit", "health", "monitor_address", "monitor_port")
        if getattr(member, field) != defaults[field]]
    return ", ".join(words)


def _compared(old: Any, new: Any) -> tuple[FieldChange, ...]:
    changes: list[FieldChange] = []
    for field in FIELDS[type(new)]:
        before, after = getattr(old, field), getattr(new, field)
        if before == after:
            continue
        if field == "members":
            changes += _members(before, after)
        elif field in NAMED:
            changes += _named(field, before, after)
        else:
            changes.append(FieldChange(_shown_field(field), plain_value(before), plain_value(after)))
    return tuple(changes)


def policy_summary(policy: L7Policy) -> str:
    """A policy in a line."""
    rules = " and ".join(
        f"{'not ' if rule.invert else ''}{rule.type.value}{f' {rule.key}' if rule.key else ''} "
        f"{rule.compare_type.value} {rule.value!r}" for rule in policy.rules) or "everything"
    to = policy.redirect_pool or policy.redirect_url or policy.redirect_prefix or ""
    if policy.action is PolicyAction.FIXED_RESPONSE:
        to = str(policy.response_status)
    return f"{rules}: {policy.action.value} {to}".rstrip() + ("" if policy.admin_state_up else ", disabled")


def monitor_summary(monitor: Monitor) -> str:
    """A monitor in a line: its type, and what is not as it would be without saying so."""
    plain = plain_value(monitor)
    return ", ".join([plain.pop("type"), *(f"{field} {value}" for field, value in plain.items() if field != "name")])


NAMED: dict[str, Callable[[Any], str]] = {"l7_policies": policy_summary, "monitors": monitor_summary}
"""Fields that hold parts with names, and how one of them is told in a line."""


def _named(field: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> list[FieldChange]:
    summary_of = NAMED[field]
    old, new = ({one.name: one for one in parts} for parts in (before, after))
    changes = [FieldChange(f"{field}[{name}]", summary_of(old[name]) if name in old else None, summary_of(one))
               for name, one in new.items() if old.get(name) != one]
    changes += [FieldChange(f"{field}[{name}]", summary_of(one), None) for name, one in old.items()
                if name not in new]
    if [name for name in old if name in new] != [name for name in new if name in old]:
        changes.append(FieldChange(f"{field}, order", ", ".join(old), ", ".join(new)))
    return changes


def _members(before: tuple[Member, ...], after: tuple[Member, ...]) -> list[FieldChange]:
    old = {member.endpoint: member for member in before}
    new = {member.endpoint: member for member in after}
    changes: list[FieldChange] = []
    for key, member in new.items():
        if key not in old:
            changes.append(FieldChange(f"members[{key}]", None, summary(member)))
        else:
            changes += [FieldChange(f"members[{key}].{change.field}", change.old, change.new)
                        for change in _compared(old[key], member)]
    changes += [FieldChange(f"members[{key}]", summary(member), None) for key, member in old.items() if key not in new]
    return changes
