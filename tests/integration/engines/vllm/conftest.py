"""Fixtures of the tests of the `vllm` engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.vllm.server import StandIn, Style, serving
from tests.integration.engines.vllm.workers import Executor

Start = Callable[..., StandIn]

CONFIG = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture
def checkpoints(short_path: Path) -> Checkpoints:
    """Of a model on two ranks."""
    files = short_path / "files"
    files.mkdir()
    return Checkpoints(files, "decoder", CONFIG, 2)


@pytest.fixture
def directory(short_path: Path) -> Path:
    return short_path / "engine"


@pytest.fixture
def start(checkpoints: Checkpoints) -> Iterator[Start]:
    """Starts servers; each must have been used well when the test ends."""
    started: list[StandIn] = []
    with ExitStack() as stack:

        def start(
            style: Style = "0.32",
            *,
            backend: str | None = "weightbus",
            extended: bool = False,
            drafts: bool = False,
            copies: int = 1,
            api_key: str = "",
        ) -> StandIn:
            executor = Executor(checkpoints, backend=backend, extended=extended, drafts=drafts)
            stand_in = StandIn(executor, style, copies, api_key)
            stack.callback(lambda: stand_in.executor.end())
            started.append(stack.enter_context(serving(stand_in)))
            return stand_in

        yield start
    for stand_in in started:
        stand_in.check()
