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
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import anyio
import anyio.abc
import msgspec
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from weightbus.bus.clock import ClockReading
from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusError, BusUnavailable
from weightbus.consumers.campaigns import Campaigns
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.errands import Errands, keep_on
from weightbus.consumers.errors import ConsumerError, EngineUnavailable, TransferError, cause_of
from weightbus.consumers.journal import Journal, Work
from weightbus.consumers.listener import Listener
from weightbus.consumers.metering import Metering
from weightbus.consumers.outbox import Outbox
from weightbus.consumers.planner import plan_request
from weightbus.consumers.rival import wait_for_rival
from weightbus.consumers.round import events as ev
from weightbus.consumers.round import instructions as do
from weightbus.consumers.round.config import RoundConfig
from weightbus.consumers.round.machine import RoundMachine
from weightbus.consumers.timers import Timers
from weightbus.consumers.transfer.route import Route
from weightbus.consumers.update import Updater
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import EngineState, StageComplete
from weightbus.schemas.rounds import RoundPlan
from weightbus.tracing.attributes import Destination
from weightbus.tracing.context import SpanRef
from weightbus.tracing.telemetry import Telemetry

__all__ = ("Consumer", "open_consumer")

_logger = logging.getLogger(__name__)

EVENTS_KEPT: Final = 100_000
"""Events that wait for the machine; more mean that this process is stuck."""

FIRST_TOKEN_S: Final = 10.0
"""So long the first token of a version is looked out for: who asks later has not waited for it."""

SMALL_STEP_NS: Final = 10**9
"""By so much a deadline or a timer may come too early or too late when the clock is renewed."""

LEAVE_S: Final = 2.0
"""To tell the others that this engine goes."""


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
    nothing left to end), takes leave within `LEAVE_S`, and leaves the engine paused if its
    parameters may be a mix.

    Raises, in an exception group:
        BusUnavailable: the bus is gone for longer than its reconnect time.
        SubscriptionOverflow: this process is too slow for what is said on the bus.
        EngineUnavailable: the engine is gone.
        EngineTaken: another consumer, which is alive, keeps an engine of this id.
    """
    async with anyio.create_task_group() as group:
        consumer = Consumer(config, bus, engine, routes, telemetry, group)
        with consumer._kept_account():
            await consumer._start()
            try:
                yield consumer
            finally:
                cancelled = anyio.current_effective_deadline() == -math.inf
                with anyio.CancelScope(shield=True):
                    if not cancelled:
                        await consumer._stop()
                    await consumer._take_leave()
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
        self._group = group
        self._updater = Updater(config, self.instance, bus, engine, routes)
        self._metering = Metering(telemetry, config.model, config.engine, bus.settings.name)
        self._outbox = Outbox(bus, self._metering.say)
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
                links=config.links,
            ),
            plan_request,
        )
        self._clock = bus.clock.reading()
        self._timers = Timers(group, self.now_ns, self._fire)
        self._events_in: MemoryObjectSendStream[ev.Event]
        self._events_out: MemoryObjectReceiveStream[ev.Event]
        self._events_in, self._events_out = anyio.create_memory_object_stream(EVENTS_KEPT)
        self._errands = Errands()
        self._campaigns = Campaigns(bus, config, self.instance, self._feed)
        destination = Destination.of_ready(
            bus.prefix, config.model, client=bus.settings.name, url=bus.url
        )
        self._journal = Journal(telemetry, self._emit, config.engine, destination, self._reading)
        self._listener = Listener(
            bus,
            config.model,
            self._journal,
            self._feed,
            self._put_state_soon,
            self._metering.hear,
        )
        self._preparing: dict[int, anyio.CancelScope] = {}
        self._moving = anyio.CancelScope()
        self._changing = False
        """A `Transfer` or `Resume` is under way."""
        self._changes = 0
        """How many there were."""
        self._token_failed = False
        """It was said that first tokens are missing."""
        self._state: EngineState | None = None
        self._beat_ns = 0
        """The time of the last heartbeat."""
        self._state_changed = anyio.Event()
        self._heartbeats = anyio.CancelScope()
        self._stopped = anyio.Event()

    @property
    def state(self) -> EngineState | None:
        """What the engine's presence key says; None before the first event."""
        return self._state

    def now_ns(self) -> int:
        """Bus time; it does not step while a version is in hand."""
        return self._reading().now_ns()

    def _reading(self) -> ClockReading:
        """Of the bus's clock: the newest one, once no update is timed by the one before.

        Timers that are set do not mind a small step, and nearly always there is one between two
        updates of which the second has come before the end of the first.
        """
        if self._journal.is_empty and not self._preparing:
            newest = self._bus.clock.reading()
            step_ns = abs(newest.now_ns() - self._clock.now_ns())
            if step_ns <= SMALL_STEP_NS or not self._machine.timers:
                self._clock = newest
        return self._clock

    # ---------------------------------------------------------------- start and stop

    @contextmanager
    def _kept_account(self) -> Iterator[None]:
        """What cannot be read is counted; every span and figure ends with it, however it ends."""
        try:
            letters = self._bus.count_dead_letters(
                self._metering.count_dead_letter, self._config.model
            )
            with letters:
                yield
        finally:
            self._journal.close_all()
            self._metering.leave()

    async def _start(self) -> None:
        """The others know of this engine, and it of them, before it hears of any version: a round
        that began otherwise would leave somebody out."""
        config = self._config
        await wait_for_rival(self._bus.presence, config.model, config.engine, config.stop_s)
        served, touched = await self._take_over()
        self._feed(ev.Started(served_version=served, touched=touched))
        self._group.start_soon(self._run_machine)
        self._group.start_soon(self._outbox.run)
        self._group.start_soon(self._errands.run)
        self._group.start_soon(self._run_lease_renewal)
        self._group.start_soon(self._run_engine_watch)
        await self._group.start(self._run_heartbeat)
        await self._group.start(self._listener.run_presence)
        await self._group.start(self._listener.run_messages)
        await self._listener.catch_up()

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
        """Called while every task runs; returns once all is said, and all leases are released, or
        when the time for it is over."""
        with anyio.move_on_after(self._config.stop_s):
            self._feed(ev.Stop())
            await self._stopped.wait()
            await self._errands.wait_done(self._config.stop_s)
            await self._outbox.drain(self._config.stop_s)

    async def _take_leave(self) -> None:
        """No heartbeat comes after this. It has time of its own: what could not be ended in time
        must not keep the others waiting for this engine."""
        self._heartbeats.cancel()
        with suppress(BusError), anyio.move_on_after(LEAVE_S):  # else the key will expire
            await self._bus.presence.drop(self._config.model, self._config.engine)

    def _feed(self, event: ev.Event) -> None:
        self._events_in.send_nowait(event)

    def _fire(self, name: str, token: int) -> None:
        self._feed(ev.TimerFired(name=name, token=token))

    def _put_state_soon(self) -> None:
        self._state_changed.set()

    # ---------------------------------------------------------------- what is kept alive

    async def _run_heartbeat(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Put the engine's state, at once when it changes and with every beat."""
        announced = False
        with self._heartbeats:
            while True:
                changed = self._state_changed = anyio.Event()
                if self._state is not None:
                    # Each is later than the one before, also if the clock was set back.
                    self._beat_ns = max(self._beat_ns + 1, self.now_ns())
                    state = msgspec.structs.replace(self._state, updated_ns=self._beat_ns)
                    await keep_on(self._bus.presence.put(state))
                    if not announced:
                        announced = True
                        task_status.started()
                with anyio.move_on_after(self._config.heartbeat_s):
                    await changed.wait()

    async def _run_lease_renewal(self) -> None:
        while True:
            await anyio.sleep(self._config.reader_ttl_s / 3)
            await keep_on(self._updater.renew_leases())

    async def _run_engine_watch(self) -> None:
        """Notice an engine that lost what it served, or that is gone.

        Raises:
            EngineUnavailable: it has not answered for `engine_lost_s`.
        """
        answered = anyio.current_time()
        while True:
            await anyio.sleep(self._config.heartbeat_s)
            changes = self._changes
            served = self._state.version if self._state is not None else -1
            try:
                report = await self._engine.state(self._config.command_s)
            except ConsumerError as error:
                if anyio.current_time() - answered > self._config.engine_lost_s:
                    raise EngineUnavailable(
                        self._config.engine,
                        f"no answer for {self._config.engine_lost_s:g} s: {error}",
                    ) from error
                if not isinstance(error, EngineUnavailable):
                    continue  # slow, not gone
                held, reason = -1, str(error)
            else:
                answered = anyio.current_time()
                held, reason = report.version, report.error or "its workers were started anew"
                steady = not self._changing and changes == self._changes
                serves = steady and not report.paused and not report.touched
                if served < 0 <= held and serves:
                    self._feed(ev.EngineServes(held))
            if held < served:
                _logger.warning("engine %s serves nothing: %s", self._config.engine, reason)
                self._feed(ev.EngineLost(reason))

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
                self._begin_change()
                self._moving = anyio.CancelScope()
                self._group.start_soon(self._transfer, instruction, self._moving)
            case do.CancelTransfer():
                self._moving.cancel()
            case do.Resume():
                self._begin_change()
                self._group.start_soon(self._resume, instruction)
            case do.Campaign(round):
                self._errands.take_nowait(self._campaigns.campaign, round)
            case do.Renew(round):
                self._errands.take_nowait(self._campaigns.renew, round)
            case do.ReleaseRound(round):
                self._errands.take_nowait(self._campaigns.release, round)
            case do.ReleaseReader(version):
                self._journal.close(version)
                self._reading()  # what follows may be the next version's, by a newer clock
                self._updater.let_go_nowait(version)
                self._errands.take_nowait(self._updater.release, version)
            case do.Send(message):
                self._outbox.say_nowait(*self._journal.sign(message))
            case do.SetState():
                self._set_state(instruction)
            case do.SetTimer():
                self._timers.set_nowait(instruction)
            case do.CancelTimer(name):
                self._timers.cancel_nowait(name)

    def _begin_change(self) -> None:
        self._changing = True
        self._changes += 1

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
        self._metering.say(self._state)
        self._state_changed.set()

    async def _prepare(self, instruction: do.Prepare, scope: anyio.CancelScope) -> None:
        ready, token = instruction.ready, instruction.token
        work = self._journal.open(ready, instruction.round)
        self._listener.round = instruction.round
        with scope:
            try:
                prepared = await self._updater.prepare(ready, self._seconds_to(instruction))
                planned = await self._bus.last(
                    RoundPlan, model=ready.model, round=instruction.round
                )
            except BusUnavailable:
                raise
            except WeightBusError as error:
                self._feed(ev.PrepareFailed(token, cause_of(error), str(error)))
            else:
                work.prepared = prepared
                plan = planned.message if planned is not None else None
                self._feed(
                    ev.Prepared(
                        token,
                        prepared.offers,
                        plan if isinstance(plan, RoundPlan) else None,
                        prepared.manifest.layout_digest,
                        prepared.rendezvous,
                        prepared.groups,
                        prepared.origin,
                    )
                )
        del self._preparing[token]

    async def _transfer(self, instruction: do.Transfer, moving: anyio.CancelScope) -> None:
        plan, token = instruction.plan, instruction.token
        work = self._journal.find(plan.version)
        assert work is not None, "a plan comes after `Prepared`"
        assert work.prepared is not None
        self._journal.begin_round(work, plan)
        start_ns = self.now_ns()
        try:
            outcome = await self._updater.transfer(
                work.prepared, instruction.ready, plan, self._seconds_to(instruction), moving
            )
        except TransferError as error:
            self._changing = False
            failure = f"{error.cause}: {error.reason}"
            self._journal.record(work, error.stage, start_ns, self.now_ns(), error=failure)
            self._journal.negotiate_again(work)
            self._feed(
                ev.TransferFailed(token, error.cause, error.reason, error.touched, error.stage)
            )
            return
        self._changing = False
        self._journal.record_outcome(work, outcome)
        self._feed(
            ev.TransferDone(
                token=token,
                verified=outcome.verified,
                routes=(outcome.route,),
                bytes=outcome.bytes,
                weights_digest=outcome.weights_digest,
                direct_parameters=sum(rank.direct_parameters for rank in outcome.applied),
                processed_parameters=sum(rank.processed_parameters for rank in outcome.applied),
                reason=outcome.reason,
            )
        )

    async def _resume(self, instruction: do.Resume) -> None:
        version, token = instruction.version, instruction.token
        start_ns, failure = self.now_ns(), None
        try:
            await self._updater.resume(version, self._seconds_to(instruction))
        except ConsumerError as error:
            failure = error
        self._changing = False
        end_ns, paused_s, served_ns = self.now_ns(), 0.0, self._bus.clock.host.wall_ns()
        work = self._journal.find(version)
        if work is not None and work.pause_start_ns:
            paused_s = max(0, end_ns - work.pause_start_ns) / 1e9
        told = "" if failure is None else f"{type(failure).__name__}: {failure}"
        if work is not None:
            self._journal.tell_outcomes(work)
            self._journal.record(work, "commit", start_ns, end_ns, error=told)
        if failure is not None:
            self._feed(ev.ResumeFailed(token, type(failure).__name__, str(failure), paused_s))
            return
        if work is not None:
            self._journal.await_first_token(work)
            self._group.start_soon(self._watch_first_token, work, served_ns)
        self._feed(ev.Resumed(token, paused_s))

    async def _watch_first_token(self, work: Work, served_ns: int) -> None:
        """Tell when the engine has made its first token with a version that it serves since
        `served_ns`, by this host's clock. Nothing waits for this, and nothing fails with it."""
        version, seen = work.scope.version, None
        try:
            seen = await self._engine.first_token(version, FIRST_TOKEN_S)
        except ConsumerError as error:
            _logger.debug("the first token of version %d is not seen: %s", version, error)
        except Exception as error:  # noqa: BLE001 - the engine's own code, and no update needs it
            if not self._token_failed:
                self._token_failed = True
                _logger.warning("first tokens are missing: %s: %s", type(error).__name__, error)
        if seen is None:
            self._journal.give_up_first_token(work)
            return
        end_ns = max(served_ns, seen.at_ns)  # it may come before the word that it can
        told = self._journal.record_first_token(
            work, start_ns=served_ns, end_ns=end_ns, resolution_ns=seen.resolution_ns
        )
        if told is not None:
            headers = SpanRef(told.trace_id, told.span_id).headers()
            self._outbox.report_nowait(told, headers)

    def _seconds_to(self, instruction: do.Prepare | do.Transfer | do.Resume) -> float:
        """What is left of the instruction's budget: at least a millisecond, to fail in order."""
        return max(0.001, (instruction.deadline_ns - self.now_ns()) / 1e9)

    def _emit(self, stage: StageComplete) -> None:
        self._outbox.report_nowait(stage, {})
