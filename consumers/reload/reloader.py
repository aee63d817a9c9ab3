"""Brings versions of one layout into one rank's live model.

Owns the trace, the plan and its proof. The first version goes through the engine's own loader and
proves the plan; after that, what is proven is written directly, and the rest is loaded by the
engine. A version that changes what is undecided proves the plan again, whole. A model that cannot
be traced is always loaded by the engine, and so is one whose proven plan the device has no room
for.

Invariants: every cell is digested from the very bytes that were written to a parameter or handed
to the engine's loader, or that no rank needs; a proof is kept only if the version that it was made
with ended whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from weightbus.bus.cuda import open_cuda
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import (
    DeadlineExceeded,
    PeerLost,
    PlanError,
    ProofFailed,
    SegmentUnavailable,
    TornRead,
    TraceRefused,
)
from weightbus.consumers.planning.buckets import BucketPlan, plan_buckets
from weightbus.consumers.planning.tiles import TilePlan, bind_tiles, plan_tiles
from weightbus.consumers.reload.cells import check_cells
from weightbus.consumers.reload.checkpoint import Checkpoint, shards_by_tensor
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.executor import Executor, Sums, check_device
from weightbus.consumers.reload.faults import settle
from weightbus.consumers.reload.host import ModelHost
from weightbus.consumers.reload.loading import CellsOf
from weightbus.consumers.reload.loose import LooseCells
from weightbus.consumers.reload.maker import Maker, Reading
from weightbus.consumers.reload.memory import state_tensors
from weightbus.consumers.reload.proof import Proof, memory_of, prove
from weightbus.consumers.reload.split import Split, split_update
from weightbus.consumers.reload.staging import StagedSources
from weightbus.consumers.reload.streams import StreamPlan, move_stream, plan_stream
from weightbus.consumers.reload.threads import Threads
from weightbus.consumers.reload.tracer import Trace, trace_needs, whole_needs
from weightbus.consumers.transfer.gpu import OpenCuda, gpu_of
from weightbus.consumers.transfer.lanes import Lanes
from weightbus.consumers.transfer.segments import OpenSegment
from weightbus.schemas.base import BucketTimings
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("Outcome", "Reloader")

STREAMS_KEPT: Final = 2
"""Plans of streams that are kept: groups change, and with them lanes and their buckets."""


@dataclass(kw_only=True)
class Outcome:
    """What one update did."""

    digests: Sums
    """Of every cell."""
    source_bytes: int = 0
    """Read for parameters."""
    direct: int = 0
    """Parameters written directly."""
    processed: int = 0
    """Parameters loaded by the engine."""
    reason: str = ""
    """Why the engine's own loader was taken, if it was."""
    buckets: BucketTimings = ()
    """Of what was streamed; see `Streamed`."""


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One version on its way."""

    segments: Sequence[OpenSegment]
    reading: Reading
    deadline: Deadline
    outcome: Outcome


class Reloader:
    """One layout's way into one rank's live model. Not for several threads."""

    untraced_reason: str = ""
    """Not empty: every update takes the engine's own loader, and why."""
    needs: Needs
    """Whole tensors with no destination if it could not be traced."""

    def __init__(
        self,
        host: ModelHost,
        layout: Layout,
        threads: Threads | None = None,
        cuda: OpenCuda = open_cuda,
    ) -> None:
        """
        Args:
            threads: what moves and digests; the caller's to close. None: the caller's own thread.
            cuda: asked for when a GPU first needs it.

        Raises:
            CheckpointRefused: the layout does not make the model.
        """
        self.layout = layout
        self._host = host
        self._threads = threads or Threads()
        self._shards = shards_by_tensor(layout)
        self._order: tuple[int, ...] = tuple(range(len(layout.tensors)))
        """Of the tensors that the engine's own loader is given."""
        self._cells: tuple[Cell, ...] = ()
        self._split: Split | None = None
        self._streams: dict[tuple[int, int], tuple[Split, StreamPlan]] = {}
        """By bytes and lanes of the buckets, the longest unused first."""
        self._live: tuple[Split, tuple[list[int], list[int]]] | None = None
        """Where the parameters of a split are."""
        self._traced: tuple[Trace, TilePlan] | None = None
        self._gpu = gpu_of(host.device, cuda)
        """Where the parameters are; None: in main memory."""
        try:
            check_device(host.device)
            trace = trace_needs(host, layout)
            self._traced = trace, plan_tiles(layout, trace.needs)
            self.needs, self._order = trace.needs, trace.order
        except (TraceRefused, PlanError) as error:
            self.untraced_reason = str(error)
            self.needs = whole_needs(layout)
        needs = self._traced[0].needs if self._traced else None
        self._loose: LooseCells | None = None
        """Those that were digested last where their segments are."""
        self._maker = Maker(host, layout, needs, self._threads, self._gpu)

    @property
    def plan(self) -> TilePlan | None:
        """None if untraced."""
        return self._traced[1] if self._traced else None

    def attach(self, cells: Sequence[Cell]) -> None:
        """Digest these cells from now on.

        If it raises, everything is as it was.

        Raises:
            PlanError: a cell is not of this layout and these needs, or there are too many tiles.
            CudaFailed: the device has no room for the tables.
        """
        check_cells(cells, self.layout, self.needs)
        attached, split = tuple(cells), self._split
        if split is not None:
            split = self._split_by(split.whole, split.proof, attached)
        self._cells, self._split, self._loose = attached, split, None
        self._forget_others()
        self._maker.attach(attached)
        if split is None or split.proof.modules:
            self._maker.plan(proves=split is None)

    def apply(self, segments: Sequence[OpenSegment], deadline: Deadline) -> Outcome:
        """Write one version into the live model, which is touched from here on.

        Returns with the device synchronised and the segments found whole. If it raises, the device
        may still be at work: the caller waits for it (`settling`) before anything else.

        Raises:
            SegmentUnavailable, TornRead: a segment was cut short, or written while it was read.
            ProofFailed: the engine moved parameters while it loaded others; the next update makes
                a new proof. Or it keeps a copy of its weights that cannot be made anew.
            DeadlineExceeded: noticed between two steps.
            Exception: whatever the engine's own loader raises.
        """
        outcome = Outcome(digests=np.zeros(len(self._cells), dtype=np.uint64))
        reading = Reading(
            segments=segments,
            checkpoint=Checkpoint(self.layout, self._shards, segments),
            digests=outcome.digests,
            deadline=deadline,
        )
        version = _Version(segments=segments, reading=reading, deadline=deadline, outcome=outcome)
        split = self._split if self._is_in_place() else None
        if split is not None and self._must_be_proven_again(version, split):
            split = None
        if split is None or split.proof.modules or split.proof.undecided:
            self._split = None  # until this version has ended whole
        if self._traced is None:
            self._load_all(version)
            version.outcome.reason = self.untraced_reason
        elif split is None:
            trace, plan = self._traced
            proof = self._load_and_prove(version, trace, plan)
            split = self._split_or_give_up(version, plan, proof)
        else:
            self._load_processed(version, split)
            self._move(version, split)
        self._end_writing()
        for segment in segments:
            segment.check()
        self._split = split
        self._forget_others()
        return version.outcome

    def _end_writing(self) -> None:
        """Returns with the device synchronised."""
        self._host.synchronize()
        if self._host.renew():
            self._host.synchronize()

    def prepare_stream(self, bucket_bytes: int, lanes: int) -> BucketPlan:
        """Plan what `stream` does with such buckets, which may take seconds; unless `can_stream`,
        only how they are cut, for those who can.

        Raises:
            PlanError: the buckets are too small.
        """
        if self._split is None or not self.can_stream():
            return plan_buckets(self.layout, bucket_bytes, lanes)
        return self._stream_plan(self._split, (bucket_bytes, lanes)).buckets

    def stream(self, lanes: Lanes, deadline: Deadline, begin: Callable[[], None]) -> Outcome:
        """Write one version that comes by once into the live model; only if `can_stream`.

        Returns with the device synchronised, and raises as `apply` does. `begin` is called before
        the first byte is written.

        Raises:
            ProofNeeded: an undecided parameter would change.
            SegmentUnavailable: an owner of a lane has given up, or is gone.
            TornRead, PeerLost, NcclFailed, CudaFailed: a lane that this worker fills cannot be.
            DeadlineExceeded: noticed between two buckets, or while waiting for one.
        """
        split = self._split
        assert split is not None, "a version is streamed only if it can be"
        plan = self._stream_plan(split, (lanes.bucket_bytes, len(lanes)))
        if split.proof.undecided:
            self._split = None  # until this version has ended whole
        try:
            streamed = move_stream(plan, self._live_memory(split), lanes, deadline, begin)
        except (SegmentUnavailable, TornRead, PeerLost, DeadlineExceeded):
            self._split = split  # what was undecided is as it was: it was compared in its slots
            raise
        self._end_writing()
        self._split = split
        return Outcome(
            digests=streamed.digests,
            source_bytes=streamed.source_bytes,
            direct=len(split.proof.direct),
            buckets=streamed.buckets,
        )

    def can_stream(self) -> bool:
        """Whether every parameter is proven to be written directly where it is now."""
        split = self._split
        if split is None or split.proof.modules or split.proof.processed:
            return False
        return self._is_in_place()

    def read_back(self) -> tuple[Sums, tuple[int, ...]]:
        """The digest of every cell as the live parameters hold it, and the cells that have none."""
        digests = np.zeros(len(self._cells), dtype=np.uint64)
        readable = np.zeros(len(self._cells), dtype=np.bool_)
        split = self._split
        if split is not None and self._is_in_place():
            sizes = [segment.size_bytes for segment in self.layout.segments]
            bound = bind_tiles(split.plan, [0] * len(sizes), sizes, *self._live_memory(split))
            digests[split.moved_cells], unreadable = split.executor.read_back(bound)
            readable[split.moved_cells] = True
            readable[split.moved_cells[list(unreadable)]] = False
        return digests, tuple(np.flatnonzero(~readable).tolist())

    def _is_in_place(self) -> bool:
        """Whether the live parameters are where the proof, if there is one, found them."""
        split = self._split
        return split is not None and split.proof.memory == memory_of(self._host.live_model())

    def _forget_others(self) -> None:
        """What was planned by another proof or for other cells goes, and its tables with it."""
        self._streams = {key: kept for key, kept in self._streams.items() if kept[0] is self._split}
        if self._live is not None and self._live[0] is not self._split:
            self._live = None

    def _stream_plan(self, split: Split, buckets: tuple[int, int]) -> StreamPlan:
        """Made once for a split, and bytes and lanes of the buckets."""
        kept = self._streams.pop(buckets, None)
        if kept is None or kept[0] is not split:
            kept = (
                split,
                plan_stream(
                    self.layout,
                    split.whole.needs,
                    self._cells,
                    split.proof.undecided,
                    buckets,
                    threads=self._threads,
                    device=self._host.device,
                ),
            )
        self._streams[buckets] = kept
        if len(self._streams) > STREAMS_KEPT:
            del self._streams[next(iter(self._streams))]
        return kept[1]

    def _split_or_give_up(self, version: _Version, plan: TilePlan, proof: Proof) -> Split | None:
        """None: the plan cannot be carried out here; the engine, which has loaded this version,
        loads every later one, too.

        Raises:
            DeviceLost: that is why.
        """
        try:
            executor = self._maker.finish(loads_again=bool(proof.modules))
            return self._split_by(plan, proof, self._cells, executor)
        except (PlanError, CudaFailed) as error:
            settle(self._host)
            self._traced, self.untraced_reason = None, str(error)
            version.outcome.reason = self.untraced_reason
            return None

    def _split_by(
        self,
        plan: TilePlan,
        proof: Proof,
        cells: Sequence[Cell],
        executor: Executor | None = None,
    ) -> Split:
        return split_update(
            self.layout,
            plan,
            proof,
            cells,
            threads=self._threads,
            device=self._host.device,
            executor=executor,
        )

    # -- through the engine's own loader

    def _load_all(self, version: _Version) -> None:
        cells: dict[int, list[int]] = {}
        for number, cell in enumerate(self._cells):
            cells.setdefault(cell.tensor, []).append(number)
        self._load(version, range(len(self.layout.tensors)), None, cells)

    def _load_and_prove(self, version: _Version, trace: Trace, plan: TilePlan) -> Proof:
        """The first version since the parameters lie where they do."""
        self._load_all(version)
        self._host.synchronize()
        with self._maker.making(version.reading, plan) as make:
            proof = prove(trace, self._host.live_model(), make, self._host.derived())
        version.outcome.processed = len(trace.needs.parameters)
        version.outcome.reason = f"proof of the plan, {_summary(proof)}"
        return proof

    def _must_be_proven_again(self, version: _Version, split: Split) -> bool:
        """Whether this version changes a parameter whose bytes have proven nothing so far."""
        if not split.proof.undecided:
            return False
        memory = self._live_memory(split)
        with StagedSources(version.segments, self._gpu) as sources:
            for portion in split.undecided:
                version.deadline.check()
                with sources.fetched(portion.ranges):
                    bound = bind_tiles(
                        portion.plan, sources.addresses, sources.sizes_bytes, *memory
                    )
                    if split.executor.changed_parameter(bound) is not None:
                        return True
        return False

    def _load_processed(self, version: _Version, split: Split) -> None:
        """What the engine processes; and the digest of all that is not moved."""
        outcome = version.outcome
        if not split.proof.modules:
            self._digest(version, split.loose_cells)
            return
        if split.proof.direct:
            self._load(version, split.loaded, split.proof.modules, split.loose_cells)
        else:
            self._load(version, range(len(self.layout.tensors)), None, split.loose_cells)
        outcome.processed, outcome.reason = len(split.proof.processed), _summary(split.proof)
        if split.proof.memory != memory_of(self._host.live_model()):
            raise ProofFailed("of a direct module", "moved while the engine loaded other modules")

    def _load(
        self,
        version: _Version,
        tensors: Collection[int],
        modules: frozenset[str] | None,
        cells: CellsOf,
    ) -> None:
        """Hand tensors to the engine, one by one as it asks for them; digest all of `cells`."""
        done: set[int] = set()
        chosen = frozenset(tensors)
        given = [number for number in self._order if number in chosen]
        with self._maker.reading(version.reading, {*tensors, *cells}, cells) as read:

            def weights() -> Iterator[tuple[str, torch.Tensor]]:
                for number, tensor in read(given):
                    done.add(number)
                    version.outcome.source_bytes += tensor.nbytes
                    yield self.layout.tensors[number].name, tensor

            with torch.no_grad():
                self._host.reload(weights(), modules)
        self._digest(version, {number: cells[number] for number in cells.keys() - done})

    def _digest(self, version: _Version, cells: CellsOf) -> None:
        """Digest cells of tensors that nobody is given."""
        numbers = tuple(sorted(number for some in cells.values() for number in some))
        if not numbers:
            return
        if self._loose is None or self._loose.numbers != numbers:
            self._loose = self._loose_cells({number: self._cells[number] for number in numbers})
        with StagedSources(
            version.segments, self._gpu if self._loose.is_on_device else None
        ) as sources:
            self._loose.digest(sources, version.outcome.digests, version.deadline)

    def _loose_cells(self, cells: dict[int, Cell]) -> LooseCells:
        try:
            return LooseCells(self.layout, cells, self._host.device, self._threads)
        except (PlanError, CudaFailed):
            if self._gpu is None:
                raise
            settle(self._host)
            return LooseCells(self.layout, cells, "cpu", self._threads)

    # -- directly

    def _move(self, version: _Version, split: Split) -> None:
        memory = self._live_memory(split)
        with StagedSources(version.segments, self._gpu) as sources:
            steps = split.fetched_steps if sources.has_fetched else split.steps
            for portion, cells in steps:
                version.deadline.check()
                with sources.fetched(portion.ranges):
                    bound = bind_tiles(
                        portion.plan, sources.addresses, sources.sizes_bytes, *memory
                    )
                    digests = split.executor.update(bound, cells)
                version.outcome.source_bytes += portion.plan.source_bytes
                version.outcome.digests[split.moved_cells[cells]] = digests
        version.outcome.direct = len(split.proof.direct)

    def _live_memory(self, split: Split) -> tuple[list[int], list[int]]:
        """Address and size in bytes of every parameter of the needs; 0 of processed ones.

        Looked up once for a split: who asks has seen that everything is where its proof found it.
        """
        if self._live is not None and self._live[0] is split:
            return self._live[1]
        live = {item.name: item.tensor for item in state_tensors(self._host.live_model())}
        addresses = [0] * len(split.plan.needs.parameters)
        sizes = [0] * len(addresses)
        for number in split.proof.direct:
            tensor = live[split.plan.needs.parameters[number].name]
            skipped = int(tensor.storage_offset()) * tensor.itemsize
            addresses[number] = tensor.data_ptr()
            sizes[number] = tensor.untyped_storage().nbytes() - skipped
        self._live = split, (addresses, sizes)
        return addresses, sizes


def _summary(proof: Proof) -> str:
    """How many parameters are written directly, and why not all."""
    count = len(proof.direct) + len(proof.processed)
    said = f"{len(proof.direct)} of {count} parameters are written directly"
    if proof.undecided:
        said += f" ({len(proof.undecided)} are proven again once their uniform bytes change)"
    if proof.processed:
        more = f" and {len(proof.reasons) - 3} more" if len(proof.reasons) > 3 else ""
        said += f", the others loaded by the engine: {'; '.join(proof.reasons[:3])}{more}"
    return said
