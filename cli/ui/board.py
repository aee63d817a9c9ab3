"""What every open page shows, in parts that remember when they last changed.

Does no I/O and knows no clock. Each refresh that changes anything has a number, the *revision*; a
page that has been told all up to one revision is told what changed since, however long that took
it. So nothing is queued for anybody: a slow browser is told less often, and costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

import anyio
import msgspec
from msgspec import Struct, structs

from weightbus.cli.ui.rounds import HistoryRow, RoundLog
from weightbus.schemas.base import Message
from weightbus.schemas.progress import FirstToken, UpdateComplete, UpdateFailed
from weightbus.tracing.fleet import EngineView, FleetView, RoundView
from weightbus.tracing.text import NS_PER_S
from weightbus.tracing.watcher import Fleet

__all__ = ("Board", "EngineRow", "FlightRow", "LinkRow")

CACHED_CHANGES: Final = 16
"""What equally far pages are told is encoded once."""

V = TypeVar("V")


class LinkRow(Struct, frozen=True, kw_only=True):
    """How we stand with the bus."""

    url: str
    """Without credentials."""
    connected: bool
    since_s: float
    """When that began, in seconds since the Unix epoch."""
    reason: str
    """Why it is lost, if that is known."""


class EngineRow(EngineView, frozen=True, kw_only=True):
    """One engine."""

    updated_s: float | None
    """When its last update ended, in seconds since the Unix epoch; None: none seen."""
    round: str
    """Of that update; empty: none seen."""


class FlightRow(Struct, frozen=True, kw_only=True):
    """One round as it runs."""

    model: str
    round: str
    version: int
    epoch: int
    leader: str
    waiting: tuple[str, ...]
    completed: tuple[str, ...]
    failed: tuple[str, ...]
    last_stage: str
    since_s: float
    """When it began, or its last plan came, in seconds since the Unix epoch."""
    overdue: bool
    told: int


class _Part(Generic[V]):
    """A value and when it changed."""

    def __init__(self, value: V) -> None:
        self.value, self.revision = value, 0

    def put(self, value: V, revision: int) -> bool:
        if value == self.value:
            return False
        self.value, self.revision = value, revision
        return True


class _Rows(Generic[V]):
    """Rows by key, each with when it changed, and when the order or set of the keys did."""

    def __init__(self) -> None:
        self._rows: dict[str, _Part[V]] = {}
        self._ordered = 0

    def put(self, rows: Mapping[str, V], revision: int) -> bool:
        changed = list(rows) != list(self._rows)
        if changed:
            self._ordered = revision
        before, self._rows = self._rows, {}
        for key, value in rows.items():
            part = before.get(key)
            if part is None:
                part = _Part(value)
                part.revision = revision
            changed |= part.put(value, revision)
            self._rows[key] = part
        return changed

    def __iter__(self) -> Iterator[V]:
        return (part.value for part in self._rows.values())

    def since(self, revision: int) -> dict[str, Any]:
        told: dict[str, Any] = {
            "rows": {
                key: part.value for key, part in self._rows.items() if part.revision > revision
            }
        }
        if self._ordered > revision:
            told["order"] = list(self._rows)
        return told


class Board:
    """The state of the pages, fed with the messages of one bus."""

    def __init__(self, model: str | None) -> None:
        self.fleet = Fleet()
        self.log = RoundLog()
        self.revision = 1
        self._model = model
        self._link = _Part(LinkRow(url="", connected=False, since_s=0.0, reason=""))
        self._ended: dict[tuple[str, str], tuple[int, str]] = {}
        """Model and engine -> when its last update ended, and its round."""
        self._since_ns: dict[tuple[str, str, int], int] = {}
        self._parts = {
            name: _Part[Any](None)
            for name in ("newest", "rounds", "failures", "dead_letters", "skipped")
        }
        self._engines, self._history = _Rows[EngineRow](), _Rows[HistoryRow]()
        self._is_stale = True
        self._changed = anyio.Event()
        self._encoded: dict[int, bytes] = {}

    @property
    def url(self) -> str:
        """Where the bus was last, without credentials."""
        return self._link.value.url

    @property
    def engines(self) -> tuple[tuple[str, str], ...]:
        """Model and name of all that are shown."""
        return tuple((row.model, row.engine) for row in self._engines)

    def is_running(self, model: str, round_id: str) -> bool:
        """Whether the pages are told that this round runs."""
        running: tuple[FlightRow, ...] = self._parts["rounds"].value or ()
        return any((row.model, row.round) == (model, round_id) for row in running)

    def feed(
        self,
        message: Message,
        received_ns: int,
        headers: Mapping[str, str],
        *,
        is_heard: bool,
    ) -> None:
        """Take a message in, heard or looked back: see `RoundLog.feed`."""
        self._is_stale |= self.fleet.feed(message, received_ns)
        if isinstance(message, UpdateComplete | UpdateFailed):
            key = (message.model, message.engine)
            if message.end_ns >= self._ended.get(key, (0, ""))[0]:
                self._ended[key] = (message.end_ns, message.round)
        self._is_stale |= isinstance(message, FirstToken)
        self.log.feed(message, received_ns, headers, is_heard=is_heard)

    def feed_gone(self, model: str, engine: str) -> None:
        """An engine's heartbeat has ended."""
        self._is_stale |= self.fleet.feed_gone(model, engine)

    def connect(self, url: str, now_ns: int) -> None:
        """The bus is there."""
        self._set_link(url, now_ns, connected=True, reason="")

    def lose(self, now_ns: int, reason: str = "") -> None:
        """The bus is lost, and tried for."""
        known = self._link.value
        self._set_link(known.url, now_ns, connected=False, reason=reason or known.reason)

    def refresh(self, now_ns: int) -> None:
        """Bring the parts up to date, and wake whoever waits if anything changed."""
        if not self._is_stale and not self._parts["rounds"].value:
            return
        self._is_stale = False
        view, revision = self.fleet.view(now_ns), self.revision + 1
        flights = [(each.model, each.round) for each in view.rounds]
        rows = {f"{row.model}/{row.round}": row for row in self.log.rows(flights)}
        told = {key: row.told for key, row in rows.items()}
        parts = self._parts
        changed = [
            parts["newest"].put(view.newest, revision),
            parts["rounds"].put(self._flights(view, told, now_ns), revision),
            parts["failures"].put(view.failures, revision),
            parts["dead_letters"].put(view.dead_letters, revision),
            parts["skipped"].put(view.skipped, revision),
            self._engines.put(self._engine_rows(view), revision),
            self._history.put(rows, revision),
        ]
        if any(changed):
            self._revise(revision)

    async def wait(self, since: int) -> None:
        """Returns once there is a later revision than `since`."""
        while self.revision <= since:
            await self._changed.wait()

    def changes(self, since: int, now_ns: int) -> bytes:
        """What changed after a revision, and what time it is, as JSON; after 0: everything."""
        if since not in self._encoded:
            while len(self._encoded) >= CACHED_CHANGES:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[since] = msgspec.json.encode(self._since(since))
        now_s = msgspec.json.encode(now_ns / NS_PER_S)
        return b'{"now_s":' + now_s + b"," + self._encoded[since].removeprefix(b"{")

    def _since(self, since: int) -> dict[str, Any]:
        told: dict[str, Any] = {"whole": since == 0}
        told |= {"engines": self._engines.since(since), "history": self._history.since(since)}
        for name, part in (*self._parts.items(), ("link", self._link)):
            if part.revision > since or since == 0:
                told[name] = part.value
        if since == 0:
            told["model"] = self._model
        return told

    def _set_link(self, url: str, now_ns: int, *, connected: bool, reason: str) -> None:
        known, revision = self._link.value, self.revision + 1
        is_new = (url, connected) != (known.url, known.connected)
        since_s = now_ns / NS_PER_S if is_new else known.since_s
        link = LinkRow(url=url, connected=connected, since_s=since_s, reason=reason)
        if self._link.put(link, revision):
            self._revise(revision)

    def _revise(self, revision: int) -> None:
        self.revision = revision
        self._encoded.clear()
        self._changed.set()
        self._changed = anyio.Event()

    def _engine_rows(self, view: FleetView) -> dict[str, EngineRow]:
        rows = {}
        for engine in view.engines:
            ended_ns, round_id = self._ended.get((engine.model, engine.engine), (0, ""))
            rows[f"{engine.model}/{engine.engine}"] = EngineRow(
                **structs.asdict(engine),
                updated_s=ended_ns / NS_PER_S if ended_ns else None,
                round=round_id,
            )
        present = {(engine.model, engine.engine) for engine in view.engines}
        self._ended = {key: ended for key, ended in self._ended.items() if key in present}
        return rows

    def _flights(
        self, view: FleetView, told: Mapping[str, int], now_ns: int
    ) -> tuple[FlightRow, ...]:
        """When a round began is reckoned once, so that it does not tremble."""
        since_ns = {}
        for each in view.rounds:
            key = (each.model, each.round, each.epoch)
            since_ns[key] = self._since_ns.get(key, now_ns - round(each.age_s * NS_PER_S))
        self._since_ns = since_ns
        return tuple(
            _flight_row(
                each,
                since_ns[each.model, each.round, each.epoch],
                told.get(f"{each.model}/{each.round}", 0),
            )
            for each in view.rounds
        )


def _flight_row(each: RoundView, since_ns: int, told: int) -> FlightRow:
    shown = {name: getattr(each, name) for name in RoundView.__struct_fields__ if name != "age_s"}
    return FlightRow(**shown, since_s=since_ns / NS_PER_S, told=told)
