# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Site documents: a whole configuration as YAML or JSON, and what is wrong with one.

Owns reading, and checking against the model (comparing: :mod:`lbapp.changes`). Inside a :class:`Site` resources are
known by their names, and a virtual server's ``default_pool_id`` holds its pool's *name*: ids and
numbers are given by the store and are no part of what an operator asks for. Never talks to a
controller and never prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import gc
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import yaml

from lbapp.config.model import L7Policy, L7Rule, Member, Network, Pool, VirtualServer
from lbapp.config.monitor import Damping, Header, Monitor, Passive
from lbapp.config.pool import Distribution, Persistence, Sorry, Waiting

Resource = Network | Pool | VirtualServer
R = TypeVar("R", Network, Pool, VirtualServer)

GIVEN_BY_STORE = ("id", "number")
READ_ONLY = frozenset({
    *GIVEN_BY_STORE, "revision", "provisioning_status", "operating_status", "health_status", "effective_weight",
    "created_at", "updated_at",
})
"""Accepted and ignored, so that what the controller shows can be edited and applied again."""

KINDS: dict[str, type[Any]] = {"networks": Network, "pools": Pool, "virtual_servers": VirtualServer}
"""The sections of a document, in the order in which they are applied."""
SECTIONS = tuple(KINDS)
WORDS: dict[type, str] = {Network: "network", Pool: "pool", VirtualServer: "virtual server"}
MOST_PROBLEMS = 10


class SiteError(Exception):
    """A document that cannot be applied; one line of text for each problem."""


def optional_fields(cls: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of a model class that may be left out, with what they are then."""
    return {info.name: info.default_factory() if info.default is msgspec.NODEFAULT else info.default
            for info in msgspec.structs.fields(cls) if not info.required}


MODEL: tuple[type[Any], ...] = (Member, L7Policy, L7Rule, Monitor, Header, Passive, Damping, Persistence, Distribution,
                                Waiting, Sorry, *KINDS.values())
DEFAULTS: dict[type, dict[str, Any]] = {cls: optional_fields(cls) for cls in MODEL}
FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(name for name in cls.__struct_fields__ if name not in GIVEN_BY_STORE) for cls in MODEL
}


@dataclasses.dataclass(frozen=True)
class Site:
    """A configuration by names, in the document's order."""

    networks: Mapping[str, Network] = dataclasses.field(default_factory=dict)
    pools: Mapping[str, Pool] = dataclasses.field(default_factory=dict)
    virtual_servers: Mapping[str, VirtualServer] = dataclasses.field(default_factory=dict)

    def document(self) -> dict[str, list[dict[str, Any]]]:
        """What ``PUT /v1/config`` takes and :func:`read` reads: sections, without the fields left at their defaults."""
        return {section: [_plain(resource) for resource in getattr(self, section).values()] for section in SECTIONS}


def plain_value(value: Any) -> Any:
    """A field's value as JSON has it."""
    if isinstance(value, tuple):
        return [plain_value(one) for one in value]
    if isinstance(value, msgspec.Struct):
        return _plain(value)
    return value.value if isinstance(value, enum.Enum) else value


def _plain(resource: msgspec.Struct) -> dict[str, Any]:
    cls = type(resource)
    defaults = DEFAULTS[cls]
    plain: dict[str, Any] = {}
    for field in FIELDS[cls]:
        value = getattr(resource, field)
        if field in defaults and value == defaults[field]:
            continue
        plain["pool" if field == "default_pool_id" else field] = plain_value(value)
    return plain


# ------------------------------------------------------------------ reading


class _Located(dict[str, Any]):
    """A mapping that knows its line in the file."""

    __slots__ = ("line",)
    line: int


class _Loader(yaml.CSafeLoader):
    """libyaml's parser; mappings know their lines, and a key given twice is an error rather than a loss."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) != len(keys):
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _located(loader: Any, node: Any) -> Iterator[_Located]:
    mapping = _Located()
    mapping.line = node.start_mark.line + 1
    yield mapping
    mapping.update(loader.construct_mapping(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _located)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Let the garbage collector rest while a million objects are made that all stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load(text: str, source: str) -> Any:
    """Parse YAML or JSON; returns plain values.

    Raises:
        SiteError: with the line.
    """
    with _no_collections():
        if text.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(msgspec.DecodeError):  # flow-style YAML begins like JSON
                return msgspec.json.decode(text)
        try:
            return yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
            raise SiteError(f"{source}: {error.problem or error.context}{where}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SiteError(f"{source}: {' '.join(str(error).split())}") from None


def read(text: str, source: str = "site") -> Site:
    """Read a site document and check it against the model.

    Args:
        text: YAML or JSON.
        source: what to call the document in messages, usually the file's name.

    Raises:
        SiteError: naming source, resource, field and what was expected.
    """
    return from_document(load(text, source), source)


def from_document(document: Any, source: str = "site") -> Site:
    """Check a document that is already parsed, see :func:`read`."""
    if not isinstance(document, dict):
        found = "an empty document" if document is None else _shown(document)
        raise SiteError(f"{source}: expected a mapping with {', '.join(SECTIONS)}; got {found}")
    with _no_collections():
        return _Reading(source).read(document)


def from_config(answer: Mapping[str, Any]) -> Site:
    """The site that ``GET /v1/config`` answers: pools by name, and nothing that the model does not have.

    Raises:
        SiteError: the controller's answer is not of this version's model.
    """
    names = {pool["id"]: pool.get("name") for pool in answer.get("pools", []) if "id" in pool}
    document: dict[str, list[dict[str, Any]]] = {}
    for section, cls in KINDS.items():
        document[section] = [_known(cls, raw) for raw in answer.get(section, [])]
    for server, raw in zip(document["virtual_servers"], answer.get("virtual_servers", []), strict=True):
        pool = raw.get("pool", raw.get("default_pool_id"))
        if isinstance(pool, Mapping):
            pool = pool.get("name") or pool.get("id")
        server.pop("default_pool_id", None)
        server["pool"] = names.get(pool, pool)
    return from_document(document, "the controller's configuration")


def _known(cls: type[msgspec.Struct], raw: Mapping[str, Any]) -> dict[str, Any]:
    known = {field: raw[field] for field in FIELDS[cls] if field in raw}
    if "members" in known:
        known["members"] = [_known(Member, member) for member in known["members"]]
    return known


class _Reading:
    """One document on its way to a :class:`Site`; gathers problems rather than stopping at the first."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[str] = []
        self.more = 0
        self.refused_pools: set[str] = set()

    def read(self, document: Mapping[str, Any]) -> Site:
        for key in document:
            if key not in SECTIONS:
                self.problem("", str(key), f"unknown section; expected {', '.join(SECTIONS)}")
        networks = self._section(document, "networks", Network)
        pools = self._section(document, "pools", Pool)
        servers = self._section(document, "virtual_servers", VirtualServer, pools)
        self._unique(networks, "networks", "cidr", lambda network: network.cidr)
        self._unique(servers, "virtual_servers", "vip_address", lambda server: " ".join(map(str, server.key)))
        if self.problems:
            if self.more:
                self.problems.append(f"{self.source}: and {self.more} more")
            raise SiteError("\n".join(self.problems))
        return Site(networks, pools, servers)

    def problem(self, label: str, field: str, message: str, raw: Any = None) -> None:
        if len(self.problems) >= MOST_PROBLEMS:
            self.more += 1
            return
        line = f" (line {raw.line})" if isinstance(raw, _Located) else ""
        self.problems.append(": ".join(part for part in (self.source, label, field, message) if part) + line)

    def _section(self, document: Mapping[str, Any], section: str, cls: type[R],
                 pools: dict[str, Pool] | None = None) -> dict[str, R]:
        raws = document.get(section)
        if raws is None:
            return {}
        if not isinstance(raws, list):
            self.problem("", section, f"expected a list, got {type(raws).__name__}")
            return {}
        found: dict[str, R] = {}
        for index, raw in enumerate(raws):
            name = raw.get("name") if isinstance(raw, dict) else None
            label = f"{section}[{index}]" + (f" ({name})" if isinstance(name, str) else "")
            if pools is not None and isinstance(raw, dict):
                raw = self._with_pool_name(raw, label, pools)
                if raw is None:
                    continue
            resource = self._convert(raw, cls, label)
            if resource is None:
                continue
            if resource.name in found:
                self.problem(label, "name", f"{WORDS[cls]} {resource.name} is there already", raw)
            found[resource.name] = resource
        return found

    def _with_pool_name(self, raw: dict[str, Any], label: str, pools: dict[str, Pool]) -> dict[str, Any] | None:
        """The virtual server with its pool's name in place of ``pool``; None after a problem.

        An inline pool goes to ``pools``, under the virtual server's name unless it has one.
        """
        server = _Located(raw) if isinstance(raw, _Located) else dict(raw)
        if isinstance(raw, _Located) and isinstance(server, _Located):
            server.line = raw.line
        given = server.pop("pool", None)
        by_id = server.pop("default_pool_id", None)
        if isinstance(given, dict):
            inline = self._convert({"name": server.get("name"), **given}, Pool, f"{label}: pool")
            if inline is None:
                return None
            if inline.name in pools:
                self.problem(label, "pool.name", f"pool {inline.name} is there already", raw)
                return None
            pools[inline.name] = inline
            given = inline.name
        elif given is None:
            given = by_id
        if given is not None and not isinstance(given, str):
            self.problem(label, "pool", f"expected a pool's name or a pool, got {_shown(given)}", raw)
            return None
        if given is not None and given not in pools and given not in self.refused_pools:
            self.problem(label, "pool", f"expected the name of a pool of this document, got {given!r}"
                         + _similar(given, pools), raw)
            return None
        if given is not None:
            server["default_pool_id"] = given
        policies = server.get("l7_policies")
        for index, policy in enumerate(policies if isinstance(policies, list) else ()):
            named = policy.get("redirect_pool") if isinstance(policy, dict) else None
            if isinstance(named, str) and named not in pools and named not in self.refused_pools:
                self.problem(label, f"l7_policies[{index}].redirect_pool",
                             f"expected the name of a pool of this document, got {named!r}"
                             + _similar(named, pools), policy)
                return None
        return server

    def _convert(self, raw: Any, cls: type[R], label: str) -> R | None:
        if not isinstance(raw, dict):
            self.problem(label, "", f"expected a mapping of fields, got {_shown(raw)}")
            return None
        cleaned: Any = raw
        if not READ_ONLY.isdisjoint(raw):
            cleaned = {key: value for key, value in raw.items() if key not in READ_ONLY}
        members = cleaned.get("members")
        if isinstance(members, list) and any(not READ_ONLY.isdisjoint(one) for one in members if isinstance(one, dict)):
            cleaned = {**cleaned, "members": [{key: value for key, value in one.items() if key not in READ_ONLY}
                                              if isinstance(one, dict) else one for one in members]}
        try:
            return msgspec.convert(cleaned, cls)
        except (msgspec.ValidationError, ValueError, TypeError) as error:
            field, message = explain(error, cls, cleaned)
            self.problem(label, field, message, _nearest(raw, field))
            if cls is Pool and isinstance(raw.get("name"), str):
                self.refused_pools.add(raw["name"])  # its virtual servers are not to blame
            return None

    def _unique(self, resources: Mapping[str, R], section: str, field: str, key: Callable[[R], str]) -> None:
        seen: dict[str, str] = {}
        for index, (name, resource) in enumerate(resources.items()):
            other = seen.setdefault(key(resource), name)
            if other != name:
                self.problem(f"{section}[{index}] ({name})", field, f"{key(resource)} belongs to {other} already")


# ------------------------------------------------------------------ what is wrong

_AT = re.compile(r"^(?P<message>.*?)(?: - at `(?P<path>\$.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^(?P<field>[a-z_][a-z_0-9]*(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): (?P<message>.*)$", re.DOTALL)
_STEP = re.compile(r"([a-z_A-Z][a-z_A-Z0-9]*)|\[(\d+)\]")
_QUOTE = "; quote it in YAML"


def explain(error: Exception, cls: type[msgspec.Struct], raw: Any) -> tuple[str, str]:
    """Turn the model's refusal of ``raw`` into a field and what was expected there."""
    found = _AT.match(str(error))
    assert found is not None  # every text matches
    message = found["message"]
    field = (found["path"] or "$")[1:].lstrip(".")
    own = _FIELD.match(message)
    if own:  # from the model's own checks, which begin with the field
        field, message = ".".join(part for part in (field, own["field"]) if part), own["message"]
        return field, message
    owner = _owner(field, cls)
    if message.startswith(("Object missing", "Object contains")):
        name = message.split("`")[1]
        field = ".".join(part for part in (field, name) if part)
        if message.startswith("Object missing"):
            return field, "expected a value, it is missing"
        known = ["pool" if one == "default_pool_id" else one for one in FIELDS[owner]]
        return field, f"unknown field{_similar(name, known) or '; expected ' + ', '.join(known)}"
    value = _at(raw, field)
    if message.startswith("Invalid enum value"):
        hint = msgspec.inspect.type_info(owner)
        assert isinstance(hint, msgspec.inspect.StructType)
        leaf = field.rsplit(".", 1)[-1]
        for info in hint.fields:
            if info.name == leaf and isinstance(info.type, msgspec.inspect.EnumType):
                return field, f"expected {', '.join(one.value for one in info.type.cls)}, got {_shown(value)}"
    message = message.replace("`", "")
    message = message[:1].lower() + message[1:]
    if ", got" not in message:
        message += f", got {_shown(value)}"
    elif not isinstance(value, dict | list):
        message = message.split(", got")[0] + f", got {_shown(value)}"
    if "expected str" in message and isinstance(value, bool | int | float):
        message += _QUOTE
    return field, message


def _owner(field: str, cls: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """The class of what lies at a path."""
    names = [name for name, _ in _STEP.findall(field) if name]
    for name in names:
        inner = next((info.type for info in msgspec.structs.fields(cls) if info.name == name), None)
        found = [one for one in MODEL if one in _parts(inner)]
        if not found:
            break
        cls = found[0]
    return cls


def _parts(hint: Any) -> set[Any]:
    """All classes within a type."""
    return {hint, *(part for one in typing.get_args(hint) for part in _parts(one))}


def _at(raw: Any, path: str) -> Any:
    """The value at a path such as ``members[2].weight``; None where there is none."""
    for name, index in _STEP.findall(path):
        if index and isinstance(raw, list) and int(index) < len(raw):
            raw = raw[int(index)]
        elif name and isinstance(raw, dict):
            raw = raw.get(name)
        else:
            return None
    return raw


def _nearest(raw: Any, path: str) -> Any:
    """The innermost mapping on the way to a path that knows its line."""
    found = raw
    for step in _STEP.finditer(path):
        inner = _at(raw, path[:step.end()])
        if isinstance(inner, _Located):
            found = inner
    return found


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _similar(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known)[:10_000], 1)
    return f"; did you mean {close[0]}?" if close else ""
