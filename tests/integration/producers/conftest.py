"""What every test of a publisher must leave behind: nothing."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

SHM = Path("/dev/shm")


@pytest.fixture
def model() -> Iterator[str]:
    """A model of this test's own; after it no block of the model may be left in /dev/shm."""
    name = f"m{uuid.uuid4().hex[:12]}"
    yield name
    left = [path.name for path in SHM.glob(f"weightbus-{name}.*")]
    for block in left:
        (SHM / block).unlink()
    assert left == []
