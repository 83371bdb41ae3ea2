# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Compiles the eBPF programs: ``python -m lbapp.dataflow.fastpath.build``.

Owns the compiler's command line and the question whether the object is newer than its sources.
Never loads anything, and imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "fastpath.bpf.c"
SOURCES = (SOURCE, *sorted(HERE.glob("*.h")))
OBJECT = HERE / "fastpath.bpf.o"
ADOPT_SOURCE = HERE.parent.parent / "server_agent" / "adopt.bpf.c"
ADOPT_OBJECT = ADOPT_SOURCE.with_suffix(".o")
"""The program of a member's host (lbapp/server_agent): it checks the same cookies."""
COMPILERS = ("clang", "clang-14", "clang-15", "clang-16", "clang-17", "clang-18", "clang-19")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-sign-compare")


class BuildError(Exception):
    """The programs cannot be compiled. The message says what is missing or wrong."""


def up_to_date(target: Path = OBJECT, source: Path = SOURCE) -> bool:
    """Whether the object is there and not older than any source, and how they are compiled."""
    try:
        made = target.stat().st_mtime_ns
    except OSError:
        return False
    return all(one.stat().st_mtime_ns <= made for one in (source, *SOURCES[1:], Path(__file__)))


def build(target: Path = OBJECT, force: bool = False, source: Path = SOURCE) -> bool:
    """Compile unless that is done already.

    The object appears whole or not at all: a process that loads it meanwhile gets the old one or the new one.

    Returns:
        Whether something had to be compiled.

    Raises:
        BuildError: no compiler, no headers, or an error in the sources.
    """
    if not force and up_to_date(target, source):
        return False
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError("clang is not installed (Debian package clang)")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".fastpath-", suffix=".o")
    except OSError as error:
        raise BuildError(f"{target.parent}: {error.strerror}") from None
    os.close(handle)
    made = Path(name)
    try:
        _run([compiler, "-O2", "-g", "-target", "bpf", "-mcpu=v3", *WARNINGS, *_includes(), "-c", str(source),
              "-o", str(made)])
        made.chmod(0o644)
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)
    return True


def _includes() -> list[str]:
    """Where Debian has ``asm/types.h``: beside the target "bpf" no compiler looks there by itself."""
    names = (sysconfig.get_config_var("MULTIARCH"), f"{platform.machine()}-linux-gnu")
    return [f"-I/usr/include/{name}" for name in dict.fromkeys(names) if name and Path("/usr/include", name).is_dir()]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
                              check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        message = done.stderr.strip() or f"exit status {done.returncode}"
        if "bpf/bpf_" in message and "file not found" in message:
            message += "\nlibbpf's headers are missing (Debian package libbpf-dev)"
        raise BuildError(message)


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m lbapp.dataflow.fastpath.build",
                                     description="Compile the eBPF programs.")
    parser.add_argument("--force", action="store_true", help="even if the object is newer than its sources")
    try:
        force = parser.parse_args().force
        for target, source in ((OBJECT, SOURCE), (ADOPT_OBJECT, ADOPT_SOURCE)):
            if build(target, force, source):
                print(f"built {target.name}")
    except BuildError as error:
        print(f"the eBPF programs could not be compiled: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
