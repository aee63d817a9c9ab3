"""What the reload machinery needs to know of one rank of SGLang. Does no I/O of its own.

Owns nothing of the engine: the model is its runner's, and is changed by `reload` only, in SGLang's
own lifecycle. Runs on the scheduler's main thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import nn

from weightbus.consumers.engines.sglang.lifecycle import (
    can_restore,
    load_checkpoint,
    reload_modules,
)
from weightbus.consumers.engines.sglang.scratch import build_scratch, keeps_graphs, started_from
from weightbus.consumers.engines.sglang.threads import on_one_thread
from weightbus.consumers.engines.vllm.refusing import (
    Origin,
    Reached,
    check_dtypes,
    check_sizes,
    lacking_quantised,
    names_on_disk,
    refusing,
)
from weightbus.consumers.errors import CheckpointRefused, ProofFailed
from weightbus.consumers.reload.host import ModelHost, Weights
from weightbus.consumers.reload.memory import module_of
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

__all__ = ("SglangHost",)

_OPTIONAL = frozenset({"input_scale", "k_scale", "prob_scale", "q_scale", "v_scale"})
"""Last names of parameters that SGLang fills by itself where a checkpoint has none."""

_ELSEWHERE = (
    "is made anew elsewhere when SGLang loads again: graphs keep the old one; start SGLang with "
    "--disable-cuda-graph, and without --enable-torch-compile"
)


class SglangHost(ModelHost):
    """One rank's model."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        is_last_rank: bool = True,
        build: Callable[[str], nn.Module] = build_scratch,
        load: Callable[[nn.Module, Weights, torch.device], None] = load_checkpoint,
        keeps_graphs: Callable[[], bool] = keeps_graphs,
        started_from: Callable[[], Origin] = started_from,
    ) -> None:
        """
        Args:
            is_last_rank: of its tensor-parallel ranks: it reads tensors to their ends.
            build: makes another model of this rank on `meta`, given the architecture's name.
            load: the mapping of checkpoint tensors to parameters.
            keeps_graphs: whether something was compiled or captured of the model.
            started_from: where the checkpoint is that the engine was started with.
        """
        self._model = model
        self._device = device
        self._is_last_rank = is_last_rank
        self._build = build
        self._load = load
        self._keeps_graphs = keeps_graphs
        self._started_from = started_from
        self._derived: dict[str, str] = {}
        self._reached = Reached()
        self._moved = ""
        """What of a model with graphs could not be kept in its memory once; empty: nothing."""

    @property
    def name(self) -> str:
        return type(self._model).__name__

    @property
    def device(self) -> str:
        return str(self._device)

    def live_model(self) -> nn.Module:
        return self._model

    def scratch_model(self) -> nn.Module:
        return self._build(self.name)

    def load_weights(self, model: nn.Module, weights: Weights) -> None:
        self._check_can_load_again(model)
        if self._moved:
            raise CheckpointRefused(self.name, f"{self._moved} {_ELSEWHERE}")
        self._reached = reached = Reached()
        with refusing(self.name, reached), on_one_thread():
            self._load(model, reached.noted(weights), self._device)

    def unwritten(self, parameter: str) -> str:
        """Quantisation makes parameters that no checkpoint has (`w13_g_idx_sort_indices` of GPTQ
        experts, scales): there, only what the checkpoint that the engine was started with has is
        known to be needed."""
        if parameter.rpartition(".")[2] in _OPTIONAL:
            return ""
        if not self._is_quantised():
            return "SGLang would leave them as they are"
        origin = self._started_from()
        return lacking_quantised(parameter, self._reached.names, names_on_disk(origin), origin)

    def _is_quantised(self) -> bool:
        return getattr(self._model, "quant_config", None) is not None

    def check_needs(self, needs: Needs, layout: Layout) -> None:
        """Of a quantised model it is not known what a tensor of another dtype or size means."""
        if not self._is_quantised():
            check_dtypes(self.name, needs, layout)
            if self._is_last_rank:
                check_sizes(self.name, needs, layout)

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        if self._moved:
            raise ProofFailed(self._moved, _ELSEWHERE)
        reloaded = reload_modules(
            self._model, modules, lambda: self._load(self._model, weights, self._device)
        )
        if reloaded.moved and self._keeps_graphs():
            self._moved = reloaded.moved[0]
            raise ProofFailed(self._moved, _ELSEWHERE)
        if modules is None:
            self._derived = reloaded.derived

    def derived(self) -> Mapping[str, str]:
        return self._derived

    def synchronize(self) -> None:
        """On a CPU nothing runs beside the calling thread."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def free_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def _check_can_load_again(self, scratch: nn.Module) -> None:
        """
        Raises:
            CheckpointRefused: what SGLang made of a parameter after it had loaded it is of another
                form, or has lost its loader, and SGLang does not say how to take that back.
        """
        live = dict(self._model.named_parameters())
        modules = dict(self._model.named_modules(remove_duplicate=False))
        for name, built in scratch.named_parameters():
            found = live.get(name)
            if found is not None and _loads_alike(built, found):
                continue
            module = modules.get(module_of(name))
            if module is None or not can_restore(module):
                raise CheckpointRefused(
                    self.name,
                    f"this engine can load no checkpoint a second time: SGLang has repacked {name} "
                    f"for {type(getattr(module, 'quant_method', None)).__name__}, for good",
                )


def _loads_alike(built: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether a parameter can be loaded as the one that was built, as far as can be seen."""
    return (
        found.shape == built.shape
        and found.dtype == built.dtype
        and hasattr(found, "weight_loader") == hasattr(built, "weight_loader")
    )
