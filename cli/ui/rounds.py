"""The last rounds of a bus: a line of history for each, and the messages that tell of it.

Does no I/O and knows no clock. Everything kept is bounded: the number of rounds, and the size of
their messages, which are kept encoded, each once. A round whose messages were let go, or that began
before we listened, is still in the history; whoever wants all of it reads it back from the bus.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from msgspec import Struct, msgpack, structs

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import FirstToken, StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan
from weightbus.tracing.facts import late_ns
from weightbus.tracing.history import Heard
from weightbus.tracing.late import RoundEnd
from weightbus.tracing.text import NS_PER_S, gigabytes_per_second
from weightbus.tracing.waterfall import ROUND_MESSAGES, RoundMessage

__all__ = ("ROUNDS_KEPT", "HistoryRow", "KnownRound", "RoundLog", "RoundState")

ROUNDS_KEPT: Final = 256
"""As many lines of history."""

MESSAGES_KEPT_BYTES: Final = 64 * 2**20
"""Of all rounds together; the messages of the oldest are let go first."""

ANNOUNCED_KEPT: Final = 1024

RoundState = Literal["running", "complete", "failed", "left"]
"""`complete`: every engine of the round serves the version. `failed`: one does not. `left`: nobody
works on it, and what became of it was not told."""

_read = msgpack.Decoder(RoundMessage)


class HistoryRow(Struct, frozen=True, kw_only=True):
    """One round, in short."""

    model: str
    round: str
    version: int
    state: RoundState
    began_s: float
    """When it became known, in seconds since the Unix epoch."""
    engines: int
    """That were heard to take part."""
    names: tuple[str, ...]
    """Theirs."""
    late: tuple[str, ...]
    """Engines that came when the round was over, and gave up: they had no part in it, or came
    again."""
    completed: int
    failed: int
    bytes: int
    """Moved into parameters, over all engines that completed."""
    wall_s: float | None
    """From the creation of `CheckpointReady` to the last engine serving; from when the first heard
    of it, if that came late; None: none serves it."""
    gb_per_s: float | None
    """`bytes` over `wall_s`, in 10^9 bytes per second."""
    routes: tuple[str, ...]
    first_token_s: float | None
    """From the same start to the last engine's first token; None: not reported."""
    told: int
    """How many messages told of it: grows with every change."""


class KnownRound(Struct, frozen=True):
    """What is known of one round."""

    version: int
    messages: tuple[Heard, ...]
    """In the order in which they came, `CheckpointReady` first, with one segment's placement."""
    is_whole: bool
    """No message of the round itself is missing."""
    told: int
    first_ns: int
    last_ns: int
    """When the bus had the first and the last of them."""


@dataclass
class _Kept:
    model: str
    round: str
    version: int
    first_ns: int
    last_ns: int
    is_whole: bool
    told: int = 0
    messages: dict[bytes, None] = field(default_factory=dict)
    size_bytes: int = 0
    began_ns: int = 0
    """The earliest time that was told; 0: none."""
    engines: dict[str, bool | None] = field(default_factory=dict)
    """Engine -> does it serve the version; None: not reported."""
    joined_ns: dict[str, int] = field(default_factory=dict)
    """Of engines of which no more is known than that they joined."""
    late: dict[str, None] = field(default_factory=dict)
    end: RoundEnd = field(default_factory=RoundEnd)
    moved_bytes: dict[str, int] = field(default_factory=dict)
    routes: dict[str, None] = field(default_factory=dict)
    served_ns: int = 0
    token_ns: int = 0
    closed: bool = False

    def take(self, message: RoundMessage) -> None:
        """What the line of history tells."""
        self.end.take(message)
        match message:
            case Join():
                self._join(message)
            case RoundPlan():
                for planned in message.engines:
                    self.engines.setdefault(planned.engine, None)
                    self.joined_ns.pop(planned.engine, None)
                self._begin(message.created_ns)
            case StageComplete():
                self._begin(message.start_ns)
            case UpdateComplete():
                self.engines[message.engine] = True
                self.moved_bytes[message.engine] = message.bytes
                self.routes.update(dict.fromkeys(message.routes))
                self.served_ns = max(self.served_ns, message.end_ns)
                self._begin(message.start_ns)
            case UpdateFailed():
                self._fail(message)
            case FirstToken():
                self.token_ns = max(self.token_ns, message.end_ns)
            case RoundComplete():
                self.closed = True
                self.engines.update(dict.fromkeys(message.completed, True))
                self.engines.update(dict.fromkeys(message.failed, False))
                self._begin(message.started_ns)

    def _join(self, join: Join) -> None:
        if join.engine not in self.engines:
            self.engines[join.engine] = None
            self.joined_ns[join.engine] = join.joined_ns
        self._begin(join.joined_ns)

    def _fail(self, failed: UpdateFailed) -> None:
        """An attempt that began when the round was over counts for nothing, with its join."""
        joined_ns = self.joined_ns.pop(failed.engine, 0)
        if not self.end.is_late(failed):
            self.engines[failed.engine] = False
            self._begin(failed.start_ns)
            return
        self.late[failed.engine] = None
        if joined_ns >= failed.start_ns:
            del self.engines[failed.engine]

    def _begin(self, time_ns: int) -> None:
        self.began_ns = _earliest(self.began_ns, time_ns)

    def row(self, created_ns: int, stored_ns: int, *, in_flight: bool) -> HistoryRow:
        origin_ns = _earliest(self.began_ns, created_ns) or self.first_ns
        if late_ns(stored_ns or created_ns, self.began_ns):
            origin_ns = self.began_ns
        wall_s = (self.served_ns - origin_ns) / NS_PER_S if self.served_ns else None
        moved_bytes = sum(
            size_bytes for name, size_bytes in self.moved_bytes.items() if self.engines[name]
        )
        ends = list(self.engines.values())
        return HistoryRow(
            model=self.model,
            round=self.round,
            version=self.version,
            state=self._state(in_flight=in_flight),
            began_s=self.first_ns / NS_PER_S,
            engines=len(ends),
            names=tuple(self.engines),
            late=tuple(self.late),
            completed=ends.count(True),
            failed=ends.count(False),
            bytes=moved_bytes,
            wall_s=wall_s,
            gb_per_s=None if wall_s is None else gigabytes_per_second(moved_bytes, wall_s),
            routes=tuple(self.routes),
            first_token_s=(self.token_ns - origin_ns) / NS_PER_S if self.token_ns else None,
            told=self.told,
        )

    def _state(self, *, in_flight: bool) -> RoundState:
        ends = self.engines.values()
        if in_flight and not self.closed:
            return "running"
        if False in ends:
            return "failed"
        return "complete" if ends and (self.closed or all(ends)) else "left"


class RoundLog:
    """The rounds that were heard of, the newest last."""

    def __init__(
        self, rounds_kept: int = ROUNDS_KEPT, messages_kept_bytes: int = MESSAGES_KEPT_BYTES
    ) -> None:
        self._rounds: dict[tuple[str, str], _Kept] = {}
        self._announced: dict[tuple[str, int, int], Heard] = {}
        """By model, version and creation: a version may be published again."""
        self._followed: set[tuple[str, int]] = set()
        """Models and versions of which all is heard: from their first announcement on."""
        self._rounds_kept, self._bytes_kept = rounds_kept, messages_kept_bytes
        self.size_bytes = 0
        """Of the messages that are kept."""

    def feed(
        self, message: Message, received_ns: int, headers: Mapping[str, str], *, is_heard: bool
    ) -> None:
        """Take a message in, which the bus stored at `received_ns`. `is_heard`: nothing that comes
        after it will be missed; else it was looked back, and other kinds were not."""
        if isinstance(message, CheckpointReady):
            self._announce(message, received_ns, headers, is_heard=is_heard)
        elif isinstance(message, ROUND_MESSAGES):
            self._take(message, received_ns, is_heard=is_heard)

    def forget_messages(self) -> None:
        """Some were missed: whoever wants all of a round must read it back."""
        self._followed.clear()
        for kept in self._rounds.values():
            self._let_go(kept)

    def rows(self, in_flight: Iterable[tuple[str, str]]) -> tuple[HistoryRow, ...]:
        """The history, the newest first; `in_flight`: model and id of the rounds that run."""
        running = set(in_flight)
        published_ns = {
            (model, version): (created_ns, announced.received_ns)
            for (model, version, created_ns), announced in self._announced.items()
        }
        return tuple(
            kept.row(
                *published_ns.get((kept.model, kept.version), (0, 0)), in_flight=key in running
            )
            for key, kept in sorted(
                self._rounds.items(), key=lambda item: (-item[1].first_ns, item[0])
            )
        )

    def find(self, model: str, round_id: str) -> KnownRound | None:
        """What is kept of one round; None: it was not heard of."""
        kept = self._rounds.get((model, round_id))
        if kept is None:
            return None
        version = (model, kept.version)
        announced = [each for key, each in self._announced.items() if key[:2] == version]
        return KnownRound(
            version=kept.version,
            messages=(*announced, *(Heard(_read.decode(each)) for each in kept.messages)),
            is_whole=kept.is_whole,
            told=kept.told,
            first_ns=kept.first_ns,
            last_ns=kept.last_ns,
        )

    def _announce(
        self, ready: CheckpointReady, stored_ns: int, headers: Mapping[str, str], *, is_heard: bool
    ) -> None:
        slim = structs.replace(
            ready, placement=ready.placement[:1], files=ready.files[:1], metadata={}
        )
        key = (ready.model, ready.version, ready.created_ns)
        if is_heard and not any(key[:2] == other[:2] for other in self._announced):
            self._followed.add(key[:2])
        self._announced[key] = Heard(slim, dict(headers), stored_ns)
        while len(self._announced) > ANNOUNCED_KEPT:
            oldest = next(iter(self._announced))
            del self._announced[oldest]
            self._followed.discard(oldest[:2])

    def _take(self, message: RoundMessage, received_ns: int, *, is_heard: bool) -> None:
        key = (message.model, message.round)
        kept = self._rounds.get(key)
        if kept is None:
            is_whole = is_heard and (message.model, message.version) in self._followed
            kept = _Kept(*key, message.version, received_ns, received_ns, is_whole=is_whole)
            self._rounds[key] = kept
            self._forget_oldest()
        encoded = msgpack.encode(message)
        if encoded in kept.messages:
            return
        kept.first_ns = min(kept.first_ns, received_ns)
        kept.last_ns = max(kept.last_ns, received_ns)
        kept.told += 1
        kept.take(message)
        if kept.is_whole:
            kept.messages[encoded] = None
            kept.size_bytes += len(encoded)
            self.size_bytes += len(encoded)
            self._spare(kept)

    def _spare(self, latest: _Kept) -> None:
        """Let the messages of the oldest rounds go, of the latest last."""
        if self.size_bytes <= self._bytes_kept:
            return
        for kept in (*(each for each in self._rounds.values() if each is not latest), latest):
            self._let_go(kept)
            if self.size_bytes <= self._bytes_kept:
                return

    def _let_go(self, kept: _Kept) -> None:
        self.size_bytes -= kept.size_bytes
        kept.messages, kept.size_bytes, kept.is_whole = {}, 0, False

    def _forget_oldest(self) -> None:
        while len(self._rounds) > self._rounds_kept:
            oldest = self._rounds.pop(next(iter(self._rounds)))
            self._let_go(oldest)
            self._followed.discard((oldest.model, oldest.version))


def _earliest(*times_ns: int) -> int:
    """0 stands for no time."""
    return min(filter(None, times_ns), default=0)
