"""Removes shared-memory blocks whose owner is gone: killed processes cannot clean up themselves.

Owns nothing. A block's owner holds a lock on it for as long as it lives (`weightbus.bus.blocks`),
in whatever container, and the kernel drops the lock with the process: no process ids, no guessing.
What a dead publisher published last may still be read, until one of the same model starts; what a
dead consumer staged is of no use to anybody. Blocks of other models go once they are old. Blocks of
other users are theirs to sweep.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

from weightbus.bus.blocks import COPY_PREFIX, SHM_DIRECTORY, SHM_PREFIX, STAGE_PREFIX

__all__ = ("OTHERS_AFTER_S", "sweep_blocks", "sweep_staging")

OTHERS_AFTER_S: Final = 3600.0
"""How long the blocks of another model's dead owners are left, after they were written."""


def sweep_blocks(model: str, directory: Path = SHM_DIRECTORY) -> tuple[str, ...]:
    """For publishers: remove the blocks of dead ones; returns their names.

    Blocking, but never waits. Who has such a block mapped keeps its memory until he unmaps it.
    """
    return _sweep((SHM_PREFIX,), (f"{SHM_PREFIX}{model}.",), directory)


def sweep_staging(model: str, directory: Path = SHM_DIRECTORY) -> tuple[str, ...]:
    """For consumers: remove the staging blocks and copies of dead ones; returns their names.

    Blocking, but never waits. Leaves the blocks of publishers, also of dead ones: the version that
    this consumer is about to read may be in them.
    """
    kinds = (STAGE_PREFIX, COPY_PREFIX)
    return _sweep(kinds, tuple(f"{kind}{model}." for kind in kinds), directory)


def _sweep(all_of: tuple[str, ...], at_once: tuple[str, ...], directory: Path) -> tuple[str, ...]:
    return tuple(
        path.name
        for path in sorted(directory.glob(f"{SHM_PREFIX}*"))
        if path.name.startswith(all_of)
        and _remove_if_dead(path, 0.0 if path.name.startswith(at_once) else OTHERS_AFTER_S)
    )


def _remove_if_dead(path: Path, after_s: float) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone in between, of another user, or no file at all: not ours to remove
        return False
    try:
        if after_s and time.time() < os.fstat(fd).st_mtime + after_s:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except (BlockingIOError, FileNotFoundError):  # its owner lives, or another sweep was faster
        return False
    finally:
        os.close(fd)
    return True
