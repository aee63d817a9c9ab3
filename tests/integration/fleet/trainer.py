"""A trainer process for tests that kill it. Its one argument is JSON (`Arguments`).

Publishes every version that it reads, one per line, from stdin; ends in order at its end.
"""

from __future__ import annotations

import sys

import msgspec
from msgspec import Struct

from tests.integration.fleet.elsewhere import filler
from tests.integration.fleet.reports import take_stdout
from tests.integration.fleet.weights import weights_of
from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.publisher import PublisherOptions

__all__ = ("OPEN", "PUBLISHED", "Arguments")

OPEN = "open"
PUBLISHED = "published"


class Arguments(Struct, frozen=True, kw_only=True):
    url: str
    model: str
    filled: bool = False
    """Whether every version holds the filler, too."""
    options: PublisherOptions = PublisherOptions()


def main(arguments: Arguments) -> None:
    reports = take_stdout()
    model, extra = arguments.model, {"filler": filler()} if arguments.filled else {}
    settings = BusSettings(url=arguments.url)
    with BlockingPublisher(settings, model, options=arguments.options) as publisher:
        reports.write(OPEN + "\n")
        for line in sys.stdin:
            version = int(line)
            publisher.publish(weights_of(model, version) | extra, version)
            reports.write(PUBLISHED + "\n")


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Arguments))
