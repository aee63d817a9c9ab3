"""Engines of the demo that come with Weight bus: a consumer starts each, and owns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from weightbus.cli.demo.fleet import Fleet
from weightbus.cli.demo.kinds import (
    ASK_S,
    EngineKind,
    EngineSpec,
    consume_command,
    embedding_faults,
)
from weightbus.cli.demo.sentences import PROBE
from weightbus.cli.demo.words import Expected
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.engines.torch.messages import Inputs

__all__ = ("TorchKind",)


class TorchKind(EngineKind):
    """See `EngineKind`: torch engines of one architecture."""

    start_s = 150.0
    holds = "bit for bit"

    def __init__(self, architecture: str, config: Mapping[str, Any] | None = None) -> None:
        self._architecture = architecture
        self._config = config or {}

    def describe(self, spec: EngineSpec) -> str:
        return f"{self._architecture}, {spec.ranks} rank{'s' if spec.ranks > 1 else ''}"

    async def start(self, fleet: Fleet, spec: EngineSpec) -> None:
        await fleet.start(
            spec.engine,
            [
                *consume_command(spec, fleet.engine_directory(spec.engine)),
                *("--architecture", self._architecture, "--tp", str(spec.ranks)),
                *("--config", msgspec.json.encode(self._config).decode()),
            ],
        )

    async def faults(self, fleet: Fleet, spec: EngineSpec, expected: Expected) -> list[str]:
        """By the SHA-256 over what each rank holds, and by the embedding of a sentence."""
        faults = []
        async with open_torch_client(fleet.engine_directory(spec.engine)) as client:
            report = await client.fingerprint(ASK_S)
            if report.version != expected.version:
                faults.append(f"it serves version {report.version}")
            if report.fingerprints != expected.fingerprints:
                faults.append("what its ranks hold is not what the trainer's tensors make")
            if expected.embedding:
                answer = await client.infer(Inputs(sentences=(PROBE,)), ASK_S)
                (vector,) = answer.outputs.vectors
                faults += embedding_faults(vector, expected.embedding)
        return faults
