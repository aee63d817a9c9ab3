"""Removes shared-memory blocks whose owner is gone: killed publishers cannot clean up themselves.

Owns nothing. A block's owner holds a lock on it for as long as it lives
(`weightbus.producers.blocks`), in whatever container, and the kernel drops the lock with the
process: no process ids, no ages, no guessing. Blocks of other users are theirs to sweep.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from weightbus.producers.blocks import SHM_DIRECTORY, SHM_PREFIX

__all__ = ("sweep_blocks",)


def sweep_blocks(directory: Path = SHM_DIRECTORY) -> tuple[str, ...]:
    """Remove every block of a dead owner; returns their names. Blocking, but never waits.

    Who has such a block mapped keeps its memory until he unmaps it.
    """
    return tuple(
        path.name for path in sorted(directory.glob(f"{SHM_PREFIX}*")) if _remove_if_dead(path)
    )


def _remove_if_dead(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone in between, of another user, or no file at all: not ours to remove
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except (BlockingIOError, FileNotFoundError):  # its owner lives, or another sweep was faster
        return False
    finally:
        os.close(fd)
    return True
