"""Pages when an engine is more than N versions behind, or quarantined; and again when it is back.

    WEIGHTBUS_NATS_URL=nats://HOST:PORT python examples/page_on_lag.py --versions 2 \\
        [--model MODEL] [--command 'notify-send Weightbus'] [--webhook https://HOST/HOOK]

Every page is printed. The command gets the text as its last argument, the webhook as JSON
`{"text": ...}`. One page for each incident: it ends when the engine serves again and has made good
half of the lag that is allowed, or is gone. An engine that serves nothing lags behind what was the
newest version when it was first seen so.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Sequence

import anyio
import anyio.to_thread

from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.monitor import CaughtUp, EngineGone, Missed, Received, Reconnected, open_monitor
from weightbus.bus.settings import BusSettings
from weightbus.schemas import (
    CheckpointReady,
    EngineState,
    UpdateComplete,
    UpdateFailed,
    WeightBusError,
)
from weightbus.tracing.fleet import EngineView, FleetView
from weightbus.tracing.watcher import Fleet

ATTEMPTS = 3
ATTEMPT_S = 10.0
"""How long a command or a webhook may take."""
PAUSE_S = 1.0
"""After the first attempt; twice as long after the second."""
AT_ONCE = 8
"""Commands and requests."""


class Incidents:
    """Which engines are in trouble; says so once, and once that it is over. Does no I/O."""

    def __init__(self, versions: int) -> None:
        self._versions = versions
        self._open: dict[tuple[str, str], str] = {}
        self._newest_when_idle: dict[tuple[str, str], int] = {}
        """Of engines that serve nothing: the newest version when that was seen first."""

    def look(self, fleet: FleetView) -> list[str]:
        """What is to be told now."""
        told = []
        for engine in fleet.engines:
            key, name = (engine.model, engine.engine), f"{engine.model}/{engine.engine}"
            lag = self._lag(engine, fleet)
            kind = self._trouble(engine, lag, self._open.get(key, ""))
            if kind and kind != self._open.get(key):
                self._open[key] = kind
                told.append(f"PAGE {name} is {self._details(kind, engine, lag, fleet)}")
            elif not kind and self._open.pop(key, None):
                now = "gone" if engine.status == "gone" else f"back, on version {engine.version}"
                told.append(f"OK {name} is {now}")
        return told

    def _lag(self, engine: EngineView, fleet: FleetView) -> int:
        key, newest = (engine.model, engine.engine), fleet.newest.get(engine.model, -1)
        if engine.version < 0 <= newest and engine.status != "gone":
            return newest - self._newest_when_idle.setdefault(key, newest)
        self._newest_when_idle.pop(key, None)
        return engine.lag or 0

    def _trouble(self, engine: EngineView, lag: int, open_kind: str) -> str:
        """Empty: none."""
        if engine.status == "gone":
            return ""
        if engine.status == "quarantined":
            return "quarantined"
        if engine.version < 0 and open_kind:
            return open_kind
        allowed = self._versions // 2 if open_kind else self._versions
        return "behind" if lag > allowed else ""

    def _details(self, kind: str, engine: EngineView, lag: int, fleet: FleetView) -> str:
        if kind == "behind":
            serves = engine.version if engine.version >= 0 else "none"
            newest = fleet.newest[engine.model]
            versions = "version" if lag == 1 else "versions"
            return f"{lag} {versions} behind: it serves {serves}, newest is {newest}"
        for failure in fleet.failures:
            if (failure.model, failure.engine) == (engine.model, engine.engine):
                return f"quarantined: version {failure.version}: {failure.cause}: {failure.reason}"
        return "quarantined"


class Pager:
    """Tells people."""

    def __init__(self, command: str | None, webhook: str | None) -> None:
        self._command, self._webhook = command, webhook
        self._at_once = anyio.CapacityLimiter(AT_ONCE)

    async def page(self, texts: Sequence[str]) -> None:
        """Side by side. Returns once each was told, or could not be: then that is on stderr."""
        async with anyio.create_task_group() as tasks:
            for text in texts:
                print(text, flush=True)
                if self._command:
                    tasks.start_soon(self._try, text, self._run)
                if self._webhook:
                    tasks.start_soon(self._try, text, self._post)

    async def _try(self, text: str, tell: Callable[[str], Awaitable[None]]) -> None:
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await anyio.sleep(attempt * PAUSE_S)
            try:
                async with self._at_once:
                    with anyio.fail_after(ATTEMPT_S):
                        await tell(text)
            except (OSError, ValueError) as error:  # TimeoutError is an OSError
                reason = str(error) or type(error).__name__
            else:
                return
        print(f"not told: {text}: {reason}", file=sys.stderr, flush=True)

    async def _run(self, text: str) -> None:
        assert self._command
        words = shlex.split(self._command)
        done = await anyio.run_process([*words, text], check=False, stdout=None, stderr=None)
        if done.returncode != 0:
            raise OSError(f"{self._command} ended with {done.returncode}")

    async def _post(self, text: str) -> None:
        assert self._webhook
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"text": text}).encode()
        request = urllib.request.Request(self._webhook, body, headers)

        def send() -> None:
            urllib.request.urlopen(request, timeout=ATTEMPT_S).close()

        await anyio.to_thread.run_sync(send, abandon_on_cancel=True)


async def watch(bus: Bus, model: str | None, incidents: Incidents, pager: Pager) -> None:
    """Until cancelled. While somebody is told, the bus does not wait: we read on afterwards."""
    fleet = Fleet()
    kinds = (CheckpointReady, UpdateComplete, UpdateFailed)
    async with open_monitor(bus, *kinds, model=model) as monitor:
        async for announced in bus.replay(CheckpointReady, model=model, is_answered=False):
            fleet.feed(announced.message, announced.received_ns)
        is_whole = False
        async for event in monitor:
            match event:
                case Received():
                    fleet.feed(event.message, event.received_ns)
                case EngineState():
                    fleet.feed(event, bus.clock.now_ns())
                case EngineGone():
                    fleet.feed_gone(event.model, event.engine)
                case CaughtUp():
                    is_whole = True
                case Missed() | Reconnected():
                    continue
            if is_whole:
                await pager.page(incidents.look(fleet.view(bus.clock.now_ns())))


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--versions", type=int, required=True, help="how far behind is no trouble")
    parser.add_argument("--model", help="only this one")
    parser.add_argument("--command", help="run with the text as its last argument")
    parser.add_argument("--webhook", help="URL that the text is posted to as JSON")
    given = parser.parse_args()
    settings = BusSettings.from_env(os.environ)
    if settings.url is None:
        sys.exit("set WEIGHTBUS_NATS_URL to what `weightbus serve` printed")
    pager = Pager(given.command, given.webhook)
    async with open_bus(settings) as bus:
        print(f"watching {bus.url}", flush=True)
        await watch(bus, given.model, Incidents(given.versions), pager)


if __name__ == "__main__":
    try:
        anyio.run(main)
    except (KeyboardInterrupt, WeightBusError) as end:
        sys.exit(str(end) or "interrupted")
