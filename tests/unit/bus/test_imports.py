"""The bus starts without what only engines and trainers need."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import weightbus.bus.connection, weightbus.bus.files, weightbus.bus.host
print(*sorted({"torch", "numpy", "zmq", "nkeys", "click"} & set(sys.modules)))
"""


def test_bus_imports_nothing_heavy_when_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert done.stdout.decode().split() == []
