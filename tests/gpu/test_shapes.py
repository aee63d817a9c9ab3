"""Layouts of large models on one GPU: every rank's parameters are what a CPU would have loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.engines.test_shapes import SMALL, whole_checkpoint
from tests.unit.reload.models import random_tensor, same_bits
from tests.unit.transfer.publishing import HOST, Kind, cut_layout, open_trainer, weights_digest
from weightbus.consumers.engines.torch.device import computing_on, open_device
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.planning.cells import plan_cells, verify_cells
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import Applied, Apply, Attach, Attached, Describe, Described, InPlace

DEADLINE_S = 120.0
VERSIONS = (1, 2, 3)


def tensors_of(config: Mapping[str, Any], version: int) -> dict[str, torch.Tensor]:
    return {
        name: random_tensor(tuple(tensor.shape), tensor.dtype, 10_000 * version + number)
        for number, (name, tensor) in enumerate(whole_checkpoint(config).items())
    }


def make_worker(
    config: Mapping[str, Any], rank: int, ranks: int
) -> tuple[ReloadWorker, ServedModel]:
    """With its live model. All ranks are on one GPU: they compute nothing together."""
    device = open_device("cuda:0")
    build = partial(build_model, "shapes", config, rank, ranks)
    with computing_on(device):
        live = build()
    live.requires_grad_(False)
    return ReloadWorker(TorchModelHost("shapes", build, live, device), rank, ranks), live


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_ranks_hold_each_version_bit_for_bit(
    config: Mapping[str, Any], ranks: int, kind: Kind, tmp_path: Path
) -> None:
    """The first version by the engine's own loader, the others by the kernel; all are proven."""
    made = [make_worker(config, rank, ranks) for rank in range(ranks)]
    workers, models = [worker for worker, _ in made], [model for _, model in made]
    with open_trainer(cut_layout(tensors_of(config, 0), 3), kind, tmp_path) as trainer:
        digest = trainer.layout_digest
        described = []
        for worker in workers:
            reply = worker.handle(
                Describe(
                    request=1,
                    layout_digest=digest,
                    layout=trainer.layout_blob,
                    deadline_s=DEADLINE_S,
                )
            )
            assert isinstance(reply, Described), reply
            assert (reply.device, reply.untraced_reason) == ("cuda:0", "")
            described.append(reply)
        plan = plan_cells(trainer.layout, [needing.needs for needing in described])
        for worker, needing, cells in zip(workers, described, plan.cells, strict=True):
            attached = worker.handle(
                Attach(
                    request=2,
                    layout_digest=digest,
                    needs_digest=needing.needs_digest,
                    cells=cells,
                    roots=trainer.roots,
                    host_id=HOST,
                    deadline_s=DEADLINE_S,
                )
            )
            assert isinstance(attached, Attached), attached
        for version in VERSIONS:
            tensors = tensors_of(config, version)
            sources = trainer.publish(tensors, version)
            sums = []
            for rank, worker in enumerate(workers):
                applied = worker.handle(
                    Apply(
                        request=3,
                        version=version,
                        layout_digest=digest,
                        feed=InPlace(sources=sources),
                        deadline_s=DEADLINE_S,
                    )
                )
                assert isinstance(applied, Applied), applied
                assert (applied.processed_parameters > 0) is (version == VERSIONS[0])
                sums.append(np.frombuffer(applied.cell_digests, dtype="<u8"))
                check_rank(models[rank], config, (rank, ranks), tensors)
            verdict = verify_cells(trainer.layout, plan, sums, weights_digest(tensors))
            assert verdict.ok, verdict.reason
        for worker in workers:
            worker.close()


def check_rank(
    live: ServedModel,
    config: Mapping[str, Any],
    place: tuple[int, int],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Its parameters are those of a model that a CPU loads."""
    fresh = build_model("shapes", config, *place)
    fresh.requires_grad_(False)
    fresh.load_checkpoint(tensors.items())
    held = dict(live.named_parameters())
    for name, parameter in fresh.named_parameters():
        assert same_bits(held[name].cpu(), parameter), (place, name)
