# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Habits that are executable: which layer imports what, and what every file has.

Nothing is imported here: files are read and parsed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPDX = ["# SPDX-FileCopyrightText: The lbapp authors", "# SPDX-License-Identifier: Apache-2.0"]
LONGEST = 600

CLOCKS_AND_SOCKETS = {
    "asyncio", "concurrent", "ctypes", "datetime", "eventlet", "http", "io", "logging", "multiprocessing", "os",
    "pathlib", "queue", "random", "ryu", "sched", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "socketserver", "ssl", "subprocess", "tempfile", "threading", "time", "urllib",
}
# Parsers and matchers that turn bytes into values, and do nothing else.
L7_LIBRARIES = {"httptools", "hpack", "re2"}
# service.py is the second Ryu application: it carries the store and REST beside app.py.
HUB_ALLOWED = ("lbapp/readings.py",)
BUS_PURE = ("application.py", "auth.py", "channel.py", "counted.py", "csmb.py", "errors.py", "events.py", "holdings.py",
            "records.py", "sessions.py", "ssmb.py")
RYU_ALLOWED = ("lbapp/app.py", "lbapp/launcher.py", "lbapp/service.py", "lbapp/dataflow/ryu_shim.py", "lbapp/api/")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")
                  if "__pycache__" not in path.parts)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[name(path) for path in paths])


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # "from lbapp.control import engine" imports a module as well.
            yield from (f"{module}.{alias.name}" for alias in node.names)


MODEL = tuple(f"lbapp.config.{one}" for one in ("fields", "formula", "monitor", "pool", "model"))
"""What describes resources: no more than types and checks."""


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def every_file() -> list[Path]:
    return [*sources("lbapp", "topologies", "mininet", "bench", "tests", "tools"), *sorted(ROOT.glob("*.py"))]


# ------------------------------------------------------------------ layers


@each(sources("lbapp/control"))
def test_control_imports_only_the_model_and_the_standard_library(path):
    """Messages in, messages out: no socket, no clock, no chance, no carrier."""
    for module in imports(path):
        top = module.partition(".")[0]
        if top == "lbapp":
            assert within(module, "lbapp.control", "lbapp.values", *MODEL, "lbapp.config.routing"), module
        elif top in L7_LIBRARIES:
            assert name(path).startswith("lbapp/control/l7/"), module
        else:
            assert top in sys.stdlib_module_names and top not in CLOCKS_AND_SOCKETS, module


@each([ROOT / "lbapp/bus" / module for module in BUS_PURE])
def test_bus_codecs_and_sessions_do_no_io(path):
    """Bytes and ``now`` in, bytes and messages out; sockets, clocks and nonces are the transports'."""
    for module in imports(path):
        top = module.partition(".")[0]
        if top == "lbapp":
            pure = tuple(f"lbapp.bus.{name.removesuffix('.py')}" for name in BUS_PURE)
            assert within(module, "lbapp.control.messages", "lbapp.config.model", "lbapp.values", *pure), module
        else:
            assert top in sys.stdlib_module_names and top not in CLOCKS_AND_SOCKETS, module


@each([ROOT / f"{one.replace('.', '/')}.py" for one in (*MODEL, "lbapp.config.routing")])
def test_the_model_does_no_io(path):
    for module in imports(path):
        top = module.partition(".")[0]
        if top == "lbapp":
            assert within(module, *MODEL), module
        else:
            assert top in {"msgspec", "netaddr", "re2"} or (
                top in sys.stdlib_module_names and top not in CLOCKS_AND_SOCKETS), module


@each(sources("lbapp/control"))
def test_control_has_no_state_of_its_modules(path):
    """State has one owner: no function rebinds a name of its module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"


@each(sources("lbapp", "topologies", "mininet"))
def test_ryu_is_imported_where_it_is_spoken_to_and_nowhere_else(path):
    if not name(path).startswith(RYU_ALLOWED):
        used = [module for module in imports(path) if within(module, "ryu", "os_ken")]
        if name(path) in HUB_ALLOWED:  # it has to wait, and waits as Ryu does
            used.remove("ryu.lib.hub")
        assert used == []


@each(sources("lbapp/dataflow"))
def test_the_data_flow_segment_knows_nothing_of_rest(path):
    assert not [module for module in imports(path) if within(module, "lbapp.api", "lbapp.app", "lbapp.cli")]


def test_mininet_folder_is_no_package():
    """It would shadow the real mininet."""
    assert not (ROOT / "mininet" / "__init__.py").exists()


# ------------------------------------------------------------------ files


@each(every_file())
def test_every_file_names_its_licence(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and lines[0].startswith("#!"):
        del lines[0]
    assert lines[:2] == SPDX or not lines


@each(every_file())
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@each([path for path in sources("lbapp") if path.read_text(encoding="utf-8").strip()])
def test_every_module_says_what_it_owns(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def _tested() -> set[str]:
    """Every module a test imports or names, as ``lbapp.control.engine`` or ``lbapp/control/engine.py``."""
    found: set[str] = set()
    for path in sources("tests/unit", "tests/integration"):
        found.update(imports(path))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(word.strip("`\"'(),:;") for word in node.value.split())
    return found


TESTED = _tested()


@each([path for path in sources("lbapp") if path.name not in ("__init__.py", "__main__.py")])
def test_every_module_has_a_test(path):
    module = name(path).removesuffix(".py").replace("/", ".")
    assert any(within(found, module) or found == name(path) for found in TESTED), f"no test imports or names {module}"
