"""Answers a consumer's requests inside one engine worker: describe, attach, apply, inspect, detach.

Owns the live parameters of one rank while `handle` runs, the plans that were attached, and the
segments that are open. Engine-independent: the engine's adapter is a `ModelHost`.

Invariants:
    `touched` is set before the first write to a live parameter, whoever writes, and cleared only
    when a whole update has ended, sources checked and device synchronised;
    `version` is the version whose bytes were written last, whole;
    no exception leaves `handle`: each becomes `Failed`, naming its class and `touched`.
"""

from __future__ import annotations

import uuid

from weightbus.consumers.reload.host import ModelHost
from weightbus.schemas.worker import (
    Apply,
    Attach,
    Describe,
    Detach,
    Inspect,
    WorkerReply,
    WorkerRequest,
)

__all__ = ("ReloadWorker",)


class ReloadWorker:
    """One rank's end of the consumer's requests.

    Not thread-safe: `handle` and `close` are called on the worker's main thread, `handle(Apply)`
    only while no forward pass runs.
    """

    def __init__(self, host: ModelHost, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.instance = uuid.uuid4().hex
        """Of this worker process; a new one has nothing attached."""
        self._host = host
        self._version = -1
        self._touched = False

    @property
    def version(self) -> int:
        """The version whose bytes were written last, whole; -1: none."""
        return self._version

    @property
    def touched(self) -> bool:
        """True: an update began and did not end whole; the model must not serve."""
        return self._touched

    def handle(self, request: WorkerRequest) -> WorkerReply:
        """Carry out one request and answer it. Blocks until done or its deadline; never raises."""
        match request:
            case Describe() | Attach() | Apply() | Inspect() | Detach():
                raise NotImplementedError

    def close(self) -> None:
        """Close every segment and forget every plan. Parameters stay as they are."""
