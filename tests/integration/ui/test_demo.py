"""The page beside the demo: a round as it runs, its waterfall, the report of it.

`WEIGHTBUS_UI_PICTURES` names a folder for pictures of what is seen: those of docs/ui.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from playwright.async_api import Browser
from playwright.async_api import Error as PlaywrightError

from tests.engine_paths import short_path
from tests.integration.ui.pages import Visit, open_ui, visit

__all__ = ("short_path",)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

FLIGHT_MS = 20_000


@contextmanager
def demo(directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "weightbus", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"},
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """The first line that matches."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            return found.group(0)
    pytest.fail(f"{pattern!r} was never printed: {seen}")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    directory = Path(os.environ.get("WEIGHTBUS_UI_PICTURES", tmp_path))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


async def test_page_shows_the_demo_and_the_waterfall_of_its_rounds(
    short_path: Path, pictures: Path, browser: Browser
) -> None:
    with demo(short_path) as process:
        bus_url = await anyio.to_thread.run_sync(until, process, r"nats://[^\s;]+")
        async with (
            open_ui(bus_url) as url,
            visit(browser, url) as shown,
            visit(browser, url, color_scheme="dark") as dark,
        ):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(shown.sees, "#flight .flight-row", "minilm")
                await anyio.to_thread.run_sync(until, process, "engine b is killed")
                with suppress(PlaywrightError):  # a picture of a round in flight, if we are quick
                    await shown.page.get_by_text("1 of 3 serves it").wait_for(timeout=FLIGHT_MS)
                await shown.shot(pictures, "fleet")
                await anyio.to_thread.run_sync(until, process, "d holds version 4")
            for name in ("a", "b", "c", "d", "moe"):
                await shown.sees("#engines .row", name)
            await shown.page.locator("#history .row", has_text="4 of 4").click()
            await see_waterfall(shown)
            await shown.shot(pictures, "waterfall")
            await dark.page.goto(shown.page.url)
            await see_waterfall(dark)
            await dark.shot(pictures, "waterfall-dark")
            async with shown.page.expect_download() as download:
                await shown.page.get_by_role("link", name="HTML report").click()
            report = short_path / "report.html"
            await (await download.value).save_as(report)
        process.terminate()
        process.communicate()
    async with visit(browser, report.as_uri(), offline=True) as read:
        await see_waterfall(read)
        assert read.requested == [report.as_uri()]
        await read.shot(pictures, "report")


async def see_waterfall(shown: Visit) -> None:
    await shown.sees(".wf-head h2", "minilm version")
    await shown.sees(".wf-told", "Critical path")
    await shown.sees(".wf-chart .row", "reload")
    assert await shown.page.locator(".wf-chart .bar").count() > 4
