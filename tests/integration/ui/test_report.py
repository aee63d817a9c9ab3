"""The HTML report in a real browser, from disk, with no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs
from playwright.async_api import Browser

from tests.integration.ui.pages import visit
from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    done,
    join,
    plan,
    ready,
    refused,
    stage,
    whole_round,
)
from weightbus.schemas.base import Message
from weightbus.tracing.exports.html import html_report
from weightbus.tracing.history import Heard, build_waterfall
from weightbus.tracing.waterfall import Waterfall

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"


def waterfall(*messages: Message) -> Waterfall:
    told = messages or whole_round()
    made = build_waterfall(MODEL, "v7", [Heard(message) for message in told])
    assert made is not None
    return made


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_report_opens_from_disk_and_asks_nobody_for_anything(
    browser: Browser, tmp_path: Path, scheme: str
) -> None:
    file = tmp_path / "round.html"
    file.write_text(html_report(waterfall()), "utf-8")
    async with visit(browser, file.as_uri(), offline=True, color_scheme=scheme) as shown:
        await shown.sees("h2", "minilm version 7")
        await shown.sees(".wf-told", waterfall().critical_told)
        await shown.sees(".wf-problems", "TornRead: segment s has generation 9")
        head = await shown.page.locator(".wf-chart .rows-head [role=columnheader]").all()
        columns = [await each.inner_text() for each in head]
        assert columns[2:] == ["time", "bytes", "GB/s", "route, link"]
        rows = await shown.page.locator(".wf-chart .row").all_inner_texts()
        assert len(rows) == 1 + 2 + 8, "the critical path, two engines, eight stages"
        assert await shown.page.get_by_role("button", name="Only the update").count() == 0
        await shown.page.locator(".wf-chart .row", has_text="failed").last.click()
        await shown.sees(".wf-detail", "b rank 1 reload")
        assert shown.requested == [file.as_uri()]
        width = await shown.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 1440, "nothing is wider than the page"


async def test_report_fits_a_narrow_page(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "round.html"
    file.write_text(html_report(waterfall()), "utf-8")
    narrow = {"width": 390, "height": 800}
    async with visit(browser, file.as_uri(), viewport=narrow) as shown:
        await shown.sees(".wf-chart .row", "reload")
        assert await shown.page.evaluate("document.documentElement.scrollWidth") <= 390


OVERLAPS = """() => {
    const labels = [...document.querySelectorAll(".axis span")];
    const boxes = labels.map((label) => label.getBoundingClientRect());
    const told = labels.map((label) => label.textContent).join(" | ");
    const isBad = boxes.some((box, at) => at && box.left < boxes[at - 1].right + 3);
    const edge = document.querySelector(".axis").getBoundingClientRect();
    const isOut = boxes.some((box) => box.left < edge.left - 1 || box.right > edge.right + 1);
    return [labels.length, isBad || isOut ? told : ""];
}"""


@pytest.mark.parametrize("end_ms", [97, 370, 999, 1_010, 12_345, 98_765, 3_600_000, 10_292_000])
async def test_labels_of_the_axis_do_not_overlap_at_any_width(
    browser: Browser, tmp_path: Path, end_ms: int
) -> None:
    """Also when the page is made narrower, or wider, while it is open."""
    file = tmp_path / "round.html"
    long = waterfall(ready(), join("a"), plan(), complete("a", end_ms=end_ms))
    file.write_text(html_report(long), "utf-8")
    async with visit(browser, file.as_uri()) as shown:
        await shown.sees(".wf-chart .row", "a")
        for width in (1440, 1000, 861, 860, 700, 500, 430, 390, 360, 320, 1440):
            await shown.page.set_viewport_size({"width": width, "height": 800})
            await shown.holds("new Promise((done) => requestAnimationFrame(() => "
                              "requestAnimationFrame(() => done(true))))")  # fmt: skip
            labels, overlapping = await shown.page.evaluate(OVERLAPS)
            assert (labels >= 2, overlapping) == (True, ""), width
        assert labels >= 3, "there is room for more on a wide page"


@pytest.mark.parametrize("engine", ["c", "a"], ids=["another", "one that was started anew"])
async def test_report_tells_a_late_engine_apart_and_stays_as_wide(
    browser: Browser, tmp_path: Path, engine: str
) -> None:
    good = [
        ready(), join("a"), join("b"), plan(), stage("a", "negotiate", 2, 10), complete("a"),
        complete("b", end_ms=140), done("a", "b"),
    ]  # fmt: skip
    file = tmp_path / "round.html"
    file.write_text(html_report(waterfall(*good, *refused(engine))), "utf-8")
    async with visit(browser, file.as_uri()) as shown:
        await shown.sees(".wf-state.good", "2 engines serving")
        await shown.sees(".wf-late", f"{engine} came when the round was over, 300 s after")
        assert await shown.page.locator(".wf-problems").is_hidden()
        labels = await shown.page.locator(".axis span").all_inner_texts()
        assert labels[-1] == "100 ms", labels
        assert await shown.page.locator(".wf-chart .row", has_text="failed").count() == 0


@pytest.mark.parametrize(
    ("residuals_s", "said"),
    [
        ((0.002, 0.003, 0.001), "\u00b1 3.00 ms"),
        ((0.002, None, 0.001), "some were not compared"),
        ((None, 0.003, 0.001), "some were not compared"),
    ],
    ids=["all known", "not of an engine", "not of the trainer"],
)
async def test_report_tells_how_far_clocks_may_be_off_only_if_all_were_compared(
    browser: Browser, tmp_path: Path, residuals_s: tuple[float | None, ...], said: str
) -> None:
    trainer, *of_engines = residuals_s
    made = waterfall()
    engines = tuple(
        structs.replace(engine, clock_residual_s=residual_s)
        for engine, residual_s in zip(made.engines, of_engines, strict=True)
    )
    file = tmp_path / "round.html"
    told = structs.replace(made, engines=engines, clock_residual_s=trainer)
    file.write_text(html_report(told), "utf-8")
    async with visit(browser, file.as_uri()) as shown:
        await shown.sees(".wf-facts div:has(dt:text('clocks'))", said)


async def test_hostile_text_in_a_report_stays_text(browser: Browser, tmp_path: Path) -> None:
    engine = structs.replace(waterfall().engines[1], reason=HOSTILE)
    file = tmp_path / "round.html"
    hostile = structs.replace(waterfall(), engines=(engine,), critical_told=HOSTILE)
    file.write_text(html_report(hostile), "utf-8")
    async with visit(browser, file.as_uri()) as shown:
        await shown.sees(".wf-problems", HOSTILE)
        await shown.sees(".wf-told", HOSTILE)
        assert await shown.page.evaluate("window.harmed") is None
        assert await shown.page.locator("main script, main img").count() == 0
