"""docs/sglang.md says what the code does: options, the loader, ways to pause, links."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from weightbus.cli.consume import command as consume
from weightbus.cli.engines import ADMIN_KEY_VARIABLE, KEY_VARIABLE, OPTIONS_OF
from weightbus.consumers.engines.sglang.engine import SglangSettings
from weightbus.consumers.engines.sglang.payload import LOADER

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "sglang.md").read_text()


def test_guide_starts_with_what_has_not_been_done() -> None:
    assert "**Not yet run on a real SGLang server.**" in GUIDE.splitlines()[2]


def test_guide_names_the_loader_and_there_is_one() -> None:
    assert f"--custom-weight-loader {LOADER}" in GUIDE
    module, _, function = LOADER.rpartition(".")
    assert callable(getattr(importlib.import_module(module), function))


def test_guide_names_every_option_of_the_engine_and_its_keys() -> None:
    known = {option for parameter in consume.params for option in parameter.opts}
    for name in OPTIONS_OF["sglang"]:
        assert f"--{name}" in known
        assert f"--{name}" in GUIDE
    assert KEY_VARIABLE in GUIDE
    assert ADMIN_KEY_VARIABLE in GUIDE


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        (SglangSettings(), "| `keep` (default) | `reset` (default) | `{}` |"),
        (SglangSettings(caches="keep"), "| `keep` | `keep` | `{}` |"),
        (SglangSettings(pause="abort"), "| `abort` | either | `{}` |"),
        (SglangSettings(pause="abort", caches="keep"), "| `abort` | either | `{}` |"),
    ],
)
def test_guide_says_how_sglang_is_paused(settings: SglangSettings, row: str) -> None:
    assert row.format(settings.pause_mode) in GUIDE


def test_links_of_the_guide_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        path, _, anchor = target.partition("#")
        file = ROOT / "docs" / path if path else ROOT / "docs" / "sglang.md"
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
