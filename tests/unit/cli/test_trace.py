"""`weightbus trace` before it reaches a bus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import cast

import anyio
import pytest
from click.testing import CliRunner
from msgspec import Struct

from tests.unit.tracing.rounds import MODEL, complete, join, ready
from weightbus.bus.connection import Bus
from weightbus.cli.trace import command, latest_rounds, read_history
from weightbus.schemas.base import Message
from weightbus.tracing.compare import Comparison, EngineComparison, Sides, StageComparison
from weightbus.tracing.history import Heard
from weightbus.tracing.waterfall import (
    BucketRow,
    EngineWaterfall,
    PathStep,
    RoundSummary,
    StageRow,
    Waterfall,
)

NS_PER_S = 10**9
NOW_NS = 1_700_000_000 * NS_PER_S


def test_trace_asks_for_a_bus_when_none_is_named() -> None:
    result = CliRunner(env={"WEIGHTBUS_NATS_URL": None}).invoke(command, [])
    assert result.exit_code == 2
    assert "WEIGHTBUS_NATS_URL" in result.output


def test_option_is_not_taken_for_the_second_round() -> None:
    words = ["--compare", "v1", "--nats", "nats://127.0.0.1:1"]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 2
    assert "--compare needs ROUND1 and ROUND2: one is missing before --nats" in result.output


@pytest.mark.parametrize(
    "struct",
    [
        *(Waterfall, EngineWaterfall, StageRow, BucketRow, PathStep),
        *(Comparison, EngineComparison, StageComparison, Sides),
    ],
)
def test_trace_help_names_every_field_of_its_json(struct: type[Struct]) -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    missing = [field for field in struct.__struct_fields__ if field not in text]
    assert missing == []


@pytest.mark.parametrize(
    ("age_s", "looks_s"),
    [(0, [60]), (59, [60]), (61, [60, 3600]), (3601, [60, 3600, None]), (-90, [60])],
)
def test_latest_rounds_looks_no_further_back_than_to_the_newest_round(
    age_s: int, looks_s: list[int | None]
) -> None:
    rounds = [
        RoundSummary(model="minilm", round=name, version=version, first_ns=NOW_NS - age * NS_PER_S)
        for version, (name, age) in enumerate([("v0", 90_000), ("v1", age_s)])
    ]
    looks: list[int] = []

    async def rounds_since(since_ns: int) -> Sequence[RoundSummary]:
        looks.append(since_ns)
        return [each for each in rounds if each.first_ns >= since_ns]

    latest = anyio.run(latest_rounds, rounds_since, NOW_NS)
    assert latest[-1].round == "v1"
    assert looks == [0 if look is None else NOW_NS - look * NS_PER_S for look in looks_s]


def test_latest_rounds_are_none_when_the_bus_remembers_none() -> None:
    async def rounds_since(since_ns: int) -> Sequence[RoundSummary]:
        return ()

    assert anyio.run(latest_rounds, rounds_since, NOW_NS) == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["v7", "--compare", "v7", "v8"], "ROUND is one too many"),
        (["--export", "html", "--json"], "--export is instead of"),
        (["--export", "html", "--compare", "v7", "v8"], "--export is instead of"),
        (["--output", "x"], "--output needs --export"),
        (["--export", "pdf"], "'perfetto', 'otlp-json', 'html'"),
        (["--compare", "v7"], "requires 2 arguments"),
    ],
)
def test_trace_refuses_what_cannot_be_meant_together(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, ["--nats", "nats://127.0.0.1:1", *arguments])
    assert result.exit_code == 2
    assert said in result.output


class RememberingBus:
    """Replays what it remembers, of the kinds that it is asked for."""

    def __init__(self, *messages: Message) -> None:
        self._messages = messages

    async def replay(
        self, *kinds: type[Message], model: str, since_ns: int = 0, is_answered: bool
    ) -> AsyncIterator[Heard]:
        assert not is_answered, "who looks back works nothing off"
        for message in self._messages:
            if isinstance(message, kinds):
                yield Heard(message)


def test_of_the_rounds_after_the_one_that_was_asked_for_nothing_is_kept() -> None:
    own = [join("a"), complete("a")]
    later = [each for version in range(8, 20) for each in (join("a", version), ready(version))]
    bus = cast(Bus, RememberingBus(ready(), *own, *later, complete("b")))
    chosen = RoundSummary(model=MODEL, round="v7", version=7, first_ns=0)
    kept = [told.message for told in anyio.run(read_history, bus, chosen)]
    assert kept[:3] == [*own, complete("b")]
    assert kept[3:] == [ready(), *(ready(version) for version in range(8, 20))]
