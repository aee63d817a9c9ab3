"""What `weightbus engine` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightbus.cli.engine import ready_line


@pytest.mark.parametrize(("tp", "ranks"), [(1, "1 rank"), (2, "2 ranks")])
def test_engine_that_is_ready_says_how_many_ranks_it_has(tp: int, ranks: str) -> None:
    line = ready_line("minilm", tp, Path("/run/a"))
    assert line == f"minilm engine with {ranks} is ready in /run/a"
