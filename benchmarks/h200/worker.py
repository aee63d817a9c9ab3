"""The process of one rank: the product's, whose fingerprint is `held.holding`."""

from __future__ import annotations

import sys

import msgspec

from weightbus.consumers.engines.torch import worker

__all__ = ("main",)


def main(arguments: worker.WorkerArguments) -> int:
    """Serve until the parent ends; returns the exit status."""
    import torch
    from torch import nn

    from benchmarks.h200.held import holding
    from benchmarks.h200.setup import ARCHITECTURE, TINY
    from weightbus.consumers.engines.torch import rank
    from weightbus.consumers.engines.torch.model import ServedModel
    from weightbus.consumers.engines.torch.models import build_model

    def answer(model: nn.Module) -> str:
        assert isinstance(model, ServedModel)
        found = holding(model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    device = torch.device(arguments.spec.device_of(arguments.rank))
    with device:
        holding(build_model(ARCHITECTURE, TINY))  # its kernels are part of the engine at rest
    rank.fingerprint = answer  # type: ignore[attr-defined]
    return worker.main(arguments)


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=worker.WorkerArguments)))
