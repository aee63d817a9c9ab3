"""What the members of a group agree on before they use an NCCL communicator: one they have, or an
id for another one.

They meet in the store at the group's rendezvous, which the consumer of its first member serves
(`open_meeting`), under keys of the plan's own. Every member says what it has; place 0 decides when
all have come. Only when all can, and have the same NCCL, is an id made: nobody waits inside NCCL
for a member that cannot come. Whoever can have no communicator comes, too, and says why.

Nothing waits in the store itself, and all of it is in a thread: a store that does not answer holds
up nobody, nor the end of the process. torch is loaded there, for its store alone.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, TypeVar
from urllib.parse import urlsplit

import msgspec

from weightbus.bus.errors import NcclFailed
from weightbus.bus.nccl import NCCL_ID_BYTES
from weightbus.consumers.errors import PeerLost, RouteUnavailable

if TYPE_CHECKING:
    from weightbus.schemas.worker import LaneFill

__all__ = ("Check", "Decision", "MakeId", "Post", "agree", "other_places")

STORE_S: Final = 10.0
"""A thread that is left while the store does not answer ends after so long."""

REASON_CHARS: Final = 4096

_LOOK_S: Final = 1e-3
_FIRST_PAUSE_S: Final = 2e-4
_LONGEST_PAUSE_S: Final = 10e-3
"""Members that have all they need meet within a millisecond; who is late may be so by minutes, and
the store is asked by all members of all groups."""

Check = Callable[[], None]
"""Raises what ends a wait early: that the transfer was given up, or its time is over."""

MakeId = Callable[[], bytes]
"""A new id of NCCL's; raises `NcclFailed`."""

T = TypeVar("T")


class Post(msgspec.Struct, frozen=True, array_like=True):
    """What a member says of itself when it comes."""

    version: Annotated[str, msgspec.Meta(max_length=64)]
    """Of its NCCL."""
    keeps: Annotated[str, msgspec.Meta(max_length=64)]
    """Incarnation of the group's communicator that it has; empty: none."""
    refusal: Annotated[str, msgspec.Meta(max_length=REASON_CHARS)]
    """Why it can have none."""


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """What the first member makes of it."""

    keep: bool = False
    """All have the same: it is kept."""
    id: Annotated[bytes, msgspec.Meta(max_length=NCCL_ID_BYTES)] = b""
    """By which another one is formed."""
    reason: Annotated[str, msgspec.Meta(max_length=REASON_CHARS)] = ""
    """Why there can be none."""


def agree(fill: LaneFill, post: Post, make_id: MakeId, end: float, check: Check) -> Decision:
    """Meet the other members. Blocking; called by every member, once for every plan.

    Args:
        make_id: only place 0 is asked.
        end: of the monotonic clock.

    Raises:
        PeerLost: some member did not come, or there is no store.
        RouteUnavailable: there is no torch here.
        Whatever `check` raises.
    """
    begin, others = time.monotonic(), other_places(fill.place, fill.size)
    meeting = _Beside(lambda left: _meet(fill, post, make_id, left), "meeting of a group")
    try:
        return meeting.wait(end, check)
    except TimeoutError:
        waited_s = time.monotonic() - begin
        reason = f"its members did not meet at {fill.rendezvous} within {waited_s:.3g} s"
        raise PeerLost(fill.group, others, reason) from None
    except _MeetingFailed as error:
        found = f"{type(error.cause).__name__}: {_first_line(error.cause)}"
        reason = f"its members did not meet at {fill.rendezvous}: {found}"
        for one in (error, error.cause):
            one.__traceback__ = None  # it keeps the connection open, and is kept itself
        raise PeerLost(fill.group, others, reason) from error.cause


def other_places(place: int, size: int) -> tuple[str, ...]:
    """The other members, as a worker knows them."""
    return tuple(f"place {other}" for other in range(size) if other != place)


class _MeetingFailed(Exception):
    """Whatever torch raised, or a message that makes no sense."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause
        super().__init__(str(cause))


class _Beside(Generic[T]):
    """A call in a daemon thread: whoever stops waiting for it does not hold up anything.

    Args:
        function: is told by its argument whether somebody waits for it no longer.
    """

    def __init__(self, function: Callable[[Callable[[], bool]], T], name: str) -> None:
        self._function = function
        self._results: list[T] = []
        self._errors: list[Exception] = []
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self, end: float, check: Check) -> T:
        """Its result or its error.

        Raises:
            TimeoutError: it has none in time.
            Whatever `check` raises.
        """
        try:
            while self._thread.is_alive():
                check()
                if time.monotonic() >= end:
                    raise TimeoutError
                self._thread.join(_LOOK_S)
        finally:
            self._left.set()
        if self._errors:
            raise self._errors[0]
        return self._results.pop()

    def _run(self) -> None:
        try:
            self._results.append(self._function(self._left.is_set))
        except Exception as error:  # noqa: BLE001 - who waits for it raises it
            self._errors.append(error)


def _meet(fill: LaneFill, post: Post, make_id: MakeId, left: Callable[[], bool]) -> Decision:
    """What the members agree on. Blocking, for hardly longer than somebody waits for it.

    Raises:
        RouteUnavailable: there is no torch here.
        _MeetingFailed: anything else.
    """
    try:
        dist: Any = importlib.import_module("torch.distributed")
    except ImportError as error:
        raise RouteUnavailable("broadcast", "torch is not installed") from error
    try:
        where = urlsplit(fill.rendezvous)
        if where.scheme != "tcp" or not where.hostname or not where.port:
            raise ValueError("a rendezvous must be tcp://host:port")
        timeout = timedelta(seconds=STORE_S)
        store = dist.TCPStore(where.hostname, where.port, is_master=False, timeout=timeout)
        keys = dist.PrefixStore(f"nccl/{fill.group}/{fill.key}", store)
        keys.set(f"place {fill.place}", _packed(post))
        if fill.place == 0:
            places = [f"place {place}" for place in range(fill.size)]
            posts = [_wait_key(keys, name, Post, left) for name in places]
            decision = _decide(posts, make_id)
            keys.set("decision", _packed(decision))
        else:
            decision = _wait_key(keys, "decision", Decision, left)
            if not (decision.keep or decision.reason or len(decision.id) == NCCL_ID_BYTES):
                raise ValueError(f"place 0 has decided for an id of {len(decision.id)} bytes")
    except Exception as error:
        raise _MeetingFailed(error) from error
    with suppress(Exception):  # what is decided is decided
        _clear(keys, fill.size)
    return decision


def _clear(keys: Any, size: int) -> None:
    """Whoever leaves last removes what was said: the store lasts as long as its consumer."""
    if keys.add("left", 1) == size:
        for name in (*(f"place {place}" for place in range(size)), "decision", "left"):
            keys.delete_key(name)


def _decide(posts: Sequence[Post], make_id: MakeId) -> Decision:
    """What the first member makes of what all have said."""
    refusals = [f"place {n}: {post.refusal}" for n, post in enumerate(posts) if post.refusal]
    if refusals:
        return Decision(reason="; ".join(refusals)[:REASON_CHARS])
    versions = {post.version for post in posts}
    if len(versions) > 1:
        named = ", ".join(sorted(versions)[:8])
        return Decision(reason=f"its members have NCCL of different versions: {named}")
    if posts[0].keeps and len({post.keeps for post in posts}) == 1:
        return Decision(keep=True)
    try:
        return Decision(id=make_id())
    except NcclFailed as error:
        return Decision(reason=f"place 0: {error}"[:REASON_CHARS])


def _wait_key(keys: Any, name: str, kind: type[T], left: Callable[[], bool]) -> T:
    """What somebody sets; asks again and again: nobody is to wait in the store itself."""
    pause_s = _FIRST_PAUSE_S
    while not keys.check([name]):
        if left():
            raise TimeoutError(f"{name} was not set in time")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return msgspec.msgpack.decode(bytes(keys.get(name)), type=kind)


def _packed(message: Post | Decision) -> bytes:
    return msgspec.msgpack.encode(message)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:512]
