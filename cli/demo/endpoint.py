"""Whether the transfer engine works on this machine, asked in a process of its own.

Its native libraries print what they like and stay loaded: the demo itself does without them.
"""

from __future__ import annotations

import subprocess
import sys

import anyio

from weightbus.bus.endpoint import open_endpoint
from weightbus.bus.errors import EndpointFailed, EndpointUnavailable

__all__ = ("main", "why_no_endpoint")

ADDRESS = "127.0.0.1"
START_S = 30.0


async def why_no_endpoint() -> str:
    """What the transfer engine lacks, and how to get it; empty: it works."""
    with anyio.move_on_after(START_S):
        done = await anyio.run_process(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != 0:
            return f"no transfer engine: it ended with exit code {done.returncode} at its start"
        return done.stdout.decode().strip()
    return f"no transfer engine: it did not start within {START_S:g} s"


def main() -> None:
    """Print what is missing."""
    try:
        with open_endpoint(ADDRESS):
            pass
    except (EndpointUnavailable, EndpointFailed) as error:
        print(error)
