"""Process groups of torch.distributed (gloo), one for each lane of a broadcast.

Owns the store that groups meet at, the groups that are ready, and those that are being buried.
Only this file and `agreement` talk to torch.distributed; torch is loaded when the first of these
is opened.

Invariants, and what was measured of gloo:
- A group whose operation failed, or was left, is never used again: it is dropped, and its members
  form another one, under keys of their own (a group's id, and the plan that forms it).
- Nothing ends an operation whose peer stands still but its own timeout: `abort` does not, and
  destroying the group waits for it. So groups are destroyed in daemon threads, which are the last
  to refer to them: not even an error does. Memory that an operation may still write to is let go
  of after that, and nothing else waits for it. The timeout
  of an operation is hardly longer than anybody waits for it: graves are soon closed.
- Operations of different lengths abort the process in C++: no member may ask for another length
  than the others.
- Every blocking call has a timeout and releases the interpreter.

Groups are neither encrypted nor authenticated: who reaches the store, and has read the plan on the
bus, can take a member's place. They belong into a network that only the fleet is in.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel

from weightbus.consumers.errors import DeadlineExceeded, PeerLost, RouteUnavailable
from weightbus.consumers.transfer.exchange import Exchange
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.rounds import Group

__all__ = ("GlooExchange", "Groups", "Meeting", "open_meeting")

GROUPS_KEPT: Final = 16
"""Groups that are kept beyond those of the plan in hand: the fleet may become what it was."""

FORM_S: Final = 10.0
"""So long the members of a group wait for each other."""

OPERATION_S: Final = 15.0
"""After so long gloo gives up a step of forming a group."""

MARGIN_S: Final = 0.5
"""Gloo gives up an operation so much later than who waits for it: a grave is open no longer."""

CHUNK_BYTES: Final = 16 * 2**20
"""Broadcast by one operation; all operations of a part are under way together, and each that ends
is progress."""

GRAVES: Final = 64
"""Groups that are buried at once, at most; before there are more, no group is formed."""

EAGER_S: Final = 5e-3
"""So long the end of an operation is looked for at once: the event loop's shortest sleep is a
millisecond, and a roll call takes a fraction of that."""

_POLL_MIN_S: Final = 1e-4
_POLL_MAX_S: Final = 1e-3
_BACKLOG: Final = 1024

T = TypeVar("T")


class Meeting:
    """A store in this process, at which groups meet whose first member it is."""

    rendezvous: str
    """Where it is, as `Join.rendezvous` and `Group.rendezvous` say it."""

    def __init__(self, store: object, rendezvous: str) -> None:
        self._store = store
        self.rendezvous = rendezvous


@contextmanager
def open_meeting(address: str) -> Iterator[Meeting]:
    """Serve a store on an address of this host, on a port of the system's choice. Blocking.

    Raises:
        RouteUnavailable: there is no torch with gloo, or the address is none of this host's.
    """
    dist = _distributed()
    try:
        family, *_, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(where[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = f"cannot listen on address {address}: {error.strerror}"
        raise RouteUnavailable("broadcast", reason) from error
    port = listener.getsockname()[1]
    host = f"[{address}]" if ":" in address else address
    try:
        store = _serve_store(dist.TCPStore, address, listener)
    except RuntimeError as error:
        raise RouteUnavailable("broadcast", f"no store on {host}:{port}: {error}") from error
    yield Meeting(store, f"tcp://{host}:{port}")


def _serve_store(make: Callable[..., Any], address: str, listener: socket.socket) -> Any:
    """A store that takes a listening socket over; if it fails, the socket is closed, by it or by
    us."""
    port, fd = listener.getsockname()[1], listener.detach()
    before = os.fstat(fd)
    try:
        return make(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=FORM_S),
            master_listen_fd=fd,
        )
    except BaseException:
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), before):
                os.close(fd)
        raise


class GlooExchange(Exchange):
    """A group of gloo. A group of one has nothing to exchange."""

    def __init__(self, group: Group, place: int, process_group: Any) -> None:
        self.id = group.id
        self.place = place
        self.size = len(group.members)
        self.others = tuple(
            f"{member.engine}/{member.rank}"
            for number, member in enumerate(group.members)
            if number != place
        )
        self._process_group = process_group
        self._left = False
        """Somebody stopped waiting for an operation before it had ended."""
        self._buried: Callable[[], bool] = _not_yet

    async def roll_call(self, answer: bytes, deadline_s: float) -> tuple[bytes, ...]:
        if self.size == 1:
            return (answer,)
        import torch
        import torch.distributed as dist

        length = len(answer)
        said = bytearray(self.size * length)
        said[self.place * length : (self.place + 1) * length] = answer
        answers = torch.frombuffer(said, dtype=torch.uint8)  # the others' bytes are 0: no answer
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        await self._run("allreduce", [answers], options, "a roll call", deadline_s)
        return tuple(bytes(said[n * length : (n + 1) * length]) for n in range(self.size))

    async def broadcast(self, address: int, size_bytes: int, root: int, stall_s: float) -> None:
        if self.size == 1 or not size_bytes:
            return
        import torch
        import torch.distributed as dist

        memory = (ctypes.c_uint8 * size_bytes).from_address(address)
        options: Any = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        what = f"{size_bytes:,} bytes of member {root}"
        chunks = torch.split(torch.frombuffer(memory, dtype=torch.uint8), CHUNK_BYTES)
        await self._run("broadcast", chunks, options, what, stall_s)

    def writing(self) -> bool:
        return self._left and not self._buried()

    def take(self, buried: Callable[[], bool]) -> Any:
        """The group itself, which nobody else has from now on.

        Args:
            buried: whether it is gone.
        """
        process_group, self._process_group = self._process_group, None
        self._buried = buried
        return process_group

    async def _run(
        self, operation: str, tensors: Sequence[Any], options: Any, what: str, stall_s: float
    ) -> None:
        """Operations of all members, side by side, from their beginning to their end."""
        if self._process_group is None:
            raise self._lost("it was dropped")
        options.timeout = timedelta(seconds=stall_s + MARGIN_S)
        works: list[Any] = []
        self._left = True
        try:
            # Nothing here names the group: tracebacks keep what is named, and whoever frees them
            # would destroy it, and wait for the operation: the event loop.
            works.extend(
                getattr(self._process_group, operation)([tensor], options) for tensor in tensors
            )
            for number in range(len(works)):
                await self._until_completed(works, number, what, stall_s)
                works[number].wait(timedelta(seconds=stall_s))
            self._left = False
        except RuntimeError as error:
            self._left = not all(work.is_completed() for work in works)
            raise self._lost(_first_line(error)) from error
        finally:
            works.clear()  # they keep the group's connections open, and tracebacks keep them

    async def _until_completed(
        self, works: Sequence[Any], number: int, what: str, stall_s: float
    ) -> None:
        pause_s, eager_end = _POLL_MIN_S, anyio.current_time() + EAGER_S
        with anyio.move_on_after(stall_s):
            while not works[number].is_completed():
                if anyio.current_time() < eager_end:
                    await anyio.lowlevel.checkpoint()
                    continue
                await anyio.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_MAX_S)
        if not works[number].is_completed():
            raise self._lost(f"{what} stood still for {stall_s:g} s")

    def _lost(self, reason: str) -> PeerLost:
        return PeerLost(self.id, self.others, reason)


class Groups:
    """The groups that this process is a member of. For one event loop.

    Args:
        address: of this host, by which the other members reach it.
    """

    def __init__(
        self, address: str, *, form_s: float = FORM_S, operation_s: float = OPERATION_S
    ) -> None:
        self.address = address
        self._form_s, self._operation_s = form_s, operation_s
        self._ready: OrderedDict[str, GlooExchange] = OrderedDict()
        self._graves: list[threading.Thread] = []

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the groups that are ready."""
        return tuple(self._ready)

    @property
    def burials(self) -> int:
        """Groups that are dropped and not gone yet."""
        self._graves = [grave for grave in self._graves if grave.is_alive()]
        return len(self._graves)

    async def open_all(
        self, lanes: Sequence[tuple[Group, int]], plan: str, deadline_s: float
    ) -> tuple[GlooExchange, ...]:
        """The groups of one plan, in its order: those that are ready, and new ones, formed side by
        side.

        Args:
            lanes: every group that this process is in, and its place there. All members of a group
                open it.
            plan: what only members of this plan know; the same on all of them.

        Raises:
            PeerLost: some member did not come, or a group without a rendezvous is not ready here.
            RouteUnavailable: there is no gloo (any more).
            DeadlineExceeded: too many groups are still being buried.
        """
        end = anyio.current_time() + deadline_s
        await self._room_for_graves(deadline_s)
        failures: list[WeightBusError] = []

        async def form(group: Group, place: int) -> None:
            left_s = max(0.0, min(end - anyio.current_time(), self._form_s))
            try:
                self._ready[group.id] = await self._form(group, place, plan, left_s)
            except WeightBusError as error:
                failures.append(error)

        async with anyio.create_task_group() as tasks:
            for group, place in lanes:
                if group.id not in self._ready:
                    tasks.start_soon(form, group, place)
        ids = [group.id for group, _ in lanes]
        if failures:
            self.drop_nowait(ids)
            raise failures[0]
        for name in ids:
            self._ready.move_to_end(name)
        self.drop_nowait(self.ids[: -len(ids) - GROUPS_KEPT])
        return tuple(self._ready[name] for name in ids)

    def drop_nowait(self, ids: Iterable[str]) -> None:
        """Bury groups: nobody uses them again. Ids that are not ready are nothing."""
        dropped = [self._ready.pop(name) for name in ids if name in self._ready]
        if not dropped:
            return
        taken: list[Any] = []
        grave = threading.Thread(  # whoever empties the list destroys the groups, and waits
            target=taken.clear, name="burial of groups", daemon=True
        )
        taken.extend(exchange.take(lambda: not grave.is_alive()) for exchange in dropped)
        self._graves.append(grave)
        grave.start()

    def close(self, deadline_s: float) -> int:
        """Drop every group and wait for the burials. Blocking. How many have not ended in time:
        their threads are daemons, and end with the groups' timeout or with the process."""
        self.drop_nowait(self.ids)
        end = time.monotonic() + deadline_s
        for grave in self._graves:
            grave.join(max(0.0, end - time.monotonic()))
        return self.burials

    async def _room_for_graves(self, deadline_s: float) -> None:
        end = anyio.current_time() + deadline_s
        while self.burials >= GRAVES:
            if anyio.current_time() >= end:
                raise DeadlineExceeded("burial of dropped groups", deadline_s)
            await anyio.sleep(_POLL_MAX_S)

    async def _form(self, group: Group, place: int, plan: str, deadline_s: float) -> GlooExchange:
        if len(group.members) == 1:
            return GlooExchange(group, place, None)
        exchange = GlooExchange(group, place, None)
        if not group.rendezvous:
            raise PeerLost(group.id, exchange.others, "it is not ready here (any more)")
        forming = _Forming(lambda: _form_group(self.address, group, place, plan, self._operation_s))
        try:
            with anyio.fail_after(deadline_s):
                process_group = await forming.wait()
        except TimeoutError:
            reason = f"its members did not meet at {group.rendezvous} within {deadline_s:g} s"
            raise PeerLost(group.id, exchange.others, reason) from None
        except WeightBusError:
            raise
        except Exception as error:  # whatever torch raises, it means that there is no group
            found = f"{type(error).__name__}: {_first_line(error)}"
            reason = f"it did not form at {group.rendezvous}: {found}"
            raise PeerLost(group.id, exchange.others, reason) from error
        return GlooExchange(group, place, process_group)


class _Forming(Generic[T]):
    """A blocking call in a daemon thread: whoever stops waiting for it does not hold up the end of
    the process."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, name="forming a group", daemon=True)
        self._thread.start()

    async def wait(self) -> T:
        """Its result or its error. To be called under a deadline."""
        pause_s = _POLL_MIN_S
        while self._thread.is_alive():
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_MAX_S)
        if self._errors:
            raise self._errors[0]
        return self._results.pop()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:  # noqa: BLE001 - who waits for it raises it
            self._errors.append(error)


def _form_group(address: str, group: Group, place: int, plan: str, operation_s: float) -> Any:
    """Meet the other members. Blocking, for no longer than `operation_s` a step."""
    dist = _distributed()
    where = urlsplit(group.rendezvous)
    if where.scheme != "tcp" or not where.hostname or not where.port:
        raise ValueError("a rendezvous must be tcp://host:port")
    timeout = timedelta(seconds=operation_s)
    store = dist.TCPStore(where.hostname, where.port, is_master=False, timeout=timeout)
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname=address)]
    options._timeout = timeout
    keys = dist.PrefixStore(f"{group.id}/{plan}", store)
    return kind(keys, place, len(group.members), options)


def _not_yet() -> bool:
    return False


def _distributed() -> Any:
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise RouteUnavailable("broadcast", "torch is not installed") from error
    if not (dist.is_available() and dist.is_gloo_available()):
        raise RouteUnavailable("broadcast", "this torch has no gloo")
    return dist


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:512]
