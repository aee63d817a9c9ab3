"""Fixtures of the tests of the `sglang` engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.sglang.setting import CONFIG, RANKS, Consumers, Models
from tests.integration.engines.sglang.stand_in import StandIn, open_stand_in


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
def has_sessions() -> bool:
    """Newer versions of SGLang take updates within sessions only."""
    return True


@pytest.fixture
def stand_in(models: Models, has_sessions: bool) -> Iterator[StandIn]:
    with open_stand_in(models.ranks, has_sessions=has_sessions) as stand_in:
        yield stand_in


@pytest.fixture
def checkpoints(short_path: Path) -> Checkpoints:
    files = short_path / "files"
    files.mkdir()
    return Checkpoints(files, "decoder", CONFIG, RANKS)


@pytest.fixture
def consumers(stand_in: StandIn, checkpoints: Checkpoints, short_path: Path) -> Consumers:
    return Consumers(stand_in, checkpoints, short_path / "engine")
