"""docs/publish-from-any-language.md says what the code does: tables, examples, faults, links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.contract.tables import GUIDES, HEARD, SAID, TABLES, regenerated
from weightbus.bus.streams import bus_streams
from weightbus.schemas import (
    CATALOGUE,
    CONTENT_TYPE_JSON,
    SCHEMA_VERSION,
    CheckpointReady,
    MessageInvalid,
    decode,
    entry_of,
    message_id_of,
    parse_safetensors_header,
    subject_of,
)

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "publish-from-any-language.md").read_text()
MESSAGES = (ROOT / "docs" / "messages.md").read_text()
ALL = "".join(guide.read_text() for guide in GUIDES)


def section(title: str) -> str:
    return GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str) -> list[str]:
    return re.findall(r"^ *```text\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_tables_are_those_of_the_code(guide: Path) -> None:
    text = guide.read_text()
    assert regenerated(text) == text, "run python -m tests.contract.regenerate"


def test_every_table_is_in_a_guide() -> None:
    marks = re.findall(r"<!-- generated: (\w+) -->", ALL)
    assert sorted(marks) == sorted(TABLES)
    assert ALL.count("<!-- end -->") == len(TABLES)


def test_table_follows_when_the_code_says_something_else() -> None:
    stale = GUIDE.replace("**required**", "optional")
    assert stale != GUIDE
    assert regenerated(stale) == GUIDE


def test_what_a_trainer_waits_for_is_all_that_is_written_in_json_to_it() -> None:
    to_trainers = {
        entry.message
        for entry in CATALOGUE
        if entry.encoding == "json" and "trainer" in entry.receivers
    }
    assert set(HEARD) == to_trainers
    assert {entry_of(kind).sender for kind in SAID} == {"trainer"}


def test_example_is_a_message_on_its_subject_with_its_id() -> None:
    (example,) = blocks(section("In short"))
    told = dict(re.findall(r"^ *([\w-]+):? +(\S+)$", example, re.MULTILINE))
    document = example[example.index("{") :]
    assert told["Content-Type"] == CONTENT_TYPE_JSON
    ready = decode(document.encode(), CONTENT_TYPE_JSON, CheckpointReady)
    assert told["subject"] == subject_of(ready, "weightbus")
    assert told["Nats-Msg-Id"] == message_id_of(ready)
    assert ready.created_ns > 0, "without it a version that is not new is passed over in silence"


def test_example_of_a_header_is_one_of_a_file() -> None:
    (example,) = blocks(section("Step by step"))
    header = parse_safetensors_header(example.strip().encode(), 8 + len(example.strip()) + 20, "x")
    assert [(tensor.name, tensor.dtype) for tensor, _ in header.tensors] == [
        ("w", "F32"),
        ("b", "BF16"),
    ]


def test_answers_that_the_guide_tells_of_are_those_that_we_give() -> None:
    table = section("When something is wrong")
    with pytest.raises(MessageInvalid) as caught:
        decode(b"{}", None, CheckpointReady)
    assert f"limit `{caught.value.limit}`" in table
    newer = json.dumps({"schema_version": SCHEMA_VERSION + 1}).encode()
    with pytest.raises(MessageInvalid) as caught:
        decode(newer, CONTENT_TYPE_JSON, CheckpointReady)
    assert f"field `{caught.value.field}`, limit `{caught.value.limit}`" in table
    assert caught.value.limit in MESSAGES
    folders = [ROOT / "bus", ROOT / "consumers"]
    errors = "".join(path.read_text() for each in folders for path in each.rglob("errors.py"))
    for cause in re.findall(r"cause `(\w+)`", table):
        assert cause == "MessageInvalid" or f"class {cause}(" in errors, cause
    (window_s,) = {stream.duplicate_window // 10**9 for stream in bus_streams("weightbus")}
    assert window_s == 120, "the guide says two minutes"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_links_of_the_guide_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", guide.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / "docs" / path if path else guide
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
