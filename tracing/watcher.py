"""The state of a fleet, fed with the messages of the bus.

Does no I/O and knows no clock. Messages may come late, twice and out of order: of two that tell of
one engine the one that was said later counts, and versions announced never go back. A round that
was closed, and those of older versions, stay closed until a plan of a later epoch: so neither the
join of an engine that comes late nor the last word of one that was given up opens them. A round
that nobody has planned is over once all who wanted to take part have failed or are gone.
Everything kept is bounded; to know repeats, a digest of every message is kept and not the message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, TypeVar

from msgspec import msgpack

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped
from weightbus.schemas.progress import (
    DeadLetter,
    EngineState,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import Budgets, Join, RoundComplete, RoundPlan
from weightbus.tracing.fleet import (
    LOST,
    DeadLetterView,
    EngineView,
    FailureView,
    FleetView,
    RoundView,
    SkippedView,
    WatchedStatus,
)
from weightbus.tracing.late import RoundEnd
from weightbus.tracing.text import NS_PER_S, gigabytes_per_second
from weightbus.tracing.waterfall import RoundMessage

__all__ = ("WATCHED_MESSAGES", "Fleet")

WATCHED_MESSAGES: Final = (
    CheckpointReady,
    CheckpointSkipped,
    Join,
    RoundPlan,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
    FirstToken,
    RoundComplete,
    DeadLetter,
)
"""What a watcher subscribes to. `EngineState` comes by presence."""

FAILURES_KEPT: Final = 8
DEAD_LETTERS_KEPT: Final = 8
SKIPPED_KEPT: Final = 8
ROUNDS_KEPT: Final = 64
REPEATS_KNOWN: Final = 4096
REPEAT_DIGEST_BYTES: Final = 16
"""A message may be 1 MiB: 4,096 of them would be 4 GiB."""
GONE_ENGINES_KEPT: Final = 16

K = TypeVar("K")
V = TypeVar("V")

DEFAULT_ROUND_S: Final = Budgets().round_s
"""Budget of a round whose plan is not known yet."""


@dataclass
class _Engine:
    status: WatchedStatus = "gone"
    version: int = -1
    target_version: int = -1
    ranks: int = 0
    engine_kind: str = ""
    as_of_ns: int = 0
    """When its consumer said what is known; by one clock, the consumer's, so that times compare."""
    update: UpdateComplete | None = None
    """The last one."""
    token: FirstToken | None = None
    """The last one."""


@dataclass
class _Round:
    version: int
    since_ns: int
    epoch: int = -1
    leader: str = ""
    budget_s: float = DEFAULT_ROUND_S
    engines: dict[str, bool | None] = field(default_factory=dict)
    """Engine -> did it complete; None: it has reported no end."""
    last_stage: str = ""

    @property
    def is_over(self) -> bool:
        """Nobody has planned it, and nobody is left who waits for that."""
        return self.epoch < 0 and not any(end is not False for end in self.engines.values())


@dataclass
class _Closed:
    """Of one model."""

    version: int = -1
    """The newest whose round was closed."""
    epoch: int = -1
    """The latest that was closed: epochs grow from round to round."""


class Fleet:
    """What is known of all models, engines and rounds on a bus."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}
        self._engines: dict[tuple[str, str], _Engine] = {}
        self._rounds: dict[tuple[str, str], _Round] = {}
        self._closed: dict[str, _Closed] = {}
        self._ends: dict[tuple[str, str], RoundEnd] = {}
        self._failures: dict[tuple[str, str, str], FailureView] = {}
        self._dead_letters: dict[DeadLetterView, None] = {}
        self._skipped: dict[tuple[str, str, int], SkippedView] = {}
        self._came: dict[tuple[str, str, int], None] = {}
        """The last versions that came, skipped before or not."""
        self._told_digests: dict[bytes, None] = {}

    @property
    def models(self) -> frozenset[str]:
        """Every model that was told of."""
        named = (self._engines, self._rounds)
        known = frozenset(self._newest).union(self._closed)
        return known.union(model for keys in named for model, _ in keys)

    def feed(self, message: Message, received_ns: int) -> bool:
        """Take a message in; False if it tells nothing new: a heartbeat, a repeat, an old word."""
        if isinstance(message, EngineState):
            return self._feed_state(message)
        said = blake2b(msgpack.encode(message), digest_size=REPEAT_DIGEST_BYTES).digest()
        if said in self._told_digests:
            return False
        _keep(self._told_digests, said, None, REPEATS_KNOWN)
        if isinstance(message, Join | RoundPlan | UpdateComplete | RoundComplete):
            self._take_end(message)
        match message:
            case CheckpointReady():
                return self._feed_ready(message)
            case CheckpointSkipped():
                return self._feed_skipped(message, received_ns)
            case Join():
                return self._feed_join(message, received_ns)
            case RoundPlan():
                return self._feed_plan(message, received_ns)
            case StageComplete():
                self._feed_stage(message, received_ns)
            case UpdateComplete() | UpdateFailed():
                self._feed_update(message, received_ns)
            case FirstToken():
                self._feed_token(message)
            case RoundComplete():
                self._feed_round_complete(message, received_ns)
            case DeadLetter():
                view = _dead_letter_view(message, received_ns)
                _keep(self._dead_letters, view, None, DEAD_LETTERS_KEPT)
        return True

    def feed_gone(self, model: str, engine: str) -> bool:
        """An engine's heartbeat has ended; False if it was gone already."""
        known = self._engines.get((model, engine))
        if known is None or known.status == "gone":
            return False
        known.status, known.target_version = "gone", -1
        self._forget_gone()
        for key, round_ in tuple(self._rounds.items()):
            if key[0] == model and round_.epoch < 0 and round_.engines.get(engine, False) is None:
                del round_.engines[engine]
                self._drop_if_over(key)
        return True

    def view(self, now_ns: int) -> FleetView:
        """The fleet at `now_ns`. A round that took twice its budget is left out: it was left."""
        return FleetView(
            newest=dict(sorted(self._newest.items())),
            engines=tuple(
                _engine_view(*key, known, self._newest.get(key[0], -1))
                for key, known in sorted(self._engines.items())
            ),
            rounds=tuple(
                _round_view(*key, known, (now_ns - known.since_ns) / NS_PER_S)
                for key, known in self._rounds.items()
                if now_ns - known.since_ns < 2 * known.budget_s * NS_PER_S
            ),
            failures=tuple(reversed(self._failures.values())),
            dead_letters=tuple(reversed(self._dead_letters)),
            skipped=tuple(reversed(self._skipped.values())),
        )

    def _feed_state(self, state: EngineState) -> bool:
        known = self._engine(state.model, state.engine)
        if state.updated_ns < known.as_of_ns and known.status != "gone":
            return False
        before = (known.status, known.version, known.target_version)
        known.status, known.target_version = state.status, state.target_version
        known.ranks, known.engine_kind = state.ranks, state.engine_kind
        if state.updated_ns >= known.as_of_ns:
            known.as_of_ns, known.version = state.updated_ns, state.version
        return before != (known.status, known.version, known.target_version)

    def _feed_ready(self, ready: CheckpointReady) -> bool:
        """A version that was skipped and comes after all is skipped no longer."""
        key = (ready.model, ready.producer, ready.version)
        _keep(self._came, key, None, REPEATS_KNOWN)
        came_after_all = self._skipped.pop(key, None) is not None
        is_newest = ready.version > self._newest.get(ready.model, -1)
        if is_newest:
            self._newest[ready.model] = ready.version
        return is_newest or came_after_all

    def _feed_skipped(self, skipped: CheckpointSkipped, received_ns: int) -> bool:
        key = (skipped.model, skipped.producer, skipped.version)
        if key in self._came:
            return False
        _keep(self._skipped, key, _skipped_view(skipped, received_ns), SKIPPED_KEPT)
        return True

    def _feed_join(self, join: Join, received_ns: int) -> bool:
        known = self._open_round(join, received_ns)
        if known is None or join.engine in known.engines:
            return False
        known.engines[join.engine] = None
        return True

    def _feed_plan(self, plan: RoundPlan, received_ns: int) -> bool:
        known = self._open_round(plan, received_ns)
        if known is None or plan.epoch < known.epoch:
            return False
        known.epoch, known.leader = plan.epoch, plan.leader
        known.since_ns, known.budget_s = received_ns, plan.budgets.round_s
        for route in plan.engines:
            known.engines.setdefault(route.engine, None)
        return True

    def _feed_stage(self, stage: StageComplete, received_ns: int) -> None:
        if (known := self._open_round(stage, received_ns)) is not None:
            rank = "" if stage.rank is None else f"/{stage.rank}"
            known.last_stage = f"{stage.engine}{rank} {stage.stage}"

    def _feed_update(self, update: UpdateComplete | UpdateFailed, received_ns: int) -> None:
        known = self._engine(update.model, update.engine)
        is_latest = update.end_ns >= known.as_of_ns
        if is_latest:
            known.as_of_ns, known.target_version = update.end_ns, -1
        if isinstance(update, UpdateComplete):
            if known.update is None or update.end_ns >= known.update.end_ns:
                known.update = update
            if is_latest:
                known.version = update.version
                known.status = known.status if known.status == "gone" else "serving"
        else:
            self._fail(_failure_view(update, received_ns, is_late=self._is_late(update)))
            if is_latest:
                known.version = update.served_version
                if update.quarantined and known.status != "gone":
                    known.status = "quarantined"
        if (current := self._open_round(update, received_ns)) is not None:
            current.engines[update.engine] = isinstance(update, UpdateComplete)
            self._drop_if_over((update.model, update.round))

    def _feed_token(self, token: FirstToken) -> None:
        known = self._engine(token.model, token.engine)
        if known.token is None or token.end_ns >= known.token.end_ns:
            known.token = token

    def _feed_round_complete(self, done: RoundComplete, received_ns: int) -> None:
        closed = self._closed.setdefault(done.model, _Closed())
        closed.version = max(closed.version, done.version)
        closed.epoch = max(closed.epoch, done.epoch)
        for key in [
            key
            for key, known in self._rounds.items()  # nobody works on older versions any more
            if key[0] == done.model and known.version <= done.version and known.epoch <= done.epoch
        ]:
            del self._rounds[key]
        for engine, reason in done.failed.items():
            if (done.model, engine, done.round) not in self._failures:
                self._fail(_given_up_view(done, engine, reason, received_ns))

    def _is_late(self, failed: UpdateFailed) -> bool:
        """Not so who failed in the round itself, and tries again."""
        end = self._ends.get((failed.model, failed.round))
        known = self._failures.get((failed.model, failed.engine, failed.round))
        return end is not None and end.is_late(failed) and (known is None or known.late)

    def _take_end(self, message: Join | RoundPlan | UpdateComplete | RoundComplete) -> None:
        key = (message.model, message.round)
        if key not in self._ends:
            _keep(self._ends, key, RoundEnd(), ROUNDS_KEPT)
        self._ends[key].take(message)

    def _engine(self, model: str, engine: str) -> _Engine:
        if (model, engine) not in self._engines:
            self._engines[model, engine] = _Engine()
            self._forget_gone()
        return self._engines[model, engine]

    def _forget_gone(self) -> None:
        gone = [key for key, known in self._engines.items() if known.status == "gone"]
        for key in gone[:-GONE_ENGINES_KEPT]:
            del self._engines[key]

    def _open_round(self, told: RoundMessage, received_ns: int) -> _Round | None:
        """The round that a message tells of, begun by it if need be; None if it is closed."""
        key = (told.model, told.round)
        if key not in self._rounds:
            closed = self._closed.get(told.model, _Closed())
            is_planned_again = isinstance(told, RoundPlan) and told.epoch > closed.epoch
            if told.version <= closed.version and not is_planned_again:
                return None
            _keep(self._rounds, key, _Round(told.version, received_ns), ROUNDS_KEPT)
        return self._rounds[key]

    def _drop_if_over(self, key: tuple[str, str]) -> None:
        if self._rounds[key].is_over:
            del self._rounds[key]

    def _fail(self, view: FailureView) -> None:
        """The latest word on one engine in one round counts."""
        self._failures.pop((view.model, view.engine, view.round), None)
        _keep(self._failures, (view.model, view.engine, view.round), view, FAILURES_KEPT)


def _engine_view(model: str, engine: str, known: _Engine, newest: int) -> EngineView:
    update = known.update
    update_s = None if update is None else max(0, update.end_ns - update.start_ns) / NS_PER_S
    moved_bytes = 0 if update is None else update.bytes
    token = known.token
    if token is not None and update is not None and token.version != update.version:
        token = None
    return EngineView(
        model=model,
        engine=engine,
        status=known.status,
        version=known.version,
        target_version=known.target_version,
        lag=max(0, newest - known.version) if min(newest, known.version) >= 0 else None,
        ranks=known.ranks,
        engine_kind=known.engine_kind,
        update_s=update_s,
        bytes=moved_bytes,
        gb_per_s=None if update_s is None else gigabytes_per_second(moved_bytes, update_s),
        routes=() if update is None else update.routes,
        verified=None if update is None else update.verified,
        first_token_s=None if token is None else max(0, token.end_ns - token.start_ns) / NS_PER_S,
    )


def _round_view(model: str, round_id: str, known: _Round, age_s: float) -> RoundView:
    by_end: dict[bool | None, list[str]] = {None: [], True: [], False: []}
    for engine, completed in known.engines.items():
        by_end[completed].append(engine)
    return RoundView(
        model=model,
        round=round_id,
        version=known.version,
        epoch=known.epoch,
        leader=known.leader,
        waiting=tuple(sorted(by_end[None])),
        completed=tuple(sorted(by_end[True])),
        failed=tuple(sorted(by_end[False])),
        last_stage=known.last_stage,
        age_s=max(0.0, age_s),
        overdue=age_s > known.budget_s,
    )


def _failure_view(update: UpdateFailed, received_ns: int, *, is_late: bool) -> FailureView:
    return FailureView(
        model=update.model,
        engine=update.engine,
        version=update.version,
        round=update.round,
        cause=update.cause,
        reason=update.reason,
        quarantined=update.quarantined,
        failed_ns=update.end_ns or received_ns,
        late=is_late,
    )


def _given_up_view(done: RoundComplete, engine: str, reason: str, received_ns: int) -> FailureView:
    return FailureView(
        model=done.model,
        engine=engine,
        version=done.version,
        round=done.round,
        cause=LOST,
        reason=reason,
        quarantined=False,
        failed_ns=done.ended_ns or received_ns,
    )


def _skipped_view(skipped: CheckpointSkipped, received_ns: int) -> SkippedView:
    return SkippedView(
        model=skipped.model,
        producer=skipped.producer,
        version=skipped.version,
        cause=skipped.cause,
        reason=skipped.reason,
        ranks=skipped.ranks,
        skipped_ns=skipped.created_ns or received_ns,
    )


def _dead_letter_view(letter: DeadLetter, received_ns: int) -> DeadLetterView:
    return DeadLetterView(
        model=letter.model,
        subject=letter.subject,
        reason=letter.reason,
        reported_by=letter.reported_by,
        reported_ns=letter.reported_ns or received_ns,
    )


def _keep(kept: dict[K, V], key: K, value: V, limit: int) -> None:
    """Put one in, and forget the oldest beyond `limit`."""
    kept[key] = value
    while len(kept) > limit:
        del kept[next(iter(kept))]
