"""An engine's front process: the product's, but that its ranks answer for every byte they hold.

    python -m benchmarks.h200.engine DIRECTORY SPEC

The fingerprint that any client may ask a rank for is a hash made on the CPU, about 1 GB/s. Here it
is what `held.py` finds, on the GPU: 15 GB in about a second. Nothing else differs.
"""

from __future__ import annotations

import sys

from benchmarks.h200 import worker
from weightbus.consumers.engines.torch import ranks, server

__all__ = ()

if __name__ == "__main__":
    ranks.worker = worker  # type: ignore[attr-defined]
    sys.exit(server.main(*sys.argv[1:]))
