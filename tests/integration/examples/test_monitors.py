"""The examples that look on, in Python and Node.js: as commands, on a real bus."""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.integration.bus.raw import publish_raw
from tests.integration.examples.languages import EXAMPLES
from tests.integration.tracing.monitors import DEADLINE_S, drop_engine, put_on_bus
from tests.nats_server import NatsServer
from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    done,
    failed,
    first_token,
    ready,
    stage,
    state,
)
from weightbus.schemas.base import Message


class Running:
    """An example that prints lines until it is stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        """The next one; the test's own time limit ends the wait."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it has ended"
        return line.rstrip("\n")

    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.line())
        return event

    def events(self, *types: str) -> list[dict[str, Any]]:
        """The next ones of these types, one of each, in whatever order."""
        found: dict[str, dict[str, Any]] = {}
        while found.keys() != set(types):
            event = self.event()
            if event["type"] in types:
                found[event["type"]] = event
        return [found[each] for each in types]

    def error(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


@contextmanager
def running(command: list[str], url: str | None, **more: str) -> Iterator[Running]:
    kept = {key: text for key, text in os.environ.items() if not key.startswith("WEIGHTBUS_")}
    variables = kept | more
    if url is not None:
        variables["WEIGHTBUS_NATS_URL"] = url
    process = subprocess.Popen(
        command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def python(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-u", str(EXAMPLES / name), *arguments]


def node(*arguments: str) -> list[str]:
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is missing: .ci/libraries languages installs it")
    if not (EXAMPLES / "node_modules" / "@msgpack" / "msgpack").is_dir():
        pytest.skip("examples/node_modules is missing or old: npm ci --prefix examples")
    return [program, str(EXAMPLES / "monitor.mjs"), *arguments]


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it. Times in nanoseconds are beyond the exact integers of Node.js."""
    told: dict[str, Any] = json.loads(msgspec.json.encode(message))
    return told


def without_times(told: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in told.items() if not key.endswith("_ns") and key != "stored"
    }


def test_node_tells_messages_of_both_encodings_and_engines_as_they_come(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [ready(6), complete("a", 6), state("a")])
    with running(node(MODEL), nats_server.url) as monitor:
        assert without_times(monitor.event()) == without_times(plain(state("a")))
        said: list[Message] = [
            stage("a", "fetch", 1, 2, rank=0, moved_bytes=2**40), complete("a"),
            first_token("a", 1, 2), ready(8, model="other"), failed("b"), ready(7),
        ]  # fmt: skip
        put_on_bus(nats_server.settings, [*said, state("a", at_ms=5), state("a", version=8)])
        drop_engine(nats_server.settings, MODEL, "a")
        names = ("StageComplete", "UpdateComplete", "FirstToken", "UpdateFailed", "CheckpointReady")
        expected = [*said[:3], *said[4:]]
        got = defaultdict[str, list[dict[str, Any]]](list)
        while not (got["EngineGone"] and all(got[name] for name in names)):
            event = monitor.event()
            got[event["type"]].append(event)
    for message in expected:
        (told,) = got[type(message).__name__]
        assert without_times(told) == without_times(plain(message))
    assert [told["version"] for told in got["EngineState"]] == [8], "one that says something new"
    assert got["EngineGone"][0]["engine"] == "a"


@pytest.mark.parametrize(("option", "value", "versions"), [
    ("--since", "10m", [6, 7]), ("--from-version", "7", [7]),
])  # fmt: skip
def test_node_tells_history_from_a_time_or_a_version(
    option: str, value: str, versions: list[int], nats_server: NatsServer
) -> None:
    put_on_bus(nats_server.settings, [complete("a", 6), complete("a", 7)])
    with running(node(option, value), nats_server.url) as monitor:
        assert [monitor.event()["version"] for _ in versions] == versions
        put_on_bus(nats_server.settings, [complete("a", 5), complete("a", 8)])
        if option == "--since":
            assert monitor.event()["version"] == 5
        assert monitor.event()["version"] == 8


def test_node_tells_what_it_missed_when_the_bus_restarts(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [complete("a", 1)])
    with running(node("--since", "10m"), nats_server.url) as monitor:
        assert monitor.event()["version"] == 1
        nats_server.restart()
        put_on_bus(nats_server.settings, [complete("a", 2), complete("a", 3)])
        assert [monitor.event()["version"] for _ in range(2)] == [2, 3]


def test_node_says_what_is_lost_and_goes_on_when_the_bus_returns_without_its_data(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [complete("a", version) for version in range(1, 6)])
    with running(node("--since", "10m"), nats_server.url) as monitor:
        assert [monitor.event()["version"] for _ in range(5)] == [1, 2, 3, 4, 5]
        for first in (11, 21):
            nats_server.kill()
            shutil.rmtree(nats_server.data_dir)
            nats_server.start()
            said = [complete("a", version) for version in range(first, first + 8)]
            put_on_bus(nats_server.settings, said)
            got = [monitor.event() for _ in range(3 + len(said))]
            missed = [event for event in got if event["type"] == "Missed"]
            assert {event["stream"] for event in missed} == {"CHECKPOINTS", "PROGRESS", "presence"}
            got.remove({"type": "Missed", "stream": "CHECKPOINTS", "at_most": None})
            got.remove({"type": "Missed", "stream": "presence", "at_most": None})
            assert got[0] == {"type": "Missed", "stream": "PROGRESS", "at_most": None}
            assert [event["version"] for event in got[1:]] == list(range(first, first + 8))


def test_node_goes_on_past_what_it_cannot_read(nats_server: NatsServer) -> None:
    headers = {"Content-Type": "application/json"}
    put_on_bus(nats_server.settings, [complete("a", 1)])
    with running(node("--since", "10m"), nats_server.url) as monitor:
        assert monitor.event()["version"] == 1
        anyio.run(publish_raw, nats_server.url, f"weightbus.{MODEL}.update.a", b"{", headers)
        put_on_bus(nats_server.settings, [complete("a", 2)])
        assert monitor.event()["version"] == 2
        assert monitor.process.stderr is not None
        assert "cannot be read" in monitor.process.stderr.readline()


@pytest.mark.parametrize(("arguments", "reason"), [
    (("--since", "soon"), "soon: is no time"), (("--from-version", "x"), "x: is no version"),
])  # fmt: skip
def test_node_refuses_what_it_cannot_use(
    arguments: tuple[str, ...], reason: str, nats_server: NatsServer
) -> None:
    with running(node(*arguments), nats_server.url) as monitor:
        assert monitor.process.wait(DEADLINE_S) == 1
        assert monitor.error() == f"monitor.mjs: {reason}\n"


@pytest.mark.parametrize(("url", "reason"), [
    (None, "WEIGHTBUS_NATS_URL"), ("nats://127.0.0.1:1", ""),
])  # fmt: skip
def test_node_fails_in_one_line_when_there_is_no_bus(url: str | None, reason: str) -> None:
    with running(node(), url) as monitor:
        assert monitor.process.wait(DEADLINE_S) == 1
        said = monitor.error()
    assert (said.count("\n"), said.startswith("monitor.mjs: ")) == (1, True)
    assert reason in said


def test_python_tells_updates_first_tokens_failures_and_engines(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [state("a")])
    with running(python("monitor.py"), nats_server.url) as monitor:
        assert monitor.line() == "a is serving, version 7"
        put_on_bus(nats_server.settings, [complete("a"), first_token("a", 131, 143), failed("b")])
        assert [monitor.line() for _ in range(3)] == [
            "a serves 7 after 0.129 s",
            "a made a token with 7 0.012 s later",
            "b failed at 7: segment s has generation 9: it must be 8",
        ]
        drop_engine(nats_server.settings, MODEL, "a")
        assert monitor.line() == "a is gone"


def guide_program(url: str) -> list[str]:
    """The program of the guide as it stands, but for the bus and the model, and a first line."""
    guide = (EXAMPLES.parent / "docs" / "monitors.md").read_text()
    (program,) = re.findall(r"```python\n(import sys\n.*?)```", guide, re.DOTALL)
    program = program.replace("nats://127.0.0.1:4222", url).replace("qwen3-rl", MODEL)
    program = program.replace("async for event in", "print('open')\n        async for event in")
    return [sys.executable, "-u", "-c", program]


NO_BUS = "nats://127.0.0.1:1"


@pytest.mark.parametrize(
    "command",
    [python("monitor.py"), python("page_on_lag.py", "--versions", "2"), guide_program(NO_BUS)],
    ids=["monitor.py", "page_on_lag.py", "guide"],
)
def test_python_ends_in_one_line_when_there_is_no_bus(command: list[str]) -> None:
    with running(command, NO_BUS) as program:
        assert program.process.wait(DEADLINE_S) == 1
        assert program.error() == f"bus {NO_BUS} is not available: Connection refused\n"


def test_python_ends_in_one_line_when_it_is_interrupted_or_the_bus_is_lost(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [state("a")])
    pager = python("page_on_lag.py", "--versions", "2")
    for command in (python("monitor.py"), pager, guide_program(nats_server.url)):
        with running(command, nats_server.url) as program:
            program.line()
            program.process.send_signal(signal.SIGINT)
            assert program.process.wait(DEADLINE_S) == 1
            assert program.error() == "interrupted\n"
    with running(python("monitor.py"), nats_server.url, WEIGHTBUS_RECONNECT_FOR_S="1") as program:
        program.line()
        nats_server.kill()
        assert program.process.wait(DEADLINE_S) == 1
        said = program.error()
    assert (said.count("\n"), "lost for 1 s" in said) == (1, True), said


def test_program_of_the_guide_runs_as_it_stands(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [state("a")])
    with running(guide_program(nats_server.url), nats_server.url) as monitor:
        assert monitor.line() == "open"
        put_on_bus(nats_server.settings, [ready(7), complete("a")])
        assert monitor.line() == "a serves 7, verified"
        drop_engine(nats_server.settings, MODEL, "a")
        assert monitor.line() == "a is gone"


def test_lag_is_paged_once_and_its_end_is_told(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [ready(7), state("a"), state("b")])
    with running(python("page_on_lag.py", "--versions", "2"), nats_server.url) as pager:
        assert pager.line().startswith("watching ")
        put_on_bus(nats_server.settings, [ready(9), complete("b", 9), ready(10), ready(11)])
        put_on_bus(nats_server.settings, [complete("b", 11), done("b", version=11)])
        put_on_bus(nats_server.settings, [complete("a", 9, end_ms=500)])
        put_on_bus(nats_server.settings, [complete("a", 10, end_ms=600)])
        assert [pager.line() for _ in range(2)] == [
            f"PAGE {MODEL}/a is 3 versions behind: it serves 7, newest is 10",
            f"OK {MODEL}/a is back, on version 10",
        ]


def test_incident_that_was_there_before_is_paged_at_the_start(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [ready(12), state("a")])
    with running(python("page_on_lag.py", "--versions", "2"), nats_server.url) as pager:
        assert pager.line().startswith("watching ")
        assert pager.line() == f"PAGE {MODEL}/a is 5 versions behind: it serves 7, newest is 12"
        drop_engine(nats_server.settings, MODEL, "a")
        assert pager.line() == f"OK {MODEL}/a is gone"


def test_quarantine_is_paged_with_its_reason_to_a_command_and_a_webhook(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    pages = tmp_path / "pages"
    script = f"import sys; open({str(pages)!r}, 'a').write(sys.argv[1] + chr(10))"
    put_on_bus(nats_server.settings, [ready(7), state("a", "updating", 6, 7)])
    with webhook() as (url, posted):
        options = {
            "--versions": "5", "--model": MODEL, "--webhook": url,
            "--command": shlex.join([sys.executable, "-c", script]),
        }  # fmt: skip
        words = [word for option in options.items() for word in option]
        with running(python("page_on_lag.py", *words), nats_server.url) as pager:
            assert pager.line().startswith("watching ")
            put_on_bus(nats_server.settings, [failed("a")])
            put_on_bus(nats_server.settings, [state("a", "quarantined", -1, at_ms=500)])
            put_on_bus(nats_server.settings, [complete("a", 8, end_ms=600)])
            told = [pager.line() for _ in range(2)]
            posts = [posted.get(timeout=DEADLINE_S) for _ in range(2)]
    reason = "TornRead: segment s has generation 9: it must be 8"
    assert told == [
        f"PAGE {MODEL}/a is quarantined: version 7: {reason}",
        f"OK {MODEL}/a is back, on version 8",
    ]
    assert posts == [{"text": text} for text in told]
    assert pages.read_text().splitlines() == told


def test_page_that_cannot_be_told_is_said_and_the_next_one_is_tried(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [ready(12), state("a"), state("b")])
    command = python("page_on_lag.py", "--versions", "2", "--command", "false")
    with running(command, nats_server.url) as pager:
        assert [pager.line()[:4] for _ in range(3)] == ["watc", "PAGE", "PAGE"]
        assert pager.process.stderr is not None
        said = sorted(pager.process.stderr.readline() for _ in "ab")
        for engine, line in zip("ab", said, strict=True):
            assert line.startswith(f"not told: PAGE {MODEL}/{engine} is 5 versions behind")
            assert line.endswith("false ended with 1\n")
        pager.process.send_signal(signal.SIGINT)


def test_engine_that_serves_nothing_is_paged_and_its_first_version_ends_that(
    nats_server: NatsServer,
) -> None:
    states = [state("a", "updating", -1, 7), state("c", version=1)]
    put_on_bus(nats_server.settings, [ready(7), *states])
    with running(python("page_on_lag.py", "--versions", "2"), nats_server.url) as pager:
        assert pager.line().startswith("watching ")
        assert pager.line().startswith(f"PAGE {MODEL}/c is 6 versions behind"), "it has seen all"
        put_on_bus(nats_server.settings, [state("b"), ready(8), ready(9), ready(10)])
        put_on_bus(nats_server.settings, [state("a", "updating", -1, 10, at_ms=400)])
        assert [pager.line() for _ in range(2)] == [
            f"PAGE {MODEL}/a is 3 versions behind: it serves none, newest is 10",
            f"PAGE {MODEL}/b is 3 versions behind: it serves 7, newest is 10",
        ]
        put_on_bus(nats_server.settings, [state("b", "updating", -1, 10, at_ms=450)])
        put_on_bus(nats_server.settings, [complete("a", 10, end_ms=500)])
        assert pager.line() == f"OK {MODEL}/a is back, on version 10"
        put_on_bus(nats_server.settings, [complete("b", 10, end_ms=600)])
        assert pager.line() == f"OK {MODEL}/b is back, on version 10"


def test_pages_of_several_engines_do_not_wait_for_each_other(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [ready(12), state("a"), state("b")])
    with webhook(threading.Barrier(2, timeout=DEADLINE_S)) as (url, posted):
        command = python("page_on_lag.py", "--versions", "2", "--webhook", url)
        with running(command, nats_server.url) as pager:
            told = [pager.line() for _ in range(3)][1:]
            posts = [posted.get(timeout=DEADLINE_S) for _ in range(2)]
    assert sorted(post["text"] for post in posts) == told


def test_pager_pauses_before_it_tries_again(nats_server: NatsServer, tmp_path: Path) -> None:
    times = tmp_path / "times"
    script = f"import time; print(time.monotonic(), file=open({str(times)!r}, 'a')); exit(1)"
    words = shlex.join([sys.executable, "-c", script])
    put_on_bus(nats_server.settings, [ready(12), state("a")])
    with running(
        python("page_on_lag.py", "--versions", "2", "--command", words), nats_server.url
    ) as pager:
        assert pager.process.stderr is not None
        assert pager.process.stderr.readline().startswith("not told: ")
    began = [float(line) for line in times.read_text().splitlines()]
    assert len(began) == 3
    assert began[2] - began[0] >= 3


@contextmanager
def webhook(
    barrier: threading.Barrier | None = None,
) -> Iterator[tuple[str, queue.Queue[dict[str, str]]]]:
    """Its URL, and what was posted there; a post is answered when `barrier` lets it pass."""
    posted: queue.Queue[dict[str, str]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if barrier is not None:
                barrier.wait()
            posted.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook", posted
        finally:
            server.shutdown()
            thread.join()
