"""How the process of a rank ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SERVE = """
import os, sys
from weightbus.consumers.engines.torch import rank, worker
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.errors import DeviceLost

def run_rank(*arguments):
    if sys.argv[2]:
        raise {"lost": DeviceLost("cuda:0", "gone"), "fault": KeyError("gone")}[sys.argv[2]]

rank.run_rank = run_rank
spec = TorchEngineSpec(architecture="decoder", config={}, device=sys.argv[1])
sys.exit(worker.main(worker.WorkerArguments(
    directory="/", rank=0, words=0, parent=os.getppid(), spec=spec
)))
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("error", "status"), [("", 0), ("lost", 1), ("fault", 1)])
def test_status_says_how_a_rank_ended_wherever_it_computes(
    device: str, error: str, status: int
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SERVE, device, error],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert ("gone" in ended.stderr) == bool(error)
