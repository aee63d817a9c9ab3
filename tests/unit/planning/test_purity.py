"""Planning is pure: it does without torch, clocks and the outside world."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "boxes",
    "buckets",
    "cells",
    "choice",
    "cost",
    "cuts",
    "destinations",
    "explain",
    "gathers",
    "groups",
    "limits",
    "pieces",
    "regions",
    "replicas",
    "routes",
    "shapes",
    "sharing",
    "source",
    "staging",
    "tables",
    "tiles",
    "windows",
)
FORBIDDEN = ("torch", "anyio", "nats", "zmq", "triton")


def test_planning_imports_nothing_but_numpy_and_schemas_when_all_of_it_is_imported() -> None:
    imports = "; ".join(f"import weightbus.consumers.planning.{name}" for name in MODULES)
    program = f"import sys; {imports}; print(*sorted(set({FORBIDDEN}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""
