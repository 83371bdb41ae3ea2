# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Values of the operator's own (``lbapp.server_agent.sources``): what is written, asked, and made of answers."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbapp.server_agent import sources
from lbapp.server_agent.sources import Place, SourceError, Sources, Term, Value, read
from topologies.namespace import wait_until


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------------ what the operator writes


@pytest.mark.parametrize(("text", "value"), [
    ("queue=command:/bin/echo 5", Value("queue", "command", "/bin/echo 5")),
    ("a=http:http://h/x", Value("a", "http", "http://h/x", (Term(""),))),
    ("a=http:https://h:1/x?y=1#b.0.c", Value("a", "http", "https://h:1/x?y=1", (Term("b.0.c"),))),
    ("a=http:http://h/#rate(b)", Value("a", "http", "http://h/", (Term("b", (), True),))),
    ("a=prometheus:http://h/m#up", Value("a", "prometheus", "http://h/m", (Term("up"),))),
    ('a=prometheus:http://h/m#m{x="1", y="a\\"b#}"}',
     Value("a", "prometheus", "http://h/m", (Term("m", (("x", "1"), ("y", 'a"b#}'))),))),
    ("a=prometheus:http://h/m#rate(t_sum)/rate( t_count )",
     Value("a", "prometheus", "http://h/m", (Term("t_sum", (), True), Term("t_count", (), True)))),
    ("a=prometheus:http://h/m#m{}", Value("a", "prometheus", "http://h/m", (Term("m"),)))])
def test_values_are_read(text: str, value: Value) -> None:
    assert read(text) == value


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected NAME="), ("a", "expected NAME="), ("a=b", "expected NAME="), ("a=file:/x", "expected NAME="),
    ("a=command:", "expected NAME="), ("A=command:/x", "small letters"), ("=command:/x", "small letters"),
    ("a b=command:/x", "small letters"), ("a=command:echo", "whole path"), ('a=command:/x "', "command line"),
    ("a=command:  ", "whole path"), ("a=http:ftp://h/", "expected a URL"), ("a=http:h", "expected a URL"),
    ("a=http:http://[x/", "expected a URL"), ("a=http:http://h:99999/", "expected a URL"),
    ("a=http:http://h/#", "#KEY"),
    ("a=http:http://h/#a/b/c", "#KEY"), ("a=prometheus:http://h/m", "#METRIC"), ("a=prometheus:http://h/m#", "#METRIC"),
    ("a=prometheus:http://h/m#1x", "#METRIC"), ("a=prometheus:http://h/m#m{x=1}", "LABEL="),
    ("a=prometheus:http://h/m#rate(m", "#METRIC"), ('a=prometheus:http://h/m#m{x="1"', "#METRIC")])
def test_what_is_no_value_is_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(text)


@given(st.text(max_size=80), st.sampled_from(["", "a=http:http://h/#", "a=prometheus:http://h/#", "a=command:/"]))
def test_any_text_is_a_value_or_refused(text: str, prefix: str) -> None:
    with contextlib.suppress(SourceError):
        assert read(prefix + text).name


def test_names_come_once_and_there_are_so_many() -> None:
    with pytest.raises(SourceError, match="got it twice"):
        Sources([read("a=command:/x"), read("a=command:/y")], 3)
    with pytest.raises(SourceError, match="at most 48"):
        Sources([read(f"v{number}=command:/x") for number in range(49)], 3)


# ------------------------------------------------------------------ commands


def script(directory: Path, text: str) -> str:
    path = directory / "value"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_a_command_prints(tmp_path: Path) -> None:
    assert sources.run_command(f"{script(tmp_path, 'import sys; print(sys.argv[1])')} 'a b'", 30) == "a b\n"


@pytest.mark.parametrize(("seconds", "text", "why"), [
    (60, "raise SystemExit(3)", "ended with 3"), (60, "while True: print('x' * 9999)", "prints more than"),
    (1, "import time; time.sleep(600)", "takes longer"),
    (1, "import os, time; os.close(1); os.close(2); time.sleep(600)", "takes longer"),
    (1, "import os, time\nif os.fork(): os._exit(0)\ntime.sleep(600)", "takes longer")])
def test_a_command_that_fails_is_no_value(tmp_path: Path, seconds: float, text: str, why: str) -> None:
    began = time.monotonic()
    with pytest.raises(sources._Missing, match=why):
        sources.run_command(script(tmp_path, text), seconds)
    assert time.monotonic() - began < 120


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    with pytest.raises(sources._Missing, match="takes longer"):
        sources.run_command(f"/bin/sh -c 'sleep 600 & echo $! > {mark}; wait'", 5.0)
    pid = int(mark.read_text())

    def over() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(over, 60, "the end of what it had started")


def test_commands_that_cannot_be_run() -> None:
    with pytest.raises(sources._Missing, match="No such file"):
        sources.run_command("/nowhere/at/all")


# ------------------------------------------------------------------ pages


class Pages:
    """A small HTTP server whose answers are set."""

    def __init__(self) -> None:
        self.text: str | bytes = ""
        self.status = 200
        self.asked = 0
        pages = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pages.asked += 1
                body = pages.text if isinstance(pages.text, bytes) else pages.text.encode()
                self.send_response(pages.status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Quietly."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/x"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def pages() -> Iterator[Pages]:
    found = Pages()
    yield found
    found.close()


class Asked:
    """A place with a clock of its own."""

    def __init__(self, *texts: str) -> None:
        self.now = 100.0
        self.place = Place([read(text) for text in texts], lambda: self.now)

    def values(self) -> dict[str, float]:
        self.place.ask()
        return self.place.had(self.now)


def test_numbers_of_pages(pages: Pages) -> None:
    asked = Asked(f"plain=http:{pages.url}")
    pages.text = " 12.5\n"
    assert asked.values() == {"plain": 12.5}
    asked = Asked(f"deep=http:{pages.url}#a.1.b", f"half=http:{pages.url}#a.0/all", f"text=http:{pages.url}#t")
    pages.text = json.dumps({"a": [1, {"b": -2}], "all": 2, "t": "3.5"})
    before = pages.asked
    assert asked.values() == {"deep": -2.0, "half": 0.5, "text": 3.5}
    assert pages.asked == before + 1  # asked once for all of them


@pytest.mark.parametrize("text", ["", "no", "{}", "[]", '{"a": {}}', '{"a": true}', '{"a": null}', '{"a": NaN}',
                                  '{"a": 1e999}', '{"a": "x"}', '{"a": Infinity}', "[" * 100_000, '{"a": [1]}'])
def test_pages_without_a_number(pages: Pages, text: str, caplog: pytest.LogCaptureFixture) -> None:
    asked = Asked(f"v=http:{pages.url}#a")
    pages.text = '{"a": 1}'
    assert asked.values() == {"v": 1.0}
    pages.text = text
    assert asked.values() == {} == asked.values()
    assert len(messages(caplog)) == 1 and "value v is missing" in messages(caplog)[0]
    pages.text = '{"a": 2}'
    assert asked.values() == {"v": 2.0}


def test_pages_that_are_none(pages: Pages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = Asked(f"v=http:{pages.url}")
    pages.text, pages.status = "1", 302  # redirections may lead anywhere
    assert asked.values() == {}
    pages.status = 500
    assert asked.values() == {}
    pages.status = 200
    monkeypatch.setattr(sources, "MOST_BYTES", 1000)
    pages.text = "1" + " " * 2000
    assert asked.values() == {}
    pages.close()
    assert asked.values() == {}
    said = messages(caplog)
    assert len(said) == 4
    assert "status is 302" in said[0] and "status is 500" in said[1] and "larger than 1000 bytes" in said[2]
    pages.__init__()  # type: ignore[misc]  # for the fixture's end


def test_a_server_that_says_nothing_takes_its_time_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = sources.browser("http://127.0.0.1", 1.0)
        with pytest.raises(sources._Missing):
            sources.fetch(client, f"http://127.0.0.1:{silent.getsockname()[1]}/", 1.0)


def test_a_page_that_drips_takes_its_time_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip() -> None:
            accepted = server.accept()[0]
            with accepted, contextlib.suppress(OSError):
                accepted.recv(4096)
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not stop.wait(0.2):
                    accepted.sendall(b" ")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        try:
            with pytest.raises(sources._Missing, match="takes longer"):
                sources.fetch(sources.browser("http://h", 5.0), f"http://127.0.0.1:{server.getsockname()[1]}/", 1.5)
        finally:
            stop.set()
            thread.join(30)


# ------------------------------------------------------------------ metrics


METRICS = """# HELP requests Requests.
# TYPE requests counter
requests_total{code="200",host="a"} 100
requests_total{code="200",host="b"} 50
requests_total{code="500",host="a"} 1
# TYPE took histogram
took_bucket{le="+Inf"} 10
took_sum 5
took_count 10
temperature NaN
odd{x="a\\"b"} 7
"""


def test_metrics(pages: Pages) -> None:
    pages.text = METRICS
    asked = Asked(*(f"{name}=prometheus:{pages.url}#{metric}" for name, metric in {
        "every": "requests_total", "good": 'requests_total{code="200"}', "one": 'requests_total{host="a",code="500"}',
        "odd": 'odd{x="a\\"b"}', "average": "took_sum/took_count", "none": 'requests_total{code="404"}',
        "away": "elsewhere", "nan": "temperature"}.items()))
    assert asked.values() == {"every": 151, "good": 150, "one": 1, "odd": 7, "average": 0.5}


def test_rates(pages: Pages) -> None:
    asked = Asked(f"r=prometheus:{pages.url}#rate(n_total)", f"t=prometheus:{pages.url}#rate(s) / rate(n_total)")
    said = []
    for seconds, count, total in ((0, 100, 1), (2, 104, 3), (2, 104, 3), (2, 10, 0), (0, 20, 1), (4, 30, 6)):
        asked.now += seconds
        pages.text = f"n_total {count}\ns {total}\n"
        said.append(asked.values())
    assert said == [{}, {"r": 2, "t": 0.5}, {"r": 0}, {}, {}, {"r": 2.5, "t": 0.5}]


@pytest.mark.parametrize("text", ["{", "a b c d e", "<html>", "\x00\x01", "a{x=} 1", 'a{x="} 1', "a 1 x"])
def test_what_are_no_metrics(pages: Pages, text: str) -> None:
    pages.text = text
    assert Asked(f"v=prometheus:{pages.url}#zebra").values() == {}


@given(st.text(max_size=200))
def test_any_page_is_metrics_or_missing(text: str) -> None:
    with contextlib.suppress(sources._Missing):
        assert all(map(math.isfinite, sources.of_metrics(text, [Term("a"), Term("b")]).values()))


# ------------------------------------------------------------------ all sources


def test_sources_are_asked_beside_each_other(pages: Pages, tmp_path: Path) -> None:
    """One that hangs delays none of the others, and its value is missing."""
    pages.text = "4"
    found = Sources([read(f"slow=command:{script(tmp_path, 'import time; time.sleep(600)')}"),
                     read(f"quick=http:{pages.url}")], 0.2)
    stop = threading.Event()
    found.start(stop)
    try:
        wait_until(lambda: found.had() == {"quick": 4.0}, 60, "the quick one")
        assert found.names == {"slow", "quick"}
        pages.text = "5"
        wait_until(lambda: found.had() == {"quick": 5.0}, 60, "the next answer")
        pages.status = 503
        wait_until(lambda: found.had() == {}, 60, "its absence")
    finally:
        stop.set()


def test_a_value_that_is_no_more_had_grows_old() -> None:
    place = Place([read("a=command:/bin/echo 1")], lambda: 50.0)
    place.ask()
    assert place.had(50.0) == {"a": 1.0} and place.had(50.1) == {}
