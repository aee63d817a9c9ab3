"""docs/monitors.md says what is so; its tables are held to the code with those of other guides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from weightbus.bus.jetstream import BATCH_BYTES, BATCH_MESSAGES
from weightbus.bus.monitor import open_monitor
from weightbus.bus.settings import BusSettings
from weightbus.bus.streams import bus_streams
from weightbus.schemas import stream_name

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "monitors.md").read_text()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", GUIDE))))
def test_link_leads_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).resolve().exists(), target


def test_numbers_are_those_of_the_code() -> None:
    streams = {stream.name: stream for stream in bus_streams("weightbus")}
    progress = streams[stream_name("PROGRESS", "weightbus")]
    checkpoints = streams[stream_name("CHECKPOINTS", "weightbus")]
    assert progress.max_age == 7 * 86_400 * 10**9
    assert f"keeps seven days, or {progress.max_bytes // 2**20} MiB" in GUIDE
    assert f"the last {checkpoints.max_msgs_per_subject} messages of every subject" in GUIDE
    assert f"({BATCH_MESSAGES} messages or {BATCH_BYTES // 2**20} MiB)" in GUIDE
    assert f"`reconnect_for_s` ({BusSettings().reconnect_for_s:g} s)" in GUIDE


def test_arguments_of_open_monitor_are_all_told() -> None:
    told = open_monitor.__annotations__.keys() - {"bus", "message_types", "return"}
    assert told
    assert [name for name in told if f"{name}=" not in GUIDE] == []
