"""Two hundred engines on a real bus: all are reached, and the document stays small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import anyio
import pytest

from tests.integration.ui.pages import Visit, put
from tests.unit.tracing.rounds import complete, done, join, plan, ready, route, stage, state
from weightbus.bus.connection import Bus
from weightbus.schemas.base import Message, Stage

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]

ENGINES = tuple(f"engine-{number:03}" for number in range(200))

NODES_MAX = 2500
"""Two hundred whole rows would be more."""

WATCH = """() => {
  window.most = 0;
  const frame = () => {
    window.most = Math.max(window.most, document.querySelectorAll("*").length);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}"""


async def test_page_stays_small_while_200_engines_update(teller: Bus, shown: Visit) -> None:
    async with anyio.create_task_group() as tasks:
        for engine in ENGINES:
            tasks.start_soon(teller.presence.put, state(engine, "serving", 7))
    await shown.sees("#engines-count", "200")
    await shown.page.evaluate(WATCH)
    is_seen = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_round, teller, is_seen)
        await shown.sees("#flight .flight-row", "of 200 serve it")
        is_seen.set()
        await shown.page.get_by_label("Filter by model or engine").fill("engine-19")
        await shown.sees("#engines-count", "10 of 200")
        await shown.page.get_by_label("Filter by model or engine").fill("")
        await shown.sees("#engines-count", "200")
    await shown.sees("#history .row", "200 of 200")
    assert 0 < await shown.page.evaluate("window.most") < NODES_MAX, "in any frame"


async def test_row_far_below_is_reached_by_keyboard_and_drawn_then(
    teller: Bus, shown: Visit
) -> None:
    async with anyio.create_task_group() as tasks:
        for engine in ENGINES:
            tasks.start_soon(teller.presence.put, state(engine, "serving", 7))
    await shown.sees("#engines-count", "200")
    rows = shown.page.locator("#engines .row")
    assert await rows.count() < 60
    await rows.first.focus()
    await shown.page.keyboard.press("End")
    await shown.sees("#engines .row", ENGINES[-1])
    assert await shown.page.evaluate("document.activeElement.ariaRowIndex") == "201"
    await shown.page.keyboard.press("PageUp")
    await shown.page.keyboard.press("ArrowUp")
    names = await rows.locator("b").all_inner_texts()
    assert names == sorted(names), "rows are in the document as on the screen"
    assert await rows.count() < 60


async def test_waterfall_of_200_engines_begins_folded_and_unfolds(
    teller: Bus, shown: Visit
) -> None:
    await run_round(teller)
    await shown.page.locator("#history .row", has_text="200 of 200").click()
    await shown.sees(".wf-state", "200 engines serving")
    assert await nodes(shown) < NODES_MAX
    rows = await shown.page.locator(".wf-chart .rows").get_attribute("aria-rowcount")
    assert 200 < int(rows or 0) < 220, "only what is on the critical path is unfolded"
    await shown.page.get_by_role("button", name="Unfold all").click()
    await shown.page.get_by_role("button", name="Fold all").wait_for()
    rows = await shown.page.locator(".wf-chart .rows").get_attribute("aria-rowcount")
    assert int(rows or 0) == 2 + 200 * 5
    assert await nodes(shown) < NODES_MAX


async def nodes(shown: Visit) -> int:
    return int(await shown.page.evaluate("document.querySelectorAll('*').length"))


STAGES: Final[Sequence[tuple[Stage, int | None, int, int]]] = (
    ("negotiate", None, 3, 9),
    ("fetch", 0, 10, 40),
    ("reload", 0, 40, 70),
    ("commit", None, 270, 272),
)
"""Stage, rank, start and end in milliseconds."""


async def run_round(teller: Bus, is_seen: anyio.Event | None = None) -> None:
    """1,203 messages, as fast as the bus takes them; those of its end once it was seen."""
    await put(teller, ready(8))
    await say(teller, [join(name, 8) for name in ENGINES])
    await put(teller, plan(*map(route, ENGINES), version=8))
    for kind, rank, start, end in STAGES:
        said = [
            stage(name, kind, start, end + at, rank=rank, version=8)
            for at, name in enumerate(ENGINES)
        ]
        await say(teller, said)
    if is_seen is not None:
        await is_seen.wait()
    await say(teller, [complete(name, 8, end_ms=300 + at) for at, name in enumerate(ENGINES)])
    await put(teller, done(*ENGINES, version=8))


async def say(teller: Bus, messages: Sequence[Message]) -> None:
    """All at once."""
    async with anyio.create_task_group() as tasks:
        for message in messages:
            tasks.start_soon(teller.publish, message)
