"""`weightbus trace` before it reaches a bus."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from weightbus.cli.trace import command
from weightbus.tracing.waterfall import EngineWaterfall, StageRow, Waterfall


def test_trace_asks_for_a_bus_when_none_is_named() -> None:
    result = CliRunner(env={"WEIGHTBUS_NATS_URL": None}).invoke(command, [])
    assert result.exit_code == 2
    assert "WEIGHTBUS_NATS_URL" in result.output


@pytest.mark.parametrize("struct", [Waterfall, EngineWaterfall, StageRow])
def test_trace_help_names_every_field_of_its_json(struct: type[Waterfall]) -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    missing = [field for field in struct.__struct_fields__ if field not in text]
    assert missing == []
