"""A worker that loses its GPU in the middle of an update: `python -m tests.gpu.lost_device`.

Prints what it answers to three updates; ends like a rank of an engine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tests.unit.reload.models import random_tensor
from tests.unit.transfer.publishing import HOST, cut_layout, open_trainer
from weightbus.consumers.engines.torch.device import computing_on, open_device
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.worker import end_now
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import Apply, Attach, Describe, Described, Failed, InPlace

CONFIG = {"vocab_size": 20, "num_hidden_layers": 1, "repacked_down_proj": True}
"""Repacked: the engine's own loader takes a part of every update."""

DEADLINE_S = 60.0


class LosingHost(TorchModelHost):
    """The second reload reads outside of a tensor."""

    reloads = 0

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        super().reload(weights, modules)
        self.reloads += 1
        if self.reloads == 2:
            values = torch.zeros(4, device=self.device)
            values[torch.tensor([10**6], device=self.device)] += 1  # shows when it is waited for


def main() -> None:
    device = open_device("cuda:0")
    with computing_on(device):
        live = build_model("decoder", CONFIG)
    live.requires_grad_(False)
    host = LosingHost("decoder", lambda: build_model("decoder", CONFIG), live, device)
    worker = ReloadWorker(host, 0, 1)
    plain = build_model("decoder", {**CONFIG, "repacked_down_proj": False})
    shapes = {name: t.shape for name, t in plain.checkpoint_tensors().items()}

    def tensors(version: int) -> dict[str, torch.Tensor]:
        return {
            name: random_tensor(shape, torch.float32, 100 * version + number)
            for number, (name, shape) in enumerate(shapes.items())
        }

    with (
        tempfile.TemporaryDirectory() as directory,
        open_trainer(cut_layout(tensors(0)), "memory", Path(directory)) as trainer,
    ):
        digest = trainer.layout_digest
        described = worker.handle(
            Describe(
                request=0,
                layout_digest=digest,
                layout=trainer.layout_blob,
                deadline_s=DEADLINE_S,
            )
        )
        assert isinstance(described, Described), described
        worker.handle(
            Attach(
                request=0,
                layout_digest=digest,
                needs_digest=described.needs_digest,
                cells=(),
                roots=(),
                host_id=HOST,
                deadline_s=DEADLINE_S,
            )
        )
        for version in (1, 2, 3):
            sources = trainer.publish(tensors(version), version)
            request = Apply(
                request=version,
                version=version,
                layout_digest=digest,
                feed=InPlace(sources=sources),
                deadline_s=DEADLINE_S,
            )
            reply = worker.handle(request)
            said = type(reply).__name__
            if isinstance(reply, Failed):
                said = reply.error + (", touched" if reply.touched else "")
            print(f"{version}: {said}")
    lost = worker.lost
    worker.close()
    print(f"{type(lost).__name__}: {lost}", file=sys.stderr)
    end_now()


if __name__ == "__main__":
    main()
