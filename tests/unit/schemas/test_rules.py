"""What several fields of one message must agree on."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.contract.examples import EXAMPLES
from weightbus.schemas import (
    CudaSegment,
    FileSegment,
    Group,
    InPlace,
    LaneFill,
    Member,
    MessageInvalid,
    RankRoute,
    SharedMemorySegment,
    Stream,
    decode,
    encode,
)

READY = EXAMPLES["CheckpointReady"]
FILE = FileSegment(path="/a")
LANES = Stream(
    lanes=("weightbus-a", "weightbus-b"),
    bucket_bytes=1,
    slots=1,
    turn=1,
    reader=0,
    device=True,
    readers=1,
)


def lanes(**fields: Any) -> Stream:
    return msgspec.structs.replace(LANES, **fields)


def replaced(name: str, **fields: Any) -> Any:
    return msgspec.structs.replace(EXAMPLES[name], **fields)


def block(generation: int) -> SharedMemorySegment:
    return SharedMemorySegment(name="weightbus-a", host_id="h", generation=generation)


@pytest.mark.parametrize(
    ("name", "fields", "field", "limit"),
    [
        ("CheckpointReady", {"files": ("/a",)}, "placement", "must not be given beside files"),
        (
            "CheckpointReady",
            {"files": ("/a",), "placement": ()},
            "layout_digest",
            "must not be given beside files",
        ),
        ("CheckpointReady", {"layout_digest": None}, "layout_digest", "or files alone"),
        ("CheckpointReady", {"weights_digest": None}, "weights_digest", "with tensor_digests"),
        ("CheckpointReady", {"valid_until_ns": 1}, "valid_until_ns", "not before created_ns"),
        (
            "CheckpointReady",
            {"placement": ((FileSegment(path="a"),),)},
            "placement[0][0].path",
            "must be an absolute path",
        ),
        (
            "CheckpointReady",
            {"placement": ((FILE,), (FileSegment(path="/a\0b"),))},
            "placement[1][0].path",
            "must be an absolute path",
        ),
        (
            "CheckpointReady",
            {"placement": ((block(3),),)},
            "placement[0][0].generation",
            "must be even",
        ),
        ("CheckpointReady", {"placement": ((FILE, FILE),)}, "placement[0][1]", "not repeat"),
        ("CheckpointPart", {"rank": 2}, "rank", "must be below world_size, 2"),
        ("CheckpointPart", {"placement": ((block(1),),)}, "placement[0][0].generation", "even"),
        ("CheckpointSkipped", {"ranks": (1, 2, 1)}, "ranks[2]", "must not repeat"),
        ("Join", {"ranks": EXAMPLES["Join"].ranks * 2}, "ranks[1]", "must not repeat"),  # type: ignore[attr-defined]
        ("Abort", {"lost": ("b", "c", "b")}, "lost[2]", "must not repeat"),
        ("RoundComplete", {"completed": ("a", "a")}, "completed[1]", "must not repeat"),
        ("RoundComplete", {"completed": ("b",)}, "failed", "not be in failed and in completed"),
        ("UpdateComplete", {"weights_digest": None}, "weights_digest", "given when verified"),
        ("UpdateComplete", {"routes": ("p2p", "p2p")}, "routes[1]", "must not repeat"),
        ("Described", {"rank": 1}, "rank", "must be below world_size"),
        ("Described", {"needs_digest": "0" * 64}, "needs_digest", "digest of needs"),
        ("Attach", {"roots": ("shared",)}, "roots[0]", "absolute"),
        ("CopyReady", {"placement": ((block(1),),)}, "placement[0][0].generation", "even"),
        (
            "CheckpointReady",
            {
                "placement": (
                    (CudaSegment(handle=b"", host_id="h", device_uuid="u", generation=7),),
                )
            },
            "placement[0][0].generation",
            "even",
        ),
        ("Join", {"groups": ("g", "h", "g")}, "groups[2]", "must not repeat"),
        (
            "Apply",
            {"feed": InPlace(sources=(block(5),))},
            "feed.sources[0][0].generation",
            "even",
        ),
        (
            "Apply",
            {"feed": Stream(lanes=("weightbus-a",) * 2, bucket_bytes=1, slots=1, turn=1, reader=0)},
            "feed.lanes[1]",
            "must not repeat",
        ),
        ("Apply", {"feed": lanes(device=False)}, "feed.device", "must be true"),
        ("Apply", {"feed": lanes(reader=1)}, "feed.reader", "less than readers: 1"),
        ("Apply", {"feed": lanes(fills=(LaneFill(2, 0),))}, "feed.fills[0].lane", "of 2 lanes"),
        (
            "Apply",
            {"feed": lanes(fills=(LaneFill(0, 0), LaneFill(0, 1)))},
            "feed.fills[1]",
            "must not repeat",
        ),
        (
            "Apply",
            {"feed": lanes(fills=(LaneFill(0, 0, 2, 2),))},
            "feed.fills[0].place",
            "less than size: 2",
        ),
        (
            "Apply",
            {"feed": lanes(sources=(None, block(5)))},
            "feed.sources[1][0][0].generation",
            "even",
        ),
        ("Inspected", {"proven": ("0" * 64,) * 2}, "proven[1]", "must not repeat"),
        ("Applied", {"cell_digests": b"1234567"}, "cell_digests", "8 bytes for each"),
        ("Inspected", {"cell_digests": b"123456789"}, "cell_digests", "8 bytes for each"),
        ("Inspected", {"unreadable": (0, 2)}, "unreadable[1]", "of 2 cells"),
    ],
)
def test_message_is_refused_when_its_fields_disagree(
    name: str, fields: dict[str, Any], field: str, limit: str
) -> None:
    message = replaced(name, **fields)
    with pytest.raises(MessageInvalid) as caught:
        encode(message)
    assert (caught.value.kind, caught.value.field) == (name, field)
    assert limit in caught.value.limit
    with pytest.raises(MessageInvalid) as again:
        decode(msgspec.msgpack.encode(message), None, type(message))
    assert str(again.value) == str(caught.value)


@pytest.mark.parametrize(
    ("files", "field"),
    [(("/a", "b"), "files[1]"), (("/a", "/b", "/a"), "files[2]"), (("/a\0",), "files[0]")],
)
def test_files_are_refused_when_relative_or_repeated(files: tuple[str, ...], field: str) -> None:
    message = replaced("CheckpointReady", layout_digest=None, placement=(), files=files)
    with pytest.raises(MessageInvalid) as caught:
        encode(message)
    assert caught.value.field == field


def test_files_alone_are_the_whole_contract_of_a_trainer_in_another_language() -> None:
    payload = b'{"model":"m","version":7,"producer":"p","files":["/shared/a.safetensors"]}'
    ready = decode(payload, "application/json", type(READY))
    assert ready.files == ("/shared/a.safetensors",)  # type: ignore[attr-defined]


PLAN: Any = EXAMPLES["RoundPlan"]
A0, B0, B1, C0 = Member("a", 0), Member("b", 0), Member("b", 1), Member("c", 0)


def group(identity: str, *members: Member, rendezvous: str = "tcp://host:1") -> Group:
    return Group(id=identity, members=members, rendezvous=rendezvous)


def plan_with(*groups: Group, first: RankRoute | None = None, **fields: Any) -> Any:
    """The example's plan (a and b in two groups, c alone) with one thing changed."""
    plan = msgspec.structs.replace(PLAN, **fields)
    if groups:
        plan = msgspec.structs.replace(plan, groups=groups)
    if first is not None:
        part = msgspec.structs.replace(plan.engines[0], ranks=(first,))
        plan = msgspec.structs.replace(plan, engines=(part, *plan.engines[1:]))
    return plan


def b_with(*routes: RankRoute) -> Any:
    """The example's plan with other routes of the ranks of b."""
    part = msgspec.structs.replace(PLAN.engines[1], ranks=routes)
    return msgspec.structs.replace(PLAN, engines=(PLAN.engines[0], part, PLAN.engines[2]))


BROADCAST = RankRoute(rank=0, route="broadcast")


@pytest.mark.parametrize(
    ("plan", "field", "limit"),
    [
        (b_with(BROADCAST, RankRoute(rank=1, route="p2p")), "engines[1].ranks[1].route", "of the"),
        (b_with(BROADCAST, BROADCAST), "engines[1].ranks[1]", "must not repeat"),
        (plan_with(first=RankRoute(rank=0, route="p2p")), "groups[0].members[0]", "is broadcast"),
        (plan_with(group("g", A0, A0)), "groups[0].members[1]", "must not repeat"),
        (plan_with(group("g", A0, C0)), "groups[0].members[1]", "is broadcast"),
        (plan_with(group("g", A0, Member("d", 0))), "groups[0].members[1]", "is broadcast"),
        (plan_with(group("g", A0, B0)), "groups", "must name rank 1 of engine b"),
        (plan_with(group("g", A0, B0), group("g", A0, B1)), "groups.id[1]", "must not repeat"),
        (plan_with(group("g", A0, B0), group("h", B1)), "groups[1].members", "must be 2"),
        (
            plan_with(group("g", A0, B0), group("h", A0, B1, rendezvous="")),
            "groups[1].rendezvous",
            "must be given",
        ),
        (plan_with(groups=()), "groups", "must name rank 0 of engine a"),
        (plan_with(bucket_bytes=0), "bucket_bytes", "at least 1"),
        (plan_with(engines=PLAN.engines * 2), "engines[3]", "must not repeat"),
    ],
)
def test_plan_is_refused_when_ranks_and_groups_disagree(plan: Any, field: str, limit: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        encode(plan)
    assert (caught.value.kind, caught.value.field) == ("RoundPlan", field)
    assert limit in caught.value.limit


def test_plan_of_one_host_needs_no_rendezvous() -> None:
    alone = plan_with(
        group("g", A0, rendezvous=""), group("h", B0, rendezvous=""), group("i", B1, rendezvous="")
    )
    assert decode(encode(alone), None, type(alone)) == alone


def test_needs_of_a_worker_are_checked_where_they_arrive() -> None:
    needs: Any = EXAMPLES["Described"].needs  # type: ignore[attr-defined]
    beyond = msgspec.structs.replace(needs.copies[0], offset=10**6)
    message = replaced("Described", needs=msgspec.structs.replace(needs, copies=(beyond,)))
    with pytest.raises(MessageInvalid) as caught:
        encode(message)
    assert (caught.value.kind, caught.value.field) == ("Described", "needs.copies[0]")
