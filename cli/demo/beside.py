"""What is told at the start: how to look on from beside the demo. Reads nothing but PATH."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

__all__ = ("looking_on", "this_program")


def this_program(argv0: str) -> str:
    """How a shell that stands where this program was started starts it again."""
    path = Path(argv0)
    if path.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m weightbus"
    if shutil.which(path.name) == str(path):
        return shlex.quote(path.name)
    return shlex.quote(argv0)


def looking_on(argv0: str, url: str) -> tuple[str, ...]:
    """Lines with the commands that show the demo's bus, as they can be typed."""
    program = this_program(argv0)
    return (
        f"bus at {url}; it ends with the demo. To look on meanwhile, in another terminal:",
        f"    {program} ui --open --nats {url}",
        f"    {program} watch --nats {url}",
    )
