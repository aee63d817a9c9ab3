"""The NCCL communicators of one worker, one for each device lane that it fills with others.

Owns the communicators that are ready, those that are being buried, and a few bytes of device
memory. No process group of torch: those end the process when something stands still.

Invariants:
- A communicator that failed, or was left by anybody, is never used again: it is dropped, and its
  members form another one.
- The members of every plan agree on a communicator before they use it, also one that they have:
  it is kept only if all of them have the same one still.
- They meet for a plan once: where that failed it fails again, and another plan is needed.
- A communicator that is given out has worked: a few bytes were broadcast, which connects its
  members, and loads what NCCL loads late.
- Only `drop`, in daemon threads, waits for NCCL without a deadline of its own.

What a communicator takes of device memory: `weightbus.bus.nccl.MAX_CTAS`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from weightbus.bus.cuda import CudaRuntime, open_cuda
from weightbus.bus.errors import CudaFailed, NcclFailed, NcclUnavailable
from weightbus.bus.nccl import Nccl, NcclCommunicator, open_nccl
from weightbus.consumers.errors import DeadlineExceeded, PeerLost, RouteUnavailable
from weightbus.consumers.transfer.agreement import (
    REASON_CHARS,
    Check,
    Post,
    agree,
    other_places,
)
from weightbus.consumers.transfer.gpu import OpenCuda
from weightbus.schemas.errors import WeightBusError

if TYPE_CHECKING:
    from weightbus.schemas.worker import LaneFill

__all__ = ("Communicator", "Communicators")

COMMUNICATORS_KEPT: Final = 2
"""Communicators that are kept beyond those of the plan in hand: each holds device memory."""

FORM_S: Final = 10.0
"""So long the members wait for each other once they have met: then all of them are at it."""

QUEUE_S: Final = 10.0
"""A broadcast is queued after so long at the latest: no other member is needed for that."""

GRAVES: Final = 8
"""Communicators that are buried at once, at most; before there are more, none is formed."""

_PROOF_BYTES: Final = 32
_SCRATCH_BYTES: Final = 4096
_FAILURES_KEPT: Final = 64
_FIRST_PAUSE_S: Final = 10e-6
_LONGEST_PAUSE_S: Final = 1e-3

OpenNccl = Callable[[], Nccl]
"""As `weightbus.bus.nccl.open_nccl`."""


def _go_on() -> None:
    """A `Check` of who waits until the deadline."""


class Communicator:
    """One member of a group. In a group of one nothing is broadcast.

    Given out by `Communicators`. For one thread; another one may drop it meanwhile.
    """

    group: str
    place: int
    size: int
    incarnation: str
    """What its members call it: no two communicators are called the same."""
    met: str
    """Key of the plan that it was opened for last."""

    def __init__(
        self, fill: LaneFill, formed: NcclCommunicator | None, incarnation: str = ""
    ) -> None:
        self.group, self.place, self.size = fill.group, fill.place, fill.size
        self.incarnation, self.met = incarnation, fill.key
        self._formed = formed
        self._dropped = False

    def broadcast(
        self,
        address: int,
        size_bytes: int,
        root: int,
        stream: int,
        *,
        queue_s: float = QUEUE_S,
        check: Check = _go_on,
    ) -> None:
        """Queue a broadcast of device memory in place: afterwards it is as the root's.

        All members queue the same ones in the same order. It is in the stream when this returns;
        memory and stream must stay until it is done. Whoever waits for that does so under a
        deadline and calls `check` meanwhile: a member that is lost may not be noticed otherwise.

        Args:
            stream: of the communicator's device, as `CudaRuntime.copy_async` takes it.

        Raises:
            PeerLost: it was dropped; a member is lost; or nothing was queued for `queue_s`.
            NcclFailed: NCCL or the device refuses it.
            Whatever `check` raises.
        """
        if self._formed is None or not size_bytes:
            return
        self._refuse_if_dropped()
        try:
            self._formed.broadcast(address, size_bytes, root, stream)
            what = f"queueing {size_bytes:,} bytes of place {root}"
            self._wait(self._formed.is_ready, what, queue_s, check)
        except NcclFailed as error:
            raise self._at_fault(error) from error

    def check(self) -> None:
        """Whether all is well, as far as NCCL knows. Does not wait.

        Raises:
            PeerLost: it was dropped, or a member is lost.
            NcclFailed: something that was queued has failed.
        """
        if self._formed is None:
            return
        self._refuse_if_dropped()
        try:
            self._formed.is_ready()
        except NcclFailed as error:
            raise self._at_fault(error) from error

    def prove(
        self, cuda: CudaRuntime, device: int, scratch: tuple[int, int], end: float, check: Check
    ) -> None:
        """Wait until it is formed, and broadcast a few bytes, which connects the members.

        Args:
            scratch: device memory and a stream for it.
            end: of the monotonic clock.

        Raises:
            As `broadcast`, and CudaFailed.
        """
        formed, (address, stream) = self._formed, scratch
        assert formed is not None
        known = hashlib.sha256(self.incarnation.encode()).digest()
        left_s = max(0.0, end - time.monotonic())
        try:
            self._wait(formed.is_ready, "forming it", left_s, check)
            cuda.write(device, address, known if self.place == 0 else bytes(_PROOF_BYTES))
            left_s = max(0.0, end - time.monotonic())
            self.broadcast(address, _PROOF_BYTES, 0, stream, queue_s=left_s, check=check)

            def is_done() -> bool:
                formed.is_ready()
                return cuda.is_done(device, stream)

            left_s = max(0.0, end - time.monotonic())
            self._wait(is_done, "its first broadcast", left_s, check)
        except NcclFailed as error:
            raise self._at_fault(error) from error
        if cuda.read(device, address, _PROOF_BYTES) != known:
            raise self._lost("its first broadcast has brought other bytes than place 0 sent")

    def drop(self) -> None:
        """From now on nobody uses it. Does not wait, and ends nothing: see `abort`."""
        self._dropped = True

    def abort(self) -> None:
        """End what it does, and free what it holds. May wait for the device."""
        if self._formed is not None:
            self._formed.abort()

    def _wait(self, is_done: Callable[[], bool], what: str, limit_s: float, check: Check) -> None:
        end, pause_s = time.monotonic() + limit_s, _FIRST_PAUSE_S
        while not is_done():
            check()
            self._refuse_if_dropped()
            if time.monotonic() >= end:
                raise self._lost(f"{what} stood still for {limit_s:.3g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _refuse_if_dropped(self) -> None:
        if self._dropped:
            raise self._lost("it was dropped")

    def _at_fault(self, error: NcclFailed) -> WeightBusError:
        """Who NCCL says is: another member, or this one."""
        if self._dropped:
            return self._lost("it was dropped")
        return self._lost(str(error)) if error.others else error

    def _lost(self, reason: str) -> PeerLost:
        return PeerLost(self.group, other_places(self.place, self.size), reason)


class Communicators:
    """The communicators of one worker. One thread at a time opens them; any may drop them.

    Args:
        device: number of the worker's GPU.
        nccl, cuda: asked for when a group of several is opened.
        form_s: so long the members wait for each other once they have met.
    """

    def __init__(
        self,
        device: int,
        *,
        nccl: OpenNccl = open_nccl,
        cuda: OpenCuda = open_cuda,
        form_s: float = FORM_S,
    ) -> None:
        self._device, self._open_nccl, self._open_cuda = device, nccl, cuda
        self._form_s = form_s
        self._opening, self._lock = threading.Lock(), threading.Lock()
        self._ready: OrderedDict[str, Communicator] = OrderedDict()
        self._failures: OrderedDict[tuple[str, str], WeightBusError] = OrderedDict()
        """(Group, key) -> why its members did not come together."""
        self._graves: list[threading.Thread] = []
        self._scratch: tuple[int, int] | None = None
        """Device memory and a stream."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the groups that are ready."""
        with self._lock:
            return tuple(self._ready)

    @property
    def burials(self) -> int:
        """Communicators that are dropped and not gone yet: until then their kernels may run."""
        with self._lock:
            self._graves = [grave for grave in self._graves if grave.is_alive()]
            return len(self._graves)

    def open_all(
        self, fills: Sequence[LaneFill], deadline_s: float, check: Check = _go_on
    ) -> tuple[Communicator, ...]:
        """The communicators of one plan, in its order: those that its members have, and new ones.

        Blocking; all members open the same groups. Opened again for the same plan, they are there
        at once. May be called while the engine serves.

        Args:
            fills: in the order of the plan's lanes: whoever fills several opens one after the
                other, and no two members wait for each other in different ones.
            check: called again and again while it waits.

        Raises:
            PeerLost: some member did not come, or cannot go on.
            RouteUnavailable: there is no NCCL here, or no torch.
            NcclFailed, CudaFailed: this member cannot form one.
            DeadlineExceeded: too many are still being buried, or another thread still opens some.
            Whatever `check` raises.
        """
        end = time.monotonic() + deadline_s
        if not self._opening.acquire(timeout=deadline_s):
            raise DeadlineExceeded("forming communicators", deadline_s)
        try:
            opened = tuple(self._open(fill, end, deadline_s, check) for fill in fills)
        finally:
            self._opening.release()
        with self._lock:
            ids = [fill.group for fill in fills if fill.group in self._ready]
            for group in ids:
                self._ready.move_to_end(group)
            old = tuple(self._ready)[: -len(ids) - COMMUNICATORS_KEPT]
        for group in old:
            self.drop(group)
        return opened

    def open(self, fill: LaneFill, deadline_s: float, check: Check = _go_on) -> Communicator:
        """The only one of a plan: see `open_all`."""
        return self.open_all((fill,), deadline_s, check)[0]

    def drop(self, group: str) -> None:
        """Bury a communicator: nobody uses it again, and what it does is ended beside. Never
        raises, never waits. One that is not ready is nothing."""
        with self._lock:
            dropped = self._ready.pop(group, None)
        if dropped is not None:
            self._bury(dropped)

    def wait_burials(self, deadline_s: float) -> int:
        """Wait until what was dropped is gone; afterwards no kernel of it runs any more. Blocking.

        Returns:
            How many are not gone in time: their threads are daemons, and end with the process.
        """
        end = time.monotonic() + deadline_s
        for grave in tuple(self._graves):
            grave.join(max(0.0, end - time.monotonic()))
        return self.burials

    def close(self, deadline_s: float) -> int:
        """Drop all, and wait for the burials. Blocking. How many have not ended in time."""
        for group in self.ids:
            self.drop(group)
        left = self.wait_burials(deadline_s)
        if self._scratch is not None and not left:
            (address, stream), self._scratch = self._scratch, None
            cuda = self._open_cuda()
            with suppress(CudaFailed):  # a device in no state to do so: it goes with the process
                cuda.destroy_stream(self._device, stream)
                cuda.free(self._device, address)
        return left

    def _open(self, fill: LaneFill, end: float, deadline_s: float, check: Check) -> Communicator:
        if fill.size == 1:
            return Communicator(fill, None)
        ready = self._ready.get(fill.group)
        if ready is not None and ready.met == fill.key and _is_well(ready):
            return ready
        failure = self._failures.get((fill.group, fill.key))
        if failure is not None:
            raise failure
        self._room_for_graves(end, deadline_s, check)
        try:
            return self._meet(fill, end, check)
        except BaseException as error:
            self.drop(fill.group)
            self._failures[fill.group, fill.key] = _failure(fill, error)
            while len(self._failures) > _FAILURES_KEPT:
                self._failures.popitem(last=False)
            raise

    def _meet(self, fill: LaneFill, end: float, check: Check) -> Communicator:
        """Agree with the other members, and form what they have agreed on. Whoever has much to
        register comes late: he is waited for as long as the transfer may take."""
        ready = self._ready.get(fill.group)
        if ready is not None and not _is_well(ready):
            self.drop(fill.group)
            ready = None
        nccl, unavailable = self._nccl()
        post = Post(
            version=nccl.version if nccl else "",
            keeps=ready.incarnation if ready else "",
            refusal=str(unavailable)[:REASON_CHARS] if unavailable else "",
        )

        def make_id() -> bytes:
            assert nccl is not None, "who has none has refused"
            return nccl.make_id(fill.group, fill.place)

        decision = agree(fill, post, make_id, end, check)
        if nccl is None:
            raise RouteUnavailable("broadcast", post.refusal) from unavailable
        if decision.reason:
            raise PeerLost(fill.group, other_places(fill.place, fill.size), decision.reason)
        if decision.keep and ready is not None:
            ready.met = fill.key
            return ready
        self.drop(fill.group)
        return self._form(fill, nccl, decision.id, min(end, time.monotonic() + self._form_s), check)

    def _form(
        self, fill: LaneFill, nccl: Nccl, id: bytes, end: float, check: Check
    ) -> Communicator:
        cuda = self._open_cuda()
        if self._scratch is None:
            address = cuda.allocate(self._device, _SCRATCH_BYTES)
            self._scratch = address, cuda.create_stream(self._device)
        formed = nccl.begin(cuda, self._device, id, fill.group, fill.place, fill.size)
        communicator = Communicator(fill, formed, hashlib.sha256(id).hexdigest())
        try:
            communicator.prove(cuda, self._device, self._scratch, end, check)
        except BaseException:
            self._bury(communicator)
            raise
        with self._lock:
            self._ready[fill.group] = communicator
        return communicator

    def _nccl(self) -> tuple[Nccl | None, NcclUnavailable | None]:
        try:
            return self._open_nccl(), None
        except NcclUnavailable as error:
            return None, error

    def _bury(self, communicator: Communicator) -> None:
        def bury() -> None:
            with suppress(WeightBusError):  # it goes with the process; kernels show on the device
                communicator.abort()

        communicator.drop()
        grave = threading.Thread(target=bury, name="burial of a communicator", daemon=True)
        grave.start()
        with self._lock:
            self._graves.append(grave)

    def _room_for_graves(self, end: float, deadline_s: float, check: Check) -> None:
        while self.burials >= GRAVES:
            check()
            if time.monotonic() >= end:
                raise DeadlineExceeded("burial of dropped communicators", deadline_s)
            time.sleep(_LONGEST_PAUSE_S)


def _is_well(communicator: Communicator) -> bool:
    try:
        communicator.check()
    except WeightBusError:
        return False
    return True


def _failure(fill: LaneFill, error: BaseException) -> WeightBusError:
    """What a member is told who opens a group again that was not opened for this plan."""
    if isinstance(error, PeerLost | RouteUnavailable | NcclFailed | CudaFailed):
        return error
    reason = f"this member has left it while it was formed: {type(error).__name__}: {error}"
    return PeerLost(fill.group, other_places(fill.place, fill.size), reason[:REASON_CHARS])
