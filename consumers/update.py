"""One engine's part of an update: prepare before the plan, transfer and prove after it.

Owns what is known of the engine per layout (needs, cells) and the reader leases; decides nothing:
what is prepared, transferred or released is the round machine's word. Invariants: the reader lease
is taken before the retirement is looked for; the engine is paused by `transfer` only, and whatever
happens it is either proven, or as it was before, or reported as touched.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio
import anyio.to_thread
import numpy as np
import numpy.typing as npt

from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusError, LeaseLost
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.errors import (
    ConsumerError,
    DeadlineExceeded,
    DigestMismatch,
    NotAttached,
    RouteUnavailable,
    TransferCancelled,
    TransferError,
    VersionRetired,
    cause_of,
)
from weightbus.consumers.manifest import Manifest, read_manifest
from weightbus.consumers.pause import Pause
from weightbus.consumers.planning.cells import CellPlan, plan_cells, verify_cells
from weightbus.consumers.round.config import Origin
from weightbus.consumers.transfer.gpu import is_gpu
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.schemas.base import RouteName
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import check_placement
from weightbus.schemas.leases import ReaderLease
from weightbus.schemas.placement import Placement
from weightbus.schemas.progress import Verified
from weightbus.schemas.rounds import RankOffer, RoundPlan
from weightbus.schemas.worker import Applied, Described, Inspected

__all__ = ("Outcome", "Prepared", "Updater")

_logger = logging.getLogger(__name__)

Sums = npt.NDArray[np.uint64]

CLOCK_TOLERANCE_NS = 60 * 10**9
"""How far a clock that was not measured may be off before `valid_until_ns` misleads."""

SHARE_S = 1.0
"""So long the bus may take to hear that a copy is offered."""

LAYOUTS_KEPT = 4
"""Layouts whose needs and cells are kept; the engine keeps its own plans."""


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What is known of the engine relative to one layout."""

    described: tuple[Described, ...]
    need_bytes: tuple[int, ...]
    layout_bytes: int
    """Of all tensors."""
    cells: CellPlan

    @property
    def instances(self) -> tuple[str, ...]:
        return tuple(rank.instance for rank in self.described)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A version that this engine can take."""

    manifest: Manifest
    binding: Binding
    offers: tuple[RankOffer, ...]
    proven: bool
    """Every rank's plan of this layout is proven: it can be streamed."""
    hosts: int = 1
    """How many it can be read from, copies included."""
    rendezvous: str = ""
    """Where groups meet whose first member is this engine; empty: it can be in none."""
    groups: tuple[str, ...] = ()
    """Ids of the groups that are ready."""

    @property
    def origin(self) -> Origin:
        manifest = self.manifest
        return Origin(
            layout_bytes=self.binding.layout_bytes,
            hosts=self.hosts,
            files=manifest.in_files,
            memory=manifest.memory,
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a transfer did: every rank holds the version, whole and (if offered) proven."""

    applied: tuple[Applied, ...]
    """In rank order."""
    route: RouteName
    verified: Verified
    weights_digest: str | None
    pause_start_ns: int
    """By this process's steady clock; all times of `applied` are by the host's wall clock."""

    @property
    def bytes(self) -> int:
        return sum(rank.bytes for rank in self.applied)

    @property
    def reason(self) -> str:
        return next((rank.reason for rank in self.applied if rank.reason), "")


class Updater:
    """Prepares and transfers versions for one engine."""

    def __init__(
        self,
        config: ConsumerConfig,
        consumer: str,
        bus: Bus,
        engine: Engine,
        routes: Sequence[Route],
    ) -> None:
        self._config = config
        self._consumer = consumer
        self._bus = bus
        self._engine = engine
        self._routes = {route.name: route for route in routes if route.name in config.routes}
        self._bindings: OrderedDict[str, Binding] = OrderedDict()
        self._leases: dict[int, CheckpointReady] = {}
        """Versions whose reader lease is held, or about to be."""
        self._lease_changes = anyio.Lock()
        self._engine_turn = anyio.Lock()
        """A `prepare` that is cancelled lets go of the engine before the next one takes it."""

    async def prepare(self, ready: CheckpointReady, deadline_s: float) -> Prepared:
        """Everything that can be got before a plan. The engine goes on serving.

        Takes the version's reader lease; it is kept, also on failure, until `let_go_nowait`.

        Raises:
            WeightBusError: the version cannot be taken, and why; the engine is as it was.
        """
        try:
            with anyio.fail_after(deadline_s):
                await self._take_lease(ready)
                manifest = await self._manifest(ready)
                async with self._engine_turn:
                    inspected = await self._engine.look(deadline_s)
                    binding = await self._bind(manifest, inspected, deadline_s)
                for route in self._routes.values():
                    route.know_devices([rank.device for rank in binding.described])
                routes = await self._reachable(manifest, ready)
        except TimeoutError as error:
            raise DeadlineExceeded("prepare", deadline_s) from error
        proven = all(manifest.layout_digest in rank.proven for rank in inspected)
        meeting = self._routes.get("broadcast")
        return Prepared(
            manifest=manifest,
            binding=binding,
            offers=self._offers(binding, routes, proven=proven),
            proven=proven,
            hosts=self._hosts(ready, manifest),
            rendezvous="" if meeting is None else meeting.rendezvous,
            groups=() if meeting is None else meeting.groups,
        )

    async def transfer(
        self,
        prepared: Prepared,
        ready: CheckpointReady,
        plan: RoundPlan,
        deadline_s: float,
        moving: anyio.CancelScope,
    ) -> Outcome:
        """Run this engine's part of a plan. Returns with the engine paused and proven.

        Cancelling `moving`, also before this is called, ends the transfer with an error.

        Raises:
            TransferError: it failed or was cancelled, and nothing writes to the engine any more.
                If `touched`, it stays paused; otherwise it does what it did before.
        """
        pause = Pause(
            self._engine,
            prepared.binding.instances,
            deadline_s,
            self._config.command_s,
            self._bus.clock.host.steady_ns,
        )
        try:
            with anyio.fail_after(deadline_s), moving:
                applied, route = await self._move(prepared, ready, plan, pause, deadline_s)
                verified = await self._prove(prepared, ready, applied)
                if verified == "verified":
                    await self._share(prepared, ready, route)
            if moving.cancelled_caught:
                raise TransferCancelled(plan.round, plan.epoch)
        except (WeightBusError, TimeoutError) as error:
            touched = await pause.undo_unless_touched()
            if isinstance(error, TimeoutError):
                error = DeadlineExceeded("transfer", deadline_s)
            if cause_of(error) == NotAttached.__name__:
                self._bindings.pop(prepared.manifest.layout_digest, None)
            raise TransferError(error, touched=touched) from error
        except BaseException:
            await pause.undo_unless_touched()
            raise
        return Outcome(
            applied=applied,
            route=route,
            verified=verified,
            weights_digest=ready.weights_digest,
            pause_start_ns=pause.start_ns,
        )

    async def resume(self, version: int, deadline_s: float) -> None:
        """Let the engine serve the version that its parameters hold, proven."""
        await self._engine.resume(version, deadline_s)

    async def renew_leases(self) -> None:
        """Keep the reader leases that are held; to be called well within their TTL."""
        for version in sorted(self._leases):
            async with self._lease_changes:
                if version not in self._leases:
                    continue
                lease = self._lease(version)
                try:
                    await self._bus.reader_leases.renew(lease, self._config.reader_ttl_s)
                except LeaseLost as error:
                    _logger.warning("version %d was not protected for a while: %s", version, error)
                    await self._bus.reader_leases.take(lease, self._config.reader_ttl_s)

    def let_go_nowait(self, version: int) -> None:
        """The reader lease of a version is not renewed any more; `release` is to follow."""
        self._leases.pop(version, None)

    async def release(self, version: int) -> None:
        """Drop the reader lease of a version, unless it was taken again since it was let go: its
        publisher may overwrite it."""
        async with self._lease_changes:
            if version not in self._leases:
                await self._bus.reader_leases.release(self._lease(version))

    def _lease(self, version: int) -> ReaderLease:
        return ReaderLease(
            model=self._config.model,
            version=version,
            engine=self._config.engine,
            consumer=self._consumer,
            taken_ns=self._bus.clock.now_ns(),
        )

    async def _take_lease(self, ready: CheckpointReady) -> None:
        """Take the lease, then look whether the version can still be read: in this order."""
        async with self._lease_changes:
            self._leases[ready.version] = ready
            await self._bus.reader_leases.take(
                self._lease(ready.version), self._config.reader_ttl_s
            )
        if 0 < ready.valid_until_ns < self._bus.clock.now_ns() - self._off_ns(ready):
            raise VersionRetired(ready.version, "its placement was valid until a time that is past")
        last = await self._bus.last(CheckpointRetired, model=ready.model, producer=ready.producer)
        if last is not None and last.message.version >= ready.version:
            reason = last.message.reason or "its publisher retired it"
            raise VersionRetired(ready.version, reason)

    def _off_ns(self, ready: CheckpointReady) -> int:
        """By how much the trainer's clock and ours may be apart."""
        residuals_ns = (ready.clock_residual_ns, self._bus.clock.reading().residual_ns)
        return sum(CLOCK_TOLERANCE_NS if each is None else each for each in residuals_ns)

    async def _manifest(self, ready: CheckpointReady) -> Manifest:
        """The layout from the store, or from the headers of the files."""
        if ready.layout_digest is not None:
            digest, placement = ready.layout_digest, ready.placement
            layout, blob = await self._bus.layouts.get(digest)
        else:
            return await anyio.to_thread.run_sync(
                read_manifest, ready.files, self._config.file_roots, abandon_on_cancel=True
            )
        check_placement(layout, placement)
        return Manifest(layout=layout, layout_digest=digest, layout_blob=blob, placement=placement)

    def _hosts(self, ready: CheckpointReady, manifest: Manifest) -> int:
        """How many a version can be read from, by the route that knows most of them."""
        placements = [self._placement(route, ready, manifest) for route in self._routes.values()]
        return max(
            (replace(manifest, placement=placement).hosts for placement in placements), default=1
        )

    def _placement(self, route: Route, ready: CheckpointReady, manifest: Manifest) -> Placement:
        """With what other engines offer of the version now, as far as this route can read it."""
        return route.widen(ready, manifest.layout_digest, manifest.layout, manifest.placement)

    async def _bind(
        self, manifest: Manifest, inspected: Sequence[Inspected], deadline_s: float
    ) -> Binding:
        """Needs and cells of the engine for a layout; made once per layout and worker process."""
        known = self._bindings.get(manifest.layout_digest)
        if known is not None and known.instances == tuple(rank.instance for rank in inspected):
            self._bindings.move_to_end(manifest.layout_digest)
            return known
        described = await self._engine.describe(
            manifest.layout_digest, manifest.layout_blob, deadline_s
        )
        cells, need_bytes, layout_bytes = await anyio.to_thread.run_sync(
            _plan_proof, manifest.layout, described
        )
        await self._engine.attach(
            manifest.layout_digest,
            tuple(rank.needs_digest for rank in described),
            cells.cells,
            deadline_s,
        )
        binding = Binding(
            described=described, need_bytes=need_bytes, layout_bytes=layout_bytes, cells=cells
        )
        self._bindings[manifest.layout_digest] = binding
        if len(self._bindings) > LAYOUTS_KEPT:
            self._bindings.popitem(last=False)
        return binding

    def _offers(
        self, binding: Binding, routes: Sequence[RouteName], *, proven: bool
    ) -> tuple[RankOffer, ...]:
        """What every rank can do: a group waits for nobody who cannot stream yet."""
        offered = tuple(route for route in routes if proven or route != "broadcast")
        if not offered:
            reason = "no version has come by local or p2p yet, to prove the plan of this layout"
            raise RouteUnavailable("broadcast", reason)
        return tuple(
            RankOffer(
                rank=rank.rank,
                device=rank.device,
                needs_digest=rank.needs_digest,
                need_bytes=need_bytes,
                free_bytes=self._room_bytes(0 if is_gpu(rank.device) else rank.free_bytes),
                device_bytes=rank.free_bytes if is_gpu(rank.device) else 0,
                routes=offered,
            )
            for rank, need_bytes in zip(binding.described, binding.need_bytes, strict=True)
        )

    def _room_bytes(self, free_bytes: int) -> int:
        """What staging in memory of the host may take of what a rank names; 0: not known."""
        rooms = [route.room_bytes for route in self._routes.values()]
        limits = [max(1, room) for room in rooms if room is not None]
        return min([free_bytes, *limits]) if free_bytes else min(limits, default=0)

    async def _reachable(self, manifest: Manifest, ready: CheckpointReady) -> tuple[RouteName, ...]:
        """Routes by which every segment can be reached from here, nearest first; those that are
        out of favour only if there is no other."""
        reachable, disfavoured, refusals = list[RouteName](), list[RouteName](), list[str]()
        for name, route in self._routes.items():
            placement = self._placement(route, ready, manifest)
            try:
                await anyio.to_thread.run_sync(
                    route.reach, manifest.layout, placement, abandon_on_cancel=True
                )
            except ConsumerError as error:
                refusals.append(f"{name}: {error}")
            else:
                (reachable if route.is_favoured(ready.version) else disfavoured).append(name)
        if not (reachable or disfavoured):
            raise RouteUnavailable("any", "; ".join(refusals) or "the configuration allows none")
        return tuple(reachable or disfavoured)

    async def _move(
        self,
        prepared: Prepared,
        ready: CheckpointReady,
        plan: RoundPlan,
        pause: Pause,
        deadline_s: float,
    ) -> tuple[tuple[Applied, ...], RouteName]:
        """Every rank by the route that the plan gives this engine."""
        (part,) = (part for part in plan.engines if part.engine == self._config.engine)
        name = part.ranks[0].route
        route = self._routes.get(name)
        if route is None:
            raise RouteUnavailable(name, "this consumer does not have it")
        applied = await route.transfer(
            Transfer(
                engine=self._engine,
                ranks=tuple(rank.rank for rank in part.ranks),
                version=plan.version,
                layout=prepared.manifest.layout,
                layout_digest=prepared.manifest.layout_digest,
                placement=self._placement(route, ready, prepared.manifest),
                plan=plan,
                begin_write=pause.begin,
                deadline_s=deadline_s,
                proven=prepared.proven,
            )
        )
        return applied, name

    async def _share(self, prepared: Prepared, ready: CheckpointReady, name: RouteName) -> None:
        """What is proven, others may have. The engine waits for the bus no longer than it must."""
        with anyio.move_on_after(SHARE_S):
            digest = prepared.manifest.layout_digest
            await self._routes[name].share(ready.version, digest, ready.created_ns)

    async def _prove(
        self, prepared: Prepared, ready: CheckpointReady, applied: Sequence[Applied]
    ) -> Verified:
        """Add up the digests of all ranks.

        Raises:
            DigestMismatch: they are not the publisher's; it names the tensors if they are known.
        """
        sums = tuple(np.frombuffer(rank.cell_digests, dtype="<u8") for rank in applied)
        layout, cells = prepared.manifest.layout, prepared.binding.cells
        verdict = await anyio.to_thread.run_sync(
            verify_cells, layout, cells, sums, ready.weights_digest, None
        )
        if verdict.ok:
            return "verified" if ready.weights_digest is not None else "not_offered"
        if (of_tensors := await self._tensor_digests(ready, layout)) is not None:
            verdict = verify_cells(layout, cells, sums, ready.weights_digest, of_tensors)
        raise DigestMismatch(
            ready.weights_digest or "not offered", verdict.digest, verdict.tensors, verdict.reason
        )

    async def _tensor_digests(self, ready: CheckpointReady, layout: Layout) -> Sums | None:
        """The publisher's, to name the tensors at fault; None: they are not to be had."""
        if ready.tensor_digests is None:
            return None
        try:
            blob = await self._bus.objects.get(ready.tensor_digests)
        except BusError as error:
            _logger.warning("tensors at fault cannot be named: %s", error)
            return None
        if len(blob) != 8 * len(layout.tensors):
            _logger.warning("tensors at fault cannot be named: %d bytes of digests", len(blob))
            return None
        return np.frombuffer(blob, dtype="<u8")


def _plan_proof(
    layout: Layout, described: Sequence[Described]
) -> tuple[CellPlan, tuple[int, ...], int]:
    """The cells of every rank, how many bytes each rank reads, and how many there are."""
    sizes = [DTYPE_BYTES[tensor.dtype] for tensor in layout.tensors]
    need_bytes = tuple(
        sum(math.prod(copy.sizes) * sizes[copy.tensor] for copy in rank.needs.copies)
        for rank in described
    )
    layout_bytes = sum(
        math.prod(tensor.shape) * size for tensor, size in zip(layout.tensors, sizes, strict=True)
    )
    return plan_cells(layout, tuple(rank.needs for rank in described)), need_bytes, layout_bytes
