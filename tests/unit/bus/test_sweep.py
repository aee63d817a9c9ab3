"""Blocks of dead owners go; those of the living, and what is no block, stay."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from weightbus.bus.blocks import SharedBlock
from weightbus.bus.sweep import OTHERS_AFTER_S, sweep_blocks, sweep_staging

OWNER = """
import sys
from pathlib import Path
from weightbus.bus.blocks import SharedBlock
blocks = [SharedBlock(f"weightbus-{name}", 4, 0, Path(sys.argv[1])) for name in ("m.a", "n.a")]
print("ready", flush=True)
sys.stdin.read()
"""


def test_sweep_removes_blocks_only_when_their_owner_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert sweep_blocks("m", tmp_path) == ()
        owner.kill()
        owner.wait()
    assert sweep_blocks("m", tmp_path) == ("weightbus-m.a",)
    assert sweep_blocks("m", tmp_path) == ()
    assert sweep_blocks("n", tmp_path) == ("weightbus-n.a",)


def test_sweep_removes_blocks_of_another_model_when_they_are_old(tmp_path: Path) -> None:
    old, older = time.time() - OTHERS_AFTER_S + 60, time.time() - OTHERS_AFTER_S - 60
    for name, written in (("old", old), ("older", older)):
        path = tmp_path / f"weightbus-n.{name}"
        path.touch()
        os.utime(path, (written, written))
    assert sweep_blocks("m", tmp_path) == ("weightbus-n.older",)


def test_sweep_leaves_a_block_when_its_owner_is_this_process(tmp_path: Path) -> None:
    block = SharedBlock("weightbus-m.own", 4, 0, tmp_path)
    assert sweep_blocks("m", tmp_path) == ()
    block.close()


def test_block_is_there_and_locked_when_sweeps_run_while_it_is_made(tmp_path: Path) -> None:
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            sweep_blocks("m", tmp_path)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        blocks = [SharedBlock(f"weightbus-m.{n}", 4, 0, tmp_path) for n in range(500)]
    finally:
        done.set()
        sweeper.join()
    assert sweep_blocks("m", tmp_path) == ()
    assert len(list(tmp_path.iterdir())) == len(blocks)
    for block in blocks:
        block.close()


def test_sweep_leaves_what_is_no_block(tmp_path: Path) -> None:
    (tmp_path / "psm_another").write_bytes(b"x")
    (tmp_path / "weightbus-m.directory").mkdir()
    (tmp_path / "weightbus-m.link").symlink_to(tmp_path / "psm_another")
    assert sweep_blocks("m", tmp_path) == ()
    assert len(list(tmp_path.iterdir())) == 3


def test_consumer_sweeps_dead_staging_and_leaves_publishers_blocks(tmp_path: Path) -> None:
    long_ago = time.time() - OTHERS_AFTER_S - 60
    for name in ("m.slot", "stage.m.l0", "copy.m.0", "stage.n.l0", "stage.mm.l0"):
        (tmp_path / f"weightbus-{name}").touch()
    for name in ("m.old", "n.old", "stage.n.old"):
        path = tmp_path / f"weightbus-{name}"
        path.touch()
        os.utime(path, (long_ago, long_ago))
    mine = SharedBlock("weightbus-stage.m.mine", 4, 0, tmp_path)
    removed = sweep_staging("m", tmp_path)
    mine.close()
    assert set(removed) == {
        "weightbus-copy.m.0",
        "weightbus-stage.m.l0",
        "weightbus-stage.n.old",
    }
