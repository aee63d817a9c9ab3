"""Checkpoints for the conformance suite: seeded versions of a model, as safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightbus.bus.digest import combine, digest_hex, digest_tensors
from weightbus.bus.files import read_layout_of_files
from weightbus.consumers.engines.torch.fingerprint import fingerprint
from weightbus.consumers.engines.torch.host import process_weights_after_loading
from weightbus.consumers.engines.torch.models import build_model, initialise
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import encode_layout, layout_digest
from weightbus.schemas.placement import FileSegment

__all__ = ("Checkpoints",)


class Checkpoints:
    """Versions of one model; version n is the same in every run."""

    def __init__(
        self, directory: Path, architecture: str, config: Mapping[str, Any], ranks: int
    ) -> None:
        self.directory = directory
        self.architecture, self.config, self.ranks = architecture, dict(config), ranks
        self.layout: Layout = read_layout_of_files([self.path(0)], [str(directory)])
        self.layout_digest = layout_digest(self.layout)
        self.layout_blob = encode_layout(self.layout)

    def path(self, version: int) -> str:
        """The version's file; written when it is first asked for."""
        path = self.directory / f"{version}.safetensors"
        if not path.exists():
            save_file(self._tensors(version), path)
        return str(path)

    def sources(self, version: int) -> tuple[FileSegment, ...]:
        return (FileSegment(path=self.path(version)),)

    def segments(self, version: int) -> tuple[bytes, ...]:
        """What the layout's segments of a version hold."""
        return (Path(self.path(version)).read_bytes(),)

    def weights_digest(self, version: int) -> str:
        """What a publisher would say."""
        tensors = self._tensors(version)
        sums = digest_tensors(
            [
                tensors[spec.name].reshape(-1).view(torch.uint8).numpy()
                for spec in self.layout.tensors
            ]
        )
        return digest_hex(combine(sums))

    def fingerprints(self, version: int) -> tuple[str, ...]:
        """What every rank of an engine must hold, made by the engine's own loader alone."""
        tensors = self._tensors(version)
        found = []
        for rank in range(self.ranks):
            model = build_model(self.architecture, self.config, rank, self.ranks)
            model.requires_grad_(False)
            model.load_weights(tensors.items())
            process_weights_after_loading(model)
            found.append(fingerprint(model))
        return tuple(found)

    def _tensors(self, version: int) -> dict[str, torch.Tensor]:
        """With a tensor that no engine needs."""
        trained = {k: v for k, v in self.config.items() if k != "repacked_down_proj"}
        model = build_model(self.architecture, trained)
        initialise(model, seed=1000 + version)
        tensors = {name: tensor.clone() for name, tensor in model.checkpoint_tensors().items()}
        return {**tensors, "pooler.unused": torch.full((3, 5), float(version))}
