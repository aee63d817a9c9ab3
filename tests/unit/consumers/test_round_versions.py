"""Which version is gone for next, after every history."""

from __future__ import annotations

import pytest

from tests.unit.consumers.machines import NS_PER_S, ready
from weightbus.consumers.round.config import RoundConfig
from weightbus.consumers.round.versions import MAX_KNOWN, Versions

CONFIG = RoundConfig(model="m", engine="a", consumer="a-1", host_id="h", backoff_s=1.0)


def known(*versions: int) -> Versions:
    book = Versions(CONFIG)
    for version in versions:
        assert book.see(ready(version), "", 0)
    return book


def fail(book: Versions, floor: int, *, touched: bool, cause: str = "WorkerLost") -> int:
    """The best version fails; which one it was."""
    best = book.best(floor, touched=touched)
    assert best is not None
    book.fail(best, cause, 0)
    return best.version


def best(book: Versions, floor: int, *, touched: bool = False) -> int | None:
    found = book.best(floor, touched=touched)
    return None if found is None else found.version


def test_best_is_the_newest_when_several_can_be_had() -> None:
    assert best(known(5, 7, 6), floor=4) == 7


def test_best_is_none_when_all_are_at_the_floor_or_below() -> None:
    assert best(known(3, 4), floor=4) is None


def test_floor_itself_can_be_had_again_when_the_engine_was_touched() -> None:
    assert best(known(3, 4), floor=4, touched=True) == 4


def test_older_than_the_floor_is_never_best_when_the_engine_was_touched() -> None:
    assert best(known(3), floor=4, touched=True) is None


def test_failed_version_is_left_alone_when_the_engine_serves_another() -> None:
    book = known(5, 6)
    assert [fail(book, 4, touched=False) for _ in range(8)] == [6, 6, 6, 6, 5, 5, 5, 5]
    assert best(book, 4) is None


def test_failed_versions_are_tried_in_turns_when_the_engine_is_down() -> None:
    book = known(5, 6)
    tried = [fail(book, 5, touched=True) for _ in range(6)]
    assert tried == [6, 6, 5, 5, 6, 6]


@pytest.mark.parametrize("cause", ["CheckpointRefused", "MessageInvalid", "VersionRetired"])
@pytest.mark.parametrize("touched", [False, True])
def test_version_is_left_alone_when_it_cannot_be_used_at_all(cause: str, touched: bool) -> None:
    book = known(5, 6)
    assert fail(book, 4, touched=touched, cause=cause) == 6
    assert best(book, 4, touched=touched) == 5


def test_version_without_a_plan_is_left_alone_only_while_the_engine_serves() -> None:
    book = known(5, 6)
    assert fail(book, 4, touched=False, cause="PlanError") == 6
    assert best(book, 4, touched=False) == 5
    assert best(book, 4, touched=True) == 6


@pytest.mark.parametrize("cause", ["RouteUnavailable", "SegmentUnavailable", "PlanError"])
def test_version_is_never_given_up_when_the_engine_is_down(cause: str) -> None:
    for book, floor, touched in ((known(6), 5, True), (known(6), -1, False)):
        assert [fail(book, floor, touched=touched, cause=cause) for _ in range(20)] == [6] * 20


def test_version_is_tried_again_when_no_route_was_available_for_a_moment() -> None:
    book = known(6)
    assert [fail(book, 5, touched=False, cause="RouteUnavailable") for _ in range(4)] == [6] * 4
    assert best(book, 5) is None


def test_pauses_double_up_to_the_limit_when_a_version_fails_again() -> None:
    book = known(5)
    pauses_s = []
    for _ in range(8):
        fail(book, -1, touched=False)
        found = book.best(-1, touched=False)
        assert found is not None
        pauses_s.append(found.not_before_ns / NS_PER_S)
    assert pauses_s == [1, 2, 4, 8, 16, 30, 30, 30]


def test_repeat_says_nothing_new_when_a_checkpoint_is_heard_twice() -> None:
    book = known(5)
    assert not book.see(ready(5), "", 0)


def test_retired_version_stays_gone_when_it_is_heard_of_again() -> None:
    book = known(5)
    book.retire(5)
    assert best(book, 4) is None
    assert not book.see(ready(5), "", 0)


def test_version_can_be_had_when_another_producer_has_retired_its_own() -> None:
    book = known(5)
    book.retire(5, "another")
    assert best(book, 4) == 5
    book.retire(5, ready(5).producer)
    assert best(book, 4) is None


def test_retired_version_can_be_had_when_it_is_published_again() -> None:
    book = known(5)
    fail(book, 4, touched=False, cause="MessageInvalid")
    book.retire(5)
    assert book.see(ready(5, created_ns=99), "", 0)
    found = book.best(4, touched=False)
    assert found is not None
    assert found.failures == 0


def test_failure_of_an_earlier_publication_does_not_count_when_it_is_published_again() -> None:
    book = known(5)
    earlier = book.best(4, touched=False)
    assert earlier is not None
    book.see(ready(5, created_ns=99), "", 0)
    book.fail(earlier, "MessageInvalid", 0)
    assert best(book, 4) == 5


def test_no_version_is_given_up_when_it_failed_for_want_of_an_engine() -> None:
    book = known(4, 5)
    for _ in range(20):
        found = book.best(3, touched=True)
        assert found is not None
        assert found.version == 5
        book.fail(found, "EngineUnavailable", 0, prepared=False)
    book.serve(4)
    assert best(book, 4) == 5


def test_version_is_given_up_when_the_engine_is_lost_with_it_again_and_again() -> None:
    book = known(5)
    while (found := book.best(4, touched=False)) is not None:
        book.fail(found, "EngineUnavailable", 0)
    assert best(book, 4) is None


def test_older_versions_are_forgotten_when_a_version_is_served() -> None:
    book = known(4, 5, 6)
    fail(book, 3, touched=False)
    book.serve(6)
    found = book.best(6, touched=True)
    assert found is not None
    assert (found.version, found.failures) == (6, 0)
    assert best(book, 3) == 6


def test_oldest_versions_make_room_when_too_many_are_known() -> None:
    book = known(*range(MAX_KNOWN + 2))
    assert [fail(book, -1, touched=True) for _ in range(2 * MAX_KNOWN)][-1] == 2
