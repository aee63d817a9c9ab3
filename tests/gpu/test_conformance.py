"""The suite that every engine must pass, with the ranks of the torch engine on GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.engines.harness import GPU_KINDS, EngineUnderTest, Subject
from tests.integration.engines.test_conformance import *  # noqa: F403

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("kind", list(GPU_KINDS))]


@pytest.fixture  # type: ignore[no-redef]
async def running(
    kind: str, subject: Subject, short_path: Path, gpus: Callable[[int], None]
) -> AsyncIterator[EngineUnderTest]:
    gpus(subject.ranks)
    async with GPU_KINDS[kind](subject, short_path) as running:
        yield running
