"""`weightbus watch` on a real bus: its state, its lines, its end, and a bus that restarts."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import msgspec
import pytest

from tests.integration.bus.raw import publish_raw
from tests.integration.tracing.monitors import (
    COMMAND,
    DEADLINE_S,
    drop_engine,
    environment,
    put_on_bus,
    weightbus,
)
from tests.nats_server import NatsServer
from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    failed,
    first_token,
    join,
    plan,
    ready,
    skipped,
    stage,
    state,
    whole_round,
)
from weightbus.bus.connection import open_bus
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import subject_of
from weightbus.schemas.progress import DeadLetter
from weightbus.tracing.fleet import FleetView

MANY = 1000

LATER = state("a", "serving", 7, at_ms=500)


@contextmanager
def watching(
    server: NatsServer, *arguments: str, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """The command with its output in a pipe; killed at the end if it still runs."""
    process = subprocess.Popen(
        [*COMMAND, "watch", "--nats", server.url, *arguments],
        env=environment(PYTHONUNBUFFERED="1", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def next_line(process: subprocess.Popen[str]) -> str:
    """Waits for it; the test's own time limit ends the wait."""
    assert process.stdout is not None
    return process.stdout.readline()


def test_watch_once_prints_the_state_as_one_json_object(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [*whole_round(), ready(8), join("a", 8), skipped(9), LATER])
    done = weightbus("watch", "--once", "--json", "--nats", nats_server.url)
    assert (done.returncode, done.stderr) == (0, "")
    view = msgspec.json.decode(done.stdout, type=FleetView)
    assert view.newest == {MODEL: 8}
    a, b = view.engines
    assert (a.engine, a.status, a.version, a.lag, a.verified) == ("a", "serving", 7, 1, "verified")
    assert (b.engine, b.status) == ("b", "gone")
    assert [(each.round, each.waiting) for each in view.rounds] == [("v8", ("a",))]
    assert [failure.cause for failure in view.failures] == ["TornRead"]
    assert [(each.version, each.cause) for each in view.skipped] == [(9, "busy")]


def test_watch_once_prints_tables(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [*whole_round(), LATER])
    done = weightbus("watch", "--once", "--nats", nats_server.url)
    assert done.returncode == 0, done.stderr
    assert f"newest versions  {MODEL} 7" in done.stdout
    assert "serving" in done.stdout
    assert "TornRead" in done.stdout


@pytest.mark.parametrize("command", [("watch", "--once"), ("trace",)])
def test_who_looks_back_writes_nothing_when_something_cannot_be_read(
    command: tuple[str, ...], nats_server: NatsServer
) -> None:
    put_on_bus(nats_server.settings, [*whole_round(), LATER])
    for message in (join("b"), ready(), complete("a"), stage("a", "fetch", 1, 2, rank=0)):
        anyio.run(publish_raw, nats_server.url, subject_of(message, "weightbus"), b"\xc1", {})
    done = weightbus(*command, "--nats", nats_server.url)
    assert (done.returncode, done.stderr) == (0, "")

    async def letters() -> list[str]:
        async with open_bus(nats_server.settings) as bus:
            history = bus.replay(DeadLetter, is_answered=False)
            return [letter.message.subject async for letter in history]

    assert anyio.run(letters) == []


def test_watch_once_shows_one_model_when_it_is_named(nats_server: NatsServer) -> None:
    others = [ready(3, model="zeta"), state("z", model="zeta")]
    put_on_bus(nats_server.settings, [ready(), LATER, *others])
    done = weightbus("watch", "--once", "--json", "--model", "zeta", "--nats", nats_server.url)
    view = msgspec.json.decode(done.stdout, type=FleetView)
    assert (view.newest, [engine.engine for engine in view.engines]) == ({"zeta": 3}, ["z"])


def test_watch_once_shows_engines_that_wait_for_their_first_checkpoint(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [state("z", model="zeta")])
    done = weightbus("watch", "--once", "--json", "--nats", nats_server.url)
    view = msgspec.json.decode(done.stdout, type=FleetView)
    assert [(engine.model, engine.engine) for engine in view.engines] == [("zeta", "z")]


def test_watch_tells_of_engines_that_wait_for_their_first_checkpoint(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [state("z", model="zeta")])
    with watching(nats_server) as process:
        assert "zeta: z is" in next_line(process)


def test_watch_prints_a_line_per_event_until_it_is_interrupted(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [ready(6), state("a", "updating", 6, 7)])
    with watching(nats_server) as process:
        first = next_line(process)
        assert f"{MODEL}: a is updating, on version 6, moving to version 7" in first
        said = [ready(7), join("a"), complete("a"), skipped(8), first_token("a", 131, 143)]
        put_on_bus(nats_server.settings, said)
        told = [next_line(process).partition("Z ")[2] for _ in said]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert told[0] == f"{MODEL}: version 7 is ready, from trainer\n"
    assert told[1] == f"{MODEL}: a joins round v7 with 1 rank\n"
    assert told[2].startswith(f"{MODEL}: a serves version 7 after 129 ms")
    assert told[3] == f"{MODEL}: version 8 is skipped by trainer (busy): a reads slot 1\n"
    assert told[4] == f"{MODEL}: a makes its first token with version 7 after 12.0 ms\n"


def test_watch_prints_an_object_per_event_when_asked_for_json(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [ready(6), state("a")])
    with watching(nats_server, "--json") as process:
        assert json.loads(next_line(process))["type"] == "EngineState"
        put_on_bus(nats_server.settings, [failed("a")])
        told = json.loads(next_line(process))
    assert told["received_ns"] > 0
    expected = {"received_ns": told["received_ns"], **msgspec.to_builtins(failed("a"))}
    assert told == expected


def test_watch_tells_that_an_engine_is_gone_when_its_heartbeat_ends(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [ready(6), state("a")])
    with watching(nats_server, "--json", "--model", MODEL) as process:
        assert json.loads(next_line(process))["type"] == "EngineState"
        drop_engine(nats_server.settings, MODEL, "a")
        gone = json.loads(next_line(process))
    assert (gone["type"], gone["model"], gone["engine"]) == ("EngineGone", MODEL, "a")


def test_watch_goes_on_and_tells_what_it_missed_when_the_bus_restarts(
    nats_server: NatsServer,
) -> None:
    put_on_bus(nats_server.settings, [ready(6), state("a")])
    with watching(nats_server, "--json") as process:
        assert json.loads(next_line(process))["type"] == "EngineState"
        nats_server.restart()
        missed: list[Message] = [ready(7), join("a"), plan(), complete("a")]
        put_on_bus(nats_server.settings, missed)
        told: set[str] = set()
        while "UpdateComplete" not in told:
            told.add(json.loads(next_line(process))["type"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert told >= {"CheckpointReady", "Join", "RoundPlan", "UpdateComplete"}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_watch_says_that_the_bus_is_lost_while_it_is_and_then_that_it_is_back(
    nats_server: NatsServer, options: tuple[str, ...]
) -> None:
    put_on_bus(nats_server.settings, [state("a")])
    with watching(nats_server, *options) as process:
        next_line(process)
        nats_server.kill()
        said = process.stderr if options else process.stdout
        assert said is not None
        assert said.readline().startswith("bus lost, trying since ")
        nats_server.start()
        back = next_line(process)
    assert ('"Reconnected"' in back) if options else ("lost and is back" in back)


def test_watch_shows_on_its_terminal_that_the_bus_is_lost(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [state("a")])
    ours, theirs = pty.openpty()
    command = [*COMMAND, "watch", "--nats", nats_server.url]
    process = subprocess.Popen(command, env=environment(TERM="xterm"), stdout=theirs)
    os.close(theirs)
    try:
        seen = b""
        while b"serving" not in seen and (chunk := _read(ours)):
            seen += chunk
        assert b"bus lost" not in seen
        nats_server.kill()
        seen = b""
        while b"bus lost, trying since " not in seen and (chunk := _read(ours)):
            seen += chunk
        assert b"bus lost, trying since " in seen
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        os.close(ours)


def test_watch_tells_everything_when_its_reader_stood_still(nats_server: NatsServer) -> None:
    """A pipe holds a few hundred lines: after them the command stands still, too."""
    few = {"WEIGHTBUS_MAX_UNREAD_MESSAGES": "8"}
    put_on_bus(nats_server.settings, [state("a", version=0)])
    with watching(nats_server, "--json", **few) as process:
        assert json.loads(next_line(process))["type"] == "EngineState"
        put_on_bus(nats_server.settings, [complete("a", version) for version in range(MANY)])
        told = [json.loads(next_line(process)) for _ in range(MANY)]
    assert [each["version"] for each in told] == list(range(MANY))


def test_watch_draws_tables_when_it_has_a_terminal(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [*whole_round(), LATER])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "watch", "--nats", nats_server.url],
        env=environment(TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        seen = b""
        while b"serving" not in seen:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        while chunk := _read(ours):
            seen += chunk
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        os.close(ours)
    assert seen.rstrip().endswith(b"\x1b[?25h"), "the cursor is shown again"


def _read(descriptor: int) -> bytes:
    """Empty at the end: a terminal whose other side is closed says EIO."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_watch_ends_quietly_when_its_reader_has_gone(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [ready(6), state("a")])
    with watching(nats_server, "--json") as process:
        next_line(process)
        assert process.stdout is not None
        process.stdout.close()
        put_on_bus(nats_server.settings, [ready(7), failed("a")])
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize("arguments", [(), ("--once",)])
def test_watch_fails_with_one_line_when_there_is_no_bus(
    nats_server: NatsServer, arguments: tuple[str, ...]
) -> None:
    nats_server.stop()
    quick = {"WEIGHTBUS_CONNECT_TIMEOUT_S": "0.5"}
    done = weightbus("watch", "--nats", nats_server.url, *arguments, **quick)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
