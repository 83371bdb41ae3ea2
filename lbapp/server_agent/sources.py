# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Values of the operator's own that are reported: of a command, of a page, of Prometheus' metrics.

Owns how each is asked, within a time and a size, and what of the answer is the value. Each place is asked in a thread
of its own, so that none holds up another one, nor the reports. What fails is a missing value, said once; never a 0.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import selectors
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lbapp.server_agent.report import MOST_VALUES, NAME

LOG = logging.getLogger("lbapp.server_agent")

TIMEOUT_S = 2.0
"""For one answer, whatever it takes."""
ENDING_S = 1.0
"""A command that was killed is waited for so long: one that hangs in the kernel is left behind."""
MOST_BYTES = 4 << 20
"""Of a page."""
MOST_OUTPUT = 64 << 10
"""Of a command."""
MOST = MOST_VALUES - 16
"""Values of the operator's own: there are some besides."""
MISSED = 3
"""A value counts until so many intervals have passed."""
KINDS = ("command", "http", "prometheus")
_METRIC = r'[A-Za-z_:][A-Za-z0-9_:]*(?:\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?'
_LABEL = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(,|$)')
_ESCAPED = {"n": "\n", "\\": "\\", '"': '"'}
_PATHS = {"http": r"[^()/#]+", "prometheus": _METRIC}


class SourceError(ValueError):
    """What was written is no value; the message says why."""


class _Missing(Exception):
    """There is no value this time. The message says why."""


class Term(NamedTuple):
    """One figure of an answer: where it is, and whether what counts is how much it grows in a second."""

    path: str
    labels: tuple[tuple[str, str], ...] = ()
    rate: bool = False


class Value(NamedTuple):
    """One value of the operator's own.

    Attributes:
        kind: of :data:`KINDS`.
        target: a command line, or a URL.
        terms: the figure, or two of which the first is divided by the second.
    """

    name: str
    kind: str
    target: str
    terms: tuple[Term, ...] = ()


def read(text: str) -> Value:
    """From ``NAME=command:PATH``, ``NAME=http:URL[#KEY]`` or ``NAME=prometheus:URL#METRIC``.

    KEY and METRIC may be within ``rate(...)``, and two of them may have a ``/`` between.

    Raises:
        SourceError: it is something else.
    """
    name, equals, rest = text.partition("=")
    kind, colon, target = rest.partition(":")
    if not (equals and colon and target) or kind not in KINDS:
        raise SourceError(f"expected NAME=command:PATH, NAME=http:URL#KEY or NAME=prometheus:URL#METRIC, got {text!r}")
    if not NAME.fullmatch(name):
        raise SourceError(f"expected a name of small letters, digits and _, got {name!r}")
    if kind == "command":
        try:
            words = shlex.split(target)
        except ValueError as error:
            raise SourceError(f"{name}: expected a command line, got {target!r} ({error})") from None
        if not words or not Path(words[0]).is_absolute():
            raise SourceError(f"{name}: expected the whole path of an executable, got {target!r}")
        return Value(name, kind, target)
    url, sharp, selector = target.partition("#")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise SourceError(f"{name}: expected a URL, got {url!r}")
    if not sharp and kind == "http":
        return Value(name, kind, url, (Term(""),))
    return Value(name, kind, url, _terms(name, kind, selector))


def _terms(name: str, kind: str, selector: str) -> tuple[Term, ...]:
    one = rf"(?:rate\(\s*{_PATHS[kind]}\s*\)|{_PATHS[kind]})"
    both = re.fullmatch(rf"\s*({one})\s*(?:/\s*({one})\s*)?", selector)
    if both is None:
        what = "KEY" if kind == "http" else 'METRIC{LABEL="VALUE"}'
        raise SourceError(f"{name}: expected #{what}, rate(...) of one, or one / another, got {selector!r}")
    terms = []
    for text in both.groups():
        if text is None:
            continue
        inner = re.fullmatch(r"rate\(\s*(.*?)\s*\)", text)
        path = (inner[1] if inner else text).strip()
        labels: tuple[tuple[str, str], ...] = ()
        if kind == "prometheus":
            path, brace, rest = path.partition("{")
            labels = _labels(name, rest[:-1]) if brace else ()
        terms.append(Term(path, labels, inner is not None))
    return tuple(terms)


def _labels(name: str, text: str) -> tuple[tuple[str, str], ...]:
    found, at = [], 0
    while text[at:].strip():
        match = _LABEL.match(text, at)
        if match is None:
            raise SourceError(f'{name}: expected LABEL="VALUE", got {text[at:]!r}')
        found.append((match[1], re.sub(r"\\(.)", lambda escaped: _ESCAPED.get(escaped[1], escaped[0]), match[2])))
        at = match.end()
    return tuple(found)


# ------------------------------------------------------------------ asking


def run_command(line: str, seconds: float = TIMEOUT_S) -> str:
    """What a command prints. It is ended, with all that it started in its session's group, when its time is over.

    Raises:
        _Missing: it failed, printed too much, or took too long.
    """
    try:
        process = subprocess.Popen(shlex.split(line), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, start_new_session=True, cwd="/")
    except OSError as error:
        raise _Missing(f"{error.strerror}") from None
    assert process.stdout is not None
    printed = b""
    until = time.monotonic() + seconds
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while selector.select(max(until - time.monotonic(), 0)):
                part = os.read(process.stdout.fileno(), MOST_OUTPUT)
                printed += part
                if not part:
                    break
                if len(printed) > MOST_OUTPUT:
                    raise _Missing(f"it prints more than {MOST_OUTPUT} bytes")
            else:
                raise _Missing(f"it takes longer than {seconds:g} s")
            try:
                code = process.wait(max(until - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise _Missing(f"it takes longer than {seconds:g} s") from None
            if code:
                raise _Missing(f"it ended with {code}")
        finally:
            if process.returncode is None:
                # Not waited for yet: so its number, and its group's, are still its own.
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(ENDING_S)
    return printed.decode("utf-8", "replace")


def browser(url: str, seconds: float = TIMEOUT_S) -> httpx.Client:
    """What fetches pages. No proxies, no redirections: the answer is the server's own."""
    return httpx.Client(timeout=seconds, trust_env=False, follow_redirects=False, verify=url.startswith("https:"),
                        headers={"Accept-Encoding": "identity", "User-Agent": "lbapp"})


def fetch(client: httpx.Client, url: str, seconds: float = TIMEOUT_S) -> str:
    """A page.

    Raises:
        _Missing: there is none, it is too large, or it took too long.
    """
    until = time.monotonic() + seconds
    parts, size = [], 0
    try:
        with client.stream("GET", url) as answer:
            if answer.status_code != 200:
                raise _Missing(f"its status is {answer.status_code}")
            for part in answer.iter_raw():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise _Missing(f"it is larger than {MOST_BYTES} bytes")
                if time.monotonic() > until:
                    raise _Missing(f"it takes longer than {seconds:g} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Missing(str(error) or type(error).__name__) from None
    return b"".join(parts).decode("utf-8", "replace")


def number(text: Any) -> float:
    """A number.

    Raises:
        _Missing: it is none, or has no bounds.
    """
    try:
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise ValueError
        value = float(text)
    except (ValueError, OverflowError):
        raise _Missing(f"expected a number, got {str(text)[:40]!r}") from None
    if not math.isfinite(value):
        raise _Missing(f"expected a number, got {value}")
    return value


def of_json(text: str, path: str) -> float:
    """A number in a page: the page itself, or what is at ``key.key.0`` of its JSON.

    Raises:
        _Missing: there is none.
    """
    if not path:
        return number(text.strip())
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise _Missing("expected JSON") from None
    for key in path.split("."):
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and len(key) < 10 and int(key) < len(found):
            found = found[int(key)]
        else:
            raise _Missing(f"there is no {path}")
    return number(found)


def of_metrics(text: str, terms: Iterable[Term]) -> dict[Term, float]:
    """The sums of all samples that have a name and labels; without terms that have none.

    Raises:
        _Missing: these are no metrics of Prometheus.
    """
    sums: dict[Term, float] = {}
    wanted: dict[str, list[Term]] = {}
    for term in terms:
        wanted.setdefault(term.path, []).append(term)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                for term in wanted.get(sample.name, ()):
                    if all(sample.labels.get(name) == value for name, value in term.labels):
                        sums[term] = sums.get(term, 0.0) + float(sample.value)
    except Exception as error:  # the parser raises what it happens to
        raise _Missing(f"expected metrics of Prometheus ({error})") from None
    return {term: value for term, value in sums.items() if math.isfinite(value)}


# ------------------------------------------------------------------ threads


class Place:
    """One command or URL, and the values that are had from it.

    Args:
        values: of one kind and target.
        clock: seconds of a clock that only goes forward.
    """

    def __init__(self, values: Iterable[Value], clock: Callable[[], float] = time.monotonic) -> None:
        self.values = tuple(values)
        self.kind, self.target = self.values[0].kind, self.values[0].target
        self._clock = clock
        self._had: dict[str, tuple[float, float]] = {}
        self._before: dict[Term, tuple[float, float]] = {}
        self._told: dict[str, str] = {}
        self._client = None if self.kind == "command" else browser(self.target)

    def ask(self) -> None:
        """Ask once. What fails is said once, and again when it is well."""
        try:
            text = run_command(self.target) if self._client is None else fetch(self._client, self.target)
            terms = {term for value in self.values for term in value.terms}
            metrics = of_metrics(text, terms) if self.kind == "prometheus" else {}
        except _Missing as missing:
            for value in self.values:
                self._miss(value.name, str(missing))
            return
        now = self._clock()
        before, after = self._before, dict[Term, tuple[float, float]]()
        figures: dict[Term, float | str] = {}
        for term in terms:
            try:
                figure = metrics.get(term) if self.kind == "prometheus" else of_json(text, term.path)
                if figure is None:
                    raise _Missing(f"there is no {term.path}")
                if term.rate:
                    after[term] = figure, now
                    figure = _rate(before.get(term), after[term])
                figures[term] = figure
            except _Missing as missing:
                figures[term] = str(missing)
        self._before = after
        for value in self.values:
            try:
                self._had[value.name] = number(text.strip()) if self.kind == "command" else _combined(
                    [figures[term] for term in value.terms]), now
                if self._told.pop(value.name, ""):
                    LOG.info("value %s is there again", value.name)
            except _Missing as missing:
                self._miss(value.name, str(missing))

    def _miss(self, name: str, why: str) -> None:
        self._had.pop(name, None)
        if why and self._told.get(name) != why:
            self._told[name] = why
            LOG.warning("value %s is missing: %s %s: %s", name, self.kind, self.target, why)

    def had(self, since: float) -> dict[str, float]:
        """The values had since then, by name."""
        return {name: value for name, (value, at) in list(self._had.items()) if at >= since}


def _rate(before: tuple[float, float] | None, after: tuple[float, float]) -> float:
    if before is None or after[1] <= before[1] or after[0] < before[0]:
        raise _Missing("")  # the first look, or it began anew: no news
    return (after[0] - before[0]) / (after[1] - before[1])


def _combined(figures: list[float | str]) -> float:
    numbers = []
    for figure in figures:
        if isinstance(figure, str):
            raise _Missing(figure)
        numbers.append(figure)
    if len(numbers) == 1:
        return numbers[0]
    if not numbers[1]:
        raise _Missing("")  # nothing happened that there could be an average of
    return number(numbers[0] / numbers[1])


class Sources:
    """All values of the operator's own.

    Args:
        values: at most 48.
        interval: seconds from asking to asking.

    Raises:
        SourceError: a name comes twice, or there are too many.
    """

    def __init__(self, values: Iterable[Value], interval: float) -> None:
        places: dict[tuple[str, str], list[Value]] = {}
        names: set[str] = set()
        for value in values:
            if value.name in names:
                raise SourceError(f"{value.name}: expected once, got it twice")
            names.add(value.name)
            places.setdefault((value.kind, value.target), []).append(value)
        if len(names) > MOST:
            raise SourceError(f"expected at most {MOST} values, got {len(names)}")
        self.names = frozenset(names)
        self._interval = interval
        self._places = [Place(each) for each in places.values()]

    def start(self, stop: threading.Event) -> None:
        """Have all of them asked until then, from the network namespace in which the caller is."""
        for place in self._places:
            threading.Thread(target=self._asking, args=(place, stop), name=f"value {place.values[0].name}",
                             daemon=True).start()

    def _asking(self, place: Place, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                place.ask()
            except Exception:
                LOG.exception("%s %s cannot be asked", place.kind, place.target)
            stop.wait(self._interval)

    def had(self) -> dict[str, float]:
        """The values that are there now."""
        since = time.monotonic() - MISSED * self._interval - TIMEOUT_S
        return {name: value for place in self._places for name, value in place.had(since).items()}
