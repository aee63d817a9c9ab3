"""A process that stands for one consumer on a virtual host: an engine, and the route `broadcast`.

Its one argument is JSON (`Arguments`). Prints its rendezvous, then for every line on stdin, a
`Command`, a `Result`. Ends with its stdin.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import msgspec
from msgspec import Struct

from tests.integration.routes.engine import DEADLINE_S, InProcessEngine
from tests.integration.routes.model import make_tensors
from tests.unit.transfer.publishing import Trainer, cut_layout, open_trainer, weights_digest
from weightbus.consumers.errors import cause_of
from weightbus.consumers.transfer.broadcast import BroadcastRoute
from weightbus.consumers.transfer.fetch import LocalSegments
from weightbus.consumers.transfer.groups import GlooExchange, Groups, open_meeting
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.staged import Staging
from weightbus.consumers.transfer.staging import BlockPool
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import FileSegment
from weightbus.schemas.rounds import Group, RoundPlan

__all__ = ("ADDRESS", "PATIENT_S", "SEGMENTS", "Arguments", "Command", "Result", "layout")

ADDRESS = "127.0.0.1"
SEGMENTS = 3

PATIENT_S = 30.0
"""So long members wait for each other where none is lost: no machine is so slow."""


def layout() -> Layout:
    """What every version looks like: some 80 tensors of every dtype, cut at random."""
    return cut_layout(make_tensors(0), SEGMENTS, seed=1)


class Arguments(Struct, frozen=True, kw_only=True):
    model: str
    engine: str
    ranks: int
    host_id: str
    directory: str
    """Of the checkpoints."""


class Command(Struct, frozen=True, kw_only=True):
    """Take part in a plan."""

    plan: RoundPlan
    proven: bool | None = None
    """Whether the engine shall be taken for proven; None: whether it is."""
    signal: int = 0
    """Sent to itself in the middle of a bucket; 0: none."""
    stall_s: float = PATIENT_S
    """How long a step may stand still."""


class Result(Struct, frozen=True, kw_only=True):
    cause: str = ""
    reason: str = ""
    touched: bool = False
    seconds: float = 0.0
    groups: tuple[str, ...] = ()
    stages: tuple[tuple[str, ...], ...] = ()
    """Of every rank."""


class _Struck(GlooExchange):
    """A member that is hit by a signal when the others are in their third bucket."""

    def __init__(self, inner: GlooExchange, signal: int) -> None:
        self.id, self.place, self.size = inner.id, inner.place, inner.size
        self.others = inner.others
        self._inner, self._signal, self._buckets = inner, signal, 3

    async def roll_call(self, answer: bytes, deadline_s: float) -> tuple[bytes, ...]:
        return await self._inner.roll_call(answer, deadline_s)

    async def broadcast(self, address: int, size_bytes: int, root: int, stall_s: float) -> None:
        self._buckets -= 1
        if not self._buckets:
            os.kill(os.getpid(), self._signal)
        await self._inner.broadcast(address, size_bytes, root, stall_s)

    def writing(self) -> bool:
        return self._inner.writing()


class _Groups(Groups):
    signal = 0

    async def open_all(
        self, lanes: Sequence[tuple[Group, int]], plan: str, deadline_s: float
    ) -> tuple[GlooExchange, ...]:
        opened = await super().open_all(lanes, plan, deadline_s)
        return (_Struck(opened[0], self.signal), *opened[1:]) if self.signal else opened


class Member:
    def __init__(
        self,
        arguments: Arguments,
        trainer: Trainer,
        route: BroadcastRoute,
        groups: _Groups,
        staging: Staging,
    ) -> None:
        self._trainer, self._route = trainer, route
        self._groups, self._staging = groups, staging
        self._engine = InProcessEngine(arguments.engine, arguments.ranks, trainer.roots)

    async def prepare(self) -> None:
        await self._engine.attach_to(self._trainer)

    async def update(self, command: Command) -> Result:
        """What came of a plan; what arrived is looked at, bit by bit."""
        begin = anyio.current_time()
        self._groups.signal, self._staging.stall_s = command.signal, command.stall_s
        version = command.plan.version
        try:
            applied = await self._route.transfer(await self._transfer(command))
        except WeightBusError as error:
            return Result(
                cause=cause_of(error),
                reason=str(error),
                touched=getattr(error, "touched", False),
                seconds=anyio.current_time() - begin,
                groups=self._route.groups,
            )
        tensors = make_tensors(version)
        verdict = self._engine.verdict(self._trainer, applied, weights_digest(tensors))
        assert verdict.ok, verdict.reason
        self._engine.check(tensors)
        return Result(
            seconds=anyio.current_time() - begin,
            groups=self._route.groups,
            stages=tuple(tuple(timing.stage for timing in rank.stages) for rank in applied),
        )

    async def _transfer(self, command: Command) -> Transfer:
        plan, trainer = command.plan, self._trainer
        ranks = await self._engine.inspect(None, DEADLINE_S)
        proven = all(trainer.layout_digest in rank.proven for rank in ranks)

        async def pause() -> None:
            await self._engine.pause(DEADLINE_S)

        transfer = Transfer(
            engine=self._engine,
            ranks=tuple(range(self._engine.ranks)),
            version=plan.version,
            layout=trainer.layout,
            layout_digest=trainer.layout_digest,
            placement=tuple(
                (FileSegment(path=str(trainer.path(number, plan.version))),)
                for number in range(SEGMENTS)
            ),
            plan=plan,
            begin_write=pause,
            deadline_s=plan.budgets.transfer_s,
            proven=proven,
        )
        return transfer if command.proven is None else replace(transfer, proven=command.proven)


async def main(arguments: Arguments) -> None:
    local = LocalSegments(arguments.host_id, [arguments.directory])
    pool = BlockPool(f"{arguments.model}.{arguments.engine}")
    staging = Staging(pool, PATIENT_S)
    groups = _Groups(ADDRESS, form_s=PATIENT_S, operation_s=PATIENT_S)
    directory = Path(arguments.directory)
    with open_meeting(ADDRESS) as meeting, open_trainer(layout(), "files", directory) as trainer:
        route = BroadcastRoute(
            arguments.engine,
            Sources(local, arguments.host_id, [arguments.directory]),
            staging,
            groups,
            meeting,
        )
        member = Member(arguments, trainer, route, groups, staging)
        await member.prepare()
        print(route.rendezvous, flush=True)
        async for line in anyio.wrap_file(sys.stdin):
            result = await member.update(msgspec.json.decode(line, type=Command))
            print(msgspec.json.encode(result).decode(), flush=True)
        groups.close(0.0)
        pool.close()


if __name__ == "__main__":
    anyio.run(main, msgspec.json.decode(sys.argv[1], type=Arguments))
