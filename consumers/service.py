"""The consumer service: the driver of one round machine, beside one engine.

Owns the tasks that listen, beat, send, keep leases and run the machine's long instructions. It
decides nothing: everything heard becomes an event, every instruction is carried out, every result
becomes an event again. Invariants: events are handled one at a time in the order they were fed; an
instruction that waits runs as a task of its own; leaving the context ends every task, within a
deadline.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.abc
import msgspec
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusError, BusUnavailable, LeaseLost
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received, Reconnected
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.errors import ConsumerError, EngineUnavailable, TransferError, cause_of
from weightbus.consumers.outbox import Outbox
from weightbus.consumers.planner import plan_request
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.config import RoundConfig
from weightbus.consumers.round.machine import RoundMachine
from weightbus.consumers.timers import Timers
from weightbus.consumers.transfer.route import Route
from weightbus.consumers.update import Prepared, Updater
from weightbus.schemas.base import Message, Stage
from weightbus.schemas.catalogue import subject_of
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.leases import RoundLease
from weightbus.schemas.progress import EngineState, StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import (
    Abort,
    Commit,
    Join,
    Proven,
    RoundComplete,
    RoundPlan,
)
from weightbus.tracing.context import SpanRef
from weightbus.tracing.telemetry import Span, StageScope, Telemetry

__all__ = ("Consumer", "open_consumer")

_logger = logging.getLogger(__name__)

HEARD_MESSAGES = (
    CheckpointReady,
    CheckpointRetired,
    Join,
    RoundPlan,
    Proven,
    Commit,
    Abort,
    RoundComplete,
    UpdateComplete,
    UpdateFailed,
)

EVENTS_KEPT = 100_000
"""Events that wait for the machine; more mean that this process is stuck."""

VERSIONS_REMEMBERED = 8
"""Checkpoints whose publish span is remembered; a publisher has two alive at most."""


T = TypeVar("T")


@dataclass(kw_only=True)
class _Work:
    """What belongs to one version while it is worked on: spans, times, what was prepared."""

    ready: CheckpointReady
    scope: StageScope
    seen_ns: int
    span: Span
    stack: ExitStack
    prepared: Prepared | None = None
    pause_start_ns: int = 0


@dataclass(frozen=True)
class _Heard:
    """How a checkpoint was heard of."""

    publish: SpanRef | None
    seen_ns: int


@asynccontextmanager
async def open_consumer(
    config: ConsumerConfig,
    *,
    bus: Bus,
    engine: Engine,
    routes: Sequence[Route],
    telemetry: Telemetry,
) -> AsyncIterator[Consumer]:
    """A consumer service beside `engine`; entering means subscribed, leaving means stopped.

    The collaborators are the caller's: they outlive the service. A consumer that is left says so on
    the bus, ends what it can within `config.stop_s` (if it was cancelled, or failed, there is
    nothing left to end), and leaves the engine paused if its parameters may be a mix.

    Raises, in an exception group:
        BusUnavailable: the bus is gone for longer than its reconnect time.
        EngineUnavailable: the engine is gone.
    """
    async with anyio.create_task_group() as group:
        consumer = Consumer(config, bus, engine, routes, telemetry, group)
        await consumer._start()
        try:
            yield consumer
        finally:
            cancelled = anyio.current_effective_deadline() == -math.inf
            with anyio.CancelScope(shield=True), anyio.move_on_after(config.stop_s):
                await (consumer._take_leave() if cancelled else consumer._stop())
            group.cancel_scope.cancel()


class Consumer:
    """One running service; made by `open_consumer`."""

    def __init__(
        self,
        config: ConsumerConfig,
        bus: Bus,
        engine: Engine,
        routes: Sequence[Route],
        telemetry: Telemetry,
        group: TaskGroup,
    ) -> None:
        self.instance = uuid.uuid4().hex[:16]
        """Of this process: a restarted consumer is another one."""
        self._config = config
        self._bus = bus
        self._engine = engine
        self._telemetry = telemetry
        self._group = group
        self._updater = Updater(config, self.instance, bus, engine, routes)
        self._outbox = Outbox(bus)
        self._machine = RoundMachine(
            RoundConfig(
                model=config.model,
                engine=config.engine,
                consumer=self.instance,
                host_id=config.host_id,
                commit=config.commit,
                budgets=config.budgets,
                join_window_s=config.join_window_s,
                round_ttl_s=config.round_ttl_s,
            ),
            plan_request,
        )
        self._clock_offset_ns = time.time_ns() - time.monotonic_ns()
        self._timers = Timers(group, self.now_ns, self._fire)
        self._events_in: MemoryObjectSendStream[ev.Event]
        self._events_out: MemoryObjectReceiveStream[ev.Event]
        self._events_in, self._events_out = anyio.create_memory_object_stream(EVENTS_KEPT)
        self._errands_in: MemoryObjectSendStream[Callable[[], Awaitable[None]]]
        self._errands_out: MemoryObjectReceiveStream[Callable[[], Awaitable[None]]]
        self._errands_in, self._errands_out = anyio.create_memory_object_stream(math.inf)
        self._heard: dict[int, _Heard] = {}
        self._works: dict[int, _Work] = {}
        self._preparing: dict[int, anyio.CancelScope] = {}
        self._led: dict[str, RoundLease] = {}
        self._round = ""
        self._state: EngineState | None = None
        self._state_changed = anyio.Event()
        self._heartbeats = anyio.CancelScope()
        self._stopped = anyio.Event()

    @property
    def state(self) -> EngineState | None:
        """What the engine's presence key says; None before the first event."""
        return self._state

    def now_ns(self) -> int:
        """Nanoseconds since the Unix epoch, by a clock that never steps."""
        return self._clock_offset_ns + time.monotonic_ns()

    # ---------------------------------------------------------------- start and stop

    async def _start(self) -> None:
        """The others know of this engine, and it of them, before it hears of any version: a round
        that began otherwise would leave somebody out."""
        served, touched = await self._take_over()
        self._feed(ev.Started(served_version=served, touched=touched))
        self._group.start_soon(self._run_machine)
        self._group.start_soon(self._outbox.run)
        self._group.start_soon(self._run_errands)
        self._group.start_soon(self._run_lease_renewal)
        self._group.start_soon(self._run_engine_watch)
        await self._group.start(self._run_heartbeat)
        await self._group.start(self._run_presence)
        await self._group.start(self._run_messages)
        await self._catch_up()

    async def _take_over(self) -> tuple[int, bool]:
        """What the engine, which may have outlived an earlier consumer, holds.

        Paused and clean means that a consumer died between its pause and its first write, or after
        its last: which, the workers' versions tell. Only the first may serve on without a proof.
        """
        report = await self._engine.state(self._config.command_s)
        if not report.paused or report.touched or report.version < 0:
            return report.version, report.touched
        ranks = await self._engine.inspect(None, self._config.command_s)
        clean = all(rank.version == report.version and not rank.touched for rank in ranks)
        if clean:
            await self._engine.resume(report.version, self._config.command_s)
        return report.version, not clean

    async def _stop(self) -> None:
        """Called while every task runs; returns once all is said, and all leases are released."""
        self._feed(ev.Stop())
        await self._stopped.wait()
        errands_done = anyio.Event()
        self._errand(_set, errands_done)
        await errands_done.wait()
        await self._outbox.drain(self._config.stop_s)
        await self._take_leave()

    async def _take_leave(self) -> None:
        """No heartbeat comes after this."""
        self._heartbeats.cancel()
        with suppress(BusError):  # the key will expire
            await self._bus.presence.drop(self._config.model, self._config.engine)

    # ---------------------------------------------------------------- what is heard

    def _feed(self, event: ev.Event) -> None:
        self._events_in.send_nowait(event)

    def _fire(self, name: str, token: int) -> None:
        self._feed(ev.TimerFired(name=name, token=token))

    async def _run_messages(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with self._bus.subscribe(*HEARD_MESSAGES, model=self._config.model) as messages:
            task_status.started()
            async for message in messages:
                if isinstance(message, Reconnected):
                    self._state_changed.set()
                    await self._catch_up()
                else:
                    self._hear(message)

    async def _catch_up(self) -> None:
        """Read what was missed, however long the server takes to be ready for it."""
        while True:
            missed = await _keep_on(self._look_back())
            if missed is not None:
                break
            await anyio.sleep(self._config.heartbeat_s)
        for received in missed:
            self._hear(received)

    async def _look_back(self) -> Sequence[Received[Any]]:
        """The last checkpoint, the last that is gone and, of the round in hand, the last plan."""
        model = self._config.model
        found: list[Received[Any] | None] = [
            await self._bus.last(CheckpointReady, model=model),
            await self._bus.last(CheckpointRetired, model=model),
        ]
        if self._round:
            found.append(await self._bus.last(RoundPlan, model=model, round=self._round))
        return [received for received in found if received is not None]

    def _hear(self, received: Received[Message]) -> None:
        match received.message:
            case CheckpointReady() as ready:
                publish = SpanRef.from_headers(received.headers)
                self._heard.setdefault(ready.version, _Heard(publish, self.now_ns()))
                for version in sorted(self._heard)[:-VERSIONS_REMEMBERED]:
                    del self._heard[version]
                self._feed(ev.CheckpointSeen(ready, publish.trace_id if publish else ""))
            case CheckpointRetired() as retired:
                self._feed(ev.CheckpointGone(retired.version, retired.reason))
            case Join() as join:
                self._feed(ev.JoinSeen(join))
            case RoundPlan() as plan:
                self._feed(ev.PlanSeen(plan))
            case Proven() as proven:
                self._feed(ev.ProvenSeen(proven))
            case Commit() as commit:
                self._feed(ev.CommitSeen(commit))
            case Abort() as abort:
                self._feed(ev.AbortSeen(abort))
            case RoundComplete() as complete:
                self._feed(ev.RoundCompleteSeen(complete))
            case UpdateComplete() | UpdateFailed() as update:
                self._feed(ev.UpdateSeen(update))

    async def _run_presence(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with self._bus.presence.watch(self._config.model) as changes:
            for state in await self._bus.presence.list(self._config.model):
                self._feed(ev.EngineSeen(state))
            task_status.started()
            while True:
                match await _keep_on(anext(changes)):
                    case EngineState() as state:
                        self._feed(ev.EngineSeen(state))
                    case EngineGone(engine=engine):
                        self._feed(ev.EngineGone(engine))
                    case None:
                        await anyio.sleep(self._config.heartbeat_s)

    # ---------------------------------------------------------------- what is kept alive

    async def _run_heartbeat(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Put the engine's state, at once when it changes and with every beat."""
        announced = False
        with self._heartbeats:
            while True:
                changed = self._state_changed = anyio.Event()
                if self._state is not None:
                    state = msgspec.structs.replace(self._state, updated_ns=self.now_ns())
                    await _keep_on(self._bus.presence.put(state))
                    if not announced:
                        announced = True
                        task_status.started()
                with anyio.move_on_after(self._config.heartbeat_s):
                    await changed.wait()

    async def _run_lease_renewal(self) -> None:
        while True:
            await anyio.sleep(self._config.reader_ttl_s / 3)
            await _keep_on(self._updater.renew_leases())

    async def _run_engine_watch(self) -> None:
        """Notice an engine that lost what it served, or that is gone.

        Raises:
            EngineUnavailable: it has not answered for `engine_lost_s`.
        """
        answered = anyio.current_time()
        while True:
            await anyio.sleep(self._config.heartbeat_s)
            served = self._state.version if self._state is not None else -1
            try:
                report = await self._engine.state(self._config.command_s)
            except ConsumerError as error:
                if anyio.current_time() - answered > self._config.engine_lost_s:
                    raise EngineUnavailable(
                        self._config.engine,
                        f"no answer for {self._config.engine_lost_s:g} s: {error}",
                    ) from error
                held, reason = -1, str(error)
            else:
                answered = anyio.current_time()
                held, reason = report.version, report.error or "its workers were started anew"
            if held < served:
                _logger.warning("engine %s serves nothing: %s", self._config.engine, reason)
                self._feed(ev.EngineLost(reason))

    async def _run_errands(self) -> None:
        """Requests to the bus that must keep their order."""
        async for errand in self._errands_out:
            await _keep_on(errand())

    async def _campaign(self, round: str) -> None:
        wanted = RoundLease(
            model=self._config.model,
            round=round,
            leader=self._config.engine,
            epoch=0,
            consumer=self.instance,
        )
        held = await self._bus.round_leases.acquire(wanted, self._config.round_ttl_s)
        if held.consumer == self.instance:
            self._led[round] = held
            self._feed(ev.LeaseWon(round=round, epoch=held.epoch))
        else:
            self._feed(ev.LeaseHeld(round=round, leader=held.leader))

    async def _renew(self, round: str) -> None:
        if (lease := self._led.get(round)) is None:
            return
        try:
            await self._bus.round_leases.renew(lease, self._config.round_ttl_s)
        except LeaseLost:
            del self._led[round]
            self._feed(ev.LeaseLost(round=round))

    async def _release_round(self, round: str) -> None:
        if (lease := self._led.pop(round, None)) is not None:
            await self._bus.round_leases.release(lease)

    # ---------------------------------------------------------------- what is done

    async def _run_machine(self) -> None:
        async for event in self._events_out:
            for instruction in self._machine.handle(event, self.now_ns()):
                self._execute(instruction)
            if self._machine.stopped:
                self._stopped.set()

    def _execute(self, instruction: do.Instruction) -> None:
        match instruction:
            case do.Prepare(token):
                scope = self._preparing[token] = anyio.CancelScope()
                self._group.start_soon(self._prepare, instruction, scope)
            case do.CancelPrepare(token):
                if token in self._preparing:
                    self._preparing[token].cancel()
            case do.Transfer():
                self._group.start_soon(self._transfer, instruction)
            case do.CancelTransfer():
                self._updater.cancel_transfer()
            case do.Resume():
                self._group.start_soon(self._resume, instruction)
            case do.Campaign(round):
                self._errand(self._campaign, round)
            case do.Renew(round):
                self._errand(self._renew, round)
            case do.ReleaseRound(round):
                self._errand(self._release_round, round)
            case do.ReleaseReader(version):
                self._close_work(version)
                self._updater.let_go_nowait(version)
                self._errand(self._updater.release, version)
            case do.Send(message):
                self._outbox.say_nowait(message, self._headers_for(message))
            case do.SetState():
                self._set_state(instruction)
            case do.SetTimer():
                self._timers.set_nowait(instruction)
            case do.CancelTimer(name):
                self._timers.cancel_nowait(name)

    def _errand(self, errand: Callable[..., Awaitable[None]], *arguments: object) -> None:
        self._errands_in.send_nowait(lambda: errand(*arguments))

    def _set_state(self, instruction: do.SetState) -> None:
        self._state = EngineState(
            model=self._config.model,
            engine=self._config.engine,
            consumer=self.instance,
            host_id=self._config.host_id,
            status=instruction.status,
            version=instruction.version,
            target_version=instruction.target_version,
            ranks=self._engine.ranks,
            engine_kind=self._engine.kind,
        )
        self._state_changed.set()

    async def _prepare(self, instruction: do.Prepare, scope: anyio.CancelScope) -> None:
        ready, token = instruction.ready, instruction.token
        work = self._open_work(ready, instruction.round)
        self._round = instruction.round
        with scope:
            try:
                prepared = await self._updater.prepare(ready, self._seconds_to(instruction))
                planned = await self._bus.last(
                    RoundPlan, model=ready.model, round=instruction.round
                )
            except BusUnavailable:
                raise
            except WeightBusError as error:
                cause = cause_of(error)
                work.span.fail(f"{cause}: {error}")
                self._feed(ev.PrepareFailed(token, cause, str(error)))
            else:
                work.prepared = prepared
                plan = planned.message if planned is not None else None
                self._feed(
                    ev.Prepared(
                        token,
                        prepared.offers,
                        plan if isinstance(plan, RoundPlan) else None,
                        prepared.manifest.layout_digest,
                    )
                )
        del self._preparing[token]

    async def _transfer(self, instruction: do.Transfer) -> None:
        plan, token = instruction.plan, instruction.token
        work = self._works[plan.version]
        work.scope = msgspec.structs.replace(work.scope, round=plan.round)
        self._record(work, "negotiate", work.seen_ns, self.now_ns())
        if work.prepared is None:
            raise ConsumerError(f"version {plan.version} was planned before it was prepared")
        start_ns = self.now_ns()
        try:
            outcome = await self._updater.transfer(
                work.prepared, instruction.ready, plan, self._seconds_to(instruction)
            )
        except TransferError as error:
            failure = f"{error.cause}: {error.reason}"
            self._record(work, error.stage, start_ns, self.now_ns(), error=failure)
            work.span.fail(failure)
            self._feed(
                ev.TransferFailed(token, error.cause, error.reason, error.touched, error.stage)
            )
            return
        work.pause_start_ns = outcome.pause_start_ns
        for applied in outcome.applied:
            for timing in applied.stages:
                self._telemetry.record_stage(
                    self._emit,
                    work.scope,
                    timing.stage,
                    start_ns=timing.start_ns,
                    end_ns=timing.end_ns,
                    bytes=timing.bytes,
                    rank=applied.rank,
                    route=outcome.rank_routes[applied.rank],
                    parent=work.span.ref,
                )
        self._feed(
            ev.TransferDone(
                token=token,
                verified=outcome.verified,
                routes=outcome.routes,
                bytes=outcome.bytes,
                weights_digest=outcome.weights_digest,
                direct_parameters=sum(rank.direct_parameters for rank in outcome.applied),
                processed_parameters=sum(rank.processed_parameters for rank in outcome.applied),
                reason=outcome.reason,
            )
        )

    async def _resume(self, instruction: do.Resume) -> None:
        version, token = instruction.version, instruction.token
        start_ns = self.now_ns()
        try:
            await self._updater.resume(version, self._seconds_to(instruction))
        except ConsumerError as error:
            self._feed(ev.ResumeFailed(token, type(error).__name__, str(error)))
            return
        end_ns, paused_s = self.now_ns(), 0.0
        if (work := self._works.get(version)) is not None:
            self._record(work, "commit", start_ns, end_ns)
            if work.pause_start_ns:
                paused_s = (end_ns - work.pause_start_ns) / 1e9
        self._feed(ev.Resumed(token, paused_s))

    def _seconds_to(self, instruction: do.Prepare | do.Transfer | do.Resume) -> float:
        """What is left of the instruction's budget: at least a millisecond, to fail in order."""
        return max(0.001, (instruction.deadline_ns - self.now_ns()) / 1e9)

    # ---------------------------------------------------------------- spans

    def _open_work(self, ready: CheckpointReady, round: str) -> _Work:
        """The record and the span of a version; kept if the version is tried again."""
        if (work := self._works.get(ready.version)) is not None:
            return work
        heard = self._heard.get(ready.version) or _Heard(None, self.now_ns())
        scope = StageScope(ready.model, ready.version, round, self._config.engine)
        stack = ExitStack()
        span = stack.enter_context(
            self._telemetry.update_span(
                subject_of(ready, self._bus.prefix), scope, parent=heard.publish
            )
        )
        work = _Work(ready=ready, scope=scope, seen_ns=heard.seen_ns, span=span, stack=stack)
        self._works[ready.version] = work
        return work

    def _close_work(self, version: int) -> None:
        if (work := self._works.pop(version, None)) is not None:
            work.stack.close()

    def _record(
        self, work: _Work, stage: Stage, start_ns: int, end_ns: int, *, error: str = ""
    ) -> None:
        self._telemetry.record_stage(
            self._emit,
            work.scope,
            stage,
            start_ns=start_ns,
            end_ns=end_ns,
            parent=work.span.ref,
            error=error,
        )

    def _emit(self, stage: StageComplete) -> None:
        self._outbox.report_nowait(stage, {})

    def _headers_for(self, message: Message) -> Mapping[str, str]:
        work = self._works.get(getattr(message, "version", -1))
        return work.span.ref.headers() if work is not None else {}


async def _set(event: anyio.Event) -> None:
    event.set()


async def _keep_on(request: Awaitable[T]) -> T | None:
    """A request to the bus that will be repeated anyway: a refusal is told and outlived (None).

    Raises:
        BusUnavailable: the bus is gone for good.
    """
    try:
        return await request
    except BusUnavailable:
        raise
    except BusError as error:
        _logger.warning("%s: %s", type(error).__name__, error)
        return None
