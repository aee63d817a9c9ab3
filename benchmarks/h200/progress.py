"""What is going on, on the terminal: one line for each step, with the seconds since the start."""

from __future__ import annotations

import time
from typing import Final

__all__ = ("say",)

START_S: Final = time.monotonic()


def say(what: str) -> None:
    print(f"{time.monotonic() - START_S:7.1f} s  {what}", flush=True)
