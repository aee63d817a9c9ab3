"""One example of everything that is said, with every field filled in: what the golden files hold.

To add a message or a field: fill it in here and run `python -m tests.contract.regenerate`. A golden
file that changes is a change of the contract: old readers must still understand it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from weightbus.schemas import (
    Abort,
    Applied,
    Apply,
    Attach,
    Attached,
    BucketTiming,
    Budgets,
    Cell,
    CheckpointPart,
    CheckpointReady,
    CheckpointRetired,
    CheckpointSkipped,
    Commit,
    Copy,
    CopyReady,
    CopyRetired,
    CudaSegment,
    DeadLetter,
    Describe,
    Described,
    Detach,
    Detached,
    EngineRoute,
    EngineState,
    Failed,
    FileSegment,
    Fill,
    FirstToken,
    Group,
    InPlace,
    Inspect,
    Inspected,
    Join,
    LaneFill,
    Layout,
    Links,
    Member,
    Message,
    Needs,
    ParameterSpec,
    Prepare,
    Prepared,
    Proven,
    RankOffer,
    RankRoute,
    ReaderLease,
    Relay,
    RemoteSegment,
    RoundComplete,
    RoundLease,
    RoundPlan,
    SegmentSpec,
    ShardSpec,
    SharedMemorySegment,
    StageComplete,
    StageTiming,
    Stream,
    TensorSpec,
    Transform,
    UpdateComplete,
    UpdateFailed,
    layout_digest,
    needs_digest,
)

__all__ = ("EXAMPLES", "LAYOUT", "NEEDS", "VARIANTS")

MODEL: Final = "qwen3-rl"
ROUND: Final = "v7-0"
HOST: Final = "6f1c2d0e-8a47-4b0e-9d53-1f0f4f9c2a11:2a"
TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
T0: Final = 1_767_225_600_000_000_000
"""2026-01-01T00:00:00Z in nanoseconds."""

LAYOUT: Final = Layout(
    tensors=(
        TensorSpec("model.embed_tokens.weight", "BF16", (6, 4)),
        TensorSpec("model.norm.weight", "F32", (4,)),
        TensorSpec("model.scale", "F32", ()),
        TensorSpec("model.none", "U8", (0, 3)),
    ),
    shards=(
        ShardSpec(0, (0, 0), (3, 4), 0, 0),
        ShardSpec(0, (3, 0), (3, 4), 1, 0),
        ShardSpec(1, (0,), (4,), 0, 256),
        ShardSpec(2, (), (), 1, 256),
        ShardSpec(3, (0, 0), (0, 3), 1, 512),
    ),
    segments=(SegmentSpec(512), SegmentSpec(512)),
)

NEEDS: Final = Needs(
    parameters=(
        ParameterSpec("embed.weight", "BF16", (4, 4), (4, 1)),
        ParameterSpec("norm.weight", "BF16", (4,), (1,)),
    ),
    copies=(Copy(0, (0, 0), (3, 4), 0, 0, (4, 1)), Copy(1, (0,), (4,), 1, 0, (1,), 0)),
    fills=(Fill(0, 12, (1, 4), (4, 1), 0.0),),
    transforms=(Transform((("cast", "BF16"), ("neg", ""))),),
)

_LAYOUT_DIGEST = layout_digest(LAYOUT)
_NEEDS_DIGEST = needs_digest(NEEDS)
_PLACEMENT = (
    (
        SharedMemorySegment(name="weightbus-trainer-0-a", host_id=HOST, generation=14),
        RemoteSegment(protocol="rdma", session="10.0.0.1:4711", address=2**40, generation=14),
    ),
    (
        CudaSegment(handle=bytes(range(64)), host_id=HOST, device_uuid="GPU-0", generation=14),
        FileSegment(
            path="/shared/step-7/model-00002.safetensors",
            size_bytes=4_294_967_296,
            modified_ns=1_790_000_000_123_456_789,
        ),
    ),
)

_TRAINER: Final[tuple[Message, ...]] = (
    CheckpointReady(
        model=MODEL,
        version=7,
        producer="trainer",
        layout_digest=_LAYOUT_DIGEST,
        placement=_PLACEMENT,
        weights_digest="00ff00ff00ff00ff",
        tensor_digests="ab" * 32,
        created_ns=T0,
        clock_residual_ns=150_000,
        valid_until_ns=T0 + 10**9,
        metadata={"step": "7", "loss": "0.12"},
    ),
    CheckpointPart(
        model=MODEL,
        version=7,
        producer="trainer",
        rank=1,
        world_size=2,
        layout_digest=_LAYOUT_DIGEST,
        placement=_PLACEMENT,
        shard_digests="cd" * 32,
        error="rank 1 ran out of memory",
        created_ns=T0,
        step="52",
    ),
    CheckpointRetired(
        model=MODEL, version=5, producer="trainer", reason="its slot is needed", active_readers=1
    ),
    CheckpointSkipped(
        model=MODEL,
        version=8,
        producer="trainer",
        cause="ranks",
        reason="the parts of ranks 2 and 3 of 4 did not come within 60 s",
        ranks=(2, 3),
        waited_s=60.0,
        created_ns=T0,
    ),
)

_CONSUMER: Final[tuple[Message, ...]] = (
    CopyReady(
        model=MODEL,
        version=7,
        engine="a",
        layout_digest=_LAYOUT_DIGEST,
        placement=_PLACEMENT,
        checkpoint_ns=T0,
        created_ns=T0 + 10**9,
    ),
    CopyRetired(model=MODEL, version=7, engine="a", reason="version 8 is about to be copied"),
    Join(
        model=MODEL,
        version=7,
        round=ROUND,
        engine="a",
        consumer="consumer-1",
        host_id=HOST,
        ranks=(
            RankOffer(
                rank=0,
                device="cuda:0",
                needs_digest=_NEEDS_DIGEST,
                need_bytes=40,
                free_bytes=2**30,
                device_bytes=2**33,
                routes=("local", "p2p"),
            ),
        ),
        served_version=6,
        links=Links(
            memory=20 * 10**9,
            disk=2 * 10**9,
            network=12_500_000_000,
            broadcast=3 * 10**9,
            p2p=2 * 10**9,
            device=55 * 10**9,
            peer=390 * 10**9,
            cards=8,
        ),
        rendezvous="tcp://10.0.0.1:29500",
        groups=("0f1e2d3c4b5a-1",),
        checkpoint_ns=T0,
        layout_digest=_LAYOUT_DIGEST,
        broken_epoch=1,
        joined_ns=T0,
    ),
    RoundPlan(
        model=MODEL,
        version=7,
        round=ROUND,
        epoch=1,
        leader="a",
        engines=(
            EngineRoute(engine="a", ranks=(RankRoute(rank=0, route="broadcast", reason="far"),)),
            EngineRoute(
                engine="b",
                ranks=(
                    RankRoute(rank=0, route="broadcast"),
                    RankRoute(rank=1, route="broadcast"),
                ),
            ),
            EngineRoute(engine="c", ranks=(RankRoute(rank=0, route="local"),)),
        ),
        groups=(
            Group(
                id="0f1e2d3c4b5a-1",
                members=(Member("a", 0), Member("b", 0)),
                rendezvous="tcp://10.0.0.1:29500",
            ),
            Group(
                id="5a4b3c2d1e0f-1",
                members=(Member("a", 0), Member("b", 1)),
                rendezvous="tcp://10.0.0.1:29500",
            ),
        ),
        bucket_bytes=2**27,
        slots=3,
        device=True,
        budgets=Budgets(prepare_s=10.0, transfer_s=60.0, commit_s=5.0, round_s=90.0),
        commit="together",
        checkpoint_ns=T0,
        created_ns=T0,
    ),
    Proven(model=MODEL, version=7, round=ROUND, epoch=1, engine="a"),
    Commit(model=MODEL, version=7, round=ROUND, epoch=1),
    Abort(model=MODEL, version=7, round=ROUND, epoch=1, lost=("b",), reason="b is gone"),
    RoundComplete(
        model=MODEL,
        version=7,
        round=ROUND,
        epoch=1,
        leader="a",
        completed=("a",),
        failed={"b": "torn read"},
        layout_digest=_LAYOUT_DIGEST,
        bytes=80,
        engines=2,
        started_ns=T0,
        ended_ns=T0 + 10**9,
        trace_id=TRACE,
    ),
    StageComplete(
        model=MODEL,
        version=7,
        round=ROUND,
        engine="a",
        stage="fetch",
        rank=0,
        route="local",
        bytes=40,
        buckets=(BucketTiming(T0, T0 + 600, 30), BucketTiming(T0 + 500, T0 + 1000, 10)),
        start_ns=T0,
        end_ns=T0 + 1000,
        ok=False,
        error="torn read",
        trace_id=TRACE,
        span_id="00f067aa0ba902b7",
        parent_span_id="00f067aa0ba902b6",
    ),
    UpdateComplete(
        model=MODEL,
        version=7,
        round=ROUND,
        engine="a",
        verified="verified",
        weights_digest="00ff00ff00ff00ff",
        routes=("local",),
        bytes=40,
        start_ns=T0,
        end_ns=T0 + 10**9,
        paused_s=0.25,
        direct_parameters=2,
        processed_parameters=1,
        reason="experts are repacked",
        trace_id=TRACE,
        clock_residual_ns=150_000,
    ),
    UpdateFailed(
        model=MODEL,
        version=7,
        round=ROUND,
        engine="b",
        cause="TornRead",
        reason="segment 0 has generation 16: it must be 14 before and after reading",
        stage="fetch",
        served_version=-1,
        quarantined=True,
        start_ns=T0,
        end_ns=T0 + 10**9,
        trace_id=TRACE,
        clock_residual_ns=150_000,
    ),
    FirstToken(
        model=MODEL,
        version=7,
        round=ROUND,
        engine="a",
        start_ns=T0 + 10**9,
        end_ns=T0 + 10**9 + 30_000_000,
        resolution_ns=20_000_000,
        trace_id=TRACE,
        span_id="00f067aa0ba902b8",
        parent_span_id="00f067aa0ba902b6",
    ),
    DeadLetter(
        model=MODEL,
        subject="weightbus.qwen3-rl.checkpoint.ready",
        reason="CheckpointReady: version is -1: must be int >= 0",
        field="version",
        value="-1",
        limit="must be int >= 0",
        content_type="application/json",
        payload=b'{"version":-1}',
        payload_bytes=14,
        reported_by="consumer-1",
        reported_ns=T0,
    ),
    EngineState(
        model=MODEL,
        engine="a",
        consumer="consumer-1",
        host_id=HOST,
        status="updating",
        version=6,
        target_version=7,
        ranks=2,
        engine_kind="torch",
        updated_ns=T0,
    ),
    RoundLease(model=MODEL, round=ROUND, leader="a", epoch=1, consumer="consumer-1"),
    ReaderLease(model=MODEL, version=7, engine="a", consumer="consumer-1", taken_ns=T0),
)

_WORKER: Final[tuple[Message, ...]] = (
    Describe(request=1, layout_digest=_LAYOUT_DIGEST, layout=b"zlib", deadline_s=30.0),
    Described(
        request=1,
        rank=0,
        world_size=1,
        instance="worker-1",
        device="cuda:0",
        free_bytes=2**30,
        needs_digest=_NEEDS_DIGEST,
        needs=NEEDS,
        untraced_reason="",
    ),
    Attach(
        request=2,
        layout_digest=_LAYOUT_DIGEST,
        needs_digest=_NEEDS_DIGEST,
        cells=(Cell(0, (0, 0), (3, 4), 0), Cell(2, (), (), -1)),
        roots=("/shared",),
        host_id=HOST,
        deadline_s=30.0,
    ),
    Attached(request=2, rank=0, tiles=3, tile_bytes=40),
    Prepare(
        request=6,
        layout_digest=_LAYOUT_DIGEST,
        feed=InPlace(sources=(_PLACEMENT[0][0], _PLACEMENT[1][1])),
        deadline_s=60.0,
    ),
    Prepared(request=6, rank=0, ready=True, reason="SegmentUnavailable: it is gone"),
    Apply(
        request=3,
        version=7,
        layout_digest=_LAYOUT_DIGEST,
        feed=Stream(
            lanes=("weightbus-stage.a.0", "weightbus-stage.a.1"),
            bucket_bytes=2**26,
            slots=3,
            turn=1,
            reader=1,
        ),
        deadline_s=60.0,
    ),
    Applied(
        request=3,
        rank=0,
        version=7,
        bytes=40,
        cell_digests=bytes(range(16)),
        stages=(StageTiming("h2d", T0, T0 + 1000, 40, (BucketTiming(T0, T0 + 1000, 40),)),),
        direct_parameters=2,
        processed_parameters=0,
        reason="",
        proven=(_LAYOUT_DIGEST,),
        updates=3,
    ),
    Failed(request=3, rank=0, error="TornRead", reason="segment 0", touched=True),
    Inspect(request=4, layout_digest=_LAYOUT_DIGEST, deadline_s=5.0),
    Inspected(
        request=4,
        rank=0,
        instance="worker-1",
        version=7,
        touched=False,
        updates=3,
        cell_digests=bytes(range(16)),
        unreadable=(1,),
        proven=(_LAYOUT_DIGEST,),
    ),
    Detach(request=5, deadline_s=5.0),
    Detached(request=5, rank=0),
)

EXAMPLES: Final = {type(message).__name__: message for message in _TRAINER + _CONSUMER + _WORKER}
"""Message type's name -> its example."""

_APPLY: Final = next(message for message in _WORKER if isinstance(message, Apply))

VARIANTS: Final[dict[str, Message]] = {
    "Apply-in_place": msgspec.structs.replace(
        _APPLY, feed=InPlace(sources=(_PLACEMENT[0][0], _PLACEMENT[1][1]))
    ),
    "Apply-relay": msgspec.structs.replace(
        _APPLY, feed=Relay(block="weightbus-relay.a.0", window_bytes=2**20, slots=2, turn=1)
    ),
    "Apply-device_lanes": msgspec.structs.replace(
        _APPLY,
        feed=Stream(
            lanes=("weightbus-stage.a.0", "weightbus-stage.a.1"),
            bucket_bytes=2**26,
            slots=3,
            turn=1,
            reader=1,
            device=True,
            fills=(LaneFill(1, 1, 2, 4, "v7-0.1", "tcp://10.0.0.1:29400", "v7-0.1.2"),),
            sources=(_PLACEMENT[0][0], None),
            readers=2,
        ),
    ),
}
"""What a field of several types holds beside the example, by the name of the golden file."""
