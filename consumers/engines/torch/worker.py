"""The process of one rank of a `torch` engine: bound to its parent first, then everything else.

Owns nothing; torch is imported only once the process cannot outlive its parent any more.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.words import RankWords
from weightbus.schemas.errors import WeightBusError

__all__ = ("WorkerArguments", "end_now", "main")

_PR_SET_PDEATHSIG = 1


class WorkerArguments(Struct, frozen=True, kw_only=True):
    """Everything a rank's process is told; its only argument, as JSON."""

    directory: str
    rank: int
    words: int
    """Inherited descriptor of its `RankWords`."""
    parent: int
    """Process id of the front."""
    spec: TorchEngineSpec


def main(arguments: WorkerArguments) -> int:
    """Serve until the parent ends; returns the exit status."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != arguments.parent:
        return 1
    # Ctrl-C goes to the whole process group; the front is the one to end the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from weightbus.consumers.engines.torch.rank import run_rank

    if arguments.spec.device != "cpu":
        atexit.register(end_now)  # after torch's own, hence called before them
    try:
        run_rank(
            EngineDirectory(Path(arguments.directory)),
            arguments.spec,
            arguments.rank,
            RankWords(arguments.words),
            arguments.parent,
        )
    except WeightBusError as error:
        # One write, so that the lines of several ranks stay whole: unbuffered, `print` makes two.
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    if arguments.spec.device != "cpu":
        end_now(0)
    return 0


def end_now(status: int = 1) -> None:
    """End the process without cleaning up: nothing of a rank outlives it.

    When the interpreter ends, the status is not known any more: it is 1 unless it was told before.
    A GPU that is lost, or a group whose peer is gone, can keep a process from ending.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=WorkerArguments)))
