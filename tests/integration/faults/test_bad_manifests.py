"""Manifests that lie: refused before anything is written, with the reason, and forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec import structs
from safetensors.torch import save_file

from tests.integration.bus.raw import publish_raw
from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.slots import block_of
from tests.integration.fleet.weights import weights_of
from weightbus.schemas.blobs import canonical, compress
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.codec import CONTENT_TYPE_JSON, CONTENT_TYPE_MSGPACK, encode
from weightbus.schemas.layout import Layout, SegmentSpec
from weightbus.schemas.placement import FileSegment
from weightbus.schemas.progress import DeadLetter, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join
from weightbus.schemas.safetensors import layout_of_files, parse_safetensors_header

pytestmark = pytest.mark.anyio

OUTSIDE = "/etc/hostname"


@dataclass(frozen=True)
class Lie:
    """What is changed in an honest manifest, and how it is answered."""

    name: str
    cause: str
    reason: str
    layout: Callable[[Layout], Layout] | None = None
    ready: Callable[[CheckpointReady], CheckpointReady] | None = None


def shard(layout: Layout, number: int, **changes: Any) -> Layout:
    """The layout with one shard changed."""
    shards = list(layout.shards)
    shards[number] = structs.replace(shards[number], **changes)
    return structs.replace(layout, shards=tuple(shards))


def two_overlapping(layout: Layout) -> Layout:
    """A second shard of the same box, in bytes of its own behind the first segment's end."""
    (segment,), again = layout.segments, layout.shards[0]
    again = structs.replace(again, offset_bytes=segment.size_bytes)
    longer = SegmentSpec(segment.size_bytes + 2**20)
    return structs.replace(layout, shards=(*layout.shards, again), segments=(longer,))


def too_large(layout: Layout) -> Layout:
    (segment,) = layout.segments
    return structs.replace(layout, segments=(SegmentSpec(segment.size_bytes + 1),))


def elsewhere(ready: CheckpointReady) -> CheckpointReady:
    ((segment,),) = ready.placement
    return structs.replace(ready, placement=((structs.replace(segment, host_id="other"),),))


LIES = (
    Lie("overlap", "MessageInvalid", "overlaps shards[0]", layout=two_overlapping),
    Lie(
        "outside-its-tensor",
        "MessageInvalid",
        "must lie within 256",
        layout=lambda layout: shard(layout, 0, starts=(1, 0)),
    ),
    Lie(
        "outside-its-segment",
        "MessageInvalid",
        "must end within the segment",
        layout=lambda layout: shard(layout, 0, offset_bytes=2**40),
    ),
    Lie(
        "hole",
        "MessageInvalid",
        "shards must hold every element",
        layout=lambda layout: structs.replace(layout, shards=layout.shards[1:]),
    ),
    Lie("segment-shorter-than-said", "RouteUnavailable", "must hold at least", layout=too_large),
    Lie("on-another-host", "RouteUnavailable", "on host other", ready=elsewhere),
    Lie(
        "path-outside-the-roots",
        "RouteUnavailable",
        f"at {OUTSIDE}: must lie below",
        ready=lambda ready: structs.replace(ready, placement=((FileSegment(path=OUTSIDE),),)),
    ),
    Lie(
        "more-segments-than-the-layout",
        "MessageInvalid",
        "the layout has 1 segments",
        ready=lambda ready: structs.replace(ready, placement=ready.placement * 2),
    ),
    Lie(
        "layout-not-in-the-store",
        "ObjectMissing",
        "is not in the object store",
        ready=lambda ready: structs.replace(ready, layout_digest="0" * 64),
    ),
)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.name)
async def test_manifest_is_refused_and_the_next_goes_through_when_it_lies(
    fleet: Fleet, lie: Lie
) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        honest = await trainer.publish()
        for follower in (a, b):
            await follower.completes(honest.version)
        version = fleet.next_version()
        ready = structs.replace(
            honest, version=version, producer="liar", created_ns=honest.created_ns + 1
        )
        if lie.layout is not None:
            assert honest.layout_digest is not None
            layout, _ = await fleet.bus.layouts.get(honest.layout_digest)
            raw = canonical("layout", lie.layout(layout))
            digest = await fleet.bus.objects.put(hashlib.sha256(raw).hexdigest(), compress(raw))
            ready = structs.replace(ready, layout_digest=digest)
        if lie.ready is not None:
            ready = lie.ready(ready)
        await fleet.say(ready)
        for follower in (a, b):
            failed = await follower.fails(version, lie.cause)
            assert lie.reason in failed.reason
            assert (failed.served_version, failed.quarantined) == (honest.version, False)
            await follower.serves(honest.version)
        after = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(after)
    assert fleet.log.said(Join, version=version) == []


async def test_block_that_was_cut_short_is_refused_and_does_not_kill_the_worker(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        await a.completes(first)
        hold = a.engine.hold("before_apply")
        ready = await trainer.publish()
        await hold.reached.wait()
        block = block_of(ready)
        whole = block.stat().st_size
        with block.open("r+b") as file:
            file.truncate(whole // 2)
        hold.release()
        failed = await a.fails(ready.version, "SegmentUnavailable")
        assert "must hold at least" in failed.reason
        await a.serves(first)
        with block.open("r+b") as file:
            file.truncate(whole)  # its owner has it mapped, and would be killed
        await a.completes((await trainer.publish()).version)


def write_honest(path: Path, fleet: Fleet, version: int) -> None:
    save_file(weights_of(fleet.model, version), path)


def write_text(path: Path, fleet: Fleet, version: int) -> None:
    path.write_text("these are not weights, but they are long enough")


def write_cut_short(path: Path, fleet: Fleet, version: int) -> None:
    write_honest(path, fleet, version)
    path.write_bytes(path.read_bytes()[:-1])


def write_lying_header(path: Path, fleet: Fleet, version: int) -> None:
    """Two tensors that say that they lie in the same place."""
    of_one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = msgspec.json.encode({"one": of_one, "two": of_one})
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


def write_link_to_outside(path: Path, fleet: Fleet, version: int) -> None:
    path.symlink_to(OUTSIDE)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_text, "safetensors"),
        (write_cut_short, "file"),
        (write_lying_header, "two"),
        (write_link_to_outside, "must lie below an allowed root"),
    ],
)
async def test_files_are_refused_and_the_next_go_through_when_they_are_bad(
    fleet: Fleet, write: Callable[[Path, Fleet, int], None], reason: str
) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        first = fleet.next_version()
        path = fleet.directory / "first.safetensors"
        write_honest(path, fleet, first)
        await trainer.publisher.publish_files(path, first)
        await a.completes(first)
        bad = fleet.next_version()
        path = fleet.directory / "bad.safetensors"
        write(path, fleet, bad)
        await say_files(fleet, bad, [str(path)])
        failed = await a.fails(bad, "MessageInvalid")
        assert reason in failed.reason
        assert str(path) in failed.reason
        await a.serves(first)
        await a.completes((await trainer.publish()).version)


async def test_file_is_refused_when_it_is_absent_or_outside_the_roots(fleet: Fleet) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        await a.completes(first)
        for path, cause in (
            (OUTSIDE, "MessageInvalid"),
            (str(fleet.directory / "absent.safetensors"), "FileUnreadable"),
        ):
            version = fleet.next_version()
            await say_files(fleet, version, [path])
            failed = await a.fails(version, cause)
            assert path in failed.reason
        await a.serves(first)
        await a.completes((await trainer.publish()).version)


async def say_files(fleet: Fleet, version: int, files: Sequence[str]) -> None:
    """As a trainer would that knows nothing of layouts and digests."""
    await fleet.say(
        CheckpointReady(
            model=fleet.model, version=version, producer="files", files=tuple(files), created_ns=1
        )
    )


async def test_event_is_a_dead_letter_when_it_cannot_be_read(fleet: Fleet) -> None:
    subject = f"weightbus.{fleet.model}.checkpoint.ready"
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        first = await trainer.publish()
        await a.completes(first.version)
        of_next_major = msgspec.to_builtins(first) | {"schema_version": 2, "version": 2**31}
        of_other_model = encode(structs.replace(first, model="other", version=2**31))
        for content_type, payload, reason in (
            (CONTENT_TYPE_MSGPACK, b"\xc1 not MessagePack", ""),
            (CONTENT_TYPE_JSON, b'{"type": "CheckpointReady", "version": -1}', ""),
            (CONTENT_TYPE_MSGPACK, of_other_model, "other"),
            (CONTENT_TYPE_JSON, msgspec.json.encode(of_next_major), "2: spoken here: 1"),
        ):
            headers = {"Content-Type": content_type}
            await publish_raw(fleet.server.url, subject, payload, headers)
            letter = await fleet.log.wait(DeadLetter, payload=payload[:1024])
            assert letter.subject == subject
            assert reason in letter.reason
        await a.serves(first.version)
        await a.completes((await trainer.publish()).version)
    assert fleet.log.said(UpdateFailed) == []


async def test_version_is_served_when_a_newer_publisher_says_more_than_we_know(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a:
        version = fleet.next_version()
        path = fleet.directory / "newer.safetensors"
        write_honest(path, fleet, version)
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        layout = layout_of_files([parse_safetensors_header(header, len(content), str(path))])
        newer = {
            "model": fleet.model,
            "version": version,
            "producer": "newer",
            "layout_digest": await fleet.bus.layouts.put(layout),
            "placement": [[{"kind": "tape", "reel": 7}, {"kind": "file", "path": str(path)}]],
            "created_ns": 1,
            "urgency": "high",
        }
        subject = f"weightbus.{fleet.model}.checkpoint.ready"
        headers = {"Content-Type": CONTENT_TYPE_JSON}
        await publish_raw(fleet.server.url, subject, msgspec.json.encode(newer), headers)
        await fleet.log.wait(UpdateComplete, engine="a", version=version)
        await a.serves(version)
    assert fleet.log.said(DeadLetter) == []


async def test_checkpoint_without_a_tensor_of_the_model_is_refused_by_the_engine(
    fleet: Fleet,
) -> None:
    """Served, it would be a mix: the rest would be of the version before."""
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        await a.completes(first)
        version = fleet.next_version()
        weights = weights_of(fleet.model, version)
        del weights["lm_head.weight"]
        await trainer.publisher.publish(weights, version)
        failed = await a.fails(version, "CheckpointRefused")
        assert "must have lm_head.weight" in failed.reason
        assert (failed.served_version, failed.quarantined) == (first, False)
        await a.serves(first)
        await a.completes((await trainer.publish()).version)
    assert fleet.log.said(UpdateComplete, version=version) == []


async def test_checkpoint_of_another_shape_is_refused_by_the_engine(fleet: Fleet) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        await a.completes(first)
        version = fleet.next_version()
        weights = weights_of(fleet.model, version)
        weights["lm_head.weight"] = torch.zeros(7, 32)
        await trainer.publisher.publish(weights, version)
        failed = await a.fails(version, "CheckpointRefused")
        assert "shape of lm_head.weight is [7, 32]: must be [256, 32]" in failed.reason
        assert (failed.served_version, failed.quarantined) == (first, False)
        await a.serves(first)
        await a.completes((await trainer.publish()).version)
