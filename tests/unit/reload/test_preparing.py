"""Work beside the serving: begun once, told of, stopped, and waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.preparing import PrepareBudget, Preparing

BUDGET_S = 30.0


class Work:
    """Runs until it is let go, or told to stop."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.runs = 0
        self.threads: list[str] = []

    def __call__(self, budget: PrepareBudget) -> None:
        self.runs += 1
        self.threads.append(threading.current_thread().name)
        self.begun.set()
        while not self.may_end.wait(1e-3):
            budget.check()


@pytest.fixture
def preparing() -> Iterator[Preparing]:
    preparing = Preparing()
    yield preparing
    preparing.finish()


def test_short_work_is_done_at_once_and_only_once(preparing: Preparing) -> None:
    work = Work()
    work.may_end.set()
    budget = Deadline("prepare", BUDGET_S)
    while not preparing.ask("a", work, BUDGET_S).ready:  # a slow machine may need another look
        budget.check()
    assert preparing.ask("a", work, BUDGET_S) == (True, "")
    assert work.runs == 1
    assert threading.current_thread().name not in work.threads


def test_long_work_is_told_to_be_under_way_until_it_has_ended(preparing: Preparing) -> None:
    work = Work()
    assert not preparing.ask("a", work, BUDGET_S).ready
    assert not preparing.ask("a", work, BUDGET_S).ready
    work.may_end.set()
    preparing.finish("a")
    assert work.runs == 1


def test_failure_is_told_and_raises_nothing(
    preparing: Preparing, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(budget: PrepareBudget) -> None:
        raise ValueError("no such block")

    budget = Deadline("prepare", BUDGET_S)
    while not (progress := preparing.ask("a", fail, BUDGET_S)).ready:
        budget.check()
    assert progress.reason == "ValueError: no such block"
    assert "no such block" in caplog.text


def test_work_of_another_key_is_stopped_and_then_replaced(preparing: Preparing) -> None:
    old, new = Work(), Work()
    assert not preparing.ask("old", old, BUDGET_S).ready
    assert old.begun.wait(BUDGET_S)
    new.may_end.set()
    budget = Deadline("prepare", BUDGET_S)
    while not preparing.ask("new", new, BUDGET_S).ready:
        budget.check()
    assert (old.runs, new.runs) == (1, 1)
    assert not old.may_end.is_set()


def test_finish_waits_for_the_same_work_and_stops_another(preparing: Preparing) -> None:
    work = Work()
    preparing.ask("a", work, BUDGET_S)
    threading.Timer(0.05, work.may_end.set).start()
    preparing.finish("a")
    assert work.may_end.is_set()
    endless = Work()
    preparing.ask("b", endless, BUDGET_S)
    preparing.finish("c")
    assert not endless.may_end.is_set()


def test_work_ends_when_its_budget_is_used_up(preparing: Preparing) -> None:
    work = Work()
    preparing.ask("a", work, 0.02)
    budget = Deadline("prepare", BUDGET_S)
    while not (progress := preparing.ask("a", work, 0.02)).ready:
        budget.check()
    assert progress.reason.startswith("DeadlineExceeded: ")
