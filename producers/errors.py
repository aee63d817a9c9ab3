"""Errors of the trainer's side. Does no I/O. Each builds its own message from typed fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightbus.schemas.errors import WeightBusError

__all__ = (
    "DeviceMemoryFull",
    "GivenUp",
    "NotServed",
    "ProducerError",
    "PublisherClosed",
    "RankInvalid",
    "SealFailed",
    "SlotBusy",
    "SlotsUnsuitable",
    "TensorInvalid",
    "TrainerInvalid",
    "VersionNotNew",
    "VersionSkipped",
)


class ProducerError(WeightBusError):
    """Base of the trainer side's errors. None of them spoils the publisher: publish again."""


class TensorInvalid(ProducerError):
    """What was given to be published cannot be described by a layout."""

    def __init__(self, tensor: str, value: object, limit: str) -> None:
        self.tensor, self.value, self.limit = tensor, value, limit
        super().__init__(f"tensor {tensor} is {value}: {limit}")


class TrainerInvalid(ProducerError):
    """What a model is, or how it is spread over ranks, is none of what is known here."""

    def __init__(self, what: str, value: object, limit: str) -> None:
        self.what, self.value, self.limit = what, value, limit
        super().__init__(f"{what} is {value}: {limit}")


class VersionNotNew(ProducerError):
    """A version must be greater than every one before it: readers ignore what is not newer."""

    def __init__(self, model: str, version: int, newest: int, producer: str) -> None:
        self.model, self.version, self.newest, self.producer = model, version, newest, producer
        super().__init__(
            f"version of {model} is {version}: must be greater than {newest}, "
            f"which {producer} has used"
        )


class SlotBusy(ProducerError):
    """Readers still hold the versions that had to be given up for a new one.

    The version in the slot has been retired, so that nobody begins to read it, but it was not
    overwritten: who reads it already may finish. The newest version is untouched.
    """

    def __init__(self, version: int, readers: Sequence[str], waited_s: float) -> None:
        self.version, self.readers, self.waited_s = version, tuple(readers), waited_s
        super().__init__(
            f"the slot of version {version} cannot be written: after {waited_s:g} s there are "
            "readers left: " + ", ".join(self.readers)
        )


class VersionSkipped(ProducerError):
    """Engines are still busy with versions before, and `when_busy="skip"`: go on without this one.

    Raised on every rank of a trainer if it is on one. The newest version is untouched, and a
    trainer of one rank has retired nothing. In a group of ranks the version is used up, and a rank
    that saw no reader may have retired the oldest version already.
    """

    def __init__(self, version: int, reason: str, rank: int | None = None) -> None:
        self.version, self.reason = version, reason
        self.rank = rank
        """Which other rank has skipped it; None: this one."""
        by = "" if rank is None else f" by rank {rank}"
        super().__init__(f"version {version} is skipped{by}: {reason}")


class SlotsUnsuitable(ProducerError):
    """What is published cannot lie in slots of the wanted kind. Nothing has happened."""

    def __init__(self, slots: str, reason: str) -> None:
        self.slots, self.reason = slots, reason
        super().__init__(f"slots are {slots!r}: {reason}")


class DeviceMemoryFull(ProducerError):
    """There is no room for a slot on a GPU."""

    def __init__(self, device: int, uuid: str, need_bytes: int, have_bytes: int) -> None:
        self.device, self.uuid = device, uuid
        self.need_bytes, self.have_bytes = need_bytes, have_bytes
        super().__init__(
            f"GPU {device} ({uuid}) has {have_bytes:,} bytes free: a slot needs {need_bytes:,} "
            "(a publisher keeps two slots of its part's size; slots='host' needs none)"
        )


class SealFailed(ProducerError):
    """The parts of all ranks did not become one checkpoint. The version is used up on every rank.

    `missing` names the ranks whose part was not heard of in time: rank 0 hears all others, and
    these hear rank 0 alone.
    """

    def __init__(self, version: int, reason: str, missing: Sequence[int] = ()) -> None:
        self.version, self.reason, self.missing = version, reason, tuple(missing)
        super().__init__(f"version {version} is not sealed: {reason}")


class GivenUp(ProducerError):
    """The trainer will not come to publish a version: what `give_up` says on the bus."""

    def __init__(self, version: int, reason: str) -> None:
        self.version, self.reason = version, reason
        super().__init__(f"version {version} is given up: {reason}")


class NotServed(ProducerError):
    """Engines have not come to a version in time, and may still do so; or it was not announced."""

    def __init__(
        self,
        model: str,
        version: int,
        behind: Mapping[str, int],
        present: int,
        wanted: int,
        waited_s: float,
        reason: str = "",
    ) -> None:
        """`reason`: why it will not be served at all."""
        self.reason = reason
        self.model, self.version, self.behind = model, version, dict(behind)
        """Of present engines that serve an older version, or none (-1): which."""
        self.present, self.wanted, self.waited_s = present, wanted, waited_s
        said = [f"{engine} serves version {served}" for engine, served in sorted(behind.items())]
        if present < wanted:
            said.insert(0, f"{present} of {wanted} engines are present")
        why = f": {reason}" if reason else f" after {waited_s:g} s: " + ", ".join(said)
        super().__init__(f"version {version} of {model} is not served{why}")


class RankInvalid(ProducerError):
    """A rank does something that is not for it to do."""

    def __init__(self, rank: int, limit: str) -> None:
        self.rank, self.limit = rank, limit
        super().__init__(f"rank is {rank}: {limit}")


class PublisherClosed(ProducerError):
    """The publisher is used after its end."""

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(f"the publisher of {model} is closed")
