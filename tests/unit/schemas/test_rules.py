"""What several fields of one message must agree on."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.contract.examples import EXAMPLES
from weightbus.schemas import (
    FileSegment,
    Group,
    Member,
    MessageInvalid,
    RankRoute,
    SharedMemorySegment,
    decode,
    encode,
)

READY = EXAMPLES["CheckpointReady"]
FILE = FileSegment(path="/a")


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
        ("Join", {"ranks": EXAMPLES["Join"].ranks * 2}, "ranks[1]", "must not repeat"),  # type: ignore[attr-defined]
        ("Abort", {"lost": ("b", "c", "b")}, "lost[2]", "must not repeat"),
        ("RoundComplete", {"completed": ("a", "a")}, "completed[1]", "must not repeat"),
        ("RoundComplete", {"completed": ("b",)}, "failed", "not be in failed and in completed"),
        ("UpdateComplete", {"weights_digest": None}, "weights_digest", "given when verified"),
        ("UpdateComplete", {"routes": ("p2p", "p2p")}, "routes[1]", "must not repeat"),
        ("Described", {"rank": 1}, "rank", "must be below world_size"),
        ("Described", {"needs_digest": "0" * 64}, "needs_digest", "digest of needs"),
        ("Attach", {"roots": ("shared",)}, "roots[0]", "absolute"),
        ("Apply", {"sources": (block(5),)}, "sources[0][0].generation", "even"),
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


def plan_with(rank_route: RankRoute | None = None, groups: tuple[Group, ...] | None = None) -> Any:
    """The example's plan (rank 0 of a and of b in one group) with one thing changed."""
    plan: Any = EXAMPLES["RoundPlan"]
    if rank_route is not None:
        first = msgspec.structs.replace(plan.engines[0], ranks=(rank_route,))
        plan = msgspec.structs.replace(plan, engines=(first, *plan.engines[1:]))
    if groups is not None:
        plan = msgspec.structs.replace(plan, groups=groups)
    return plan


def group(*members: Member) -> Group:
    return Group(members=members)


A0, B0, B1 = Member("a", 0), Member("b", 0), Member("b", 1)


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (plan_with(RankRoute(rank=0, route="broadcast")), "engines[0].ranks[0].group"),
        (plan_with(RankRoute(rank=0, route="p2p", group=0)), "engines[0].ranks[0].group"),
        (plan_with(RankRoute(rank=0, route="broadcast", group=1)), "engines[0].ranks[0].group"),
        (plan_with(RankRoute(rank=0, route="local")), "groups[0].members[0]"),
        (plan_with(groups=(group(A0, A0),)), "groups[0].members[1]"),
        (plan_with(groups=(group(A0, B0, B1),)), "groups[0].members[2]"),
        (plan_with(groups=(group(A0, Member("c", 0)),)), "groups[0].members[1]"),
        (plan_with(groups=(group(A0, B0), group(A0, B0))), "groups[1].members[0]"),
        (
            plan_with(
                RankRoute(rank=0, route="broadcast", group=1), groups=(group(B0, B1), group(A0, B1))
            ),
            "groups[0].members[1]",
        ),
        (plan_with(groups=()), "engines[0].ranks[0].group"),
        (replaced("RoundPlan", bucket_bytes=0), "bucket_bytes"),
        (replaced("RoundPlan", engines=EXAMPLES["RoundPlan"].engines * 2), "engines[2]"),  # type: ignore[attr-defined]
    ],
)
def test_plan_is_refused_when_ranks_and_groups_disagree(plan: Any, field: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        encode(plan)
    assert (caught.value.kind, caught.value.field) == ("RoundPlan", field)


def test_plan_is_refused_when_a_group_leaves_a_rank_out() -> None:
    plan: Any = EXAMPLES["RoundPlan"]
    ranks = tuple(
        msgspec.structs.replace(route, route="broadcast", group=0)
        for route in plan.engines[1].ranks
    )
    second = msgspec.structs.replace(plan.engines[1], ranks=ranks)
    with pytest.raises(MessageInvalid, match="must name rank 1 of engine b"):
        encode(msgspec.structs.replace(plan, engines=(plan.engines[0], second)))


def test_needs_of_a_worker_are_checked_where_they_arrive() -> None:
    needs: Any = EXAMPLES["Described"].needs  # type: ignore[attr-defined]
    beyond = msgspec.structs.replace(needs.copies[0], offset=10**6)
    message = replaced("Described", needs=msgspec.structs.replace(needs, copies=(beyond,)))
    with pytest.raises(MessageInvalid) as caught:
        encode(message)
    assert (caught.value.kind, caught.value.field) == ("Described", "needs.copies[0]")
