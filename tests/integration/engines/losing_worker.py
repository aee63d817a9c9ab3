"""A rank's process that loses its device, as far as it knows, when `LOST_VERSION` is applied.

There need not be a GPU: what follows is the same on a CPU.
"""

from __future__ import annotations

import sys

import msgspec

from weightbus.consumers.engines.torch import rank, worker
from weightbus.consumers.errors import DeviceLost
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import Apply, WorkerReply, WorkerRequest

__all__ = ("LOST_VERSION",)

LOST_VERSION = 2


class LosingWorker(ReloadWorker):
    """What it has written of the version, nobody knows."""

    def handle(self, request: WorkerRequest) -> WorkerReply:
        if isinstance(request, Apply) and request.version == LOST_VERSION and self.rank == 1:
            self._begin()
            self._lost = DeviceLost("cuda:1", "CUDA error: an illegal memory access")
        return super().handle(request)


if __name__ == "__main__":
    rank.ReloadWorker = LosingWorker  # type: ignore[attr-defined]
    sys.exit(worker.main(msgspec.json.decode(sys.argv[1], type=worker.WorkerArguments)))
