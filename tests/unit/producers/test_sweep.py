"""Blocks of dead owners go; those of the living, and what is no block, stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from weightbus.producers.blocks import SharedBlock
from weightbus.producers.sweep import sweep_blocks

OWNER = """
import sys
from pathlib import Path
from weightbus.producers.blocks import SharedBlock
block = SharedBlock("weightbus-child", 4, 0, Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


def test_sweep_removes_a_block_only_when_its_owner_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert sweep_blocks(tmp_path) == ()
        owner.kill()
        owner.wait()
    assert sweep_blocks(tmp_path) == ("weightbus-child",)
    assert sweep_blocks(tmp_path) == ()


def test_sweep_leaves_a_block_when_its_owner_is_this_process(tmp_path: Path) -> None:
    block = SharedBlock("weightbus-own", 4, 0, tmp_path)
    assert sweep_blocks(tmp_path) == ()
    block.close()


def test_sweep_leaves_what_is_no_block(tmp_path: Path) -> None:
    (tmp_path / "psm_another").write_bytes(b"x")
    (tmp_path / "weightbus-directory").mkdir()
    (tmp_path / "weightbus-link").symlink_to(tmp_path / "psm_another")
    assert sweep_blocks(tmp_path) == ()
    assert len(list(tmp_path.iterdir())) == 3
