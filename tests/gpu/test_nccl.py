"""NCCL as it is, between two processes, each with a GPU of its own: what the stub only claims."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.nccl_members import Answer, Members, open_members
from weightbus.bus.nccl import MAX_CTAS, NCCL_ID_BYTES, find_nccl, open_nccl
from weightbus.consumers.transfer.groups import open_meeting

ROOT: Final = Path(__file__).resolve().parents[2]
ADDRESS: Final = "127.0.0.1"
MIB: Final = 2**20
SIZE: Final = 64 * MIB
STALL_S: Final = 3.0
DEADLINE_S: Final = 60.0
CHANNEL_BYTES: Final = 24 * MIB
"""Of device memory, at most, for each channel of a communicator; see `MAX_CTAS`."""
FIXED_BYTES: Final = 416 * MIB
"""Of device memory, at most, besides: NCCL's kernels and what it keeps for itself, some 360 MiB as
measured with NCCL 2.28 on H200."""


@pytest.fixture
def members(gpus: Callable[[int], None]) -> Iterator[Members]:
    """Two, on GPUs 0 and 1."""
    gpus(2)
    with (
        open_meeting(ADDRESS) as meeting,
        open_members(meeting.rendezvous, (0, 1)) as members,
    ):
        yield members


def broadcast(members: Members, group: str, root: int, size_bytes: int) -> None:
    """Both hold what only the root held."""
    answers = members.ask(
        (0, 1),
        "broadcast",
        group=group,
        root=root,
        size_bytes=size_bytes,
        seed=root + size_bytes,
        stall_s=DEADLINE_S,
    )
    assert all("sha256" in answer for answer in answers), answers
    assert len({answer["sha256"] for answer in answers}) == 1, answers


def assert_formed(answers: list[Answer]) -> None:
    assert all(answer.get("incarnation") for answer in answers), answers
    assert len({answer["incarnation"] for answer in answers}) == 1, answers


def test_library_of_torch_is_found_and_tells_the_version_that_torch_tells() -> None:
    import torch

    torch.ones(1, device="cuda")
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    assert open_nccl().version == version, find_nccl()
    assert "nccl" in find_nccl()


def test_library_is_found_without_torch() -> None:
    code = (
        "import sys; from weightbus.bus.nccl import open_nccl; n = open_nccl();"
        "assert 'torch' not in sys.modules; print(n.version, n.path)"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT), *filter(None, sys.path)])
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [open_nccl().version, find_nccl()]


def test_no_two_ids_are_the_same() -> None:
    first, second = (open_nccl().make_id("g", 0) for _ in range(2))
    assert len(first) == len(second) == NCCL_ID_BYTES
    assert first != second


@pytest.mark.usefixtures("whole_gpu")
def test_bytes_of_both_roots_reach_the_other_gpu(members: Members) -> None:
    opened = members.open((0, 1), "g-1", "plan 1")
    assert_formed(opened)
    for answer in opened:
        assert answer["used_bytes"] <= MAX_CTAS * CHANNEL_BYTES + FIXED_BYTES, answer
    for root in (0, 1):
        for size_bytes in (1, MIB + 3, SIZE):
            broadcast(members, "g-1", root, size_bytes)
    again = members.open((0, 1), "g-1", "plan 2")
    assert {answer["incarnation"] for answer in again} == {opened[0]["incarnation"]}, "it is kept"
    for answer in members.ask((0, 1), "close", deadline_s=DEADLINE_S):
        assert answer["left"] == 0, answer


@pytest.mark.parametrize("lost", [0, 1])
def test_member_that_is_left_aborts_and_its_gpu_goes_on(members: Members, lost: int) -> None:
    assert_formed(members.open((0, 1), "g-1", "plan 1"))
    begun = members.ask((0, 1), "repeat", group="g-1", root=1, size_bytes=SIZE, stall_s=STALL_S)
    assert all(answer.get("begun") for answer in begun), begun
    members.kill(lost)
    left = 1 - lost
    answer = members.hear(left)
    assert answer["error"] == "PeerLost", answer
    assert answer["waited_s"] < 2 * STALL_S + 1, answer
    (dropped,) = members.ask([left], "drop", group="g-1", deadline_s=DEADLINE_S)
    assert dropped["left"] == 0, "the communicator is aborted"
    assert dropped["done"], "its kernel has ended"
    assert dropped["took_s"] < 20, dropped
    (used,) = members.ask([left], "use")
    assert used["read"] == "usable", used


def test_another_group_is_formed_after_one_was_left_in_a_broadcast(members: Members) -> None:
    """Member 1 stays, and takes no part: member 0's kernel stands still until it is aborted."""
    assert_formed(members.open((0, 1), "g-1", "plan 1"))
    what = {"root": 1, "size_bytes": SIZE, "seed": 1}
    (alone,) = members.ask([0], "broadcast", group="g-1", stall_s=STALL_S, **what)
    assert alone["error"] == "PeerLost", alone
    for answer in members.ask((0, 1), "drop", group="g-1", deadline_s=DEADLINE_S):
        assert (answer["left"], answer["done"]) == (0, True), answer
    assert_formed(members.open((0, 1), "g-2", "plan 2"))
    broadcast(members, "g-2", 0, SIZE)
    broadcast(members, "g-2", 1, SIZE)


def test_nobody_waits_longer_than_told_for_a_member_that_stops_while_it_forms(
    members: Members,
) -> None:
    members.kill(1)
    fill = {"group": "g", "key": "plan 1", "place": 0, "size": 2}
    members.tell(0, "open", deadline_s=STALL_S, rendezvous=members.rendezvous, **fill)
    answer = members.hear(0)
    assert answer["error"] == "PeerLost", answer
    assert answer["took_s"] < 2 * STALL_S, answer
    (used,) = members.ask([0], "use")
    assert used["read"] == "usable", used
