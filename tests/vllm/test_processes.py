"""What a server that is killed leaves behind is removed, and nothing else."""

from __future__ import annotations

import os
import sys
from multiprocessing import shared_memory
from pathlib import Path

from tests.vllm.processes import SHM, running_group, shared_blocks

LEAVES_A_BLOCK = """
import os, time
from multiprocessing import resource_tracker, shared_memory
block = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(block._name, "shared_memory")  # as if that were killed, too
open(os.path.join(os.environ["VLLM_RPC_BASE_PATH"], "socket"), "w").close()
print(block.name, os.environ["VLLM_RPC_BASE_PATH"], flush=True)
time.sleep(3600)
"""


def test_blocks_and_sockets_of_a_killed_group_are_removed_and_no_others(tmp_path: Path) -> None:
    others = shared_memory.SharedMemory(create=True, size=64)
    try:
        command = [sys.executable, "-c", LEAVES_A_BLOCK]
        with running_group(command, tmp_path / "log", dict(os.environ), lines=True) as process:
            assert process.stdout is not None
            name, sockets = process.stdout.readline().decode().split()
            assert shared_blocks(process.pid) == {SHM / name}
            assert Path(sockets, "socket").exists()
        assert not (SHM / name).exists()
        assert not Path(sockets).exists()
        assert (SHM / others.name).exists()
    finally:
        others.close()
        others.unlink()
