"""The front of an engine whose ranks lose their device in one version: `-m ... DIRECTORY SPEC`."""

from __future__ import annotations

import sys

from tests.integration.engines import losing_worker
from weightbus.consumers.engines.torch import ranks, server

__all__ = ()

if __name__ == "__main__":
    ranks.worker = losing_worker  # type: ignore[attr-defined]
    sys.exit(server.main(*sys.argv[1:]))
