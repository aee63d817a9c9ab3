"""A waterfall as Trace Event Format JSON: open it in https://ui.perfetto.dev or chrome://tracing.

Does no I/O. The format: "Trace Event Format", Google, 2016. A process for the trainer, one for
every engine, and one for the critical path; in an engine's, a thread for what the whole engine does
and threads for the stages of every rank; an arrow from the publication to every update, unless it
lies long before the round: nothing would be seen of the round beside it. For the same reason who
came when the round was over is told in `otherData` only. Times are microseconds after the round's
origin, whose time `otherData` has. Invariants: on one thread what begins within something ends
within it, as viewers take it for granted (what overlaps otherwise goes to a thread of its own);
every arrow has two ends, each on an event.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from weightbus.tracing.attributes import BUCKET, BYTES, RANK, AttributeValue
from weightbus.tracing.exports.spans import TreeSpan, span_tree, trace_id_of
from weightbus.tracing.laps import MOVING
from weightbus.tracing.text import NS_PER_S, gigabytes_per_second
from weightbus.tracing.waterfall import PathStep, Waterfall

__all__ = ("perfetto",)

TICK_NS: Final = 125
"""To which times are rounded: an eighth of a microsecond. Viewers add `ts` and `dur` as floating
point numbers, or cut each to nanoseconds: of eighths both are exact, so that what ends together
ends together, and nothing seems to outlast what it is in."""
TICKS_PER_US: Final = 8

PATH_PID: Final = 1
TRAINER_PID: Final = 2
FIRST_ENGINE_PID: Final = 3

ROUNDING_GB_PER_S: Final = 1e-9
"""What is left of a sum of rates that have all ended."""

Event = dict[str, Any]


def perfetto(waterfall: Waterfall) -> str:
    """One JSON object on one line."""
    trace = {
        "displayTimeUnit": "ms",
        "traceEvents": list(_events(waterfall)),
        "otherData": {
            "model": waterfall.model,
            "version": waterfall.version,
            "round": waterfall.round,
            "trace_id": trace_id_of(waterfall),
            "origin_ns": str(waterfall.origin_ns),
            "critical_path": waterfall.critical_told,
            "late": {late.engine: late.told for late in waterfall.late},
        },
    }
    return msgspec.json.encode(trace).decode()


def _events(waterfall: Waterfall) -> Iterator[Event]:
    of_engine: dict[str, list[TreeSpan]] = {}
    for span in span_tree(waterfall, with_late=False):
        of_engine.setdefault(span.engine, []).append(span)
    yield from _path(waterfall.critical_path, waterfall.critical_told)
    published = [] if waterfall.late_s else of_engine.get("", [])
    if published:
        producer = waterfall.producer or "trainer"
        yield from _process(TRAINER_PID, f"trainer {producer}", published, waterfall.origin_ns)
    for pid, engine in enumerate(waterfall.engines, start=FIRST_ENGINE_PID):
        name = f"engine {engine.engine} ({engine.outcome})"
        own = of_engine[engine.engine]
        yield from _process(pid, name, own, waterfall.origin_ns)
        yield from _rates(pid, own, waterfall.origin_ns)
        updates = [span for span in own if span.kind == "CONSUMER"]
        for span in published:
            yield from _arrow(pid, span, updates[:1], waterfall.origin_ns)


def _path(steps: Iterable[PathStep], told: str) -> Iterator[Event]:
    """The steps in a row."""
    if not told:
        return
    yield _name("process_name", PATH_PID, 1, "critical path")
    yield _sort("process_sort_index", PATH_PID, 1, PATH_PID)
    yield _name("thread_name", PATH_PID, 1, "what the last engine waited for")
    for step in steps:
        who = "".join([step.engine, "" if step.rank is None else f" rank {step.rank}"])
        start_ns = round(step.start_s * NS_PER_S)
        end_ns = round((step.start_s + step.duration_s) * NS_PER_S)
        args = {"engine": step.engine, "rank": step.rank, "waited for": step.waited_for}
        known = {key: value for key, value in args.items() if value not in ("", None)}
        name = f"{step.what} {step.waited_for or who}".strip()
        yield _slice(PATH_PID, 1, name, "critical", start_ns, end_ns, known)


def _process(pid: int, name: str, spans: Sequence[TreeSpan], origin_ns: int) -> Iterator[Event]:
    """Names, and every span on its thread."""
    yield _name("process_name", pid, 1, name)
    yield _sort("process_sort_index", pid, 1, pid)
    threads = _threads(spans)
    numbers = {thread: tid for tid, thread in enumerate(sorted(set(threads.values())), start=1)}
    for thread, tid in numbers.items():
        lane = f" ({thread.lane + 1})" if thread.lane else ""
        yield _name("thread_name", pid, tid, f"{thread.title}{lane}")
        yield _sort("thread_sort_index", pid, tid, tid)
    by_id = {span.span_id: span for span in spans}
    for span_id, thread in threads.items():
        span = by_id[span_id]
        start_ns, end_ns = span.start_ns - origin_ns, span.end_ns - origin_ns
        stage = by_id[span.parent_id].name if span.name == "bucket" else span.name
        yield _slice(
            pid, numbers[thread], _title(span, stage), stage.partition(" ")[0], start_ns, end_ns,
            _args(span),
        )  # fmt: skip


class _Thread(Struct, frozen=True, order=True):
    """Threads are shown in this order."""

    rank: int
    """-1: the whole engine."""
    place: int
    title: str
    lane: int = 0
    """One more for each that would overlap on the one before."""


def _threads(spans: Sequence[TreeSpan]) -> dict[str, _Thread]:
    """Span id -> where it is shown; parents before their children."""
    by_id = {span.span_id: span for span in spans}
    open_until: dict[_Thread, list[int]] = {}
    found: dict[str, _Thread] = {}

    def fits(thread: _Thread, span: TreeSpan) -> bool:
        """Within what is open there, or after it."""
        ends = open_until.setdefault(thread, [])
        while ends and ends[-1] <= span.start_ns:
            ends.pop()
        return not ends or span.end_ns <= ends[-1]

    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns, _depth(span))):
        thread = _usual_thread(span)
        if span.name == "bucket":
            beside = found[span.parent_id]
            title = f"rank {beside.rank} {by_id[span.parent_id].name} buckets"
            overflow = _Thread(beside.rank, beside.place, title)
            thread = beside if fits(beside, span) else overflow
        while not fits(thread, span):
            thread = structs.replace(thread, lane=thread.lane + 1)
        open_until[thread].append(span.end_ns)
        found[span.span_id] = thread
    return found


def _usual_thread(span: TreeSpan) -> _Thread:
    rank = span.attributes.get(RANK)
    if not isinstance(rank, int) or span.name not in MOVING:
        return _Thread(-1, 0, "update" if span.engine else "publications")
    return _Thread(rank, MOVING.index(span.name), f"rank {rank} {span.name}")


def _depth(span: TreeSpan) -> int:
    if span.kind != "INTERNAL":
        return 0
    return 2 if span.name in ("bucket", "join", "plan") else 1


def _title(span: TreeSpan, stage: str) -> str:
    if span.name == "bucket":
        return f"{stage} {span.attributes[BUCKET]}"
    return span.name.partition(" weightbus")[0]


def _args(span: TreeSpan) -> dict[str, AttributeValue]:
    """Its attributes, its rate in 10^9 bytes per second, and what makes it findable elsewhere."""
    told: dict[str, AttributeValue] = {**span.attributes, "span_id": span.span_id}
    if span.kind == "CONSUMER":
        told["trace_id"] = span.trace_id
    moved = span.attributes.get(BYTES)
    rate = None
    if isinstance(moved, int):
        rate = gigabytes_per_second(moved, (span.end_ns - span.start_ns) / NS_PER_S)
    if rate is not None:
        told["GB/s"] = rate
    if span.error:
        told["error"] = span.error
    return told


def _rates(pid: int, spans: Iterable[TreeSpan], origin_ns: int) -> Iterator[Event]:
    """What all ranks of an engine move together, stage by stage, whenever that changes."""
    changes: dict[int, dict[str, float]] = {}
    stages: dict[str, float] = {}
    for span in spans:
        moved, duration_ns = span.attributes.get(BYTES), span.end_ns - span.start_ns
        if span.name in MOVING and isinstance(moved, int) and moved and duration_ns:
            rate = moved / duration_ns
            stages[span.name] = 0.0
            for at_ns, change in ((span.start_ns, rate), (span.end_ns, -rate)):
                at = changes.setdefault(at_ns, {})
                at[span.name] = at.get(span.name, 0.0) + change
    for at_ns, differences in sorted(changes.items()):
        for stage, difference in differences.items():
            rest = stages[stage] + difference
            stages[stage] = rest if rest > ROUNDING_GB_PER_S else 0.0
        yield {
            "ph": "C", "name": "GB/s", "pid": pid, "ts": _us(at_ns - origin_ns),
            "args": dict(stages),
        }  # fmt: skip


def _arrow(
    pid: int, published: TreeSpan, updates: Iterable[TreeSpan], origin_ns: int
) -> Iterator[Event]:
    """From a publication to the updates that follow it. Both need some length to hold an end."""
    for update in updates:
        if published.start_ns < published.end_ns and update.start_ns < update.end_ns:
            ends = (("s", TRAINER_PID, published), ("f", pid, update))
            for phase, at_pid, span in ends:
                told: Event = {
                    "ph": phase, "id": pid, "name": "CheckpointReady", "cat": "publish",
                    "pid": at_pid, "tid": 1, "ts": _us(span.start_ns - origin_ns),
                }  # fmt: skip
                yield told | ({"bp": "e"} if phase == "f" else {})


def _slice(
    pid: int,
    tid: int,
    name: str,
    category: str,
    start_ns: int,
    end_ns: int,
    args: Mapping[str, object],
) -> Event:
    return {
        "ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": _us(start_ns),
        "dur": _us(end_ns) - _us(start_ns), "args": dict(args),
    }  # fmt: skip


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _sort(kind: str, pid: int, tid: int, place: int) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"sort_index": place}}


def _us(time_ns: int) -> float:
    return round(time_ns / TICK_NS) / TICKS_PER_US
