"""One rank of a loop of one's own for tests: `on_step_end`, then a collective.

Arguments: bus URL, model, rank, world size, port of rank 0. Prints a JSON line once the step is
published. Then rank 0 leaves no Python to run: it waits in a collective that never ends. The others
wait in Python.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
from torch import distributed

from weightbus.bus.settings import BusSettings
from weightbus.producers.integrations.hooks import StepOptions, step_publisher

STEP = 5


def main() -> None:
    url, model, rank, world_size, port = sys.argv[1:]
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(seconds=600),
    )
    torch.manual_seed(0)
    with step_publisher(BusSettings(url=url), model, steps=StepOptions(every=STEP)) as on_step_end:
        on_step_end(torch.nn.Linear(4, 4), STEP)
        print(json.dumps({"step": STEP}), flush=True)
        if rank == "0":
            distributed.barrier()
        sys.stdin.readline()


if __name__ == "__main__":
    main()
