"""An engine one of whose ranks loses its device in the middle of an update."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.harness import LONG_S, Updates, until
from tests.integration.engines.losing_worker import LOST_VERSION
from weightbus.bus.guard import guarded_command
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.start import wait_until_ready
from weightbus.consumers.errors import ApplyFailed, EngineUnavailable

pytestmark = pytest.mark.anyio

CONFIG = {"vocab_size": 100}
RANKS = 2


async def test_ranks_are_started_anew_when_one_has_lost_its_device(short_path: Path) -> None:
    files = short_path / "files"
    files.mkdir()
    checkpoints = Checkpoints(files, "decoder", CONFIG, RANKS)
    place = EngineDirectory(short_path / "engine")
    place.prepare()
    spec = TorchEngineSpec(architecture="decoder", config=dict(CONFIG), tp=RANKS)
    command = [sys.executable, "-m", "tests.integration.engines.losing_front"]
    with place.log.open("wb") as log:
        guard = await anyio.open_process(
            guarded_command([*command, str(place.path), spec.to_json()]),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert guard.stdin is not None
    try:
        async with open_torch_client(place.path) as client:
            before = (await wait_until_ready(client, place, guard, LONG_S)).pids
            async with open_torch_engine(place.path, roots=[str(files)]) as engine:
                updates = Updates(engine, checkpoints)
                await updates.prepare()
                await updates.update(1)
                await engine.pause(LONG_S)
                with pytest.raises(ApplyFailed, match="cuda:1 is lost to this process") as caught:
                    await updates.apply(LOST_VERSION)
                assert (caught.value.cause, caught.value.touched) == ("DeviceLost", True)

                async def replaced() -> bool:
                    return (await client.state(LONG_S)).pids not in ((), before)

                await until(replaced)
                report = await engine.state(LONG_S)
                assert (report.version, report.paused, report.touched) == (-1, True, False)
                assert "DeviceLost: device cuda:1 is lost" in report.error
                with pytest.raises(EngineUnavailable):
                    await engine.resume(1, LONG_S)
                await updates.prepare()
                await updates.update(3)
                found = (await client.fingerprint(LONG_S)).fingerprints
                assert found == checkpoints.fingerprints(3)
    finally:
        with anyio.CancelScope(shield=True):
            await guard.stdin.aclose()
            await guard.wait()
