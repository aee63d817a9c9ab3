"""Virtual hosts of a test: members in processes of their own, and the plans that they run."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import msgspec
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.integration.broadcast import member
from tests.integration.broadcast.member import Arguments, Command, Result
from tests.integration.routes.model import make_tensors
from tests.unit.transfer.publishing import Trainer, open_trainer
from weightbus.bus.sweep import sweep_staging
from weightbus.schemas.codec import CONTENT_TYPE_MSGPACK, decode, encode
from weightbus.schemas.rounds import Budgets, EngineRoute, Group, Member, RankRoute, RoundPlan

__all__ = ("Fleet", "Host", "MemberProcess", "open_fleet")

START_S = 120.0
"""Members only import what they need: 60 s were not enough where others had both cores."""
UPDATE_S = 60.0
LINE_BYTES = 2**20
BUCKET_BYTES = 2048

Host = Sequence[tuple[str, int]]
"""Its engines: name and number of ranks."""


class MemberProcess:
    """One consumer with its engine."""

    def __init__(self, name: str, ranks: int, process: anyio.abc.Process) -> None:
        self.name, self.ranks, self.process = name, ranks, process
        assert process.stdout is not None
        self._lines = BufferedByteReceiveStream(process.stdout)
        self.rendezvous = ""

    async def start(self) -> None:
        self.rendezvous = (await self._line(START_S)).decode()

    async def update(self, command: Command) -> Result:
        """What it says came of a plan."""
        assert self.process.stdin is not None
        await self.process.stdin.send(msgspec.json.encode(command) + b"\n")
        return await self.result()

    async def result(self) -> Result:
        return msgspec.json.decode(await self._line(2 * UPDATE_S), type=Result)

    async def _line(self, deadline_s: float) -> bytes:
        with anyio.fail_after(deadline_s):
            return await self._lines.receive_until(b"\n", LINE_BYTES)


class Fleet:
    """Made by `open_fleet`."""

    def __init__(
        self,
        model: str,
        hosts: Sequence[Host],
        members: dict[str, MemberProcess],
        trainer: Trainer,
    ) -> None:
        self.hosts, self.members, self.trainer = hosts, members, trainer
        self.model = model

    def publish(self, version: int) -> None:
        self.trainer.publish(make_tensors(version), version)

    def plan(
        self, version: int, epoch: int, *, groups_of: int | None = None, without: str = ""
    ) -> RoundPlan:
        """The broadcast of a version to every host.

        Args:
            groups_of: epoch of an earlier plan, whose groups are used again.
            without: an engine, alone on its host, that is left out.
        """
        hosts = [host for host in self.hosts if without not in {name for name, _ in host}]
        ranks = [
            [Member(name, rank) for name, count in sorted(host) for rank in range(count)]
            for host in hosts
        ]
        lanes = [
            tuple(host[lane % len(host)] for host in ranks)
            for lane in range(max(len(host) for host in ranks))
        ]
        plan = RoundPlan(
            model=self.model,
            version=version,
            round=f"v{version}",
            epoch=epoch,
            leader=hosts[0][0][0],
            engines=tuple(
                EngineRoute(
                    engine=name,
                    ranks=tuple(RankRoute(rank=r, route="broadcast") for r in range(count)),
                )
                for name, count in sorted(engine for host in hosts for engine in host)
            ),
            groups=tuple(
                Group(
                    id=f"lane{number}-{groups_of or epoch}",
                    members=members,
                    rendezvous=self.members[members[0].engine].rendezvous,
                )
                for number, members in enumerate(lanes)
            ),
            bucket_bytes=BUCKET_BYTES,
            slots=2,
            budgets=Budgets(transfer_s=UPDATE_S),
        )
        decoded = decode(encode(plan), CONTENT_TYPE_MSGPACK, (RoundPlan,))
        assert isinstance(decoded, RoundPlan), "it keeps the rules"
        return decoded

    async def run(
        self,
        plan: RoundPlan,
        *,
        expect: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        **commands: Command,
    ) -> dict[str, Result]:
        """All members of a plan run it, side by side.

        Args:
            expect: engines whose results are waited for; None: of all.
            skip: engines that hear nothing of it.
                commands: for engines that shall do something else than run the plan.
        """
        results: dict[str, Result] = {}

        async def update(name: str) -> None:
            command = commands.get(name, Command(plan=plan))
            results[name] = await self.members[name].update(command)

        async with anyio.create_task_group() as tasks:
            for part in plan.engines:
                if part.engine in skip:
                    continue
                if expect is None or part.engine in expect:
                    tasks.start_soon(update, part.engine)
                else:
                    stdin = self.members[part.engine].process.stdin
                    assert stdin is not None
                    command = commands.get(part.engine, Command(plan=plan))
                    await stdin.send(msgspec.json.encode(command) + b"\n")
        return results

    async def prove(self, *, skip: Sequence[str] = ()) -> None:
        """The first version, which every engine takes alone."""
        self.publish(1)
        results = await self.run(self.plan(1, 1), skip=skip)
        assert {result.cause for result in results.values()} == {""}, results


@asynccontextmanager
async def open_fleet(hosts: Sequence[Host], directory: Path) -> AsyncIterator[Fleet]:
    """Members that are ready for plans; they are killed at the end."""
    model = f"m{uuid.uuid4().hex[:8]}"  # no other test has blocks of this name
    members: dict[str, MemberProcess] = {}
    try:
        for number, host in enumerate(hosts):
            for name, ranks in host:
                arguments = Arguments(
                    model=model,
                    engine=name,
                    ranks=ranks,
                    host_id=f"host-{number}",
                    directory=str(directory),
                )
                command = [
                    *(sys.executable, "-m", member.__name__),
                    msgspec.json.encode(arguments).decode(),
                ]
                process = await anyio.open_process(command, stderr=None, stdin=subprocess.PIPE)
                members[name] = MemberProcess(name, ranks, process)
        for one in members.values():
            await one.start()
        with open_trainer(member.layout(), "files", directory) as trainer:
            yield Fleet(model, hosts, members, trainer)
    finally:
        await _end(members.values())
        sweep_staging(model)  # who was killed has left its blocks


async def _end(members: Iterable[MemberProcess]) -> None:
    with anyio.CancelScope(shield=True):
        for one in members:
            if one.process.returncode is None:
                one.process.kill()
        for one in members:
            with anyio.move_on_after(START_S):
                await one.process.wait()
