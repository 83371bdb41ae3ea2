# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI description, generated from the very classes that validate requests."""

from __future__ import annotations

from typing import Any

import msgspec

from lbapp.api import views
from lbapp.api.errors import ErrorAnswer, Problem
from lbapp.api.happenings import FILTERS as HAPPENINGS
from lbapp.api.live import FILTERS, Announcement, LoadReport
from lbapp.api.remembered import FILTERS as REMEMBERED
from lbapp.api.remembered import Removed
from lbapp.api.requests import DEFAULT_LIMIT, JSON, MAX_LIMIT, MERGE_PATCH
from lbapp.api.sites import Difference
from lbapp.config.model import Member, Network, Pool, Switch, VirtualServer

_TEMPLATE = "#/components/schemas/{name}"
_RESOURCES = {"virtual-servers": VirtualServer, "pools": Pool, "networks": Network}
_PROBLEMS = {problem.status.split(" ", 1)[0]: problem for problem in Problem}
_ALWAYS = ("401", "408", "500")
_CHANGES = ("400", "404", "409", "411", "413", "415", "503")

JsonObject = dict[str, Any]


def _ref(name: str) -> JsonObject:
    return {"$ref": _TEMPLATE.format(name=name)}


def _content(schema: JsonObject, *types: str) -> JsonObject:
    return {one: {"schema": schema} for one in types or (JSON,)}


def _schemas() -> JsonObject:
    kinds = [VirtualServer, Pool, Member, Network, Switch, views.SwitchView, views.ConnectionView, views.StatisticsView,
             views.ServerAgentView, views.Lease, views.ReportAnswer, LoadReport, views.HealthView,
             views.EventView, views.DrainingView, views.PersistenceView, Removed, Announcement, ErrorAnswer, Difference]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)
    for kind in (VirtualServer, Pool, Member, Network):
        _with_read_only(schemas[kind.__name__]["properties"])
    asked = schemas["Switch"]
    asked["properties"]["id"]["readOnly"] = True
    asked["properties"]["name"]["description"] = "Its datapath id, as in the path; may be left out."
    asked["required"] = []
    schemas["Member"]["properties"]["effective_weight"] = {
        "type": "integer", "readOnly": True,
        "description": "With slow start and distribution; 0 while it takes no new connections."}
    schemas["Member"]["properties"]["health_status"] = {"readOnly": True, "anyOf": [_ref("HealthView"),
                                                                                    {"type": "null"}]}
    schemas["VirtualServer"]["properties"]["pool"] = {
        "description": "Instead of default_pool_id: a pool's name, or in POST a whole pool, made in the same step.",
        "writeOnly": True, "anyOf": [{"type": "string"}, _ref("Pool"), {"type": "null"}]}
    schemas["Site"] = _site(schemas)
    return schemas


def _with_read_only(properties: JsonObject) -> None:
    properties["revision"] = {"type": "integer", "description": "Counts the changes; the ETag."}
    properties["provisioning_status"] = {"enum": [one.value for one in views.ProvisioningStatus]}
    properties["operating_status"] = {"enum": [one.value for one in views.OperatingStatus]}
    for name in ("id", "number", "revision", "provisioning_status", "operating_status"):
        if name in properties:
            properties[name]["readOnly"] = True


def _site(schemas: JsonObject) -> JsonObject:
    properties = schemas["VirtualServer"]["properties"]
    server = {**schemas["VirtualServer"], "title": "SiteVirtualServer", "properties": {
        **{name: schema for name, schema in properties.items()
           if not schema.get("readOnly") and name != "default_pool_id"},
        "pool": {"description": "A pool's name.", "anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    }}
    return {"title": "Site", "type": "object", "additionalProperties": False,
            "description": "The whole configuration. What is not in it is removed.",
            "properties": {"networks": {"type": "array", "items": _ref("Network")},
                           "pools": {"type": "array", "items": _ref("Pool")},
                           "virtual_servers": {"type": "array", "items": server}}}


def _parameter(name: str, where: str, schema: JsonObject, description: str) -> JsonObject:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": description}


def _path_parameters(path: str) -> list[JsonObject]:
    found = []
    if "{id}" in path:
        found.append(_parameter("id", "path", {"type": "string"}, "UUID or name"))
    if "{member}" in path:
        found.append(_parameter("member", "path", {"type": "string"}, "UUID, address:port or name"))
    return found


_PAGING = [
    _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
               "Most to return"),
    _parameter("marker", "query", {"type": "string"}, "The last id of the page before"),
]
_NAME = _parameter("name", "query", {"type": "string"}, "Only the one of this name")
_DPID = _parameter("id", "path", {"type": "string", "pattern": "^(0[xX])?[0-9a-fA-F]{1,16}$"}, "Datapath id")
_IF_MATCH = _parameter("If-Match", "header", {"type": "string"}, "ETag; 409 unless it is the current one")
_DRY_RUN = _parameter("dry_run", "query", {"type": "boolean", "default": False}, "Only tell, change nothing")


def _listing(key: str, name: str) -> JsonObject:
    return {"type": "object", "required": [key, "next"], "properties": {
        key: {"type": "array", "items": _ref(name)},
        "next": {"description": "Where the next page is.", "anyOf": [{"type": "string"}, {"type": "null"}]}}}


def _operation(summary: str, status: str, schema: JsonObject | None, parameters: list[JsonObject],
               body: JsonObject | None = None, problems: tuple[str, ...] = ("400", "404")) -> JsonObject:
    answer: JsonObject = {"description": summary}
    if schema is not None:
        answer["content"] = _content(schema)
    answers: JsonObject = {status: answer}
    for problem in (*problems, *_ALWAYS):
        answers[problem] = {"description": _PROBLEMS[problem].code, "content": _content(_ref("ErrorAnswer"))}
    operation: JsonObject = {"summary": summary, "responses": answers}
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _collection(path: str, key: str, name: str, one: str) -> JsonObject:
    outer, inner = _path_parameters(path), _path_parameters(one)
    body = _content(_ref(name))
    text = key.replace("_", " ")
    return {
        path: {
            "get": _operation(f"List {text}", "200", _listing(key, name), [*outer, _NAME, *_PAGING]),
            "post": _operation(f"Add to {text}", "201", _ref(name), outer, body, _CHANGES),
        },
        one: {
            "get": _operation("Show", "200", _ref(name), inner),
            "put": _operation("Replace; what is left out gets its default", "200", _ref(name), [*inner, _IF_MATCH],
                              body, _CHANGES),
            "patch": _operation("Change some fields (JSON Merge Patch)", "200", _ref(name), [*inner, _IF_MATCH],
                                _content({"type": "object"}, MERGE_PATCH, JSON), _CHANGES),
            "delete": _operation("Remove", "204", None, [*inner, _IF_MATCH], None, ("400", "404", "409", "503")),
        },
    }


def document() -> JsonObject:
    """The whole description, OpenAPI 3.1."""
    paths: JsonObject = {}
    for segment, kind in _RESOURCES.items():
        paths |= _collection(f"/v1/{segment}", segment.replace("-", "_"), kind.__name__, f"/v1/{segment}/{{id}}")
    paths |= _collection("/v1/pools/{id}/members", "members", "Member", "/v1/pools/{id}/members/{member}")
    filters = [_parameter(name, "query", {"type": "string"}, "Only such") for name in FILTERS]
    known = [_parameter(name, "query", {"type": "string"}, "Only such") for name in REMEMBERED]
    only = [_parameter(name, "query", {"type": "string"}, "Only of this") for name in ("virtual_server", "pool")]
    bulk = tuple(problem for problem in _CHANGES if problem != "404")
    paths |= {
        "/v1/config": {
            "get": _operation("The whole configuration", "200", _ref("Site"), []),
            "put": _operation("Replace the whole configuration in one transaction", "200", _ref("Difference"),
                              [_DRY_RUN, _IF_MATCH], _content(_ref("Site")), bulk)},
        "/v1/switches": {"get": _operation("The switches", "200", {
            "type": "object", "properties": {"switches": {"type": "array", "items": _ref("SwitchView")}}},
            [], None, ("400",))},
        "/v1/switches/{id}": {
            "get": _operation("One switch", "200", _ref("SwitchView"), [_DPID]),
            "put": _operation("Ask something of it; what is left out gets its default", "200", _ref("SwitchView"),
                              [_DPID, _IF_MATCH], _content(_ref("Switch")), bulk),
            "patch": _operation("Change some of what is asked of it (JSON Merge Patch)", "200", _ref("SwitchView"),
                                [_DPID, _IF_MATCH], _content({"type": "object"}, MERGE_PATCH, JSON), bulk),
            "delete": _operation("Ask nothing of it any more", "204", None, [_DPID, _IF_MATCH], None,
                                 ("400", "404", "409", "503"))},
        "/v1/connections": {"get": _operation("The connections", "200", _listing("connections", "ConnectionView"),
                                              [*filters, *_PAGING], None, ("400",))},
        "/v1/connections/{id}": {"get": _operation("One connection", "200", _ref("ConnectionView"),
                                                   _path_parameters("{id}"))},
        "/v1/server-agents": {"get": _operation("The agents beside servers", "200", {
            "type": "object", "properties": {"server_agents": {"type": "array", "items": _ref("ServerAgentView")}}},
            [], None, ("400",))},
        "/v1/server-agents/{id}": {
            "put": _operation("An agent beside servers announces itself", "200", _ref("Lease"),
                              _path_parameters("{id}"), _content(_ref("Announcement")), ("400", "409")),
            "delete": _operation("It ends", "204", None, _path_parameters("{id}"))},
        "/v1/server-agents/{id}/report": {
            "put": _operation("An agent beside servers reports their load", "200", _ref("ReportAnswer"),
                              _path_parameters("{id}"), _content(_ref("LoadReport")), ("400", "409", "413"))},
        "/v1/events": {"get": _operation("What happened, oldest first", "200", _listing("events", "EventView"), [
            *(_parameter(name, "query", {"type": "string"}, "Only such") for name in HAPPENINGS), *_PAGING],
            None, ("400",))},
        "/v1/persistence": {
            "get": _operation("Who is known again", "200", _listing("persistence", "PersistenceView"),
                              [*known, *_PAGING], None, ("400",)),
            "delete": _operation("Forget clients; the answer tells how many", "200", _ref("Removed"), [
                *known, _parameter("all", "query", {"type": "boolean", "default": False},
                                   "Everybody; without any other parameter")], None, ("400", "404"))},
        "/v1/draining": {"get": _operation("The members and switches that are draining", "200", {
            "type": "object", "properties": {"draining": {"type": "array", "items": _ref("DrainingView")}}},
            [_parameter(name, "query", {"type": "string"}, "Only of this") for name in ("pool", "switch")], None,
            ("400",))},
        "/v1/stats": {"get": _operation("The counters", "200", _ref("StatisticsView"), only, None, ("400",))},
        "/v1/openapi.json": {"get": _operation("This description", "200", {"type": "object"}, [], None, ())},
        "/healthz": {"get": {"summary": "Whether it lives", "security": [], "responses": {
            "200": {"description": "It does", "content": _content({"type": "object"})}}}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "lbapp", "version": "1", "description": "A server load balancer."},
        "security": [{"bearer": []}],
        "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}, "schemas": _schemas()},
        "paths": paths,
    }
