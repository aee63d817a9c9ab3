"""A trainer process for tests: publishes as it is told on stdin, reports on stdout, as JSON lines.

Arguments: bus URL, model, rank, world size, and what to do at the end (`close`, `raise`, `exit`).
A line `{"version": n}` publishes; the end of stdin ends the trainer.
"""

from __future__ import annotations

import json
import sys

import torch

from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.publisher import PublisherOptions
from weightbus.producers.shards import Shard
from weightbus.schemas.errors import WeightBusError

ROWS = 12


def whole(version: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(version)
    return torch.randn(ROWS, 1024, generator=generator)


def main() -> None:
    url, model, rank, world_size, end = sys.argv[1:]
    rows = ROWS // int(world_size)
    begin = int(rank) * rows
    publisher = BlockingPublisher(
        BusSettings(url=url),
        model,
        rank=int(rank),
        world_size=int(world_size),
        options=PublisherOptions(close_wait_s=1),
    )
    print(json.dumps({"open": True}), flush=True)
    for line in sys.stdin:
        version = json.loads(line)["version"]
        box = Shard("w", whole(version)[begin : begin + rows], (ROWS, 1024), (begin, 0))
        try:
            ready = publisher.publish([box], version)
        except WeightBusError as error:
            print(json.dumps({"error": str(error)}), flush=True)
        else:
            print(json.dumps({"published": ready.version}), flush=True)
    if end == "close":
        publisher.close()
    elif end == "raise":
        raise RuntimeError("the trainer failed")


if __name__ == "__main__":
    main()
