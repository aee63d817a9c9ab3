"""The rank processes of a `torch` engine: started together, watched together, killed together.

Owns the processes of one generation, their words, and the channel to them. Does not import torch.
One rank alone is of no use: whatever happens to one of them ends the generation.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NoReturn

import anyio
import msgspec
from anyio.abc import Process

from weightbus.bus.background import open_background
from weightbus.consumers.engines.channel import WorkerChannel, open_channel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.errors import RequestFailed
from weightbus.consumers.engines.torch import worker
from weightbus.consumers.engines.torch.messages import (
    RANK_REPLIES,
    AskFingerprints,
    Fingerprints,
    Infer,
    Inferred,
    Ping,
    Refused,
)
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.words import Held, RankWords
from weightbus.consumers.engines.torch.worker import WorkerArguments
from weightbus.consumers.errors import WorkerLost
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import WorkerMessage

__all__ = ("Ranks", "open_ranks")

_LAST_WORDS_BYTES = 2000
_LAST_WORDS_S = 1.0
"""How long the text of a dead rank is waited for."""

_ON_THIS_HOST = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""All ranks of an engine are on one host, where they find each other without a network."""

_KILLED_S = 5.0
"""A killed process runs nothing of its own any more; so long the kernel may take to end it."""


class RankProcess:
    """One process and what it last printed."""

    def __init__(self, process: Process, words: RankWords) -> None:
        self.process, self.words = process, words
        self.ended = anyio.Event()
        """All that it printed has been read."""
        self.last_words = b""

    async def run_relay(self) -> None:
        """Pass on what the rank prints, and keep the end of it."""
        try:
            if self.process.stderr is not None:
                async for chunk in self.process.stderr:
                    sys.stderr.buffer.write(chunk)
                    sys.stderr.buffer.flush()
                    self.last_words = (self.last_words + chunk)[-_LAST_WORDS_BYTES:]
        finally:
            self.ended.set()

    def kill_nowait(self) -> None:
        """A rank owns nothing that outlives it, so it need not be asked."""
        if self.process.returncode is None:
            self.process.kill()

    async def obituary(self) -> str:
        """How the process ended, and what it last printed."""
        with anyio.move_on_after(_LAST_WORDS_S):
            await self.ended.wait()
        code = self.process.returncode
        how = f"status {code}" if code is None or code >= 0 else signal.Signals(-code).name
        text = self.last_words.decode(errors="replace").strip()
        return f"process {self.process.pid} ended with {how}" + (f": {text}" if text else "")


class Ranks:
    """One generation of rank processes."""

    def __init__(self, ranks: Sequence[RankProcess], channel: WorkerChannel) -> None:
        self._ranks = ranks
        self._channel = channel
        self._condemned = ""

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, in rank order."""
        return tuple(rank.process.pid for rank in self._ranks)

    def held(self) -> list[Held]:
        """What every rank holds, whatever it is doing."""
        return [rank.words.held() for rank in self._ranks]

    def hold(self) -> None:
        """From now on the ranks' weights may change."""
        for rank in self._ranks:
            rank.words.hold()

    def let_go(self) -> None:
        """From now on the ranks' weights must not change."""
        for rank in self._ranks:
            rank.words.let_go()

    def condemn(self, reason: str) -> None:
        """End this generation: `wait_until_lost` will say why."""
        self._condemned = reason
        for rank in self._ranks:
            rank.kill_nowait()

    async def wait_until_ready(self, deadline_s: float) -> None:
        """Returns when every rank has built its model and answers.

        Raises:
            WorkerLost, DeadlineExceeded: one does not.
        """
        await self._ask_all(Ping(request=0), deadline_s)

    async def compute(
        self, request: Infer | AskFingerprints, deadline_s: float
    ) -> Inferred | Fingerprints:
        """Let all ranks carry out one request, together.

        Raises:
            RequestFailed: the model refused it; the ranks are as they were.
            WorkerLost, DeadlineExceeded: a rank is gone, is stuck, or holds another version.
        """
        replies = await self._ask_all(request, deadline_s)
        first = replies[0]
        for rank, reply in replies.items():
            if _version_of(reply) != _version_of(first):
                held = f"{_version_of(reply)}, rank 0 with {_version_of(first)}"
                raise WorkerLost(rank, f"it computed with version {held}")
        answer: Inferred | Fingerprints
        match first:
            case Inferred():
                answer = first
            case Fingerprints():
                each = (one for one in replies.values() if isinstance(one, Fingerprints))
                hashes = tuple(one.fingerprints[0] for one in each)
                answer = msgspec.structs.replace(first, fingerprints=hashes)
            case Refused(error=error, reason=reason):
                raise RequestFailed(error, reason)
            case _:
                raise WorkerLost(0, f"it answered with {type(first).__name__}")
        return msgspec.structs.replace(answer, request=request.request)

    async def wait_until_lost(self) -> NoReturn:
        """Returns never; raises when a rank's process has ended.

        Raises:
            WorkerLost: says which, how, and what it last printed.
        """
        ended: list[int] = []
        async with anyio.create_task_group() as tasks:

            async def watch(number: int, rank: RankProcess) -> None:
                await rank.process.wait()
                ended.append(number)
                tasks.cancel_scope.cancel()

            for number, rank in enumerate(self._ranks):
                tasks.start_soon(watch, number, rank)
        number = ended[0]
        raise WorkerLost(number, self._condemned or await self._ranks[number].obituary())

    async def _ask_all(self, request: WorkerMessage, deadline_s: float) -> dict[int, WorkerMessage]:
        outcomes = await self._channel.request_each(
            dict.fromkeys(range(len(self._ranks)), request), deadline_s
        )
        replies: dict[int, WorkerMessage] = {}
        for rank, outcome in outcomes.items():
            if isinstance(outcome, WeightBusError):
                raise outcome
            replies[rank] = outcome
        return replies


def _version_of(reply: WorkerMessage) -> int | None:
    return reply.version if isinstance(reply, Inferred | Fingerprints) else None


@asynccontextmanager
async def open_ranks(directory: EngineDirectory, spec: TorchEngineSpec) -> AsyncIterator[Ranks]:
    """Start one process per rank; at the end they are killed, and gone when this returns."""
    async with AsyncExitStack() as stack:
        directory.rendezvous.unlink(missing_ok=True)
        stack.callback(directory.rendezvous.unlink, missing_ok=True)
        channel = await stack.enter_async_context(
            open_channel(directory.ranks, spec.tp, RANK_REPLIES)
        )
        relays = await stack.enter_async_context(open_background())
        words = [RankWords.create(number) for number in range(spec.tp)]
        for shared in words:
            stack.callback(shared.close)
        ranks: list[RankProcess] = []
        stack.push_async_callback(_kill, ranks)
        for number, shared in enumerate(words):
            rank = RankProcess(await _start(directory, spec, number, shared), shared)
            ranks.append(rank)
            relays.start_soon(rank.run_relay)
        yield Ranks(ranks, channel)


async def _start(
    directory: EngineDirectory, spec: TorchEngineSpec, rank: int, words: RankWords
) -> Process:
    arguments = WorkerArguments(
        directory=str(directory.path),
        rank=rank,
        words=words.descriptor,
        parent=os.getpid(),
        spec=spec,
    )
    return await anyio.open_process(
        [sys.executable, "-m", worker.__name__, msgspec.json.encode(arguments).decode()],
        stdin=subprocess.DEVNULL,
        stdout=None,
        stderr=subprocess.PIPE,
        pass_fds=(words.descriptor,),
        env={**os.environ, **_ON_THIS_HOST, "OMP_NUM_THREADS": str(spec.threads)},
    )


async def _kill(ranks: Sequence[RankProcess]) -> None:
    with anyio.CancelScope(shield=True):
        for rank in ranks:
            rank.kill_nowait()
        with anyio.move_on_after(_KILLED_S):
            for rank in ranks:
                await rank.process.wait()
                await rank.ended.wait()
