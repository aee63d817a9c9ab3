"""Errors of the engine's side. Does no I/O. Each builds its own message from typed fields."""

from __future__ import annotations

from collections.abc import Sequence

from weightbus.schemas.base import Stage
from weightbus.schemas.errors import WeightBusError

__all__ = (
    "ApplyFailed",
    "CheckpointRefused",
    "ConsumerError",
    "DeadlineExceeded",
    "DeviceFailed",
    "DeviceLost",
    "DigestMismatch",
    "EngineTaken",
    "EngineUnavailable",
    "MeasuringFailed",
    "NotAttached",
    "PeerLost",
    "PlanError",
    "ProofFailed",
    "ProofNeeded",
    "RouteUnavailable",
    "SegmentUnavailable",
    "TornRead",
    "TraceRefused",
    "TransferCancelled",
    "TransferError",
    "VersionRetired",
    "WorkerLost",
    "cause_of",
)


class ConsumerError(WeightBusError):
    """Base of the engine side's errors."""

    touched: bool = False
    """True: a live parameter may have been written before this was raised."""
    told_as: str = ""
    """By which name the bus hears of it: of a class of this file, where an adapter raises one of
    its own; empty: by that of the class."""


def cause_of(error: WeightBusError) -> str:
    """Name of the error class at fault: the worker's, where a worker failed."""
    if isinstance(error, ApplyFailed):
        return error.cause
    told_as = error.told_as if isinstance(error, ConsumerError) else ""
    return told_as or type(error).__name__


class PlanError(ConsumerError):
    """A plan cannot be made or bound: what the layout offers and what the engine needs disagree."""

    def __init__(self, thing: str, value: object, limit: str) -> None:
        self.thing, self.value, self.limit = thing, value, limit
        super().__init__(f"{thing} is {value}: {limit}")


class NotAttached(ConsumerError):
    """A worker does not know a layout (any more): it must be described and attached again."""

    def __init__(self, layout_digest: str, missing: str) -> None:
        self.layout_digest, self.missing = layout_digest, missing
        super().__init__(f"layout {layout_digest} is not {missing} in this worker")


class TraceRefused(ConsumerError):
    """A model's `load_weights` cannot be turned into a plan; the engine's own loader is taken."""

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"load_weights of {model} cannot be traced: {reason}")


class CheckpointRefused(ConsumerError):
    """A checkpoint does not make the engine's model: loaded, it would leave a part of another."""

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"not a checkpoint of {model}: {reason}")


class SegmentUnavailable(ConsumerError):
    """A segment cannot be opened: absent, too short, outside the allowed roots, or elsewhere."""

    def __init__(self, segment: str, value: object, limit: str) -> None:
        self.segment, self.value, self.limit = segment, value, limit
        super().__init__(f"segment {segment} is {value}: {limit}")


class TornRead(ConsumerError):
    """A segment was written again while (or before) it was read."""

    def __init__(self, segment: str, expected: int, found: int) -> None:
        self.segment, self.expected, self.found = segment, expected, found
        super().__init__(
            f"segment {segment} has generation {found}: "
            f"it must be {expected} before and after reading"
        )


class RouteUnavailable(ConsumerError):
    """A route cannot reach a segment from this rank."""

    def __init__(self, route: str, reason: str) -> None:
        self.route, self.reason = route, reason
        super().__init__(f"route {route} is not available: {reason}")


class DeadlineExceeded(ConsumerError):
    """A stage did not end within its budget."""

    def __init__(self, stage: str, deadline_s: float) -> None:
        self.stage, self.deadline_s = stage, deadline_s
        super().__init__(f"{stage} did not end within its deadline of {deadline_s:g} s")


class DeviceFailed(ConsumerError):
    """A device refused something, and goes on; `cause` is the class that its library raised."""

    def __init__(self, device: str, cause: str, reason: str) -> None:
        self.device, self.cause, self.reason = device, cause, reason
        super().__init__(f"device {device} failed: {cause}: {reason}")


class DeviceLost(ConsumerError):
    """A device does nothing for this process any more: only a new process can use it again."""

    def __init__(self, device: str, reason: str) -> None:
        self.device, self.reason = device, reason
        super().__init__(f"device {device} is lost to this process: {reason}")


class PeerLost(ConsumerError):
    """A group cannot go on: some member is gone, stands still, or has left it."""

    def __init__(self, group: str, members: Sequence[str], reason: str) -> None:
        self.group, self.members, self.reason = group, tuple(members), reason
        named = ", ".join(members[:8]) or "nobody"
        more = f" and {len(members) - 8} more" if len(members) > 8 else ""
        super().__init__(f"group {group}, shared with {named}{more}: {reason}")


class WorkerLost(ConsumerError):
    """A worker of the engine is gone or does not answer."""

    def __init__(self, rank: int, reason: str) -> None:
        self.rank, self.reason = rank, reason
        super().__init__(f"worker of rank {rank} is lost: {reason}")


class ApplyFailed(ConsumerError):
    """A worker answered `Failed`; `cause` is the name of its error class."""

    def __init__(self, rank: int, cause: str, reason: str, *, touched: bool) -> None:
        self.rank, self.cause, self.reason, self.touched = rank, cause, reason, touched
        super().__init__(f"rank {rank}: {cause}: {reason}")


class MeasuringFailed(ConsumerError):
    """A rate of this host could not be measured."""

    def __init__(self, rate: str, reason: str) -> None:
        self.rate, self.reason = rate, reason
        super().__init__(f"the rate of {rate} cannot be measured: {reason}")


class EngineUnavailable(ConsumerError):
    """The engine cannot be reached, or refused a command."""

    def __init__(self, engine: str, reason: str) -> None:
        self.engine, self.reason = engine, reason
        super().__init__(f"engine {engine} is not available: {reason}")


class EngineTaken(ConsumerError):
    """Another consumer, which is alive, keeps an engine of this id."""

    def __init__(self, model: str, engine: str, consumer: str, host_id: str) -> None:
        self.model, self.engine, self.consumer, self.host_id = model, engine, consumer, host_id
        super().__init__(
            f"engine {engine} of model {model} has a consumer that is alive, instance {consumer} "
            f"on host {host_id}: stop it, or take another engine id"
        )


class ProofFailed(ConsumerError):
    """What a parameter holds is not what the plan makes of the same checkpoint."""

    def __init__(self, parameter: str, reason: str) -> None:
        self.parameter, self.reason = parameter, reason
        super().__init__(f"parameter {parameter}: {reason}")


class ProofNeeded(ConsumerError):
    """A version cannot be streamed: its bytes are needed more often than they come by."""

    def __init__(self, thing: str, reason: str) -> None:
        self.thing, self.reason = thing, reason
        super().__init__(f"{thing} cannot be streamed: {reason}")


class DigestMismatch(ConsumerError):
    """What the ranks hold is not what was sent: the digests do not add up, or replicas differ."""

    def __init__(self, expected: str, found: str, tensors: tuple[str, ...], reason: str) -> None:
        self.expected, self.found, self.tensors, self.reason = expected, found, tensors, reason
        named = ", ".join(tensors[:8]) or "not known (the publisher offers no digest per tensor)"
        more = f" and {len(tensors) - 8} more" if len(tensors) > 8 else ""
        super().__init__(
            f"weights digest is {found}, the publisher's is {expected}: {reason}; "
            f"tensors at fault: {named}{more}"
        )


class VersionRetired(ConsumerError):
    """A version's publisher has withdrawn it: its bytes may be overwritten at any time."""

    def __init__(self, version: int, reason: str) -> None:
        self.version, self.reason = version, reason
        super().__init__(f"version {version} can no longer be read: {reason}")


class TransferCancelled(ConsumerError):
    """The plan that a transfer ran was withdrawn."""

    def __init__(self, round: str, epoch: int) -> None:
        self.round, self.epoch = round, epoch
        super().__init__(f"the transfer of round {round}, epoch {epoch}, was cancelled")


class TransferError(ConsumerError):
    """A transfer failed. `cause` names what failed first; `touched` says how the engine is left."""

    def __init__(self, error: WeightBusError, *, touched: bool) -> None:
        self.cause = cause_of(error)
        self.reason = str(error)
        self.touched = touched
        self.stage = _stage_of(error)
        super().__init__(self.reason)


def _stage_of(error: WeightBusError) -> Stage:
    """Where a transfer failed."""
    match error:
        case PeerLost():
            return "broadcast"
        case RouteUnavailable() | SegmentUnavailable() | TornRead() | VersionRetired():
            return "fetch"
        case DeadlineExceeded(stage="fetch" | "broadcast" as stage):
            return stage
    return "reload"
