"""Objects and layouts on a real server."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import anyio
import msgspec
import pytest

from tests.integration.bus.raw import last_raw, raw_client
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import ObjectCorrupt, ObjectMissing, ObjectTooLarge, RequestRefused
from weightbus.bus.objects import CHUNK_BYTES
from weightbus.bus.streams import bus_streams
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.layout_codec import encode_layout, layout_digest

pytestmark = pytest.mark.anyio

BUCKET = "weightbus-layouts"
STREAM = f"OBJ_{BUCKET}"


def layout(name: str = "w", rows: int = 4) -> Layout:
    return Layout(
        tensors=(TensorSpec(name, "BF16", (rows, 4)),),
        shards=(ShardSpec(0, (0, 0), (rows, 4), 0, 0),),
        segments=(SegmentSpec(rows * 8),),
    )


def part_of_layout() -> Layout:
    return msgspec.structs.replace(
        layout(), shards=(ShardSpec(0, (0, 0), (2, 4), 0, 0),), segments=(SegmentSpec(16),)
    )


async def stored_messages(bus: Bus) -> int:
    async with raw_client(bus.url) as client:
        info = await client.jetstream().stream_info(STREAM)
    return int(info.state.messages)


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 12_000_000])
async def test_object_comes_back_when_it_was_put(bus: Bus, size_bytes: int) -> None:
    blob = random.Random(size_bytes).randbytes(size_bytes)
    assert await bus.objects.put("key", blob) == "key"
    assert await bus.objects.get("key") == blob


async def test_object_is_missing_when_nothing_was_put_or_it_was_deleted(bus: Bus) -> None:
    with pytest.raises(ObjectMissing, match="nothing"):
        await bus.objects.get("nothing")
    await bus.objects.put("key", b"x" * 300_000)
    await bus.objects.delete("key")
    await bus.objects.delete("key")
    with pytest.raises(ObjectMissing):
        await bus.objects.get("key")
    assert await stored_messages(bus) == 0


async def test_object_is_stored_once_when_it_is_put_twice(bus: Bus) -> None:
    await bus.objects.put("key", b"x" * 300_000)
    before = await stored_messages(bus)
    await bus.objects.put("key", b"x" * 300_000)
    assert await stored_messages(bus) == before


async def test_object_is_replaced_and_its_chunks_freed_when_another_is_put(bus: Bus) -> None:
    await bus.objects.put("key", b"x" * 600_000)
    await bus.objects.put("key", b"y")
    assert await bus.objects.get("key") == b"y"
    assert await stored_messages(bus) == 2  # a chunk and its description


async def test_one_object_is_kept_when_clients_put_it_at_once(
    bus: Bus, nats_server: NatsServer
) -> None:
    blob = b"x" * 600_000
    async with open_bus(nats_server.settings) as other, anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(bus.objects.put, "key", blob)
            tasks.start_soon(other.objects.put, "key", blob)
    assert await bus.objects.get("key") == blob
    assert await stored_messages(bus) == 6


async def test_nothing_is_left_when_the_server_has_no_room_for_an_object(
    nats_server: NatsServer,
) -> None:
    (objects,) = (stream for stream in bus_streams("weightbus") if stream.name == STREAM)
    small = msgspec.json.encode(msgspec.structs.replace(objects, max_bytes=400_000))
    async with raw_client(nats_server.url) as client:
        await client.request(f"$JS.API.STREAM.CREATE.{STREAM}", small)
    async with open_bus(nats_server.settings) as bus:
        with pytest.raises(RequestRefused, match="maximum bytes exceeded"):
            await bus.objects.put("key", bytes(600_000))
        assert await stored_messages(bus) == 0
        await bus.objects.put("key", bytes(200_000))


async def test_object_is_refused_when_its_bytes_were_changed(bus: Bus) -> None:
    await bus.objects.put("key", b"x" * 200_000)
    async with raw_client(bus.url) as client:
        stream = client.jetstream()
        subject, sequence, chunk = await last_raw(client, STREAM, f"$O.{BUCKET}.C.*")
        await stream.delete_msg(STREAM, sequence)
        await stream.publish(subject, b"y" * len(chunk))
    with pytest.raises(ObjectCorrupt, match="digest"):
        await bus.objects.get("key")


async def test_object_is_refused_when_a_chunk_is_missing(bus: Bus) -> None:
    await bus.objects.put("key", b"x" * 200_000)
    async with raw_client(bus.url) as client:
        _, sequence, _ = await last_raw(client, STREAM, f"$O.{BUCKET}.C.*")
        await client.jetstream().delete_msg(STREAM, sequence)
    with pytest.raises(ObjectCorrupt, match="131072 bytes"):
        await bus.objects.get("key")


async def test_object_is_refused_unread_when_it_claims_to_be_too_large(bus: Bus) -> None:
    await bus.objects.put("key", b"x")
    async with raw_client(bus.url) as client:
        subject, _, payload = await last_raw(client, STREAM, f"$O.{BUCKET}.M.*")
        description = msgspec.json.decode(payload) | {"size": 2**40}
        await client.jetstream().publish(subject, msgspec.json.encode(description))
    with pytest.raises(ObjectTooLarge, match=str(2**40)):
        await bus.objects.get("key")


@pytest.mark.parametrize("description", [b"", b"{}", b'{"nuid": "*"}', b"\xff"])
async def test_object_is_refused_when_its_description_is_unreadable(
    bus: Bus, description: bytes
) -> None:
    await bus.objects.put("key", b"x")
    async with raw_client(bus.url) as client:
        subject, _, _ = await last_raw(client, STREAM, f"$O.{BUCKET}.M.*")
        await client.jetstream().publish(subject, description)
    with pytest.raises(ObjectCorrupt):
        await bus.objects.get("key")
    await bus.objects.put("key", b"y")
    assert await bus.objects.get("key") == b"y"


async def test_standard_client_reads_and_writes_objects_when_it_uses_the_store(bus: Bus) -> None:
    blob = random.Random(7).randbytes(300_000)
    async with raw_client(bus.url) as client:
        store = await client.jetstream().object_store(BUCKET)
        await bus.objects.put("ours", blob)
        assert (await store.get("ours")).data == blob
        await store.put("theirs", blob)
        assert await bus.objects.get("theirs") == blob
        await store.delete("theirs")
    with pytest.raises(ObjectMissing):
        await bus.objects.get("theirs")


async def test_layout_comes_back_when_it_was_put(bus: Bus, nats_server: NatsServer) -> None:
    digest = await bus.layouts.put(layout())
    assert digest == layout_digest(layout())
    async with open_bus(nats_server.settings) as other:
        assert await other.layouts.get(digest) == (layout(), encode_layout(layout()))


async def test_layout_is_read_from_the_bus_once_when_it_is_asked_for_again(
    bus: Bus, nats_server: NatsServer
) -> None:
    digest = await bus.layouts.put(layout())
    async with open_bus(nats_server.settings) as other:
        first, _ = await other.layouts.get(digest)
        await other.objects.delete(digest)
        again, _ = await other.layouts.get(digest)
    assert again is first


async def test_layout_is_stored_again_when_the_bus_no_longer_has_it(bus: Bus) -> None:
    digest = await bus.layouts.put(layout())
    await bus.objects.delete(digest)
    assert await bus.layouts.put(layout()) == digest
    assert await bus.objects.get(digest) == encode_layout(layout())


async def test_layout_is_refused_when_it_lies_under_another_digest(bus: Bus) -> None:
    wrong = hashlib.sha256(b"wrong").hexdigest()
    await bus.objects.put(wrong, encode_layout(layout()))
    with pytest.raises(ObjectCorrupt, match=layout_digest(layout())):
        await bus.layouts.get(wrong)


async def test_layout_is_refused_when_it_is_none(bus: Bus) -> None:
    digest = hashlib.sha256(b"junk").hexdigest()
    await bus.objects.put(digest, b"junk")
    with pytest.raises(ObjectCorrupt, match="layout"):
        await bus.layouts.get(digest)


async def test_layout_is_refused_when_it_breaks_a_rule(bus: Bus) -> None:
    broken = msgspec.structs.replace(layout(), shards=())
    with pytest.raises(MessageInvalid):
        await bus.layouts.put(broken)
    digest = layout_digest(broken)
    await bus.objects.put(digest, encode_layout(broken))
    with pytest.raises(MessageInvalid):
        await bus.layouts.get(digest)


async def test_part_of_a_layout_is_read_as_one_only_when_asked_for_as_one(bus: Bus) -> None:
    digest = await bus.layouts.put(part_of_layout(), partial=True)
    assert (await bus.layouts.get(digest, partial=True))[0] == part_of_layout()
    with pytest.raises(MessageInvalid):
        await bus.layouts.get(digest)


async def test_layout_is_read_from_disk_when_the_bus_no_longer_has_it(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    digest = await bus.layouts.put(layout())
    settings = msgspec.structs.replace(nats_server.settings, layout_cache_dir=tmp_path / "cache")
    async with open_bus(settings) as first:
        await first.layouts.get(digest)
    await bus.objects.delete(digest)
    async with open_bus(settings) as second:
        assert (await second.layouts.get(digest))[0] == layout()
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(encode_layout(layout("other")))
    async with open_bus(settings) as third:
        with pytest.raises(ObjectMissing):
            await third.layouts.get(digest)
