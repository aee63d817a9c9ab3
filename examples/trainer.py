"""A trainer in 20 lines: trains a small decoder and publishes it after every few steps.

Beside it, in other terminals (all name the same bus by `--nats`, or WEIGHTBUS_NATS_URL):

    weightbus serve
    weightbus consume --model tiny --engine-id a --architecture decoder
    weightbus watch
"""

from __future__ import annotations

import os
import sys

import torch

from weightbus.bus.settings import BusSettings
from weightbus.consumers.engines.torch.models import build_model, initialise
from weightbus.producers.blocking import BlockingPublisher
from weightbus.tracing.otlp import OtlpSettings


def main(versions: int) -> None:
    model = build_model("decoder", {})  # any module or state dict of yours
    initialise(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings, otlp = BusSettings.from_env(os.environ), OtlpSettings.from_env(os.environ)
    if settings.url is None:
        sys.exit("set WEIGHTBUS_NATS_URL to what `weightbus serve` printed")
    with BlockingPublisher(settings, model="tiny", otlp=otlp) as publisher:
        first = max(publisher.newest_version(), 0) + 1  # a trainer started again goes on
        for version in range(first, first + versions):
            for _ in range(10):
                tokens = torch.randint(0, 500, (32,))
                loss = torch.nn.functional.cross_entropy(model(tokens[:-1]), tokens[1:])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            ready = publisher.publish(model.checkpoint_tensors(), version=version)
            print(f"version {version}: loss {loss.item():.3f}, digest {ready.weights_digest}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
