"""What vLLM repacks, derives of its weights, or loads in a way of its own is after three updates
what an engine holds that was started from the third version, bit for bit, and says the same.

Each test has two engines, in processes of their own; on a GPU, if there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from tests.vllm.alone import Found
from tests.vllm.kinds import KINDS
from tests.vllm.processes import environment

pytestmark = pytest.mark.timeout(600)

VERSIONS = 3
RUN_S = 240.0


def surroundings() -> dict[str, str]:
    """Nothing is compiled for this but by Triton, and this package is found as it is here."""
    found = environment(VLLM_USE_DEEP_GEMM="0", VLLM_USE_FLASHINFER_SAMPLER="0")
    known = os.environ.get("PYTHONPATH", "")
    return {**found, "PYTHONPATH": os.pathsep.join(filter(None, (found["PYTHONPATH"], known)))}


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.vllm.alone", *arguments]
    with (folder / f"{len(arguments)}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=surroundings())


def end(process: subprocess.Popen[bytes], log: Path) -> Found:
    try:
        said, _ = process.communicate(timeout=RUN_S)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()[-4000:]
    return msgspec.json.decode(said.splitlines()[-1], type=Found)


@pytest.mark.parametrize("kind", KINDS)
def test_engine_is_as_a_fresh_one_after_three_updates(kind: str, tmp_path: Path) -> None:
    if not (KINDS[kind].on_cpu or torch.cuda.is_available()):
        pytest.skip("vLLM has no kernels for it on a CPU")
    fresh = start(tmp_path, kind, str(VERSIONS))
    updated = start(tmp_path, kind, str(VERSIONS), "--updated")
    try:
        expected, found = end(fresh, tmp_path / "2.log"), end(updated, tmp_path / "3.log")
    finally:
        fresh.kill()
        updated.kill()
    for number, update in enumerate(found.updates, start=1):
        print(f"{kind}: version {number}: {update.direct} direct, {update.processed} processed")
        print(f"    {update.reason}")
    names = expected.sums.keys() | found.sums.keys()
    assert not {name for name in names if expected.sums.get(name) != found.sums.get(name)}
    assert found.outputs == expected.outputs
