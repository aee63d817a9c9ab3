"""A critical path in one sentence, and a late attempt in another, with numbers. Does no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from weightbus.tracing.critical_path import CriticalPath
from weightbus.tracing.facts import PROMPT_NS
from weightbus.tracing.text import NS_PER_S, format_rate, format_seconds
from weightbus.tracing.waterfall import EngineWaterfall, LateEngine, Origin, PathStep, StageRow

__all__ = ("FASTER", "FASTER_SHARE", "format_share", "tell_late", "tell_path")

PARTS: Final = 3
"""How many steps are told of: those that took longest."""

NAMED_SHARE: Final = 0.05
"""What took less than this of the whole is not told of, unless it is the longest."""

FASTER_SHARE: Final = 1.005
"""Of a link: from here on more than 100 % is told, which is said not to be a mistake."""

FASTER: Final = "above 100 %: faster than measured by weightbus doctor"

_ENDS: Final = {
    "complete": "served after",
    "failed": "failed after",
    "unfinished": "has not finished; told are",
}

_SINCE: Final[Mapping[Origin, str]] = {
    "checkpoint_ready": "",
    "stored": " since the bus had CheckpointReady",
    "heard": " since it was heard of",
    "earliest": " since the first message",
}


def tell_path(
    path: CriticalPath, engines: Sequence[EngineWaterfall], origin: Origin, late_s: float = 0.0
) -> str:
    """`engine b, the last of 2, served after 131 ms: reload of rank 0 took 80.0 ms (61 %) at 1.14
    GB/s, 32 % of the memory link; rank 0 waited 41.0 ms (31 %) for its peers: a rank 1`.

    Where nobody heard of the version until `late_s` after it, that comes last. Empty if there is
    nothing to tell.
    """
    engine = next((each for each in engines if each.engine == path.engine), None)
    steps = [step for step in path.steps if step.what != "first_token"]
    total_s = sum(step.duration_s for step in steps)
    if engine is None or total_s <= 0:
        return ""
    longest = sorted(steps, key=lambda step: -round(step.duration_s, 9))[:PARTS]
    named = [
        step for step in longest if step is longest[0] or step.duration_s >= NAMED_SHARE * total_s
    ]
    rows = [row for index, row in enumerate(engine.stages) if (engine.engine, index) in path.rows]
    parts = [_tell_step(step, rows, total_s) for step in named]
    parts += [
        f"its first token came {format_seconds(step.duration_s)} later"
        for step in path.steps
        if step.what == "first_token"
    ]
    if late_s:
        parts.append(f"it came {format_seconds(late_s)} after the version")
    alike = sum(each.outcome == engine.outcome for each in engines)
    last = f", the last of {alike}," if alike > 1 else ""
    end = f"{_ENDS[engine.outcome]} {format_seconds(total_s)}{_SINCE[origin]}"
    return f"engine {engine.engine}{last} {end}: {'; '.join(parts)}"


_AFTER: Final[Mapping[Origin, str]] = {
    "checkpoint_ready": "CheckpointReady",
    "stored": "CheckpointReady",
    "heard": "the first engine had heard of it",
    "earliest": "the first message",
}


def tell_late(engine: LateEngine, origin: Origin) -> str:
    """`came when the round was over, 300 s after CheckpointReady, and gave up after 3.00 ms:
    VersionRetired: its publisher died (2 attempts)`."""
    start_s, end_s = engine.start_s or 0.0, engine.end_s or 0.0
    why = ": ".join(filter(None, (engine.cause, engine.reason)))
    attempts = f" ({engine.attempts} attempts)" if engine.attempts > 1 else ""
    return (
        f"came when the round was over, {format_seconds(start_s)} after {_AFTER[origin]}, and gave "
        f"up after {format_seconds(max(0.0, end_s - start_s))}: {why}{attempts}"
    )


def format_share(share: float | None) -> str:
    """`61 %`, `0.4 %`; empty for None."""
    if share is None:
        return ""
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else f"{share:.1%}".replace("%", " %")


def _tell_step(step: PathStep, rows: Sequence[StageRow], total_s: float) -> str:
    took = f"{format_seconds(step.duration_s)} ({format_share(step.duration_s / total_s)})"
    of_rank = "" if step.rank is None else f" of rank {step.rank}"
    match step.what:
        case "wait":
            who = "it" if step.rank is None else f"rank {step.rank}"
            waited_for = step.waited_for or "what is not told"
            return f"{who} waited {took} for {waited_for}"
        case "publish":
            return f"publishing took {took}"
        case "deliver":
            if step.duration_s * NS_PER_S > PROMPT_NS:  # others heard of it, so it was not there
                return f"it came {took} after the version"
            return f"delivery took {took}"
    moved = [row for row in rows if row.stage == step.what and step.rank in (None, row.rank)]
    return f"{step.what}{of_rank} took {took}{_tell_rate(moved)}"


def _tell_rate(rows: Sequence[StageRow]) -> str:
    """Of the row that moved most: ` at 1.14 GB/s, 32 % of the memory link`."""
    row = max(rows, key=lambda row: row.bytes, default=None)
    if row is None or row.gb_per_s is None:
        return ""
    share = (
        "" if row.link_share is None else f", {format_share(row.link_share)} of the {row.link} link"
    )
    if row.link_share is not None and row.link_share > FASTER_SHARE:
        share += f" ({FASTER})"
    return f" at {format_rate(row.gb_per_s)} GB/s{share}"
