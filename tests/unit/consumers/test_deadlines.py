"""Nothing in `consumers/` waits for ever for somebody else. Reads the sources.

That it is so when processes stand still is shown with real ones, in `tests/integration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.unit.consumers.waits import Wait, find_waits

ROOT: Final = Path(__file__).resolve().parents[3] / "consumers"

IDLE = "idles between two pieces of work; cancelled when its service ends"
SELF = "ends by itself: computes, and waits for nobody"
INSIDE = "held for a request to the bus, which has the bus's own deadline"

ALLOWED: Final[Mapping[str, str]] = {
    "engines/channel.py:WorkerChannel._send": "called by `request` only, under its deadline",
    "engines/channel.py:WorkerChannel.run_receiver": IDLE,
    "engines/torch/client.py:_Connection.run_receiver": IDLE,
    "engines/torch/client.py:TorchEngineClient._connect": "called by `_ask` only, under a deadline",
    "engines/torch/first.py:FirstAnswer.wait": "called by `Front._first_answer` only, under its "
    "deadline",
    "engines/torch/frames.py:FrameStream.send": "the caller's deadline; a server's client has its "
    "own connection, and ends with it",
    "engines/torch/frames.py:FrameStream.receive": IDLE,
    "engines/torch/frames.py:_Readable.receive": IDLE,
    "engines/torch/frames.py:_Readable.aclose": "part of the interface; nobody calls it",
    "engines/torch/front.py:Front.run_ranks": IDLE,
    "engines/torch/front.py:Front._restart": "called by `_control` only, under its deadline",
    "engines/torch/gate.py:Gate.close": "called by `Front._control` only, under its deadline",
    "engines/torch/ranks.py:RankProcess.run_relay": IDLE,
    "engines/torch/ranks.py:Ranks.wait_until_lost.watch": IDLE,
    "engines/torch/server.py:run_engine": IDLE,
    "engines/torch/server.py:_announce": IDLE,
    "engines/torch/server.py:_serve": IDLE,
    "engines/torch/server.py:_serve_client": IDLE,
    "engines/torch/start.py:open_front": "closes a pipe that nothing is written to",
    "engines/turns.py:TurnEngine._ask_in_turn": "its requests end by their own deadline, "
    "and with them what it waits for",
    "errands.py:Errands.run": IDLE,
    "listener.py:Listener.run_messages": IDLE,
    "listener.py:Listener.run_presence": IDLE,
    "listener.py:Listener.catch_up": "each try has the bus's own deadline, and a bus that is gone "
    "ends the service",
    "measuring.py:measure_memory.turn": SELF,
    "measuring.py:measure_broadcast": SELF,
    "measuring.py:measure_p2p": "the transfer engine's own timeouts; nobody's update waits for it",
    "outbox.py:Outbox._run_control": IDLE,
    "outbox.py:Outbox._run_progress": IDLE,
    "reload/accelerator.py:CudaAccelerator._wait": "a device cannot be stopped: the worker answers "
    "nothing while it may write, and its consumer gives it up in time",
    "reload/preparing.py:_Job.join": "called by `finish` only",
    "reload/preparing.py:Preparing.finish": "the work looks at its own budget wherever it waits "
    "for others; else it computes, or asks a driver that cannot be stopped: it uses what the next "
    "request changes, so the worker answers nothing, and its consumer gives it up in time",
    "service.py:Consumer._start": "each step is a request to the bus with the bus's own deadline",
    "service.py:Consumer._run_lease_renewal": IDLE,
    "service.py:Consumer._run_machine": IDLE,
    "transfer/agreement.py:agree": "until `end`, a time of the clock, and the wait looks at it",
    "transfer/copies.py:_ask": "each try has the bus's own deadline, and a bus that is gone "
    "ends the service",
    "transfer/copies.py:_listen": IDLE,
    "transfer/copies.py:_watch": IDLE,
    "transfer/copies.py:open_copies": "a request to the bus, tried again: see `_catch_up`",
    "transfer/compose.py:open_routes": SELF,
    "transfer/device_lanes.py:DeviceStaging._wait_idle": "a device cannot be stopped, and what "
    "waits for lost members was ended before: the worker leaves no memory that is still written, "
    "and its consumer gives it up in time",
    "transfer/groups.py:_Forming.wait": "called by `Groups._form` only, under its deadline",
    "transfer/remote.py:RemoteFetcher._fetch_some.read_share": "called by `fetch` only, under its "
    "deadline",
    "transfer/kept.py:KeptCopy.begin": SELF,
    "transfer/remote.py:RemoteFetcher._until": "called by `contact` under its deadline, and by "
    "`fetch`, which ends when there is no progress",
    "transfer/pipeline.py:Pipeline._until": "called under the deadline of `run` only",
    "transfer/relay.py:run_relay": "cancelled once the engine has answered, which has a deadline",
    "transfer/staging.py:BlockPool.room_bytes": "takes the lock only where nobody has it",
    "transfer/staged.py:Staging.plan": SELF,
    "transfer/staged.py:open_blocks": SELF,
    "transfer/staged.py:_beside": "set, or cancelled, by the tasks beside it at their deadline",
    "transfer/together.py:Calls.run": "the deadline of whoever calls it; the thread may be left",
    "update.py:Updater.renew_leases": INSIDE,
    "update.py:Updater.release": INSIDE,
    "update.py:Updater._take_lease": INSIDE,
    "update.py:Updater._manifest": "called by `prepare` only, under its deadline",
    "update.py:Updater._reachable": "called by `prepare` only, under its deadline",
    "update.py:Updater._bind": SELF,
    "update.py:Updater._prove": SELF,
    "pause.py:Pause.begin": "held for commands to the engine, which have their deadlines",
    "reload/threads.py:Threads.run": SELF,
    "transfer/remote.py:RemoteFetcher.release.forget": "takes the lock only where nobody has it",
}
"""File and function -> why it may wait without a deadline in sight."""


def found() -> dict[str, list[Wait]]:
    """Every such wait, by file and function."""
    waits: dict[str, list[Wait]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        for wait in find_waits(path.read_text()):
            waits.setdefault(f"{path.relative_to(ROOT)}:{wait.function}", []).append(wait)
    return waits


def test_no_wait_of_a_consumer_is_without_a_deadline() -> None:
    wrong = [
        f"{place}:{wait.line}: {wait.what}"
        for place, waits in found().items()
        if place not in ALLOWED
        for wait in waits
    ]
    assert not wrong, "bound them, or say in ALLOWED why not:\n" + "\n".join(wrong)


def test_every_exception_is_one() -> None:
    stale = ALLOWED.keys() - found().keys()
    assert not stale, f"no longer needed: {sorted(stale)}"


@pytest.mark.parametrize(
    "source",
    [
        "await event.wait()",
        "event.wait()",
        "thread.join()",
        "await process.wait()",
        "await stream.receive()",
        "socket.recv_multipart()",
        "fcntl.flock(fd, fcntl.LOCK_EX)",
        "await tasks.start(run)",
        "async for item in stream: pass",
        "await anext(items)",
        "await anyio.sleep_forever()",
        "while not work.is_completed(): await anyio.sleep(0.1)",
        "await anyio.to_thread.run_sync(read)",
        "with anyio.fail_after(deadline_s): await anyio.to_thread.run_sync(read)",
        "self.lock = anyio.Lock()\n    async with self.lock: pass",
        "self.lock = threading.Lock()\n    with self.lock: time.sleep(1)",
        "with anyio.fail_after(deadline_s):\n        async def wait(): await event.wait()",
    ],
)
def test_wait_without_a_deadline_is_found(source: str) -> None:
    assert len(find_waits(f"async def f():\n    {source}\n")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "with anyio.move_on_after(deadline_s): await event.wait()",
        "event.wait(deadline_s)",
        "thread.join(timeout=5)",
        "', '.join(words)",
        "socket.recv_multipart(zmq.NOBLOCK)",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "thread.start()",
        "with anyio.fail_after(deadline_s):\n"
        "        await anyio.to_thread.run_sync(read, abandon_on_cancel=True)",
        "with anyio.fail_after(deadline_s):\n        async for item in stream: pass",
        "self.lock = threading.Lock()\n    with self.lock: self.count += 1",
        "while not done():\n        budget.check()\n        time.sleep(0.1)",
    ],
)
def test_wait_with_a_deadline_is_no_finding(source: str) -> None:
    assert find_waits(f"async def f():\n    {source}\n") == []
