"""A worker's side of turns: takes the request that a turn names, and answers it.

Owns the endpoint to the consumer and the `ReloadWorker`, which is made when a request first needs
it and then kept, whoever asks. Independent of any engine: the engine's adapter calls `take` on the
worker's main thread, between its forward passes, and `open` wherever it likes.

Invariants:
    a request is carried out in the turn that names it, and in no other;
    a request behind which another waits is not carried out any more: whoever asked for it has
    given it up, or would not ask again;
    a turn raises for nothing that a request did: that travels in its reply.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from weightbus.consumers.engines.channel import WorkerEndpoint
from weightbus.consumers.engines.directory import EngineDirectory, is_owned
from weightbus.consumers.engines.errors import TurnMissed
from weightbus.consumers.engines.turns import NO_REQUEST, Turn
from weightbus.consumers.errors import DeviceLost, EngineUnavailable, PlanError
from weightbus.consumers.reload.host import ModelHost
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.errors import MessageInvalid, WeightBusError
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Describe,
    Detach,
    Failed,
    Inspect,
    Inspected,
    Prepare,
    WorkerReply,
    WorkerRequest,
)

__all__ = ("TurnTaker",)

_REQUESTS: Final = (Describe, Attach, Prepare, Apply, Inspect, Detach)
_DROPPED_KEPT: Final = 64
_MAX_REASON: Final = 4096

_logger = logging.getLogger(__name__)

Refusal = Callable[[WorkerRequest], WeightBusError | None]
"""Why the engine cannot have a request carried out now; None: it can."""


Connect = Callable[
    [Path, int, str, tuple[type[WorkerRequest], ...], Callable[[int, MessageInvalid], Failed]],
    WorkerEndpoint[WorkerRequest],
]
"""Makes the endpoint: see `WorkerEndpoint`."""


def _refuse_nothing(request: WorkerRequest) -> WeightBusError | None:
    del request
    return None


class TurnTaker:
    """One rank's. Not thread-safe."""

    def __init__(
        self,
        make_host: Callable[[], ModelHost],
        rank: int,
        world_size: int,
        refusal: Refusal = _refuse_nothing,
        connect: Connect = WorkerEndpoint,
    ) -> None:
        self._connect = connect
        self.rank = rank
        self.world_size = world_size
        self._make_host = make_host
        self._refusal = refusal
        self._instance = uuid.uuid4().hex
        """Of this process, on the channel."""
        self._reload: ReloadWorker | None = None
        self._place: EngineDirectory | None = None
        self._endpoint: WorkerEndpoint[WorkerRequest] | None = None
        self._waiting: deque[WorkerRequest] = deque()
        """Received, and not yet their turn."""
        self._dropped: deque[int] = deque(maxlen=_DROPPED_KEPT)
        self._is_spoilt = False
        """The parameters hold nothing of what was written to them."""
        self._forgets = False
        """And what is known of them is to be forgotten."""

    @property
    def lost(self) -> DeviceLost | None:
        """Not None: the device does nothing for this process any more, which has to end."""
        return None if self._reload is None else self._reload.lost

    def open(self, directory: Path) -> None:
        """Connect to the consumer of this directory, now or whenever it comes. Idempotent: only
        another directory closes the connection.

        Raises:
            EngineUnavailable: there is no such directory, or it is not for this user alone, or the
                consumer of the directory before lives.
        """
        place = EngineDirectory(directory)
        place.check()
        if self._place is not None and self._place.path == place.path:
            return
        if self._place is not None and is_owned(self._place.control):
            name = f"of rank {self.rank}"
            raise EngineUnavailable(name, f"it has another consumer, in {self._place.path}")
        self.disconnect()
        self._endpoint = self._connect(
            place.control, self.rank, self._instance, _REQUESTS, self._failed
        )
        self._place = place

    def take(self, turn: Turn) -> None:
        """Carry out the request that this turn is for, if it is there in time, and reply.

        Raises:
            EngineUnavailable: no consumer has opened this worker.
            PlanError: the turn is not for as many ranks as there are.
        """
        if self._endpoint is None:
            raise EngineUnavailable(f"of rank {self.rank}", "no consumer has opened it")
        if len(turn.numbers) != self.world_size:
            limit = f"there are {self.world_size}"
            raise PlanError("ranks of a turn", len(turn.numbers), limit)
        number = turn.numbers[self.rank]
        if number == NO_REQUEST:
            return
        try:
            request = self._await(number, turn.wait_s)
        except TurnMissed as error:
            self._endpoint.reply(self._failed(number, error))
            return
        self._endpoint.reply(self._as_spoilt(self._carry_out(request)))

    def forget(self) -> None:
        """The parameters hold nothing any more of what was written to them. From the next turn on
        whoever asks is answered as by another process, and until a version is written whole, told
        that the engine must not serve."""
        self._is_spoilt = self._forgets = True

    def close(self) -> None:
        """Leave the consumer and let go of all that was mapped for it; parameters stay as they are,
        and it is known which version they hold. May be opened again."""
        self.disconnect()
        if self._reload is not None:
            self._reload.close()

    def disconnect(self) -> None:
        """Leave the consumer; its last reply is handed over first."""
        if self._endpoint is not None:
            self._endpoint.close()
        self._endpoint, self._place = None, None
        self._waiting.clear()

    def _await(self, number: int, wait_s: float) -> WorkerRequest:
        """The request of this number; whatever came before it is dropped.

        Raises:
            TurnMissed: it was dropped, or did not come in time, or is not wanted any more.
        """
        assert self._endpoint is not None
        if number in self._dropped:
            raise TurnMissed(number, "a later request had its turn before it")
        end = time.monotonic() + wait_s
        while True:
            self._receive()
            while self._waiting:
                request = self._waiting.popleft()
                if request.request == number:
                    if self._waiting:
                        raise TurnMissed(number, "another request came after it")
                    return request
                self._dropped.append(request.request)
            left_s = end - time.monotonic()
            if left_s <= 0:
                self._dropped.append(number)
                raise TurnMissed(number, f"it did not come within {wait_s:g} s")
            self._endpoint.socket.poll(int(left_s * 1000) + 1)

    def _receive(self) -> None:
        """Everything that has arrived."""
        assert self._endpoint is not None
        while (request := self._endpoint.receive_nowait()) is not None:
            self._waiting.append(request)

    def _carry_out(self, request: WorkerRequest) -> WorkerReply:
        refused = self._refusal(request)
        if refused is not None:
            return self._failed(request.request, refused)
        if self._reload is None or self._forgets:
            try:
                self._forget_now()
                self._reload = ReloadWorker(self._make_host(), self.rank, self.world_size)
            except Exception as error:
                if not isinstance(error, WeightBusError):
                    _logger.exception("rank %d: its model is of no use to us", self.rank)
                return self._failed(request.request, error)
        return self._reload.handle(request)

    def _forget_now(self) -> None:
        """Plans and proofs, too: what no checkpoint has is the engine's own loader's to renew."""
        reload, self._reload, self._forgets = self._reload, None, False
        if reload is not None:
            reload.close()

    def _as_spoilt(self, reply: WorkerReply) -> WorkerReply:
        """What is replied of parameters that hold nothing until a version is written."""
        if isinstance(reply, Applied):
            self._is_spoilt = False
        if self._is_spoilt and isinstance(reply, Inspected | Failed):
            return msgspec.structs.replace(reply, touched=True)
        return reply

    def _failed(self, number: int, error: Exception) -> Failed:
        return Failed(
            request=number,
            rank=self.rank,
            error=type(error).__name__,
            reason=str(error)[:_MAX_REASON],
            touched=self._reload is not None and self._reload.touched,
        )
