"""`weightbus trace` on a real bus: which round it takes, what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tests.integration.tracing.monitors import put_on_bus, weightbus
from tests.nats_server import NatsServer
from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    heard,
    join,
    plan,
    ready,
    route,
    stage,
    whole_round,
)
from weightbus.tracing.compare import Comparison
from weightbus.tracing.history import build_waterfall
from weightbus.tracing.waterfall import Waterfall

GOLDEN = Path(__file__).parents[2] / "unit" / "tracing" / "golden"


@pytest.mark.parametrize("width", [80, 120])
def test_trace_prints_the_waterfall_of_the_newest_round(
    nats_server: NatsServer, width: int
) -> None:
    put_on_bus(nats_server.settings, [join("a", 6), *whole_round()])
    done = weightbus("trace", "--nats", nats_server.url, COLUMNS=str(width))
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines == (GOLDEN / f"waterfall_{width}.txt").read_text().splitlines()


def test_trace_prints_one_json_object_when_asked(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, whole_round())
    done = weightbus("trace", "v7", "--json", WEIGHTBUS_NATS_URL=nats_server.url)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    waterfall = msgspec.json.decode(done.stdout, type=Waterfall)
    assert waterfall == build_waterfall(MODEL, "v7", heard(*whole_round()))


def test_trace_takes_the_round_that_is_named(nats_server: NatsServer) -> None:
    earlier = [ready(6), join("a", 6), plan(route("a"), version=6), complete("a", 6)]
    put_on_bus(nats_server.settings, [*earlier, *whole_round()])
    done = weightbus("trace", "v6", "--json", "--nats", nats_server.url)
    told = json.loads(done.stdout)
    assert (told["version"], [engine["outcome"] for engine in told["engines"]]) == (6, ["complete"])
    assert told["origin"] == "checkpoint_ready", "the bus keeps CheckpointReady of 16 versions"


def test_trace_asks_for_the_model_when_the_bus_has_several(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [join("a", model="zeta"), *whole_round()])
    done = weightbus("trace", "--nats", nats_server.url)
    assert done.returncode == 2
    assert f"choose --model: {MODEL}, zeta" in done.stderr
    named = weightbus("trace", "--model", "zeta", "--json", "--nats", nats_server.url)
    assert json.loads(named.stdout)["model"] == "zeta"


def test_trace_lists_the_recent_rounds_when_it_knows_no_such_round(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [join("a", version) for version in range(1, 8)])
    done = weightbus("trace", "v9", "--nats", nats_server.url)
    assert done.returncode == 1
    assert done.stderr == (
        "weightbus: the bus does not remember round v9; recent rounds: "
        f"v7 of {MODEL}, v6 of {MODEL}, v5 of {MODEL}, v4 of {MODEL}, v3 of {MODEL}\n"
    )


def test_trace_says_so_when_the_bus_remembers_no_round(nats_server: NatsServer) -> None:
    done = weightbus("trace", "--model", MODEL, "--nats", nats_server.url)
    assert (done.returncode, done.stderr) == (
        1, f"weightbus: the bus does not remember any round of model {MODEL}\n"
    )  # fmt: skip


def test_trace_compares_two_rounds(nats_server: NatsServer) -> None:
    earlier = [
        ready(6), join("a", 6), plan(route("a"), version=6),
        stage("a", "reload", 10, 20, rank=0, taken="local", moved_bytes=90_900_000, version=6),
        complete("a", 6, end_ms=31),
    ]  # fmt: skip
    put_on_bus(nats_server.settings, [*earlier, *whole_round()])
    shown = weightbus("trace", "--compare", "v6", "v7", "--nats", nats_server.url)
    assert shown.returncode == 0, shown.stderr
    assert "round v7 took 100 ms longer than v6 (131 ms against 31.0 ms): " in " ".join(
        shown.stdout.split()
    )
    told = weightbus("trace", "--compare", "v6", "v7", "--json", "--nats", nats_server.url)
    compared = msgspec.json.decode(told.stdout, type=Comparison)
    assert (compared.first_round, compared.second_round) == ("v6", "v7")
    assert compared.wall_s.difference == pytest.approx(0.1)


def test_trace_compares_rounds_of_one_model_only(nats_server: NatsServer) -> None:
    put_on_bus(nats_server.settings, [join("a", 6, model="zeta"), *whole_round()])
    done = weightbus("trace", "--compare", "v6", "v7", "--nats", nats_server.url)
    assert done.returncode == 2
    assert f"only rounds of one model can be compared: v6 is of zeta, v7 of {MODEL}" in done.stderr


def test_trace_exports_to_standard_output_or_to_a_file(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    put_on_bus(nats_server.settings, whole_round())
    ways = ("trace", "--nats", nats_server.url, "--export")
    printed = weightbus(*ways, "perfetto")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert json.loads(printed.stdout)["otherData"]["round"] == "v7"
    for name, begins in (("otlp-json", '{"resourceSpans":'), ("html", "<!doctype html>")):
        path = tmp_path / name
        done = weightbus(*ways, name, "--output", str(path))
        assert done.stdout == f"round v7 of {MODEL} is in {path} ({name})\n", done.stderr
        assert path.read_text().startswith(begins)


def test_trace_says_so_when_the_file_cannot_be_written(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    put_on_bus(nats_server.settings, whole_round())
    path = tmp_path / "missing" / "round.html"
    done = weightbus("trace", "--nats", nats_server.url, "--export", "html", "--output", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "No such file or directory" in done.stderr
