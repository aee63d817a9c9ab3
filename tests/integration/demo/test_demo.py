"""`weightbus demo` as a user runs it: to its end, and ended before it by whatever may end it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.tracing.exported import assert_importable, assert_tree, parsed

END_S = 300.0
CLEAN_S = 60.0
MODELS = ("minilm", "decoder")

pytestmark = pytest.mark.timeout(400)


@contextmanager
def demo(directory: Path, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A demo in a session of its own, whose temporary files are in `directory`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "weightbus", "demo", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1", **environment},
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def processes_of(directory: Path) -> list[str]:
    """Command lines of what still runs with `directory` in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if str(directory).encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (OSError, ValueError):
            continue
    return found


def blocks() -> list[str]:
    """Shared-memory blocks of the demo's models whose owner is dead: it holds a lock on them."""
    return [
        path.name
        for model in MODELS
        for owner in (f"{model}.trainer", f"stage.{model}", f"copy.{model}")
        for path in Path("/dev/shm").glob(f"weightbus-{owner}.*")
        if is_unlocked(path)
    ]


def is_unlocked(path: Path) -> bool:
    try:
        with path.open("rb") as block:
            fcntl.flock(block, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def assert_nothing_is_left(directory: Path) -> None:
    end = time.monotonic() + CLEAN_S
    while (processes := processes_of(directory)) or blocks():
        assert time.monotonic() < end, f"left after {CLEAN_S:g} s: {processes} {blocks()}"
        time.sleep(0.2)


def assert_report(report: Path, output: str) -> None:
    """The last round, of all engines of the encoder, in three formats that open."""
    (line,) = (line for line in output.splitlines() if str(report) in line)
    page = (report / "round.html").read_text()
    trace = json.loads((report / "round.perfetto.json").read_text())
    spans = json.loads((report / "round.otlp.json").read_text())
    told = trace["otherData"]["round"]
    assert line.startswith(f"round {told}: open {report / 'round.html'} in a browser, ")
    assert f"Round {told} of minilm" in page
    assert_importable(trace)
    engines = {
        item["value"]["stringValue"]
        for group in spans["resourceSpans"]
        for item in group["resource"]["attributes"]
        if item["key"] == "weightbus.engine"
    }
    assert engines == {"a", "b", "c", "d"}
    assert_tree(parsed(json.dumps(spans))[1])


def test_demo_verifies_every_version_by_every_route_and_leaves_nothing_when_it_runs_to_its_end(
    short_path: Path, tmp_path: Path
) -> None:
    report = tmp_path / "build" / "demo"
    with demo(short_path, "--report", str(report)) as process:
        output, _ = process.communicate(timeout=END_S)
    assert process.returncode == 0, output
    result = json.loads(output.splitlines()[-1])
    assert_report(report, output)
    assert result["ok"], output
    assert result["versions"] == [1, 2, 3, 4]
    engines = ("a", "b", "c", "d", "moe")
    assert {name: engine["version"] for name, engine in result["engines"].items()} == dict.fromkeys(
        engines, 4
    )
    assert all(engine["verified"] for engine in result["engines"].values())
    assert result["routes_used"] == ["broadcast", "local", "p2p"]
    assert result["routes_missing"] == ""
    assert len(result["update_seconds"]) == 18
    assert len(result["trace_ids"]) == 7
    assert_nothing_is_left(short_path)
    assert not list(short_path.glob("weightbus*"))


def test_demo_shows_local_alone_and_says_why_when_the_transfer_engine_is_missing(
    short_path: Path,
) -> None:
    """A package of its name that cannot be imported stands in front of it."""
    (short_path / "mooncake").mkdir()
    (short_path / "mooncake" / "__init__.py").write_text(
        "raise ModuleNotFoundError('No module named mooncake', name='mooncake')"
    )
    with demo(short_path, PYTHONPATH=str(short_path)) as process:
        output, _ = process.communicate(timeout=END_S)
    assert process.returncode == 0, output
    verdict, last = output.splitlines()[-2:]
    result = json.loads(last)
    assert result["ok"], output
    assert result["routes_used"] == ["local"]
    assert set(result["engines"]) == {"a", "b", "moe"}
    assert "pip install" in result["routes_missing"], result["routes_missing"]
    assert verdict.endswith(result["routes_missing"])


@pytest.mark.parametrize(
    ("line", "signals", "exit_code"),
    [
        ("starting engine moe", [signal.SIGINT], 130),
        ("loss", [signal.SIGINT, signal.SIGINT, signal.SIGINT], 130),
        ("is killed (SIGKILL)", [signal.SIGTERM], 130),
        ("serves version 1", [signal.SIGKILL], -signal.SIGKILL),
    ],
)
def test_demo_leaves_nothing_when_it_is_ended(
    short_path: Path, line: str, signals: list[signal.Signals], exit_code: int
) -> None:
    with demo(short_path) as process:
        assert process.stdout is not None
        seen = []
        for printed in process.stdout:
            seen.append(printed)
            if line in printed:
                break
        else:
            pytest.fail(f"{line!r} was never printed: {seen}")
        for number in signals:
            process.send_signal(number)
        process.stdout.read()
        assert process.wait(END_S) == exit_code, seen
    assert_nothing_is_left(short_path)
    if exit_code > 0:
        assert not list(short_path.glob("weightbus*"))
