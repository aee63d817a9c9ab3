"""What the tests of the `sglang` engine share: models cut over two ranks, and their consumers."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.harness import LONG_S, Updates, updating
from tests.integration.engines.sglang.stand_in import Rank, StandIn
from weightbus.consumers.engines.sglang.engine import (
    SglangEngine,
    SglangSettings,
    open_sglang_engine,
)
from weightbus.consumers.engines.sglang.host import SglangHost
from weightbus.consumers.engines.sglang.worker import Place, SglangWorker
from weightbus.consumers.engines.torch.fingerprint import fingerprint
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model, initialise
from weightbus.consumers.reload.host import Weights

__all__ = ("CONFIG", "RANKS", "Consumers", "LackingCheckpoints", "Models")

CONFIG: Final[dict[str, Any]] = {"vocab_size": 100, "num_experts": 4}
RANKS: Final = 2


class Models:
    """The models of one server's ranks, and how a rank of another is made."""

    def __init__(self) -> None:
        self.models: list[ServedModel] = []
        self.ranks = [self._rank(rank) for rank in range(RANKS)]

    def fingerprints(self) -> tuple[str, ...]:
        """What every rank holds. Only while no turn is under way."""
        return tuple(map(fingerprint, self.models))

    def _rank(self, rank: int) -> Rank:
        model = build_model("decoder", CONFIG, rank, RANKS)
        model.requires_grad_(False)
        initialise(model, seed=7)
        self.models.append(model)

        def build(name: str) -> nn.Module:
            del name
            with torch.device("meta"):
                return build_model("decoder", CONFIG, rank, RANKS)

        def make_worker() -> SglangWorker:
            return SglangWorker(
                model,
                lambda live, place: SglangHost(
                    live, torch.device("cpu"), rank == RANKS - 1, build, load_as_sglang
                ),
                Place(rank, RANKS),
            )

        return Rank(make_worker)


def load_as_sglang(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Passes over tensors that it does not know, and does not miss any."""
    del device
    assert isinstance(model, ServedModel)
    model.load_weights(weights)


class Consumers:
    """Opens a consumer's end of the engine, one after the other."""

    def __init__(self, stand_in: StandIn, checkpoints: Checkpoints, directory: Path) -> None:
        self.stand_in, self.checkpoints, self.directory = stand_in, checkpoints, directory
        self.start_timeout_s = LONG_S

    def open(
        self, settings: SglangSettings | None = None
    ) -> AbstractAsyncContextManager[SglangEngine]:
        return open_sglang_engine(
            self.directory,
            url=self.stand_in.url,
            settings=settings,
            roots=[str(self.checkpoints.directory)],
            start_timeout_s=self.start_timeout_s,
        )

    def prepared(
        self, settings: SglangSettings | None = None
    ) -> AbstractAsyncContextManager[tuple[SglangEngine, Updates]]:
        """Opened, and ready for any version."""
        return updating(self.open(settings), self.checkpoints, prepares=True)


class LackingCheckpoints(Checkpoints):
    """Without the keys of one layer's attention: the parameter that they are fused into is written
    in part."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "decoder", CONFIG, RANKS)

    def _tensors(self, version: int) -> dict[str, torch.Tensor]:
        tensors = super()._tensors(version)
        lost = [name for name in tensors if name.endswith("k_proj.weight")]
        return {name: tensor for name, tensor in tensors.items() if name != lost[0]}
