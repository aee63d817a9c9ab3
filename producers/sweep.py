"""Removes shared-memory blocks whose owner is gone: killed publishers cannot clean up themselves.

Owns nothing. A block's owner holds a lock on it for as long as it lives
(`weightbus.producers.blocks`), in whatever container, and the kernel drops the lock with the
process: no process ids, no guessing. What a dead publisher published last may still be read, until
one of the same model starts; blocks of other models go once they are old. Blocks of other users are
theirs to sweep.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

from weightbus.producers.blocks import SHM_DIRECTORY, SHM_PREFIX

__all__ = ("OTHERS_AFTER_S", "sweep_blocks")

OTHERS_AFTER_S: Final = 3600.0
"""How long the blocks of another model's dead publishers are left, after they were written."""


def sweep_blocks(model: str, directory: Path = SHM_DIRECTORY) -> tuple[str, ...]:
    """Remove the blocks of dead owners; returns their names. Blocking, but never waits.

    Who has such a block mapped keeps its memory until he unmaps it.
    """
    own = f"{SHM_PREFIX}{model}."
    return tuple(
        path.name
        for path in sorted(directory.glob(f"{SHM_PREFIX}*"))
        if _remove_if_dead(path, 0.0 if path.name.startswith(own) else OTHERS_AFTER_S)
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
