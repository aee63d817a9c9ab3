"""`weightbus watch` before it reaches a bus: its lines, and its use."""

from __future__ import annotations

import json

from click.testing import CliRunner

from tests.unit.tracing.rounds import MODEL, T0_NS, complete
from weightbus.bus.monitor import Missed
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Reconnected
from weightbus.cli.watch import command, json_line, text_line
from weightbus.tracing.fleet import FleetView


def test_watch_asks_for_a_bus_when_none_is_named() -> None:
    result = CliRunner(env={"WEIGHTBUS_NATS_URL": None}).invoke(command, [])
    assert result.exit_code == 2
    assert "WEIGHTBUS_NATS_URL" in result.output


def test_watch_help_names_every_field_of_its_state() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert [field for field in FleetView.__struct_fields__ if field not in text] == []


def test_event_is_told_as_one_json_object() -> None:
    told = json.loads(json_line(complete("a"), T0_NS))
    assert (told["type"], told["received_ns"], told["bytes"]) == (
        "UpdateComplete",
        T0_NS,
        90_900_000,
    )


def test_event_is_told_with_its_time_and_model() -> None:
    line = text_line(complete("a"), T0_NS)
    assert line.startswith(f"22:13:20.000Z {MODEL}: a serves version 7 after 129 ms")


def test_end_of_a_heartbeat_is_told_both_ways() -> None:
    gone = EngineGone(MODEL, "a")
    assert json.loads(json_line(gone, 5)) == {
        "received_ns": 5, "type": "EngineGone", "model": MODEL, "engine": "a",
    }  # fmt: skip
    assert text_line(gone, T0_NS) == f"22:13:20.000Z {MODEL}: a is gone"


def test_loss_is_told_both_ways() -> None:
    assert json.loads(json_line(Missed("PROGRESS", 7), 5)) == {
        "received_ns": 5, "type": "Missed", "stream": "PROGRESS", "at_most": 7,
    }  # fmt: skip
    assert text_line(Missed("PROGRESS", 7), T0_NS).startswith("22:13:20.000Z at most 7 messages of")


def test_reconnect_is_told_both_ways() -> None:
    assert json.loads(json_line(Reconnected(), 5)) == {"received_ns": 5, "type": "Reconnected"}
    assert "lost and is back" in text_line(Reconnected(), T0_NS)
