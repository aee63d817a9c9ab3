"""A vLLM with Weight bus's host and without a consumer (`hosting.py`), as tests ask it.

Owns its process while `running_hosted` is open.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tests.vllm.checkpoints import Architecture
from tests.vllm.hosting import Order, Report
from tests.vllm.oracle import Oracle
from tests.vllm.processes import START_S, LineProcess, environment, running_group

__all__ = ("Hosted", "check_fresh", "running_hosted")

ASK_S = 120.0


class Hosted:
    """One vLLM, at version 0 when it starts."""

    def __init__(self, process: LineProcess) -> None:
        self._process = process

    def carry_out(self, **order: Any) -> Report:
        told = self._process.ask(msgspec.to_builtins(Order(**order)), ASK_S)
        return msgspec.convert({**told, "error": told.pop("said")}, Report)


@contextmanager
def running_hosted(oracle: Oracle, architecture: Architecture, directory: Path) -> Iterator[Hosted]:
    folder = oracle.folder(architecture, 0)
    command = [sys.executable, "-m", "tests.vllm.hosting", str(folder), architecture]
    env = environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    with running_group(command, directory / "vllm.log", env, lines=True) as group:
        process = LineProcess(group)
        process.answer(START_S)
        yield Hosted(process)


def check_fresh(report: Report, oracle: Oracle, architecture: Architecture, version: int) -> None:
    """It holds and says what a fresh engine does."""
    assert report.error == ""
    fresh = oracle.generates(architecture, version, 1)
    assert report.outputs == fresh.outputs
    assert report.sums == fresh.sums[0]
    assert report.drafted == fresh.drafted
