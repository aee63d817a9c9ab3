"""One line of plain text for every message that a monitor sees. Does no I/O."""

from __future__ import annotations

from datetime import UTC, datetime

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
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan
from weightbus.tracing.text import (
    NS_PER_S,
    counted,
    format_bytes,
    format_rate,
    format_seconds,
    gigabytes_per_second,
    printable,
)

__all__ = ("narrate", "narrate_gone", "narrate_missed", "time_of_day")

RANKS_SHOWN = 8

Narrated = (
    EngineState
    | CheckpointReady
    | CheckpointSkipped
    | Join
    | RoundPlan
    | StageComplete
    | UpdateComplete
    | UpdateFailed
    | FirstToken
    | RoundComplete
    | DeadLetter
)


def narrate(message: Message) -> str:
    """What a message says; its class name if it is none that monitors look at."""
    if isinstance(message, Narrated):
        return printable(f"{message.model}: {_sentence(message)}")
    return type(message).__name__


def narrate_gone(model: str, engine: str) -> str:
    """What the end of an engine's heartbeat says."""
    return f"{model}: {engine} is gone"


def narrate_missed(stream: str, at_most: int | None) -> str:
    """What it says that a stream has dropped messages before they were read."""
    if at_most is None:
        many, were = f"an unknown number of messages of {stream}", "were missed"
    else:
        many = f"at most {counted(at_most, 'message')} of {stream}"
        were = f"{'was' if at_most == 1 else 'were'} missed, counted over all kinds and models"
    return f"{many} {were}: the bus no longer keeps {'it' if at_most == 1 else 'them'}"


def time_of_day(time_ns: int) -> str:
    """`12:34:56.789Z`."""
    return (
        datetime.fromtimestamp(time_ns // 1_000_000 / 1000, UTC).strftime("%H:%M:%S.%f")[:-3] + "Z"
    )


def _sentence(message: Narrated) -> str:
    match message:
        case EngineState():
            return _state(message)
        case CheckpointReady():
            return f"version {message.version} is ready, from {message.producer}"
        case CheckpointSkipped():
            return _skipped(message)
        case Join():
            ranks = _ranks(len(message.ranks))
            return f"{message.engine} joins round {message.round} with {ranks}"
        case RoundPlan():
            return _plan(message)
        case StageComplete():
            return _stage(message)
        case UpdateComplete():
            return _complete(message)
        case UpdateFailed():
            return _failed(message)
        case FirstToken():
            return _token(message)
        case RoundComplete():
            return _done(message)
        case DeadLetter():
            return f"dead letter on {message.subject}: {message.reason}"


def _state(state: EngineState) -> str:
    text = f"{state.engine} is {state.status}"
    if state.version >= 0:
        text += f", on version {state.version}"
    if state.target_version >= 0:
        text += f", moving to version {state.target_version}"
    return f"{text} ({_ranks(state.ranks)} of {state.engine_kind or 'an engine'})"


def _skipped(skipped: CheckpointSkipped) -> str:
    text = f"version {skipped.version} is skipped by {skipped.producer} ({skipped.cause}"
    if skipped.waited_s:
        text += f" after {format_seconds(skipped.waited_s)}"
    if skipped.ranks:
        text += f"; not heard of: {_listed(skipped.ranks)}"
    return f"{text}): {skipped.reason}"


def _plan(plan: RoundPlan) -> str:
    parts = []
    for engine in plan.engines:
        routes = "+".join(dict.fromkeys(rank.route for rank in engine.ranks))
        parts.append(f"{engine.engine} by {routes}")
    return f"{plan.leader} plans round {plan.round}, epoch {plan.epoch}: {', '.join(parts)}"


def _stage(stage: StageComplete) -> str:
    who = stage.engine if stage.rank is None else f"{stage.engine}/{stage.rank}"
    duration_s = (stage.end_ns - stage.start_ns) / NS_PER_S
    text = f"{who} {stage.stage} {'took' if stage.ok else 'failed after'} "
    text += format_seconds(duration_s) + _moved(stage.bytes, duration_s)
    if stage.route is not None:
        text += f", {stage.route}"
    return text if stage.ok else f"{text}: {stage.error}"


def _complete(update: UpdateComplete) -> str:
    duration_s = (update.end_ns - update.start_ns) / NS_PER_S
    proof = "verified" if update.verified == "verified" else "no digest offered"
    return (
        f"{update.engine} serves version {update.version} after {format_seconds(duration_s)}"
        f"{_moved(update.bytes, duration_s)}, {'+'.join(update.routes)}, {proof}, "
        f"paused {format_seconds(update.paused_s)}"
    )


def _failed(update: UpdateFailed) -> str:
    left = "it serves nothing"
    if update.quarantined:
        left = "it is quarantined"
    elif update.served_version >= 0:
        left = f"it serves version {update.served_version}"
    return (
        f"{update.engine} did not reach version {update.version}: {update.cause}: {update.reason}; "
        f"{left}"
    )


def _token(token: FirstToken) -> str:
    text = f"{token.engine} makes its first token with version {token.version} after "
    text += format_seconds((token.end_ns - token.start_ns) / NS_PER_S)
    if token.resolution_ns:
        text += f", at most {format_seconds(token.resolution_ns / NS_PER_S)} less"
    return text


def _done(done: RoundComplete) -> str:
    text = f"{done.leader} closes round {done.round}: {len(done.completed)} complete"
    if done.failed:
        reasons = "; ".join(f"{engine}: {reason}" for engine, reason in done.failed.items())
        text += f", {len(done.failed)} failed ({reasons})"
    return text


def _moved(size_bytes: int, seconds: float) -> str:
    rate = gigabytes_per_second(size_bytes, seconds)
    if not size_bytes:
        return ""
    return f", {format_bytes(size_bytes)}" + (f", {format_rate(rate)} GB/s" if rate else "")


def _listed(ranks: tuple[int, ...]) -> str:
    """The first of them, and how many more."""
    shown = ", ".join(map(str, ranks[:RANKS_SHOWN]))
    more = len(ranks) - RANKS_SHOWN
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {shown}" + (f" and {more} more" if more > 0 else "")


def _ranks(count: int) -> str:
    return counted(count, "rank")
