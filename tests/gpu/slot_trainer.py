"""A trainer with GPU slots, to be killed: publishes one version, says so, and waits.

Arguments: bus URL, model, bytes of its tensor.
"""

from __future__ import annotations

import sys

import torch

from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.publisher import PublisherOptions


def main() -> None:
    url, model, size_bytes = sys.argv[1:]
    options = PublisherOptions(slots="device", linger_s=0.0)
    with BlockingPublisher(BusSettings(url=url), model, options=options) as publisher:
        tensor = torch.ones(int(size_bytes), dtype=torch.uint8, device="cuda")
        publisher.publish({"w": tensor}, 1)
        print("published", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
