"""Workers that are processes share communicators over a stub of libnccl; any of them may die."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.nccl_members import Answer, Members, open_members
from tests.nccl_stub import FOLDER, build_stub, why_no_stub
from weightbus.consumers.transfer.groups import open_meeting

ADDRESS = "127.0.0.1"
STALL_S = 2.0
SLACK_S = 20.0
"""A loaded machine may be so late; whoever waited for the deadline would be later."""
DEADLINE_S = 60.0
FORM_S = 5.0
"""Of a group that never forms: its members meet before that."""
SIZE = 300_000


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if why_no_stub():
        pytest.skip(why_no_stub())
    return build_stub(tmp_path_factory.mktemp("nccl"))


@contextmanager
def members_of(count: int, library: str, folder: Path) -> Iterator[Members]:
    devices, environment = range(count), {FOLDER: str(folder)}
    with (
        open_meeting(ADDRESS) as meeting,
        open_members(meeting.rendezvous, devices, library, environment=environment) as members,
    ):
        yield members


def broadcast(
    members: Members, places: tuple[int, ...], group: str, root: int, size_bytes: int
) -> list[Answer]:
    """Bytes of the root's own, which nobody else has."""
    return members.ask(
        places,
        "broadcast",
        group=group,
        root=root,
        size_bytes=size_bytes,
        seed=size_bytes,
        stall_s=DEADLINE_S,
    )


def assert_same(answers: list[Answer]) -> None:
    assert all("sha256" in answer for answer in answers), answers
    assert len({answer["sha256"] for answer in answers}) == 1, answers


@pytest.mark.parametrize("count", [2, 3, 4])
def test_members_hold_the_same_bytes_and_go_on_without_one_that_died(
    library: str, tmp_path: Path, count: int
) -> None:
    places, rng = tuple(range(count)), random.Random(count)
    with members_of(count, library, tmp_path) as members:
        opened = members.open(places, "g-1", "plan 1", DEADLINE_S)
        assert len({answer["incarnation"] for answer in opened}) == 1, opened
        for number in range(3 * count):
            size, root = rng.randint(1, SIZE), number % count
            assert_same(broadcast(members, places, "g-1", root, size))

        lost = rng.randrange(count)
        left = tuple(place for place in places if place != lost)
        begun = members.ask(
            places, "repeat", group="g-1", root=lost, size_bytes=SIZE, stall_s=STALL_S
        )
        assert all(answer["begun"] for answer in begun)
        members.kill(lost)
        for place in left:
            answer = members.hear(place)
            assert answer["error"] == "PeerLost", answer
            assert STALL_S < answer["waited_s"] < STALL_S + SLACK_S, answer
        for answer in members.ask(left, "drop", group="g-1", deadline_s=DEADLINE_S):
            assert answer["left"] == 0, answer
            assert answer["done"], "what it had queued has ended"

        opened = members.open(left, "g-2", "plan 2", DEADLINE_S)
        assert len({answer["incarnation"] for answer in opened}) == 1, opened
        assert_same(broadcast(members, left, "g-2", len(left) - 1, SIZE))
        for answer in members.ask(left, "close", deadline_s=DEADLINE_S):
            assert answer["left"] == 0, answer


def test_members_are_lost_within_the_deadline_when_one_dies_before_it_comes(
    library: str, tmp_path: Path
) -> None:
    with members_of(3, library, tmp_path) as members:
        members.kill(2)
        for place in (0, 1):
            fill = {"group": "g", "key": "plan 1", "place": place, "size": 3}
            rendezvous = members.rendezvous
            members.tell(place, "open", deadline_s=STALL_S, rendezvous=rendezvous, **fill)
        for answer in (members.hear(0), members.hear(1)):
            assert answer["error"] == "PeerLost", answer
            assert STALL_S < answer["took_s"] < STALL_S + SLACK_S, answer


def test_members_are_lost_within_the_deadline_when_one_stands_still_while_it_forms(
    library: str, tmp_path: Path
) -> None:
    with members_of(2, library, tmp_path) as members:
        members.ask([1], "refuse", call="what is begun", code=1, text="out of memory")
        first, second = members.open((0, 1), "g", "plan 1", FORM_S)
        assert first["error"] == "PeerLost", first
        assert "forming it stood still" in first["text"]
        assert second["error"] == "NcclFailed", second
        assert "out of memory" in second["text"]
        for answer in members.ask((0, 1), "use"):
            assert answer["read"] == "usable", answer
