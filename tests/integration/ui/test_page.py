"""The page about a real bus: live, across restarts, by keyboard, without colours."""

from __future__ import annotations

import os
import signal

import pytest
from msgspec import structs
from playwright.async_api import Browser

from tests.integration.bus.processes import halt
from tests.integration.ui.pages import Visit, open_teller, open_ui, put, visit
from tests.nats_server import NatsServer
from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    done,
    failed,
    join,
    plan,
    ready,
    refused,
    route,
    stage,
    state,
    whole_round,
)
from weightbus.bus.connection import Bus
from weightbus.schemas.base import Message
from weightbus.schemas.progress import DeadLetter

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

HOSTILE = "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"
"""As a reason that came from anyone on the bus."""

TAIL_IS_SHOWN = """(cell) => {
    const box = cell.getBoundingClientRect(), tail = cell.lastChild.getBoundingClientRect();
    const table = cell.closest(".rows").getBoundingClientRect();
    const right = Math.min(box.right, table.right);
    const isShown = tail.left >= box.left - 0.5 && tail.right <= right + 0.5;
    return [cell.textContent, isShown];
}"""

WHOLE: list[Message] = [
    *whole_round(),
    state("a", "serving", 7, at_ms=500),
    state("b", "quarantined", -1, at_ms=500),
]


async def test_page_shows_a_round_as_it_happens(teller: Bus, shown: Visit) -> None:
    await put(teller, state("a"), state("b"))
    await shown.sees("#engines .row", "serving")
    await put(teller, ready(8), join("a", 8), join("b", 8))
    await shown.sees("#flight .flight-row", "0 of 2 serve it")
    await shown.sees("#engines .row", "\u2193 1")
    await put(teller, plan(version=8), stage("a", "fetch", 10, 40, rank=0, version=8))
    await shown.sees("#flight .flight-row", "last: a/0 fetch")
    await shown.sees("#flight .flight-row", "led by a")
    await put(teller, complete("a", 8, end_ms=600))
    await shown.sees("#flight .flight-row", "1 of 2 serves it")
    await shown.page.locator("#flight .flight-row").click()
    await shown.sees(".wf-state", "1 of 2 engines done")
    await put(teller, complete("b", 8, end_ms=700), done("a", "b", version=8))
    await shown.sees(".wf-state", "2 engines serving")
    await shown.page.get_by_role("link", name="Fleet", exact=False).first.click()
    await shown.sees("#history .row", "v8")
    await shown.sees("#flight", "Nothing is on its way")


async def test_page_shows_what_the_bus_remembers_when_it_is_opened_later(
    teller: Bus, browser: Browser, nats_server: NatsServer
) -> None:
    await put(teller, *WHOLE)
    async with open_ui(nats_server.url) as url, visit(browser, url) as shown:
        await shown.sees("#engines .row", "quarantined")
        await shown.sees("#problems .problem", "TornRead: segment s has generation 9")
        await shown.page.locator("#history .row").click()
        await shown.sees(".wf-problems", "TornRead")
        await shown.sees(".wf-chart .row", "failed")
        links = await shown.page.locator("#exports a").all()
        assert len(links) == 4
        for link in links:
            path = await link.get_attribute("href")
            answer = await shown.page.request.get(f"{url}{path}")
            assert answer.ok, f"{path}: {answer.status} {await answer.text()}"
            assert "attachment" in answer.headers["content-disposition"]


async def test_good_round_stays_good_on_the_page_when_an_engine_is_refused_later(
    teller: Bus, shown: Visit
) -> None:
    await put(teller, ready(), join("a"), plan(route("a")), complete("a"), done("a"))
    await shown.sees("#history .row .mark.good", "\u2713")
    await put(teller, *refused("c"))
    await shown.sees("#problems .problem .warn", "\u25b7")
    await shown.sees("#problems .problem", "c came late")
    await shown.sees("#history .row", "1 of 1, 1 late")
    assert await shown.page.locator("#history .bad, #problems .bad").count() == 0
    await shown.page.locator("#history .row").click()
    await shown.sees(".wf-state.good", "1 engine serving")
    await shown.sees(".wf-late", "c came when the round was over, 300 s after CheckpointReady")


async def test_long_names_of_rounds_are_told_apart_in_the_history(
    teller: Bus, shown: Visit
) -> None:
    names = [f"v7-rollout-engine-of-the-second-hall-{number}-1" for number in ("3f9a1c", "77b0e2")]
    for name in names:
        alone = [join("a"), plan(route("a")), complete("a"), done("a")]
        await put(teller, *(structs.replace(message, round=name) for message in alone))
    for width in (1440, 1401, 1182, 900):
        await shown.page.set_viewport_size({"width": width, "height": 900})
        for name in names:
            row = shown.page.locator("#history .row", has_text=name)
            await row.wait_for()
            cut = await row.locator(".tailed").evaluate(TAIL_IS_SHOWN)
            assert cut == [name, True], width


@pytest.mark.parametrize("patience_s", ["60", "0.5"], ids=["reconnects", "opens it anew"])
async def test_page_goes_on_by_itself_when_the_bus_restarts(
    browser: Browser, nats_server: NatsServer, patience_s: str
) -> None:
    """Within the connection's patience, and after it was given up for good."""
    quick = {"WEIGHTBUS_RECONNECT_FOR_S": patience_s, "WEIGHTBUS_CONNECT_TIMEOUT_S": "1"}
    async with open_ui(nats_server.url, **quick) as url, visit(browser, url) as shown:
        await shown.sees("#link", "live")
        nats_server.kill()
        await shown.sees("#link", "bus lost, trying since")
        if patience_s != "60":
            await shown.sees("#link", "lost for 0.5 s")
        nats_server.start()
        await shown.sees("#link", "live")
        async with open_teller(nats_server.settings) as bus:
            await put(bus, *WHOLE)
        await shown.sees("#history .row", "v7")
        await shown.sees("#engines .row", "quarantined")


async def test_page_says_so_when_the_bus_hangs(browser: Browser, nats_server: NatsServer) -> None:
    quick = {"WEIGHTBUS_REQUEST_TIMEOUT_S": "1"}
    async with open_ui(nats_server.url, **quick) as url, visit(browser, url) as shown:
        await shown.sees("#link", "live")
        halt(nats_server.pid)
        try:
            await shown.sees("#link", "UTC: it does not answer")
        finally:
            os.kill(nats_server.pid, signal.SIGCONT)
        await shown.sees("#link", "live")


async def test_times_are_told_as_in_the_waterfall_wherever_the_reader_is(
    teller: Bus, browser: Browser, ui_url: str
) -> None:
    await put(teller, *WHOLE)
    async with visit(browser, ui_url, timezone_id="Asia/Tokyo") as shown:
        await shown.sees("#problems time", "2023-11-14 22:13:20 UTC")
        await shown.sees("#history .rows-head", "began (UTC)")
        today = await shown.page.evaluate("new Date().toISOString().slice(11, 13)")
        began = await shown.page.locator("#history .row span").nth(1).inner_text()
        assert (int(today) - int(began[-8:-6])) % 24 in (0, 1), f"{began} in UTC"
        await shown.page.locator("#history .row").click()
        await shown.sees(".wf-sub", "2023-11-14 22:13:20")


async def test_page_is_used_by_keyboard_alone(teller: Bus, shown: Visit) -> None:
    await put(teller, *WHOLE)
    await shown.sees("#history .row", "v7")
    page, keys = shown.page, shown.page.keyboard
    await keys.press("Tab")
    assert await focused(shown) == "Skip to content"
    await keys.press("Enter")
    assert await page.evaluate("document.activeElement.id") == "main"
    await keys.press("Tab")
    assert await page.evaluate("document.activeElement.dataset.key") == f"{MODEL}/a"
    assert await outline_px(shown) >= 2, "a focus ring is drawn"
    await keys.press("ArrowDown")
    assert await page.evaluate("document.activeElement.dataset.key") == f"{MODEL}/b"
    await keys.press("Tab")
    assert await page.evaluate("document.activeElement.dataset.key") == f"{MODEL}/v7"
    await keys.press("Enter")
    await shown.sees(".wf-chart .row", "reload")
    await shown.holds("document.activeElement.tagName == 'H2'")
    while "critical stage" not in await focused(shown):
        await keys.press("Tab")
    await keys.press("Enter")
    await shown.sees(".wf-detail", "a negotiate")
    await keys.press("c")
    await shown.sees(".wf-detail", "a rank 0 fetch")
    await keys.press("ArrowLeft")
    await keys.press("ArrowLeft")
    folded = page.locator('.wf-chart .row[aria-expanded="false"]')
    assert await folded.count() == 1
    await keys.press("ArrowRight")
    assert await folded.count() == 0
    await keys.press("End")
    await shown.sees(".wf-detail", "failed: TornRead")
    await keys.press("Escape")
    await shown.holds(f"document.activeElement.dataset.key == '{MODEL}/v7'")
    await keys.press("/")
    await keys.type("no such engine")
    await shown.sees("#engines", "No engine matches")
    await keys.press("Escape")
    await shown.sees("#engines .row", "serving")


async def focused(shown: Visit) -> str:
    return str(await shown.page.evaluate("document.activeElement.textContent"))


async def outline_px(shown: Visit) -> float:
    width = await shown.page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    return float(str(width).removesuffix("px"))


async def test_page_tells_everything_in_words_and_shapes_where_there_are_no_colours(
    teller: Bus, browser: Browser, nats_server: NatsServer
) -> None:
    await put(teller, *WHOLE, ready(8), join("a", 8))
    plain = {"forced_colors": "active", "reduced_motion": "reduce"}
    async with open_ui(nats_server.url) as url, visit(browser, url, **plain) as shown:
        await shown.sees("#link", "live")
        for mark, word in (("\u25cf", "serving"), ("\u25a0", "quarantined")):
            await shown.sees("#engines .row", word)
            await shown.sees("#engines .row", mark)
        await shown.sees("#history .row", "\u2715")
        await shown.sees("#history .row", "1 of 2, 1 failed")
        await shown.page.locator("#history .row").click()
        await shown.sees(".wf-chart .row", "\u2715 failed")
        await shown.sees(".wf-chart .row.is-critical", "\u25c6")
        look = "nodes => nodes.map(node => { const s = getComputedStyle(node);"
        seen = await shown.page.locator(".wf-chart .is-stage .bar").evaluate_all(
            f"{look} return [s.backgroundColor, s.borderStyle, s.outlineStyle] }})"
        )
        backgrounds = {background for background, _, _ in seen}
        assert len(backgrounds) == 2, f"bars of whole stages are of one colour: {seen}"
        assert {border for _, border, _ in seen} == {"solid", "dashed"}, "a failed one is dashed"
        assert {outline for _, _, outline in seen} == {"solid", "none"}, "critical ones have a rim"


async def test_text_of_the_bus_stays_text(teller: Bus, shown: Visit) -> None:
    letter = DeadLetter(model=MODEL, subject=f"weightbus.{MODEL}.x", reason=HOSTILE)
    torn = stage("b", "fetch", 10, 20, rank=0, error=HOSTILE)
    told = [ready(), join("b"), plan(route("b", reason=HOSTILE)), torn, failed("b", reason=HOSTILE)]
    await put(teller, *told, done(failed={"b": HOSTILE}), letter)
    await shown.sees("#problems .problem", HOSTILE)
    assert await shown.page.locator("#problems .problem", has_text=HOSTILE).count() == 2
    await shown.page.locator("#history .row").click()
    await shown.sees(".wf-problems", HOSTILE)
    await shown.page.locator(".wf-chart .row.is-stage").click()
    await shown.sees(".wf-detail", HOSTILE)
    await shown.page.locator(".wf-chart .row.is-engine").click()
    await shown.sees(".wf-detail", HOSTILE)
    assert await shown.page.evaluate("window.harmed") is None
    assert await shown.page.locator("main script, main img").count() == 0


async def test_page_filters_by_model_and_engine(teller: Bus, shown: Visit) -> None:
    await put(teller, *WHOLE, state("zed", model="other"), ready(3, model="other"))
    await shown.sees("#engines .row", "zed")
    box = shown.page.get_by_label("Filter by model or engine")
    await box.fill("OTHER")
    await shown.holds("document.querySelectorAll('#engines .row').length == 1")
    await shown.sees("#engines .row", "zed")
    await shown.sees("#engines-count", "1 of 3")
    assert await shown.page.locator("#history .row:visible").count() == 0
    assert await shown.page.locator("#problems .problem").count() == 0
    await shown.sees("#history", "No round that ended matches the filter")
    await shown.sees("#history-count", "0 of 1")
    await shown.sees("#problems", "No failure or dead letter matches the filter")
    await put(teller, join("zed", 3, model="other"))
    await box.fill("nobody")
    await shown.sees("#flight", "No round in flight matches the filter")
    await box.fill("b")
    await shown.sees("#history .row", "v7")
    await box.fill("zed")
    await shown.sees("#flight .flight-row", "to go: zed")
    assert await shown.page.locator("#history .row:visible").count() == 0


async def test_page_of_one_model_shows_no_other(
    teller: Bus, browser: Browser, nats_server: NatsServer
) -> None:
    await put(teller, *WHOLE, state("zed", model="other"), ready(3, model="other"))
    async with (
        open_ui(nats_server.url, "--model", "other") as url,
        visit(browser, url) as shown,
    ):
        await shown.sees("#engines .row", "zed")
        assert await shown.page.locator("#engines .row").count() == 1
        assert await shown.page.locator("#history .row").count() == 0


async def test_page_whose_address_cannot_be_read_shows_the_fleet(
    teller: Bus, browser: Browser, ui_url: str
) -> None:
    await put(teller, state("a"))
    async with visit(browser, f"{ui_url}#/%/x") as shown:
        await shown.sees("#link", "live")
        await shown.sees("#engines .row", "serving")


async def test_pages_that_nobody_sees_leave_the_browser_its_connections(
    teller: Bus, browser: Browser, ui_url: str
) -> None:
    """It opens six to a host at most. A page in the background is shown to a test as visible."""
    async with visit(browser, ui_url) as first:
        await first.sees("#link", "live")
        await turn(first, "hidden")
        for _ in range(5):
            other = Visit(await first.page.context.new_page())
            await other.page.goto(ui_url)
            await other.sees("#link", "live")
            await turn(other, "hidden")
        last = Visit(await first.page.context.new_page())
        await last.page.goto(ui_url)
        await last.sees("#link", "live")
        await put(teller, state("newcomer"))
        await last.sees("#engines .row", "newcomer")
        assert await first.page.locator("#engines .row").count() == 0
        await turn(first, "visible")
        await first.sees("#engines .row", "newcomer")


async def turn(shown: Visit, state: str) -> None:
    """As if the reader had gone to another tab, or come back."""
    await shown.page.evaluate(
        """state => {
          for (const [name, value] of [["visibilityState", state], ["hidden", state === "hidden"]])
            Object.defineProperty(document, name, { configurable: true, get: () => value });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        state,
    )


async def test_page_says_so_when_its_server_is_gone_and_goes_on_when_it_is_back(
    browser: Browser, nats_server: NatsServer
) -> None:
    async with open_ui(nats_server.url) as url:
        context = await browser.new_context()
        shown = Visit(await context.new_page())
        await shown.page.goto(url)
        await shown.sees("#link", "live")
    await shown.sees("#link", "page server lost, trying since")
    port = url.rpartition(":")[2].strip("/")
    async with open_ui(nats_server.url, "--port", port):
        await shown.sees("#link", "live")
        await context.close()
