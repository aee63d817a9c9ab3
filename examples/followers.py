"""A bus and two engines that follow a model, for an example that is given none.

Each is a command that a terminal could run as well. They end with the example, however it ends.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio

from weightbus.bus.connection import open_bus
from weightbus.bus.guard import guarded_command
from weightbus.bus.settings import BusSettings
from weightbus.bus.sweep import sweep_blocks
from weightbus.schemas import CheckpointReady, CheckpointSkipped, UpdateComplete
from weightbus.tracing.narration import narrate

ENGINES = ("a", "b")
START_S = 150.0
"""For processes that import torch, on a small machine."""
SERVE_S = 60.0
POLL_S = 0.05
STOP_S = 20.0
LOG_TAIL_BYTES = 2000


class Followers:
    """The engines that follow: those that were started here, or those that are on the bus."""

    def __init__(self, url: str, model: str, engines: tuple[str, ...]) -> None:
        self.url, self._model, self._engines = url, model, engines
        self._settings = BusSettings(url=url)

    def show(self, ready: CheckpointReady) -> None:
        """Wait until every engine serves a version, proven, and say so; else end the example."""
        for update in anyio.run(self._served, ready):
            print(f"  {narrate(update)}", flush=True)
            if (update.version, update.verified) != (ready.version, "verified"):
                sys.exit(f"{update.engine} has not proven version {ready.version}: {update}")
            if update.weights_digest != ready.weights_digest:
                sys.exit(f"{update.engine} holds something else than version {ready.version}")

    async def _served(self, ready: CheckpointReady) -> list[UpdateComplete]:
        found: dict[str, UpdateComplete] = {}
        async with open_bus(self._settings) as bus:
            present = [state.engine for state in await bus.presence.list(self._model)]
            waited_for = self._engines or present
            with anyio.move_on_after(SERVE_S):
                while len(found) < len(waited_for):
                    for engine in waited_for:
                        last = await bus.last(UpdateComplete, model=self._model, engine=engine)
                        if last is not None and last.message.version >= ready.version:
                            found[engine] = last.message
                    await anyio.sleep(POLL_S)
                return list(found.values())
        missing = ", ".join(engine for engine in waited_for if engine not in found)
        sys.exit(f"{missing} did not serve version {ready.version} within {SERVE_S:g} s")

    async def wait_present(self, processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
        """Until every engine that was started is on the bus."""
        async with open_bus(self._settings) as bus:
            with anyio.move_on_after(START_S):
                while True:
                    states = await bus.presence.list(self._model)
                    if {state.engine for state in states} >= set(self._engines):
                        return
                    if ended := [name for name, each in processes.items() if each.poll()]:
                        sys.exit(f"engine {ended[0]} has ended")
                    await anyio.sleep(POLL_S)
        sys.exit(f"engines {', '.join(self._engines)} did not start within {START_S:g} s")

    async def tell_skipped(self) -> None:
        """Print which version does not come, if one was given up lately, and why."""
        async with open_bus(self._settings) as bus:
            last = await bus.last(CheckpointSkipped, model=self._model, producer="trainer")
            if last is not None:
                print(narrate(last.message), flush=True)


@contextmanager
def running_followers(model: str, config: Mapping[str, Any], url: str) -> Iterator[Followers]:
    """Followers of `model`; `url`: of a bus that has some already, empty: start all that is needed.

    `config`: of the `decoder` that the engines serve.
    """
    if url:
        yield Followers(url, model, ())
        return
    directory = Path(tempfile.mkdtemp(prefix="wb-"))  # short: it holds the paths of sockets
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(sweep_blocks, model)  # of ranks that were killed
        bus = stack.enter_context(_running(directory / "bus.log", "serve", "--json"))
        followers = Followers(_url_of(bus, directory / "bus.log"), model, ENGINES)
        processes = {}
        for engine in ENGINES:
            words = ["--model", model, "--engine-id", engine, "--nats", followers.url]
            words += ["--architecture", "decoder", "--config", json.dumps(config)]
            words += ["--engine-dir", str(directory / engine)]
            process = _running(directory / f"{engine}.log", "consume", *words)
            processes[engine] = stack.enter_context(process)
        try:
            anyio.run(followers.wait_present, processes)
        except SystemExit:
            for engine in ENGINES:
                print((directory / f"{engine}.log").read_text()[-LOG_TAIL_BYTES:], file=sys.stderr)
            raise
        print(f"bus at {followers.url}; engines {' and '.join(ENGINES)} follow {model}", flush=True)
        try:
            yield followers
        except BaseException:
            anyio.run(followers.tell_skipped)
            raise


@contextmanager
def _running(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of weightbus that ends with this process, even if that is killed."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            guarded_command([sys.executable, "-m", "weightbus", *words]),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(STOP_S)


def _url_of(bus: subprocess.Popen[bytes], log: Path) -> str:
    """What `weightbus serve --json` says once it runs."""
    late = time.monotonic() + START_S
    while not (said := log.read_text()).endswith("\n"):
        if bus.poll() is not None or time.monotonic() > late:
            sys.exit(f"the bus did not start: {said}")
        time.sleep(POLL_S)
    return str(json.loads(said)["url"])
