"""Keeps the ranks of a `torch` engine running and stands between them and requests.

Runs in the front process and does no I/O but through `Ranks`. Does not import torch.

Invariants:
    A request runs on all ranks or on none, on one version, which its answer names.
    While requests are let in, no rank's weights may change; while they may, none is let in.
    Ranks live and die together. New ones hold nothing, are paused, and serve after a resume only.
    What nobody asks for does not happen: paused stays paused when the consumer is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import NoReturn, Protocol

import anyio

from weightbus.consumers.engines.torch.first import FirstAnswer
from weightbus.consumers.engines.torch.gate import Gate
from weightbus.consumers.engines.torch.messages import (
    AskFingerprints,
    AskFirstAnswer,
    AskState,
    ClientReply,
    ClientRequest,
    Done,
    Fingerprints,
    FirstAnswered,
    Infer,
    Inferred,
    Pause,
    Refused,
    Restart,
    Resume,
    StateReport,
)
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.words import NOTHING_HELD, Held
from weightbus.consumers.errors import (
    ConsumerError,
    DeadlineExceeded,
    EngineUnavailable,
    WorkerLost,
)
from weightbus.schemas.errors import WeightBusError

__all__ = ("Front", "RankGroup")

_NO_VERSION = -1
_MAX_REASON = 4096
_RESTART_DELAY_S = 0.5
_MAX_RESTART_DELAY_S = 10.0


class RankGroup(Protocol):
    """What the front needs of one generation of ranks; see `Ranks`."""

    @property
    def pids(self) -> tuple[int, ...]: ...
    def held(self) -> list[Held]: ...
    def hold(self) -> None: ...
    def let_go(self) -> None: ...
    def condemn(self, reason: str) -> None: ...
    async def wait_until_ready(self, deadline_s: float) -> None: ...
    async def wait_until_lost(self) -> NoReturn: ...
    async def compute(
        self, request: Infer | AskFingerprints, deadline_s: float
    ) -> Inferred | Fingerprints: ...


class Front:
    """One engine's front. `run_ranks` must be running for anything to be served."""

    def __init__(
        self,
        spec: TorchEngineSpec,
        open_ranks: Callable[[], AbstractAsyncContextManager[RankGroup]],
    ) -> None:
        self.ready = anyio.Event()
        """Set when the ranks were ready for the first time."""
        self._spec = spec
        self._open_ranks = open_ranks
        self._gate = Gate(spec.max_waiting)
        self._first = FirstAnswer()
        """Since the gate was last opened."""
        self._controlling = anyio.Lock()
        self._ranks: RankGroup | None = None
        """Of the present generation, while all of them are well."""
        self._served = self._nothing_held()
        """What each rank held when the gate was last opened."""
        self._gone = anyio.Event()
        """The present generation has ended, to the last process."""
        self._generation = 0
        self._failures = 0
        """Generations since one was last ready."""
        self._error = ""

    async def run_ranks(self) -> NoReturn:
        """Start the ranks, and start them anew whenever one is lost.

        Raises:
            EngineUnavailable: they could not even be started the first time.
        """
        while True:
            self._generation += 1
            self._gone = anyio.Event()
            try:
                async with self._open_ranks() as ranks:
                    await self._run_generation(ranks)
            except* ConsumerError as lost:
                self._error = _first_reason(lost)[:_MAX_REASON]
            finally:
                self._gone.set()
            if not self.ready.is_set():
                raise EngineUnavailable(self._spec.architecture, self._error)
            await anyio.sleep(min(self._failures * _RESTART_DELAY_S, _MAX_RESTART_DELAY_S))
            self._failures += 1

    async def _run_generation(self, ranks: RankGroup) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ranks.wait_until_lost)
                await ranks.wait_until_ready(self._spec.start_timeout_s)
                self._ranks = ranks
                self._failures = 0
                if self._spec.weights and not self.ready.is_set():
                    ranks.let_go()
                    self._gate.open(_NO_VERSION)
                self.ready.set()
        finally:
            self._lose_ranks()

    def _lose_ranks(self) -> None:
        self._ranks = None
        self._served = self._nothing_held()
        self._gate.reset()
        self._first.end()

    def _nothing_held(self) -> list[Held]:
        return [NOTHING_HELD] * self._spec.tp

    async def answer(self, request: ClientRequest) -> ClientReply:
        """Carry out one request of a client; every failure is an answer too."""
        try:
            match request:
                case AskState():
                    return self._report(request.request)
                case Infer() | AskFingerprints():
                    return await self._compute(request)
                case AskFirstAnswer():
                    return await self._first_answer(request)
                case _:
                    await self._control(request)
                    return Done(request=request.request)
        except WeightBusError as error:
            reason = error.stage if isinstance(error, DeadlineExceeded) else str(error)
            return Refused(
                request=request.request, error=type(error).__name__, reason=reason[:_MAX_REASON]
            )

    async def _compute(self, request: Infer | AskFingerprints) -> Inferred | Fingerprints:
        async with self._gate.enter(request.deadline_s):
            ranks = self._ranks
            if ranks is None:
                raise EngineUnavailable(self._spec.architecture, self._error)
            try:
                # Whoever asked may leave: the request is inside until the ranks are done with it.
                with anyio.CancelScope(shield=True):
                    answer = await ranks.compute(request, self._spec.step_timeout_s)
                if answer.version != self._gate.version:
                    raise WorkerLost(0, f"it computed with {answer.version}, not what is served")
            except (WorkerLost, DeadlineExceeded) as error:
                ranks.condemn(str(error))
                self._lose_ranks()
                raise
            if isinstance(answer, Inferred):
                self._first.made()
            return answer

    async def _first_answer(self, request: AskFirstAnswer) -> FirstAnswered:
        first, at_ns = self._first, 0
        if request.version == self._gate.version and not self._gate.closed:
            with anyio.move_on_after(request.deadline_s):
                at_ns = await first.wait()
        return FirstAnswered(request=request.request, at_ns=at_ns)

    async def _control(self, request: Pause | Resume | Restart) -> None:
        """One at a time, in the order they came."""
        with anyio.move_on_after(request.deadline_s):
            async with self._controlling:
                match request:
                    case Pause():
                        await self._pause()
                    case Resume(version=version):
                        self._resume(version)
                    case Restart(reason=reason):
                        await self._restart(reason)
                return
        raise DeadlineExceeded(type(request).__name__.lower(), request.deadline_s)

    async def _pause(self) -> None:
        await self._gate.close()
        self._first.end()
        if self._ranks is not None:
            self._ranks.hold()

    def _resume(self, version: int) -> None:
        if self._ranks is None:
            raise EngineUnavailable(self._spec.architecture, f"its ranks are gone: {self._error}")
        if not self._gate.closed:
            if version != self._gate.version:
                reason = f"it serves {self._gate.version} and is not paused"
                raise EngineUnavailable(self._spec.architecture, reason)
            return
        if version == _NO_VERSION and not self._spec.weights:
            raise EngineUnavailable(self._spec.architecture, "it was started without weights")
        self._ranks.let_go()
        holding = self._ranks.held()
        for rank, held in enumerate(holding):
            if held.touched or held.version != version:
                self._ranks.hold()
                what = "a part of an update after" if held.touched else "version"
                reason = f"rank {rank} holds {what} {held.version}, not version {version}"
                raise EngineUnavailable(self._spec.architecture, reason)
        self._served = holding
        self._first = FirstAnswer()
        self._gate.open(version)

    async def _restart(self, reason: str) -> None:
        if self._ranks is not None:
            self._ranks.condemn(reason)
            self._lose_ranks()
        await self._gone.wait()

    def _report(self, number: int) -> StateReport:
        return StateReport(
            request=number,
            version=self._gate.version,
            paused=self._gate.closed,
            touched=self._ranks is not None and self._ranks.held() != self._served,
            ready=self._ranks is not None,
            ranks=self._spec.tp,
            pids=self._ranks.pids if self._ranks is not None else (),
            front_pid=os.getpid(),
            generation=self._generation,
            waiting=self._gate.waiting,
            error=self._error,
        )


def _first_reason(group: BaseExceptionGroup[BaseException]) -> str:
    """The message of a group's first error."""
    first = group.exceptions[0]
    return _first_reason(first) if isinstance(first, BaseExceptionGroup) else str(first)
