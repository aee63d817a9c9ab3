"""An answer is lost with its connection and the request is sent again: nothing is done twice, and
our own first copy is not taken for somebody else's."""

from __future__ import annotations

import msgspec
import pytest

from tests.integration.bus.dropping import open_dropping
from tests.nats_server import NatsServer
from weightbus.bus.buckets import KeyBucket
from weightbus.bus.errors import BusTimeout
from weightbus.bus.jetstream import JetStream, WrongLastSequence
from weightbus.bus.leases import ReaderLeases, RoundLeases
from weightbus.bus.objects import CHUNK_BYTES, ObjectStore
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.leases import ReaderLease, RoundLease

pytestmark = pytest.mark.anyio

KEY = "$KV.weightbus-rounds.m.r"
READER = ReaderLease(model="m", version=1, engine="a", consumer="c")
ROUND = RoundLease(model="m", round="r", leader="a", epoch=0, consumer="c")


class NoLetters:
    """Everything in these tests can be read."""

    def report_nowait(
        self, model: str, subject: str, payload: bytes, content_type: str, error: MessageInvalid
    ) -> None:
        raise error


def round_leases(jetstream: JetStream) -> RoundLeases:
    return RoundLeases(KeyBucket(jetstream, "weightbus-rounds", RoundLease, NoLetters()), 5)


def reader_leases(jetstream: JetStream) -> ReaderLeases:
    return ReaderLeases(KeyBucket(jetstream, "weightbus-readers", ReaderLease, NoLetters()))


async def test_compare_and_set_is_a_duplicate_when_its_answer_was_lost(
    nats_server: NatsServer,
) -> None:
    async with open_dropping(nats_server.settings) as (link, jetstream):
        link.drop(KEY)
        ack = await jetstream.publish(KEY, b"x", expected_sequence=0)
        last = await jetstream.last("KV_weightbus-rounds", KEY)
    assert ack.duplicate
    assert ack.stream == "KV_weightbus-rounds"
    assert last is not None
    assert ack.sequence == last.sequence


async def test_compare_and_set_fails_when_its_answer_was_lost_and_another_was_first(
    nats_server: NatsServer,
) -> None:
    async with open_dropping(nats_server.settings) as (link, jetstream):
        await jetstream.publish(KEY, b"another")
        link.drop(KEY)
        with pytest.raises(WrongLastSequence):
            await jetstream.publish(KEY, b"x", expected_sequence=0)


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_object_is_whole_when_the_answer_to_its_nth_write_was_lost(
    nats_server: NatsServer, nth: int
) -> None:
    blob = b"x" * (CHUNK_BYTES + 1)  # two chunks and the description
    async with open_dropping(nats_server.settings) as (link, jetstream):
        store = ObjectStore(jetstream, "weightbus-layouts")
        link.drop("$O.", nth)
        await store.put("key", blob)
        assert link.drop_nth == 0
        assert await store.get("key") == blob
        await store.put("key", blob)
        assert await store.get("key") == blob


async def test_object_is_repaired_when_its_chunks_are_not_there(nats_server: NatsServer) -> None:
    blob = b"x" * (CHUNK_BYTES + 1)
    async with open_dropping(nats_server.settings) as (_, jetstream):
        store = ObjectStore(jetstream, "weightbus-layouts")
        await store.put("key", blob)
        await jetstream.purge("OBJ_weightbus-layouts", "$O.weightbus-layouts.C.*")
        await store.put("key", blob)
        assert await store.get("key") == blob


async def test_round_lease_stays_ours_when_the_answer_to_a_write_was_lost(
    nats_server: NatsServer,
) -> None:
    async with open_dropping(nats_server.settings) as (link, jetstream):
        leases = round_leases(jetstream)
        link.drop(KEY)
        held = await leases.acquire(ROUND, 60)
        assert held == await leases.holder("m", "r")
        link.drop(KEY)
        assert await leases.renew(held, 60) == held
        link.drop(KEY)
        await leases.release(held)
        assert await leases.holder("m", "r") is None


async def test_reader_lease_stays_ours_when_the_answer_to_its_renewal_was_lost(
    nats_server: NatsServer,
) -> None:
    async with open_dropping(nats_server.settings) as (link, jetstream):
        leases = reader_leases(jetstream)
        await leases.take(READER, 60)
        link.drop("$KV.")
        await leases.renew(READER, 60)
        assert link.drop_nth == 0
        assert await leases.readers("m", 1) == (READER,)


async def test_publish_is_given_up_when_the_server_may_have_forgotten_its_id(
    nats_server: NatsServer,
) -> None:
    async with open_dropping(nats_server.settings, resend_for_s=0.0) as (link, jetstream):
        link.drop(KEY)
        with pytest.raises(BusTimeout, match="publish"):
            await jetstream.publish(KEY, b"x")
        assert link.sent.count(KEY) == 1


async def test_leader_is_asked_when_leases_and_retirements_are_looked_at(
    nats_server: NatsServer,
) -> None:
    async with open_dropping(nats_server.settings) as (link, jetstream):
        leases = reader_leases(jetstream)
        others = [msgspec.structs.replace(READER, engine=name) for name in ("b", "c")]
        for lease in (READER, *others):
            await leases.take(lease, 60)
        await leases.renew(READER, 60)
        link.sent.clear()
        assert set(await leases.readers("m", 1)) == {READER, *others}
        await jetstream.last("weightbus-CHECKPOINTS", "weightbus.m.checkpoint.retired.t")
    assert {subject.rpartition(".")[0] for subject in link.sent} == {"$JS.API.STREAM.MSG.GET"}
