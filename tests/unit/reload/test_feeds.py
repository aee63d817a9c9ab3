"""However the bytes come, the parameters hold the same, and the digests are the publisher's."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.reload.models import Bag, ModuleHost, load_by_name, random_tensor, same_bits
from tests.unit.reload.test_random_models import RandomModel
from tests.unit.reload.test_worker import (
    DEADLINE_S,
    Client,
    Fused,
    check_model,
    load_fused,
    make_client,
    make_tensors,
)
from tests.unit.transfer.publishing import cut_layout, open_trainer
from tests.unit.transfer.staging import Owner, open_staging, relaying, streaming
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.reloader import STREAMS_KEPT, Outcome, Reloader
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.shared_memory import (
    SHM_FILLED_OFFSET,
    SHM_READERS_OFFSET,
    TURN_BITS,
)
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Attached,
    Failed,
    Feed,
    Relay,
    Stream,
    WorkerReply,
)

Tensors = Mapping[str, torch.Tensor]
_turns = itertools.count(1)


class Feeder:
    """Brings versions to one worker through staging, as a route does."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def ask(self, feed: Feed, version: int, deadline_s: float = DEADLINE_S) -> WorkerReply:
        return self.client.worker.handle(
            Apply(
                request=9,
                version=version,
                layout_digest=self.client.trainer.layout_digest,
                feed=feed,
                deadline_s=deadline_s,
            )
        )

    def relay(
        self, tensors: Tensors, version: int, window_bytes: int = 512, slots: int = 2
    ) -> Applied:
        with open_staging(1, slots * window_bytes) as owner:
            feed = Relay(
                block=owner.names[0], window_bytes=window_bytes, slots=slots, turn=next(_turns)
            )
            with relaying(owner, self.client.trainer.segments(tensors), feed):
                return self.client.verified(self.ask(feed, version), tensors, version)

    def stream(
        self, tensors: Tensors, version: int, bucket_bytes: int, slots: int, lanes: int
    ) -> WorkerReply:
        trainer = self.client.trainer
        plan = plan_buckets(trainer.layout, bucket_bytes, lanes)
        with open_staging(lanes, slots * bucket_bytes) as owner:
            feed = stream_of(owner, bucket_bytes, slots)
            with streaming(owner, plan, trainer.segments(tensors), feed):
                return self.ask(feed, version)

    def streamed(
        self, tensors: Tensors, version: int, bucket_bytes: int, slots: int, lanes: int
    ) -> Applied:
        reply = self.stream(tensors, version, bucket_bytes, slots, lanes)
        return self.client.verified(reply, tensors, version)


def stream_of(owner: Owner, bucket_bytes: int, slots: int) -> Stream:
    return Stream(
        lanes=owner.names, bucket_bytes=bucket_bytes, slots=slots, turn=next(_turns), reader=0
    )


@contextmanager
def open_feeder(
    host: ModuleHost, tensors: Tensors, directory: Path, segments: int = 2
) -> Iterator[Feeder]:
    with open_trainer(cut_layout(tensors, segments), "memory", directory) as trainer:
        client = make_client(trainer, host)
        yield Feeder(client)
        client.worker.close()


@pytest.mark.parametrize("seed", range(60))
def test_worker_makes_what_the_loader_makes_when_bytes_are_staged(
    seed: int, tmp_path: Path
) -> None:
    model, source = RandomModel(seed), random.Random(seed)
    layout = cut_layout(model.tensors(0), segments=1 + seed % 4, seed=seed)
    host = ModuleHost(model.build, model.load)
    with open_trainer(layout, "memory", tmp_path) as trainer:
        feeder = Feeder(make_client(trainer, host))
        feeder.relay(model.tensors(1), 1, source.randrange(1, 600), 1 + seed % 3)
        for version in (2, 3):
            tensors = model.tensors(version)
            shape = 1024 + 8 * source.randrange(100), source.choice([1, 2, 3])
            reply = feeder.stream(tensors, version, *shape, lanes=1 + seed % 3)
            if isinstance(reply, Failed):  # few bytes may be equal, and prove nothing
                assert reply.error == "ProofNeeded", reply
                reply = feeder.relay(tensors, version)
            applied = feeder.client.verified(reply, tensors, version)
            fresh = model.build()
            model.load(fresh, iter(tensors.items()))
            for (name, want), (_, found) in zip(
                fresh.named_parameters(), host.live.named_parameters(), strict=True
            ):
                assert same_bits(found, want), f"seed {seed}, version {version}: {name}"
        assert applied.request == 9
        feeder.client.worker.close()


SHAPES = {"cut": (211, 37), "flat": (5003,), "scalar": (), "empty": (0, 4), "one": (1, 1, 1)}


def every_dtype(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every dtype, some of them larger than a slot of the tests."""
    numbers = itertools.count(seed)
    return {
        f"{name}_{shape}": random_tensor(SHAPES[shape], dtype, next(numbers))
        for name, dtype in TORCH_DTYPES.items()
        for shape in SHAPES
    }


@pytest.mark.parametrize(("lanes", "slots"), [(1, 1), (1, 2), (2, 2), (3, 1), (3, 3)])
def test_every_dtype_is_bit_identical_when_streamed(lanes: int, slots: int, tmp_path: Path) -> None:
    tensors = every_dtype(0)

    def build() -> nn.Module:
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, torch.zeros_like(tensor))
        return model

    host = ModuleHost(build, load_by_name)
    with open_feeder(host, tensors, tmp_path, segments=3) as feeder:
        feeder.relay(every_dtype(1000), 1, window_bytes=3001)
        for version, bucket_bytes in ((2, 2048), (3, 65536)):
            tensors = every_dtype(version * 1000)
            applied = feeder.streamed(tensors, version, bucket_bytes, slots, lanes)
            assert applied.direct_parameters == sum(bool(t.numel()) for t in tensors.values())
            for name, want in tensors.items():
                assert same_bits(host.live.get_buffer(name), want), name
        inspected = feeder.client.inspect(read_back=True)
        assert inspected.cell_digests == applied.cell_digests
        assert inspected.unreadable == ()


class Wide(nn.Module):
    """A rank's half of a model: slices, a transpose, casts, a fill, and a tensor nobody wants."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Bag(torch.bfloat16, weight=(60, 130))
        self.columns = Bag(torch.bfloat16, weight=(120, 65))
        self.turned = Bag(torch.float32, weight=(90, 70))
        self.cast = Bag(torch.float32, weight=(130, 77))
        self.turned_cast = Bag(torch.bfloat16, weight=(66, 91))
        self.padded = Bag(torch.bfloat16, weight=(64, 33))


def wide_tensors(seed: int) -> dict[str, torch.Tensor]:
    return {
        "rows": random_tensor((120, 130), torch.bfloat16, seed),
        "columns": random_tensor((120, 130), torch.bfloat16, seed + 1),
        "turned": random_tensor((70, 90), torch.float32, seed + 2),
        "cast": random_tensor((130, 77), torch.float16, seed + 3).nan_to_num(),
        "turned_cast": random_tensor((91, 66), torch.float32, seed + 4).nan_to_num(),
        "padded": random_tensor((50, 33), torch.bfloat16, seed + 5),
        "unwanted": random_tensor((101, 103), torch.int16, seed + 6),
    }


def load_wide(model: Any, weights: Weights) -> None:
    for name, weight in weights:
        match name:
            case "rows":
                model.rows.weight.data.copy_(weight[60:])
            case "columns":
                model.columns.weight.data.copy_(weight[:, 65:])
            case "turned":
                model.turned.weight.data.copy_(weight.t())
            case "cast":
                model.cast.weight.data.copy_(weight)
            case "turned_cast":
                model.turned_cast.weight.data.copy_(weight.t())
            case "padded":
                model.padded.weight.data[:50].copy_(weight)
                model.padded.weight.data[50:].fill_(0.0)


@pytest.mark.parametrize(("lanes", "slots"), [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("bucket_bytes", [1024, 5000, 2**17])
def test_slices_transposes_casts_and_fills_are_bit_identical_when_streamed(
    lanes: int, slots: int, bucket_bytes: int, tmp_path: Path
) -> None:
    host = ModuleHost(Wide, load_wide)
    with open_feeder(host, wide_tensors(0), tmp_path) as feeder:
        feeder.relay(wide_tensors(10), 1, window_bytes=4099, slots=3)
        for version in (2, 3):
            tensors = wide_tensors(10 * version)
            host.live.get_parameter("padded.weight")[50:] = 7.0
            applied = feeder.streamed(tensors, version, bucket_bytes, slots, lanes)
            assert (applied.direct_parameters, applied.processed_parameters) == (6, 0)
            fresh = Wide()
            load_wide(fresh, iter(tensors.items()))
            for name, want in fresh.named_parameters():
                assert same_bits(host.live.get_parameter(name), want), name
        in_place = feeder.client.apply(tensors, 4)
        assert in_place.cell_digests == applied.cell_digests
        assert in_place.bytes == applied.bytes
        assert len(host.reloads) == 1


def test_layout_is_proven_only_when_every_parameter_is_direct_and_in_place(
    tmp_path: Path,
) -> None:
    host = ModuleHost(Fused, load_fused)
    with open_feeder(host, make_tensors(0), tmp_path) as feeder:
        client = feeder.client
        assert client.inspect().proven == ()
        reply = feeder.stream(make_tensors(5), 1, 1024, 2, 1)
        assert isinstance(reply, Failed)
        assert (reply.error, reply.touched) == ("ProofNeeded", False)
        assert client.inspect().updates == 0
        feeder.relay(make_tensors(10), 1)
        assert client.inspect().proven == (client.trainer.layout_digest,)
        feeder.streamed(make_tensors(20), 2, 1024, 2, 1)
        head: Any = host.live.get_submodule("head")
        head.weight = nn.Parameter(torch.zeros(3, 7), requires_grad=False)
        assert client.inspect().proven == ()
        reply = feeder.stream(make_tensors(30), 3, 1024, 2, 1)
        assert isinstance(reply, Failed)
        assert (reply.error, reply.touched) == ("ProofNeeded", False)
        feeder.relay(make_tensors(30), 3)
        check_model(host.live, make_tensors(30))


def test_nothing_is_proven_for_streams_when_a_module_is_processed(tmp_path: Path) -> None:
    class Repacking(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            super().reload(weights, modules)
            qk = self.live.get_parameter("block.qk")
            qk.copy_(qk.flip(0).clone())

    with open_feeder(Repacking(Fused, load_fused), make_tensors(0), tmp_path) as feeder:
        for version in (1, 2):
            feeder.relay(make_tensors(version), version)
            assert feeder.client.inspect().proven == ()


def test_untraced_model_is_loaded_when_it_is_relayed(tmp_path: Path) -> None:
    def load(model: Any, weights: Weights) -> None:
        load_fused(model, ((name, weight * 1) for name, weight in weights))

    with open_feeder(ModuleHost(Fused, load), make_tensors(0), tmp_path) as feeder:
        for version in (1, 2):
            assert "cannot be traced" in feeder.relay(make_tensors(version), version).reason
        assert feeder.client.inspect().proven == ()


UNIFORM = {"first": (900,), "norm": (600,), "last": (900,)}


def uniform_tensors(seed: int, value: float) -> dict[str, torch.Tensor]:
    """All random but `norm`, whose elements are equal and prove nothing."""
    tensors = {
        name: random_tensor(shape, torch.float32, seed + number)
        for number, (name, shape) in enumerate(UNIFORM.items())
    }
    return {**tensors, "norm": torch.full((600,), value, dtype=torch.float16)}


@pytest.mark.parametrize(("bucket_bytes", "touched"), [(1024, True), (2**16, False)])
def test_undecided_parameter_is_streamed_while_it_stays_and_relayed_once_it_changes(
    bucket_bytes: int, touched: bool, tmp_path: Path
) -> None:
    host = ModuleHost(lambda: Bag(torch.float32, **UNIFORM), load_by_name)
    with open_feeder(host, uniform_tensors(0, 1.0), tmp_path, segments=1) as feeder:
        feeder.relay(uniform_tensors(10, 1.0), 1)
        feeder.streamed(uniform_tensors(20, 1.0), 2, bucket_bytes, 2, 1)
        changed = uniform_tensors(30, 1.0)
        changed["norm"][-1] = 2.0
        reply = feeder.stream(changed, 3, bucket_bytes, 2, 1)
        assert isinstance(reply, Failed)
        assert (reply.error, reply.touched) == ("ProofNeeded", touched)
        assert "parameter norm cannot be streamed" in reply.reason
        assert bool((host.live.get_parameter("norm") == 1.0).all())
        inspected = feeder.client.inspect()
        assert (inspected.version, inspected.touched, inspected.proven) == (2, touched, ())
        assert "proof of the plan" in feeder.relay(changed, 3).reason
        assert host.live.get_parameter("norm")[-1] == 2.0
        feeder.streamed(uniform_tensors(50, 1.0) | {"norm": changed["norm"]}, 4, 1024, 1, 2)


def test_proof_is_kept_when_the_stream_of_an_undecided_parameter_breaks_off(
    tmp_path: Path,
) -> None:
    host = ModuleHost(lambda: Bag(torch.float32, **UNIFORM), load_by_name)
    with open_feeder(host, uniform_tensors(0, 1.0), tmp_path, segments=1) as feeder:
        trainer = feeder.client.trainer
        feeder.relay(uniform_tensors(10, 1.0), 1)
        plan = plan_buckets(trainer.layout, 1024, 1)
        with open_staging(1, 1024) as owner:
            feed = stream_of(owner, 1024, 1)
            segments = trainer.segments(uniform_tensors(20, 1.0))
            last = plan.buckets - 1
            with streaming(
                owner, plan, segments, feed, until=last, then=lambda: owner.give_up(feed.turn)
            ):
                reply = feeder.ask(feed, 2)
        assert isinstance(reply, Failed)
        assert (reply.error, reply.touched) == ("SegmentUnavailable", True)
        assert feeder.client.inspect().proven == (trainer.layout_digest,)
        feeder.streamed(uniform_tensors(30, 1.0), 3, 1024, 2, 2)


@pytest.mark.parametrize("how", ["given up", "without its owner", "no more"])
@pytest.mark.parametrize("feed_kind", ["stream", "relay"])
def test_update_fails_touched_and_the_next_is_whole_when_its_owner_stops_in_the_middle(
    how: str, feed_kind: str, tmp_path: Path
) -> None:
    host = ModuleHost(Wide, load_wide)
    with open_feeder(host, wide_tensors(0), tmp_path) as feeder:
        feeder.relay(wide_tensors(10), 1)
        segments = feeder.client.trainer.segments(wide_tensors(20))
        with open_staging(2 if feed_kind == "stream" else 1, 4096) as owner:

            def stop() -> None:
                if how == "given up":
                    owner.give_up(turn)
                elif how == "without its owner":
                    owner.vanish()

            deadline_s = 1.0 if how == "no more" else DEADLINE_S
            if feed_kind == "stream":
                feed = stream_of(owner, 2048, 2)
                turn = feed.turn
                plan = plan_buckets(feeder.client.trainer.layout, 2048, 2)
                with streaming(owner, plan, segments, feed, until=5, then=stop):
                    reply = feeder.ask(feed, 2, deadline_s)
            else:
                turn = next(_turns)
                relay = Relay(block=owner.names[0], window_bytes=2048, slots=2, turn=turn)
                with relaying(owner, segments, relay, until=5, then=stop):
                    reply = feeder.ask(relay, 2, deadline_s)
        assert isinstance(reply, Failed)
        assert reply.error == ("DeadlineExceeded" if how == "no more" else "SegmentUnavailable")
        assert how == "no more" or how in reply.reason
        inspected = feeder.client.inspect()
        assert (reply.touched, inspected.touched, inspected.version) == (True, True, 1)
        assert inspected.proven == (feeder.client.trainer.layout_digest,)
        feeder.streamed(wide_tensors(30), 3, 2048, 2, 2)


def test_nothing_is_touched_when_lanes_are_not_there(tmp_path: Path) -> None:
    with open_feeder(ModuleHost(Fused, load_fused), make_tensors(0), tmp_path) as feeder:
        feeder.relay(make_tensors(10), 1)
        updates = feeder.client.inspect().updates
        feed = Stream(lanes=("weightbus-none",), bucket_bytes=1024, slots=1, turn=1, reader=0)
        reply = feeder.ask(feed, 2, 0.1)
        assert isinstance(reply, Failed)
        assert (reply.error, reply.touched) == ("DeadlineExceeded", False)
        with open_staging(1, 1024) as owner:
            feed = msgspec.structs.replace(feed, lanes=owner.names, slots=2)
            reply = feeder.ask(feed, 2)
        assert isinstance(reply, Failed)
        assert (reply.error, reply.touched) == ("SegmentUnavailable", False)
        assert "1024 bytes long: must hold at least 2048" in reply.reason
        assert feeder.client.inspect().updates == updates


def test_constants_are_written_when_a_layout_has_no_bytes(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Bag(torch.float32, empty=(0, 3), ones=(4,))

    def load(model: Any, weights: Weights) -> None:
        model.ones.data.fill_(1.0)
        for _, weight in weights:
            model.empty.data.copy_(weight)

    host = ModuleHost(build, load)
    tensors = {"empty": torch.zeros(0, 3)}
    with open_feeder(host, tensors, tmp_path, segments=1) as feeder:
        feeder.relay(tensors, 1)
        assert feeder.client.inspect().proven == (feeder.client.trainer.layout_digest,)
        host.live.get_parameter("ones").zero_()
        applied = feeder.streamed(tensors, 2, 1024, 1, 2)
        assert (applied.bytes, applied.direct_parameters) == (0, 1)
        assert host.live.get_parameter("ones").tolist() == [1.0] * 4


def test_plans_of_streams_are_kept_when_used_and_dropped_when_too_many(tmp_path: Path) -> None:
    host = ModuleHost(Fused, load_fused)
    with open_feeder(host, make_tensors(0), tmp_path) as feeder:
        feeder.relay(make_tensors(10), 1)
        for version in range(2, 2 * STREAMS_KEPT + 4):
            feeder.streamed(make_tensors(version), version, 1024 * version, 1, version % 3 + 1)
            check_model(host.live, make_tensors(version))


def test_stream_is_planned_anew_when_other_cells_are_attached(tmp_path: Path) -> None:
    with open_feeder(ModuleHost(Fused, load_fused), make_tensors(0), tmp_path) as feeder:
        client = feeder.client
        feeder.relay(make_tensors(10), 1)
        feeder.streamed(make_tensors(20), 2, 1024, 1, 1)
        attached = client.worker.handle(
            Attach(
                request=5,
                layout_digest=client.trainer.layout_digest,
                needs_digest=client.describe().needs_digest,
                cells=client.cells[1:2],
                deadline_s=DEADLINE_S,
            )
        )
        assert isinstance(attached, Attached)
        reply = feeder.stream(make_tensors(30), 3, 1024, 1, 1)
        assert isinstance(reply, Applied)
        client.attach()
        applied = feeder.streamed(make_tensors(30), 3, 1024, 1, 1)
        assert reply.cell_digests == applied.cell_digests[8:16]


@pytest.mark.parametrize("change", ["other cells", "a new proof"])
def test_tables_of_earlier_plans_go_when_there_is_another(change: str, tmp_path: Path) -> None:
    host = ModuleHost(Fused, load_fused)
    with open_feeder(host, make_tensors(0), tmp_path) as feeder:
        feeder.relay(make_tensors(10), 1)
        feeder.relay(make_tensors(20), 2)
        feeder.streamed(make_tensors(30), 3, 1024, 1, 1)
        (known,) = feeder.client.worker._known.values()
        split = known.reloader._split
        assert split is not None
        executors = [weakref.ref(split.executor)]
        executors += [weakref.ref(plan.executor) for _, plan in known.reloader._streams.values()]
        del split
        assert len(executors) == 2
        if change == "other cells":
            feeder.client.attach()
        else:
            moved = nn.Parameter(torch.zeros(3, 7), requires_grad=False)
            host.live.head.weight = moved  # type: ignore[union-attr]
            feeder.relay(make_tensors(40), 4)
        gc.collect()
        assert [executor() is None for executor in executors] == [True, True]


def test_update_is_touched_once_its_first_bucket_has_been_moved(tmp_path: Path) -> None:
    with open_feeder(ModuleHost(Wide, load_wide), wide_tensors(0), tmp_path) as feeder:
        trainer = feeder.client.trainer
        feeder.relay(wide_tensors(10), 1)
        plan = plan_buckets(trainer.layout, 2048, 1)
        for filled in (0, 1):
            with open_staging(1, 2048) as owner:
                feed = stream_of(owner, 2048, 1)
                segments = trainer.segments(wide_tensors(20))
                with streaming(owner, plan, segments, feed, until=filled):
                    reply = feeder.ask(feed, 2, 0.3)
            assert isinstance(reply, Failed)
            assert (reply.error, reply.touched) == ("DeadlineExceeded", filled > 0)
            assert feeder.client.inspect().updates == 1 + filled


def blocks_mapped() -> int:
    """Mappings of staging blocks, those of the test itself among them."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("weightbus-stage")


def test_worker_unmaps_its_blocks_when_it_closes(tmp_path: Path) -> None:
    worker = ReloadWorker(ModuleHost(Fused, load_fused), 0, 1)
    with open_trainer(cut_layout(make_tensors(0)), "memory", tmp_path) as trainer:
        client = Client(worker, trainer)
        client.attach()
        Feeder(client).relay(make_tensors(1), 1)
        before = blocks_mapped()
        worker.close()
        assert blocks_mapped() == before - 1


class SlowPlanner:
    """A reloader that looks at its word while it plans."""

    def __init__(self, owner: Owner, fails: bool) -> None:
        self._owner, self._fails = owner, fails
        self.words: list[int] = []

    def can_stream(self) -> bool:
        return True

    def prepare_stream(self, bucket_bytes: int, lanes: int) -> None:
        self.look()
        if self._fails:
            raise PlanError("buckets", bucket_bytes, "must be larger")

    def stream(self, *_: object) -> Outcome:
        self.look()
        return Outcome(digests=np.zeros(0, dtype=np.uint64))

    def look(self) -> None:
        self.words.append(self._owner.blocks[0].word(SHM_READERS_OFFSET))


@pytest.mark.parametrize("fails", [False, True])
def test_worker_has_planned_before_it_says_that_it_reads(fails: bool) -> None:
    """From then on a consumer counts on it, and planning takes seconds."""
    worker = ReloadWorker(ModuleHost(Fused, load_fused), 0, 1)
    with open_staging(1, 2048) as owner:
        feed = stream_of(owner, 2048, 1)
        owner.blocks[0].set_word(SHM_FILLED_OFFSET, feed.turn << TURN_BITS)
        planner = SlowPlanner(owner, fails)
        with suppress(PlanError):
            worker._stream(cast(Reloader, planner), feed, Deadline("test", 5.0))
        planner.look()
    begun, left = feed.turn << TURN_BITS, feed.turn << TURN_BITS | 0xFFFFFFFF
    assert planner.words == ([0, left] if fails else [0, begun, begun])
    worker.close()
