"""What a rank does before it serves, so that its first update does not."""

from __future__ import annotations

import subprocess
import sys

TRACE_AFTER_WARM_UP = """
import sys
from functools import partial

from tests.unit.reload.models import layout_of
from weightbus.consumers.engines.torch import rank
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.reload.tracer import trace_needs

build = partial(build_model, sys.argv[1], {}, 0, 1)
live = build()
layout = layout_of(live.checkpoint_tensors())
host = TorchModelHost(sys.argv[1], build, live)
host.warm_up()
before = set(sys.modules)
trace_needs(host, layout)
print(sorted(set(sys.modules) - before))
"""


def test_first_trace_imports_nothing_when_the_rank_is_warm() -> None:
    found = subprocess.run(
        [sys.executable, "-c", TRACE_AFTER_WARM_UP, "decoder"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
