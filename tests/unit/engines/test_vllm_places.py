"""What a rank has open of what it read in place, as its consumer knows it."""

from __future__ import annotations

from weightbus.consumers.engines.vllm.places import MOST_SEGMENTS, OpenPlaces
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.worker import Feed, InPlace, Relay


def slot(name: str, generation: int = 2, segments: int = 1) -> InPlace:
    return InPlace(
        sources=tuple(
            SharedMemorySegment(
                name=f"weightbus-{name}{number}", host_id="here", generation=generation
            )
            for number in range(segments)
        )
    )


RELAY = Relay(block="weightbus-staging", window_bytes=4096, slots=2, turn=1)


def take(places: OpenPlaces, feed: Feed) -> None:
    """As an engine takes a version."""
    if not places.has(0, feed):
        places.ask([0])
        places.answer({0: feed})
    before = places.begin({0: feed})
    assert not places.has(0, feed), "it is not known how that ends"
    places.end({0: feed}, before)


def test_two_slots_in_turn_are_open_whatever_their_generation() -> None:
    places = OpenPlaces()
    for generation in (2, 4, 6):
        for name in "ab":
            assert places.has(0, slot(name, generation)) == (generation > 2)
            take(places, slot(name, generation))
    assert not places.has(1, slot("a")), "of another rank"


def test_slot_that_was_not_read_for_long_may_have_been_let_go() -> None:
    """As of an engine that skips every second version."""
    places = OpenPlaces()
    for name in "abaaaa":
        take(places, slot(name))
    assert places.has(0, slot("a"))
    assert not places.has(0, slot("b"))


def test_nothing_is_known_to_be_open_when_bytes_came_in_another_way() -> None:
    places = OpenPlaces()
    take(places, slot("a"))
    take(places, RELAY)
    assert not places.has(0, slot("a"))


def test_rank_that_may_be_preparing_something_is_asked() -> None:
    """Else the work that it was given before would be waited for within the pause."""
    places = OpenPlaces()
    take(places, slot("a"))
    places.ask([0])
    assert not places.has(0, slot("a"))
    places.answer({0: slot("b")})
    assert places.has(0, slot("a"))


def test_failed_update_and_new_workers_leave_nothing_known() -> None:
    places = OpenPlaces()
    take(places, slot("a"))
    places.begin({0: slot("a")})
    assert not places.has(0, slot("a"))
    take(places, slot("a"))
    places.forget()
    assert not places.has(0, slot("a"))


def test_so_many_segments_are_always_prepared() -> None:
    places = OpenPlaces()
    take(places, slot("a", segments=MOST_SEGMENTS))
    assert places.has(0, slot("a", segments=MOST_SEGMENTS))
    take(places, slot("a", segments=MOST_SEGMENTS + 1))
    assert not places.has(0, slot("a", segments=MOST_SEGMENTS + 1))
