"""What the reload machinery needs to know of a rank of the `torch` engine. Does no I/O.

The model is on a CPU or on one GPU. On a GPU the engine's own loader copies to the live parameters
from wherever it is given tensors; the copies are queued, and `synchronize` waits for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.errors import CheckpointRefused, PlanError
from weightbus.consumers.reload.host import ModelHost, Weights
from weightbus.consumers.reload.recorder import LoadRecorder

__all__ = ("TorchModelHost", "process_weights_after_loading")

CPU: Final = torch.device("cpu")


class TorchModelHost(ModelHost):
    """One rank's model on its device."""

    def __init__(
        self,
        name: str,
        build: Callable[[], ServedModel],
        live: ServedModel,
        device: torch.device = CPU,
    ) -> None:
        self._name = name
        self._build = build
        self._live = live
        self._device = device

    def warm_up(self) -> None:
        """Import what the first trace would import while requests wait: most of a second.

        On `meta` many kernels are written in Python; torch imports them with their first tensor,
        and what makes it follow a dispatch mode with the first operation under one.
        """
        self.scratch_model()
        with LoadRecorder({}, {}):
            torch.zeros((2, 2), device="meta").narrow(0, 0, 1)[0].copy_(
                torch.zeros(2, device="meta")
            )

    @property
    def name(self) -> str:
        return self._name

    @property
    def device(self) -> str:
        return str(self._device)

    def live_model(self) -> ServedModel:
        return self._live

    def scratch_model(self) -> ServedModel:
        with torch.device("meta"):
            return self._build()

    def load_weights(self, model: nn.Module, weights: Weights) -> None:
        if not isinstance(model, ServedModel):
            raise PlanError("model", type(model).__name__, "must be one that this engine built")
        try:
            model.load_checkpoint(weights)
        except PlanError as error:
            raise CheckpointRefused(self._name, str(error)) from error

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        if modules is None:
            self._live.load_checkpoint(weights)
        else:
            self._live.load_weights(weights)
        process_weights_after_loading(self._live, modules)

    def synchronize(self) -> None:
        """On a CPU nothing runs beside the calling thread."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def takes_device_tensors(self) -> bool:
        """Every loader here copies, and every module that repacks its weight does so in place."""
        return True

    def free_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def process_weights_after_loading(model: nn.Module, modules: frozenset[str] | None = None) -> None:
    """Let the modules that keep their weights in another form than they load them make it.

    `modules` names those that were loaded; None: all.
    """
    for name, module in model.named_modules():
        if modules is None or name in modules:
            process = getattr(module, "process_weights_after_loading", None)
            if process is not None:
                process()
