"""The board: what pages are told at first, and what afterwards."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from tests.unit.tracing.rounds import (
    MODEL,
    T0_NS,
    complete,
    done,
    join,
    plan,
    ready,
    stage,
    state,
    whole_round,
)
from weightbus.cli.ui.board import Board
from weightbus.schemas.base import Message
from weightbus.schemas.progress import EngineStatus
from weightbus.tracing.text import NS_PER_S


def board_of(*messages: Message) -> Board:
    board = Board(None)
    board.connect("nats://bus:4222", T0_NS)
    tell(board, *messages)
    return board


def tell(board: Board, *messages: Message, at_ns: int = T0_NS) -> None:
    for message in messages:
        board.feed(message, T0_NS, {}, is_heard=True)
    board.refresh(at_ns)


def told(board: Board, since: int = 0) -> Any:
    return msgspec.json.decode(board.changes(since, T0_NS + NS_PER_S))


def test_new_page_is_told_everything() -> None:
    page = told(board_of(*whole_round(), state("a")))
    assert page["whole"]
    assert page["now_s"] == (T0_NS + NS_PER_S) / NS_PER_S
    assert page["link"]["url"] == "nats://bus:4222"
    assert page["newest"] == {MODEL: 7}
    assert page["engines"]["order"] == [f"{MODEL}/a", f"{MODEL}/b"]
    row = page["engines"]["rows"][f"{MODEL}/a"]
    assert (row["status"], row["round"], row["updated_s"]) == ("serving", "v7", T0_NS / 1e9 + 0.131)
    assert page["history"]["rows"][f"{MODEL}/v7"]["state"] == "failed"
    assert page["failures"][0]["cause"] == "TornRead"
    assert page["rounds"] == []


def test_page_that_knows_something_is_told_what_changed_since() -> None:
    board = board_of(state("a"), state("b"))
    known = board.revision
    tell(board, state("b", "updating", at_ms=5))
    page = told(board, known)
    assert not page["whole"]
    assert list(page["engines"]["rows"]) == [f"{MODEL}/b"]
    assert "order" not in page["engines"]
    assert page["history"]["rows"] == {}
    assert not page.keys() & {"link", "newest", "rounds", "failures"}


def test_page_that_slept_through_many_changes_is_told_the_last_of_each_only() -> None:
    board = board_of(state("a"))
    known = board.revision
    for at_ms in range(1, 500):
        status: EngineStatus = "updating" if at_ms % 2 else "serving"
        tell(board, state("a", status, at_ms=at_ms), stage("a", "fetch", at_ms, at_ms + 1))
    assert board.revision > known + 400
    page = told(board, known)
    assert page["engines"]["rows"][f"{MODEL}/a"]["status"] == "updating"
    assert len(board.changes(known, T0_NS)) < 3000


def test_refresh_that_changes_nothing_wakes_nobody() -> None:
    board = board_of(*whole_round())
    before = board.revision
    tell(board, *whole_round())
    assert board.revision == before


def test_order_is_told_again_when_an_engine_comes() -> None:
    board = board_of(state("b"))
    known = board.revision
    tell(board, state("a"))
    page = told(board, known)
    assert page["engines"]["order"] == [f"{MODEL}/a", f"{MODEL}/b"]
    assert list(page["engines"]["rows"]) == [f"{MODEL}/a"]


def test_round_in_flight_does_not_tremble_and_becomes_history() -> None:
    board = board_of(ready(8), join("a", 8), plan(version=8))
    (flight,) = told(board)["rounds"]
    assert (flight["version"], flight["waiting"], flight["leader"]) == (8, ["a", "b"], "a")
    known = board.revision
    board.refresh(T0_NS + 12_345_678)
    assert board.revision == known, "its beginning is reckoned once"
    tell(board, complete("a", 8), complete("b", 8), done("a", "b", version=8))
    page = told(board, known)
    assert page["rounds"] == []
    assert page["history"]["rows"][f"{MODEL}/v8"]["state"] == "complete"


def test_loss_of_the_bus_is_told_with_the_time_when_it_began() -> None:
    board = board_of()
    board.lose(T0_NS + NS_PER_S)
    board.lose(T0_NS + 2 * NS_PER_S, "no server answers")
    link = told(board)["link"]
    assert (link["connected"], link["since_s"]) == (False, T0_NS / 1e9 + 1)
    assert link["reason"] == "no server answers"
    board.lose(T0_NS + 3 * NS_PER_S)
    assert told(board)["link"] == link
    board.connect("nats://bus:4222", T0_NS + 4 * NS_PER_S)
    assert told(board)["link"]["connected"]
    assert told(board)["link"]["reason"] == ""


def test_page_that_comes_later_is_told_the_time_though_nothing_changed() -> None:
    board = board_of(*whole_round())
    first, later = (
        msgspec.json.decode(board.changes(0, T0_NS + after_s * NS_PER_S)) for after_s in (1, 600)
    )
    assert later.pop("now_s") - first.pop("now_s") == 599
    assert later == first


@pytest.mark.anyio
async def test_wait_returns_at_the_next_revision() -> None:
    board = board_of()
    woken = anyio.Event()

    async def wait() -> None:
        await board.wait(board.revision)
        woken.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert not woken.is_set()
        tell(board, state("a"))
        with anyio.fail_after(10):
            await woken.wait()
