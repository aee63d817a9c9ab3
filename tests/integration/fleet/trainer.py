"""A trainer process for tests that kill it. Arguments: bus URL and model.

Publishes every version that it reads, one per line, from stdin; ends in order at its end.
"""

from __future__ import annotations

import sys

from tests.integration.fleet.weights import weights_of
from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher

__all__ = ("OPEN", "PUBLISHED")

OPEN = "open"
PUBLISHED = "published"


def main(url: str, model: str) -> None:
    with BlockingPublisher(BusSettings(url=url), model) as publisher:
        print(OPEN, flush=True)
        for line in sys.stdin:
            version = int(line)
            publisher.publish(weights_of(model, version), version)
            print(PUBLISHED, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
