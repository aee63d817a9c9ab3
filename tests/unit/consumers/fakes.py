"""A bus, an engine and a route without processes: they do as they are told, and remember it.

The world is one tensor of four words, which every rank holds whole.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, cast

import anyio
import anyio.lowlevel
import numpy as np
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from msgspec import structs

from tests.clocks import unmeasured_clock
from weightbus.bus.connection import Bus
from weightbus.bus.digest import combine, digest_hex, digest_tensor
from weightbus.bus.errors import LeaseLost, ObjectMissing
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received, Reconnected
from weightbus.bus.settings import BusSettings
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.engine import Engine, EngineReport, TokenSeen
from weightbus.consumers.errors import RouteUnavailable
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.schemas.base import Message, RouteName
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import encode_layout, layout_digest
from weightbus.schemas.leases import ReaderLease, RoundLease
from weightbus.schemas.needs import Copy, Needs, ParameterSpec
from weightbus.schemas.needs_codec import needs_digest
from weightbus.schemas.placement import FileSegment, Placement, Segment
from weightbus.schemas.progress import DeadLetter, EngineState
from weightbus.schemas.rounds import EngineRoute, RankRoute, RoundPlan
from weightbus.schemas.worker import (
    Applied,
    Attached,
    Cell,
    Described,
    Feed,
    InPlace,
    Inspected,
)

__all__ = (
    "CONFIG",
    "DATA",
    "DIGEST",
    "LAYOUT",
    "FakeBus",
    "FakeEngine",
    "FakeRoute",
    "layout_of",
    "plan_of",
    "ready_of",
    "sums",
)

CONFIG = ConsumerConfig(
    model="m", engine="a", host_id="h", command_s=5.0, heartbeat_s=0.02, stop_s=5.0
)
DATA = bytes(range(16))
"""What every rank holds after an honest update."""


def sums(data: bytes) -> bytes:
    """The digest of the tensor, as workers and publishers send it."""
    number = digest_tensor(np.frombuffer(data, dtype=np.uint8))
    return number.to_bytes(8, "little")


DIGEST = digest_hex(combine(np.frombuffer(sums(DATA), dtype="<u8")))


def layout_of(name: str = "w") -> Layout:
    """Layouts of several names are several layouts."""
    return Layout(
        tensors=(TensorSpec(name, "F32", (4,)),),
        shards=(ShardSpec(0, (0,), (4,), 0, 0),),
        segments=(SegmentSpec(16),),
    )


LAYOUT = layout_of()


def ready_of(version: int, layout: Layout = LAYOUT, **changes: Any) -> CheckpointReady:
    ready = CheckpointReady(
        model="m",
        version=version,
        producer="t",
        layout_digest=layout_digest(layout),
        placement=((FileSegment(path="/w"),),),
        weights_digest=DIGEST,
        tensor_digests="d" * 64,
        created_ns=version + 1,
    )
    return structs.replace(ready, **changes)


def plan_of(version: int, *routes: RouteName) -> RoundPlan:
    """One rank for each route."""
    ranks = tuple(
        RankRoute(rank=rank, route=route) for rank, route in enumerate(routes or ("local",))
    )
    return RoundPlan(
        model="m",
        version=version,
        round=f"v{version}",
        epoch=1,
        leader="a",
        engines=(EngineRoute(engine="a", ranks=ranks),),
    )


class LateAnswer:
    def __init__(self) -> None:
        self.asked, self.go_on = anyio.Event(), anyio.Event()
        self.report: EngineReport | None = None
        """What is answered, whatever was the case; None: what was the case when it was asked."""


class FakeEngine(Engine):
    """An engine whose every call can fail, hang, or be waited for."""

    kind: ClassVar[str] = "fake"

    def __init__(self, ranks: int = 1, version: int = -1) -> None:
        self._ranks = ranks
        self.calls: list[str] = []
        """Every call but `state` and `first_token`, in order; `resume` with its version."""
        self.errors: dict[str, Exception] = {}
        """Call -> what it raises."""
        self._late: LateAnswer | None = None
        self.hangs: set[str] = set()
        """Calls that never return."""
        self.entered: dict[str, anyio.Event] = {}
        """Call -> set when it hangs."""
        self.tokens: dict[int, TokenSeen] = {}
        """Version -> when its first token was there."""
        self.free_bytes = 0
        self.device = "cpu"
        self.data = [DATA] * ranks
        """What an update leaves in the parameters of each rank."""
        self.report = EngineReport(version=version, paused=version < 0, touched=False, ranks=ranks)
        self.held = [
            Inspected(request=0, rank=rank, instance="i", version=version, touched=False)
            for rank in range(ranks)
        ]

    @property
    def ranks(self) -> int:
        return self._ranks

    def start_anew(self, instance: str) -> None:
        """Its workers were lost, and hold nothing."""
        self.held = [
            structs.replace(one, instance=instance, version=-1, touched=False) for one in self.held
        ]
        self.report = structs.replace(self.report, version=-1, paused=True)

    def spoil(self) -> None:
        """Its parameters are a mix from now on."""
        self.held = [structs.replace(one, updates=one.updates + 1) for one in self.held]
        self.report = structs.replace(self.report, paused=True, touched=True)

    def prove(self, layout_digest: str) -> None:
        """Every rank's plan of a layout is proven."""
        self.held = [structs.replace(one, proven=(layout_digest,)) for one in self.held]

    def hang(self, call: str) -> anyio.Event:
        """The call hangs from now on; the event is set when it does."""
        self.hangs.add(call)
        self.entered[call] = anyio.Event()
        return self.entered[call]

    def answer_state_late(self) -> LateAnswer:
        """The next answer is of when it was asked for, and comes when it may."""
        self._late = LateAnswer()
        return self._late

    async def describe(
        self, layout_digest: str, layout: bytes, deadline_s: float
    ) -> tuple[Described, ...]:
        await self._call("describe")
        needs = Needs((ParameterSpec("p", "F32", (4,), (1,)),), (Copy(0, (0,), (4,), 0, 0, (1,)),))
        return tuple(
            Described(
                request=0,
                rank=rank,
                world_size=self._ranks,
                instance=self.held[rank].instance,
                device=self.device,
                free_bytes=self.free_bytes,
                needs_digest=needs_digest(needs),
                needs=needs,
            )
            for rank in range(self._ranks)
        )

    async def attach(
        self,
        layout_digest: str,
        needs_digests: Sequence[str],
        cells: Sequence[Sequence[Cell]],
        deadline_s: float,
    ) -> tuple[Attached, ...]:
        await self._call("attach")
        return ()

    async def pause(self, deadline_s: float) -> None:
        await self._call("pause")
        self.report = structs.replace(self.report, paused=True)

    async def apply(
        self,
        version: int,
        layout_digest: str,
        feeds: Mapping[int, Feed],
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        await self._call("apply")
        for rank in feeds:
            held = self.held[rank]
            self.held[rank] = structs.replace(held, version=version, updates=held.updates + 1)
        return tuple(
            Applied(
                request=0,
                rank=rank,
                version=version,
                bytes=16,
                cell_digests=sums(self.data[rank]),
            )
            for rank in feeds
        )

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        await self._call("inspect")
        return tuple(self.held)

    async def resume(self, version: int, deadline_s: float) -> None:
        await self._call(f"resume {version}")
        self.report = structs.replace(self.report, version=version, paused=False, touched=False)

    async def first_token(self, version: int, deadline_s: float) -> TokenSeen | None:
        await self._do("first_token")
        return self.tokens.get(version)

    async def state(self, deadline_s: float) -> EngineReport:
        if "state" in self.errors:
            raise self.errors["state"]
        report, late = self.report, self._late
        self._late = None
        if late is not None:
            late.asked.set()
            await late.go_on.wait()
            report = late.report or report
        await anyio.lowlevel.checkpoint()
        return report

    async def _call(self, call: str) -> None:
        self.calls.append(call)
        await self._do(call)

    async def _do(self, call: str) -> None:
        await anyio.lowlevel.checkpoint()
        if call in self.hangs:
            self.entered[call].set()
            await anyio.sleep_forever()
        if call in self.errors:
            raise self.errors[call]


class FakeRoute(Route):
    """Brings the version to its ranks, unless it is told to fail before or after the pause."""

    def __init__(self, name: RouteName = "local") -> None:
        self.name = name  # type: ignore[misc]  # one class stands for several routes
        self.unreachable = ""
        self.fails_before: Exception | None = None
        """Raised before the pause."""
        self.fails_after: Exception | None = None
        """Raised after it."""
        self.meanwhile: Callable[[], None] | None = None
        """What happens in between."""
        self.before_end: Callable[[], Awaitable[None]] | None = None
        self.asked: list[Transfer] = []
        self.room: int | None = None
        self.favoured = True
        self.devices: list[tuple[str, ...]] = []
        """What it has heard of the ranks' devices, in turn."""

    @property
    def room_bytes(self) -> int | None:
        return self.room

    def is_favoured(self, version: int) -> bool:
        return self.favoured

    def know_devices(self, devices: Sequence[str]) -> None:
        self.devices.append(tuple(devices))

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        assert self.devices, "it is told of the devices first"
        if self.unreachable:
            raise RouteUnavailable(self.name, self.unreachable)
        return [ways[0] for ways in placement]

    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        self.asked.append(transfer)
        if self.fails_before is not None:
            raise self.fails_before
        await transfer.begin_write()
        if self.meanwhile is not None:
            self.meanwhile()
        if self.fails_after is not None:
            raise self.fails_after
        applied = await transfer.engine.apply(
            transfer.version,
            transfer.layout_digest,
            dict.fromkeys(
                transfer.ranks,
                InPlace(sources=tuple(self.reach(transfer.layout, transfer.placement))),
            ),
            transfer.deadline_s,
        )
        if self.before_end is not None:
            await self.before_end()
        return applied


class FakeBus:
    """A bus in memory. `calls` are the requests whose order matters."""

    prefix = "weightbus"
    url = "nats://host:4222"
    settings = BusSettings(url=url)

    def __init__(self) -> None:
        self.clock = unmeasured_clock()
        self.calls: list[str] = []
        self.published: list[Message] = []
        self.headers: list[Mapping[str, str]] = []
        self.refusals: list[Exception] = []
        """What the next publishes raise."""
        self.kept: dict[type[Message], Message] = {}
        """The last message of each kind."""
        self.blobs: dict[str, bytes] = {}
        self.known = {layout_digest(LAYOUT): LAYOUT}
        self.round_leases = FakeRoundLeases(self.calls)
        self.reader_leases = FakeReaderLeases(self.calls)
        self.presence = FakePresence(self.calls)
        self.layouts = self.objects = self
        self._heard: MemoryObjectSendStream[Received[Any] | Reconnected]
        self._unheard: MemoryObjectReceiveStream[Received[Any] | Reconnected]
        self._heard, self._unheard = anyio.create_memory_object_stream(1000)

    def as_bus(self) -> Bus:
        return cast(Bus, self)

    @contextmanager
    def count_dead_letters(
        self, tell: Callable[[DeadLetter], None], model: str = ""
    ) -> Iterator[None]:
        self.dead_letter = tell
        yield

    async def publish(self, message: Message, headers: Mapping[str, str]) -> None:
        await anyio.lowlevel.checkpoint()
        if self.refusals:
            raise self.refusals.pop(0)
        self.published.append(message)
        self.headers.append(headers)

    def said(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.published if isinstance(message, kind)]

    def hear(self, message: Message) -> None:
        """Somebody says it."""
        self.kept[type(message)] = message
        self._heard.send_nowait(Received(message, "", {}, 0))

    def hear_again(self, marker: Reconnected) -> None:
        """The connection was lost, and is back."""
        self._heard.send_nowait(marker)

    @asynccontextmanager
    async def subscribe(
        self, *kinds: type[Message], model: str
    ) -> AsyncIterator[AsyncIterator[Received[Any] | Reconnected]]:
        self.calls.append("subscribe")
        yield self._unheard

    async def last(
        self, kind: type[Message], *, model: str, **tokens: str
    ) -> Received[Message] | None:
        self.calls.append(f"last {kind.__name__}")
        await anyio.lowlevel.checkpoint()
        message = self.kept.get(kind)
        if message is None or any(getattr(message, name) != tokens[name] for name in tokens):
            return None
        return Received(message, "", {}, 0)

    async def get(self, key: str) -> Any:
        """A layout and its blob, or an object."""
        await anyio.lowlevel.checkpoint()
        if key in self.known:
            return self.known[key], encode_layout(self.known[key])
        if key in self.blobs:
            return self.blobs[key]
        raise ObjectMissing(key)


class FakeRoundLeases:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    async def acquire(self, lease: RoundLease, ttl_s: float) -> RoundLease:
        return structs.replace(lease, epoch=1)

    async def renew(self, lease: RoundLease, ttl_s: float) -> RoundLease:
        return lease

    async def release(self, lease: RoundLease) -> None:
        self._calls.append(f"release {lease.round}")


class FakeReaderLeases:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.held: set[int] = set()
        self.gate = anyio.Event()
        """Requests wait for it."""
        self.gate.set()

    async def take(self, lease: ReaderLease, ttl_s: float) -> None:
        self._calls.append(f"take {lease.version}")
        await self.gate.wait()
        self.held.add(lease.version)

    async def renew(self, lease: ReaderLease, ttl_s: float) -> None:
        self._calls.append(f"renew {lease.version}")
        if lease.version not in self.held:
            raise LeaseLost(f"m.{lease.version}.a", None)

    async def release(self, lease: ReaderLease) -> None:
        self._calls.append(f"release {lease.version}")
        await self.gate.wait()
        self.held.discard(lease.version)


class FakePresence:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.states: list[EngineState] = []
        """Everything that was put."""
        self.rival: list[EngineState | None] = []
        """What the next looks at an engine find; the last of them stays."""
        self.ttl_s = 0

    async def get(self, model: str, engine: str) -> EngineState | None:
        if len(self.rival) > 1:
            return self.rival.pop(0)
        return self.rival[0] if self.rival else None

    async def put(self, state: EngineState) -> None:
        self._calls.append(f"put {state.status}")
        self.states.append(state)

    async def drop(self, model: str, engine: str) -> None:
        self._calls.append("drop")

    async def list(self, model: str) -> tuple[EngineState, ...]:
        return ()

    @asynccontextmanager
    async def watch(self, model: str) -> AsyncIterator[AsyncIterator[EngineState | EngineGone]]:
        send, receive = anyio.create_memory_object_stream[EngineState | EngineGone](1)
        with send, receive:
            yield receive
