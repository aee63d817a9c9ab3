"""A short directory: unix socket paths have a limit that pytest's own may exceed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="wb-") as path:
        yield Path(path)
