"""What a rank does before it serves, so that its first update does not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TRACE_AFTER_WARM_UP = """
import json
import sys
from functools import partial

from tests.unit.reload.models import layout_of
from weightbus.consumers.engines.torch import rank
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.reload.tracer import trace_needs

config = json.loads(sys.argv[2])
build = partial(build_model, sys.argv[1], config, 0, 1)
live = build()
layout = layout_of(live.checkpoint_tensors())
host = TorchModelHost(sys.argv[1], build, live)
host.warm_up()
before = set(sys.modules)
trace_needs(host, layout)
print(sorted(set(sys.modules) - before))
"""


SMALL_SHAPES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "moe_intermediate_size": 16,
}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("decoder", {}), ("decoder", {"num_experts": 2}), ("shapes", SMALL_SHAPES)],
)
def test_first_trace_imports_nothing_when_the_rank_is_warm(
    architecture: str, config: dict[str, int]
) -> None:
    found = subprocess.run(
        [sys.executable, "-c", TRACE_AFTER_WARM_UP, architecture, json.dumps(config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
