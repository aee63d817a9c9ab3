"""What the conformance suite needs of an engine beyond `Engine`: requests, processes, and the
truth.

The engine runs on its own, as one that outlives its consumers. Another kind of engine joins the
suite with an `EngineUnderTest` of its own in `KINDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio
import numpy as np
import numpy.typing as npt

from tests.integration.engines.checkpoints import Checkpoints
from tests.unit.transfer.staging import open_staging, relaying, streaming
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.engines.torch.messages import Inputs, Outputs
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.start import open_front, wait_until_ready
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.consumers.planning.cells import CellPlan, Verdict, plan_cells, verify_cells
from weightbus.schemas.worker import Applied, Described, Feed, InPlace, Inspected, Relay, Stream

__all__ = (
    "GPU_KINDS",
    "KINDS",
    "LONG_S",
    "Answer",
    "EngineUnderTest",
    "Subject",
    "Updates",
    "digests_of",
    "until",
    "updating",
)

LONG_S = 120.0
POLL_S = 0.01


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that another process does."""
    with anyio.fail_after(LONG_S):
        while True:
            if await condition():
                return
            await anyio.sleep(POLL_S)


class Subject(NamedTuple):
    """A model and how it is cut."""

    architecture: str
    config: Mapping[str, Any]
    ranks: int


class Answer(NamedTuple):
    """What a request got; equal contents mean equal weights, bit for bit."""

    version: int
    content: object


class EngineUnderTest(ABC):
    """One running engine, and what lies around it."""

    checkpoints: Checkpoints

    @abstractmethod
    def open_consumer(self) -> AbstractAsyncContextManager[Engine]:
        """A consumer's end of the engine; may be opened again once closed."""

    @abstractmethod
    async def ask(self, deadline_s: float = LONG_S) -> Answer:
        """One request, always the same."""

    @abstractmethod
    async def waiting(self) -> int:
        """How many requests wait."""

    @abstractmethod
    async def fingerprints(self) -> tuple[str, ...]:
        """What every rank holds, bit for bit."""

    @abstractmethod
    async def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers, in rank order."""


class TorchUnderTest(EngineUnderTest):
    def __init__(
        self, place: EngineDirectory, checkpoints: Checkpoints, client: TorchEngineClient
    ) -> None:
        self.checkpoints = checkpoints
        self._place, self._client = place, client

    def open_consumer(self) -> AbstractAsyncContextManager[Engine]:
        return open_torch_engine(self._place.path, roots=[str(self.checkpoints.directory)])

    async def ask(self, deadline_s: float = LONG_S) -> Answer:
        tokens = tuple(range(1, 12))
        if self.checkpoints.architecture == "decoder":
            inputs = Inputs(prompts=(tokens, tokens[::-1]), new_tokens=12)
        else:
            inputs = Inputs(prompts=(tokens,))
        answer = await self._client.infer(inputs, deadline_s)
        assert answer.outputs != Outputs()
        return Answer(answer.version, answer.outputs)

    async def waiting(self) -> int:
        return (await self._client.state(LONG_S)).waiting

    async def fingerprints(self) -> tuple[str, ...]:
        return (await self._client.fingerprint(LONG_S)).fingerprints

    async def worker_pids(self) -> tuple[int, ...]:
        return (await self._client.state(LONG_S)).pids


@asynccontextmanager
async def open_torch(
    subject: Subject, directory: Path, device: str = "cpu"
) -> AsyncIterator[EngineUnderTest]:
    files = directory / "files"
    files.mkdir()
    checkpoints = Checkpoints(files, subject.architecture, subject.config, subject.ranks)
    place = EngineDirectory(directory / "engine")
    place.prepare()
    spec = TorchEngineSpec(
        architecture=subject.architecture,
        config=dict(subject.config),
        tp=subject.ranks,
        device=device,
    )
    async with open_front(place, spec) as front, open_torch_client(place.path) as client:
        await wait_until_ready(client, place, front, LONG_S)
        yield TorchUnderTest(place, checkpoints, client)


Opener = Callable[[Subject, Path], AbstractAsyncContextManager[EngineUnderTest]]
KINDS: Mapping[str, Opener] = {"torch": open_torch}
GPU_KINDS: Mapping[str, Opener] = {"torch-cuda": partial(open_torch, device="cuda")}
"""Tested by `tests/gpu`."""


def digests_of(rank: Applied | Inspected) -> npt.NDArray[np.uint64]:
    """The digests of a rank's cells; a copy."""
    return np.frombuffer(rank.cell_digests, dtype="<u8").astype(np.uint64)


E = TypeVar("E", bound=Engine)


@asynccontextmanager
async def updating(
    opening: AbstractAsyncContextManager[E], checkpoints: Checkpoints, *, prepares: bool = False
) -> AsyncIterator[tuple[E, Updates]]:
    """An engine that is opened so, and what does to it what a consumer does."""
    async with opening as engine:
        updates = Updates(engine, checkpoints)
        if prepares:
            await updates.prepare()
        yield engine, updates


class Updates:
    """Does to an engine what a consumer does."""

    def __init__(self, engine: Engine, checkpoints: Checkpoints) -> None:
        self.engine, self.checkpoints = engine, checkpoints
        self._described: tuple[Described, ...] = ()
        self._cells: CellPlan | None = None

    @property
    def cells(self) -> CellPlan:
        assert self._cells is not None
        return self._cells

    async def prepare(self) -> tuple[Described, ...]:
        """Describe and attach."""
        checkpoints = self.checkpoints
        self._described = await self.engine.describe(
            checkpoints.layout_digest, checkpoints.layout_blob, LONG_S
        )
        self._cells = plan_cells(checkpoints.layout, [rank.needs for rank in self._described])
        await self.attach()
        return self._described

    async def attach(self) -> None:
        await self.engine.attach(
            self.checkpoints.layout_digest,
            [rank.needs_digest for rank in self._described],
            self.cells.cells,
            LONG_S,
        )

    async def apply(
        self, version: int, ranks: Sequence[int] | None = None, deadline_s: float = LONG_S
    ) -> tuple[Applied, ...]:
        feed = InPlace(sources=self.checkpoints.sources(version))
        chosen = range(self.engine.ranks) if ranks is None else ranks
        return await self.feed(version, dict.fromkeys(chosen, feed), deadline_s)

    async def feed(
        self, version: int, feeds: Mapping[int, Feed], deadline_s: float = LONG_S
    ) -> tuple[Applied, ...]:
        return await self.engine.apply(version, self.checkpoints.layout_digest, feeds, deadline_s)

    async def relay(self, version: int, window_bytes: int) -> tuple[Applied, ...]:
        """Bring the bytes to every rank through a staging block of its own."""
        with ExitStack() as stack:
            feeds: dict[int, Feed] = {}
            for rank in range(self.engine.ranks):
                owner = stack.enter_context(open_staging(1, 2 * window_bytes))
                feed = Relay(block=owner.names[0], window_bytes=window_bytes, slots=2, turn=version)
                stack.enter_context(relaying(owner, self.checkpoints.segments(version), feed))
                feeds[rank] = feed
            return await self.feed(version, feeds)

    async def stream(self, version: int, bucket_bytes: int, lanes: int) -> tuple[Applied, ...]:
        """Bring the bytes to all ranks through lanes that they share."""
        ranks = range(self.engine.ranks)
        plan = plan_buckets(self.checkpoints.layout, bucket_bytes, lanes)
        with open_staging(lanes, 2 * bucket_bytes) as owner:
            feeds = {
                rank: Stream(
                    lanes=owner.names, bucket_bytes=bucket_bytes, slots=2, turn=version, reader=rank
                )
                for rank in ranks
            }
            segments = self.checkpoints.segments(version)
            with streaming(owner, plan, segments, feeds[0], readers=ranks):
                return await self.feed(version, feeds)

    def verify(self, version: int, ranks: Sequence[Applied | Inspected]) -> Verdict:
        """Whether what the ranks hold adds up to the version's digest."""
        sums = [digests_of(rank) for rank in ranks]
        expected = self.checkpoints.weights_digest(version)
        return verify_cells(self.checkpoints.layout, self.cells, sums, expected)

    async def update(self, version: int) -> tuple[Applied, ...]:
        """Bring the engine to a version, proven."""
        await self.engine.pause(LONG_S)
        applied = await self.apply(version)
        verdict = self.verify(version, applied)
        assert verdict.ok, verdict.reason
        await self.engine.resume(version, LONG_S)
        return applied
