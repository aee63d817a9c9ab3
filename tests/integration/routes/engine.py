"""An engine in this process: one reload worker per rank, each answering in a thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import anyio
import anyio.to_thread
import numpy as np
import torch

from tests.integration.routes.model import make_host, parameters_of
from tests.unit.reload.models import same_bits
from tests.unit.transfer.publishing import HOST, Trainer
from weightbus.consumers.engines.engine import Engine, EngineReport
from weightbus.consumers.errors import ApplyFailed
from weightbus.consumers.planning.cells import Verdict, plan_cells, verify_cells
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Attached,
    Cell,
    Describe,
    Described,
    Failed,
    Feed,
    Inspect,
    Inspected,
    Prepare,
    Prepared,
    WorkerReply,
    WorkerRequest,
)

__all__ = ("InProcessEngine",)

DEADLINE_S = 60.0

Reply = TypeVar("Reply", Described, Attached, Prepared, Applied, Inspected)


class InProcessEngine(Engine):
    """Holds what it was asked, so that a test can look at the order of things."""

    kind = "in_process"

    def __init__(self, name: str, ranks: int, roots: Sequence[str], host_id: str = HOST) -> None:
        self.name, self.host_id = name, host_id
        self.hosts = [make_host(rank, ranks) for rank in range(ranks)]
        self.workers = [ReloadWorker(host, rank, ranks) for rank, host in enumerate(self.hosts)]
        self.log: list[str] = []
        self.before_apply: Callable[[int], Awaitable[None]] = _at_once
        """Awaited for each rank before its worker is asked; what it raises, `apply` raises."""
        self._roots = tuple(roots)

    @property
    def ranks(self) -> int:
        return len(self.workers)

    async def attach_to(self, trainer: Trainer) -> None:
        """What a consumer does before it joins."""
        described = await self.describe(trainer.layout_digest, trainer.layout_blob, DEADLINE_S)
        assert [reply.untraced_reason for reply in described] == [""] * self.ranks
        self.cells = plan_cells(trainer.layout, [reply.needs for reply in described])
        digests = [reply.needs_digest for reply in described]
        await self.attach(trainer.layout_digest, digests, self.cells.cells, DEADLINE_S)

    def verdict(self, trainer: Trainer, applied: Sequence[Applied], digest: str) -> Verdict:
        """What the ranks' digests prove."""
        sums = [np.frombuffer(reply.cell_digests, dtype="<u8") for reply in applied]
        return verify_cells(trainer.layout, self.cells, sums, digest)

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Every parameter of every rank holds its part of a checkpoint."""
        for rank in range(self.ranks):
            self.check_rank(tensors, rank)

    def check_rank(self, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
        """As `check`, for one rank."""
        wanted = dict(parameters_of(tensors, rank, self.ranks).named_parameters())
        for name, found in self.hosts[rank].live.named_parameters():
            assert same_bits(found, wanted[name]), f"{self.name}, rank {rank}: {name}"

    def close(self) -> None:
        """Unmap what the workers read."""
        for worker in self.workers:
            worker.close()

    async def describe(
        self, layout_digest: str, layout: bytes, deadline_s: float
    ) -> tuple[Described, ...]:
        request = Describe(
            request=1, layout_digest=layout_digest, layout=layout, deadline_s=deadline_s
        )
        return await self._ask(Described, dict.fromkeys(range(self.ranks), request))

    async def attach(
        self,
        layout_digest: str,
        needs_digests: Sequence[str],
        cells: Sequence[Sequence[Cell]],
        deadline_s: float,
    ) -> tuple[Attached, ...]:
        requests = {
            rank: Attach(
                request=2,
                layout_digest=layout_digest,
                needs_digest=needs_digests[rank],
                cells=tuple(cells[rank]),
                roots=self._roots,
                host_id=self.host_id,
                deadline_s=deadline_s,
            )
            for rank in range(self.ranks)
        }
        return await self._ask(Attached, requests)

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        requests = {
            rank: Prepare(request=5, layout_digest=layout_digest, feed=feed, deadline_s=deadline_s)
            for rank, feed in feeds.items()
        }
        return await self._ask(Prepared, requests)

    async def pause(self, deadline_s: float) -> None:
        self.log.append("pause")

    async def apply(
        self,
        version: int,
        layout_digest: str,
        feeds: Mapping[int, Feed],
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        self.log.append("apply")
        requests = {
            rank: Apply(
                request=3,
                version=version,
                layout_digest=layout_digest,
                feed=feed,
                deadline_s=deadline_s,
            )
            for rank, feed in feeds.items()
        }
        return await self._ask(Applied, requests)

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        request = Inspect(request=4, layout_digest=layout_digest, deadline_s=deadline_s)
        return await self._ask(Inspected, dict.fromkeys(range(self.ranks), request))

    async def resume(self, version: int, deadline_s: float) -> None:
        self.log.append("resume")

    async def state(self, deadline_s: float) -> EngineReport:
        touched = any(worker.touched for worker in self.workers)
        return EngineReport(
            version=self.workers[0].version, paused=False, touched=touched, ranks=self.ranks
        )

    async def _ask(
        self, expected: type[Reply], requests: Mapping[int, WorkerRequest]
    ) -> tuple[Reply, ...]:
        replies: dict[int, WorkerReply] = {}

        async def ask(rank: int, request: WorkerRequest) -> None:
            if isinstance(request, Apply):
                await self.before_apply(rank)
            handle = partial(self.workers[rank].handle, request)
            replies[rank] = await anyio.to_thread.run_sync(handle)

        async with anyio.create_task_group() as group:
            for rank, request in requests.items():
                group.start_soon(ask, rank, request)
        found = []
        written = any(
            reply.touched if isinstance(reply, Failed) else isinstance(reply, Applied)
            for reply in replies.values()
        )
        for rank in requests:
            reply = replies[rank]
            if isinstance(reply, Failed):
                raise ApplyFailed(rank, reply.error, reply.reason, touched=written)
            assert isinstance(reply, expected)
            found.append(reply)
        return tuple(found)


async def _at_once(rank: int) -> None:
    pass
