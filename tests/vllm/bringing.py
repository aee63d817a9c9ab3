"""Brings a version to a worker as a consumer would, without one. Owns the files that it publishes
while that takes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.unit.transfer.publishing import HOST, cut_layout, open_trainer
from weightbus.consumers.planning.cells import plan_cells
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import Applied, Apply, Attach, Describe, Described, Failed, InPlace

__all__ = ("bring",)

DEADLINE_S = 120.0


def bring(
    worker: ReloadWorker, tensors: Mapping[str, torch.Tensor], version: int, directory: Path
) -> Applied | Failed:
    """What the worker answers in the end, or when it refuses the layout."""
    files = Path(tempfile.mkdtemp(dir=directory))
    with open_trainer(cut_layout(tensors, 2), "files", files) as trainer:
        digest = trainer.layout_digest
        described = worker.handle(
            Describe(
                request=1,
                layout_digest=digest,
                layout=trainer.layout_blob,
                deadline_s=DEADLINE_S,
            )
        )
        if isinstance(described, Failed):
            return described
        assert isinstance(described, Described)
        worker.handle(
            Attach(
                request=2,
                layout_digest=digest,
                needs_digest=described.needs_digest,
                cells=plan_cells(trainer.layout, [described.needs]).cells[0],
                roots=trainer.roots,
                host_id=HOST,
                deadline_s=DEADLINE_S,
            )
        )
        applied = worker.handle(
            Apply(
                request=3,
                version=version,
                layout_digest=digest,
                feed=InPlace(sources=trainer.publish(tensors, version)),
                deadline_s=DEADLINE_S,
            )
        )
    assert isinstance(applied, Applied | Failed)
    return applied
