# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual servers with policies, in one line each, for tests of what clients say first."""

from __future__ import annotations

from typing import Any

from lbapp.config.model import (
    Application,
    CompareType,
    L7Policy,
    L7Rule,
    PolicyAction,
    Protocol,
    RuleType,
    VirtualServer,
)
from lbapp.control.l7 import Reader


def rule(type_: str, compare: str, value: str, key: str = "", invert: bool = False) -> L7Rule:
    return L7Rule(type=RuleType(type_), compare_type=CompareType(compare), value=value, key=key, invert=invert)


def to_pool(name: str, *rules: L7Rule, **fields: Any) -> L7Policy:
    return L7Policy(name=name, action=PolicyAction.REDIRECT_TO_POOL, redirect_pool=f"{name}-pool", rules=rules,
                    **fields)


def policy(name: str, action: str, *rules: L7Rule, **fields: Any) -> L7Policy:
    return L7Policy(name=name, action=PolicyAction(action), rules=rules, **fields)


def reader(application: str, *policies: L7Policy, **fields: Any) -> Any:
    """The reader of a virtual server (Any: a test knows which outcome it expects)."""
    made = Reader.of(VirtualServer(
        name="v", vip_address="10.0.0.100", protocol=Protocol.TCP, protocol_port=80,
        application=Application(application), l7_policies=policies, **fields))
    assert made is not None
    return made
