"""What a process of these tests says on its stdout: whole lines, and none of native libraries."""

from __future__ import annotations

import os
import sys
from typing import TextIO

__all__ = ("take_stdout",)


def take_stdout() -> TextIO:
    """What was stdout. From now on libraries that print there print to stderr."""
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return reports
