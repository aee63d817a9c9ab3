"""What the reload machinery needs to know of one rank of vLLM. Does no I/O of its own.

Owns nothing of the engine: the models are the runner's, and are changed by `reload` only, in vLLM's
own lifecycle. Runs on the worker's main thread. Written for vLLM 0.26 and 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from weightbus.consumers.engines.vllm.drafter import DRAFT, TARGET, Joint, share_as, tie_as
from weightbus.consumers.engines.vllm.lifecycle import processes_itself, reload_layerwise
from weightbus.consumers.engines.vllm.refusing import (
    Origin,
    Reached,
    check_dtypes,
    check_sizes,
    half_there,
    lacking,
    lacking_quantised,
    names_on_disk,
    padding_of,
    refusing,
    untold,
)
from weightbus.consumers.engines.vllm.renewing import Renewer
from weightbus.consumers.engines.vllm.scratch import build_scratch
from weightbus.consumers.engines.vllm.sleeping import are_weights_asleep
from weightbus.consumers.errors import CheckpointRefused, ProofFailed
from weightbus.consumers.reload.host import ModelHost, Weights
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

__all__ = ("VllmHost",)

_NOT_OF_A_CHECKPOINT = (
    "_q_scale",
    "_k_scale",
    "_v_scale",
    "_prob_scale",
    "_expert_map",
    "expert_mask",
    "expert_global_to_physical",
    "expert_physical_to_global",
    "expert_local_to_global",
    "cos_sin_cache",
    "inv_freq",
    "normalizer",
)
"""Last names of persistent buffers that vLLM computes when it makes a model."""


class VllmHost(ModelHost):
    """One rank's model, and its drafter's if that is made of the same checkpoint."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        device: torch.device,
        draft: tuple[nn.Module, ModelConfig] | None = None,
    ) -> None:
        """
        Args:
            model: the target, as the runner holds it.
            draft: a drafter that is made of the same checkpoint, and its config.
        """
        self._config = vllm_config
        self._model = model if draft is None else Joint(model, draft[0])
        self._renewer = Renewer(self._model)
        self._name = type(model).__name__
        self._device = torch.device(device)
        self._draft = draft
        self._derived: dict[str, str] = {}
        self._reached = Reached()
        self._padding: dict[str, int] = {}
        self._tied: list[tuple[str, str]] = []
        self._fed: frozenset[str] = frozenset()
        """Parameters that the last layout which could be traced has bytes for."""
        self._is_discarded = False
        """What vLLM has loaded is gone."""
        self._is_to_compare = False
        """Copies of weights with what they are made of: they slept when a layout was looked at."""

    def _target(self) -> nn.Module:
        return self._model.target if isinstance(self._model, Joint) else self._model

    def _is_quantised(self) -> bool:
        return self._config.quant_config is not None

    @property
    def name(self) -> str:
        return self._name

    @property
    def device(self) -> str:
        return str(self._device)

    def live_model(self) -> nn.Module:
        return self._model

    def scratch_model(self) -> nn.Module:
        scratch = build_scratch(self._config, self._config.model_config)
        if self._draft is not None and isinstance(self._model, Joint):
            scratch = Joint(scratch, build_scratch(self._config, self._draft[1]))
            share_as(self._model, scratch)
        self._tied = tie_as(self._model, scratch)
        return scratch

    def load_weights(self, model: nn.Module, weights: Weights) -> None:
        self._reached, self._padding = Reached(), padding_of(model)
        if self._is_quantised():
            weights = self._checked_by_name(list(weights))
        catching = nullcontext() if _quantises(model) else refusing(self.name, self._reached)
        with set_current_vllm_config(self._config), catching:
            _load(model, self._reached.noted(weights))

    def _checked_by_name(self, weights: list[tuple[str, torch.Tensor]]) -> Weights:
        """Quantised models may not be traceable, and then nothing tells what is not written."""
        origin = self._started_from()
        on_disk = names_on_disk(origin)
        if not on_disk:
            raise CheckpointRefused(self._name, untold(origin))
        missing = half_there({name for name, _ in weights}, on_disk)
        if missing:
            raise CheckpointRefused(
                self._name, f"it lacks {', '.join(missing[:3])}, which the engine started with"
            )
        return weights

    def unwritten(self, parameter: str) -> str:
        """Of a quantised model scales may be missing, as vLLM has defaults for them: there, only
        what the checkpoint that the engine was started with has is known to be needed."""
        names = self._reached.names
        if not self._is_quantised():
            packed = getattr(self._target(), "packed_modules_mapping", None) or {}
            own = parameter.removeprefix(TARGET).removeprefix(DRAFT)
            is_padded = parameter in self._padding
            return lacking(own if self._draft else parameter, names, packed, is_padded=is_padded)
        origin = self._started_from()
        return lacking_quantised(parameter, names, names_on_disk(origin), origin)

    def _started_from(self) -> Origin:
        return Origin(
            self._config.model_config.model,
            revision=self._config.model_config.revision,
            download_dir=self._config.load_config.download_dir,
        )

    def drops(self, parameter: str) -> bool:
        """Scales of attention's caches, which stand there for checkpoints that have them."""
        path, _, name = parameter.rpartition(".")
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return False
        return processes_itself(module) and name not in module._parameters

    def padding_bytes(self, parameter: str) -> int:
        return self._padding.get(parameter, 0)

    def check_needs(self, needs: Needs, layout: Layout) -> None:
        self._check_ties(layout)
        self._fed = frozenset(parameter.name for parameter in needs.parameters)
        is_asleep = are_weights_asleep()
        compares = not is_asleep and not self._is_discarded
        if (sinks := self._renewer.unknown(compares=compares)) is not None:
            raise CheckpointRefused(self._name, f"vLLM's {sinks.name} {sinks.reason}")
        self._is_to_compare = is_asleep and not self._is_discarded
        if isinstance(self._model, Joint):
            self._model.drafted = frozenset(
                layout.tensors[copy.tensor].name
                for copy in needs.copies
                if needs.parameters[copy.parameter].name.startswith(DRAFT)
            )
        if self._is_quantised():
            return
        check_dtypes(self.name, needs, layout)
        last = get_tensor_model_parallel_world_size() - 1
        if (
            get_tensor_model_parallel_rank() == last
            and not self._config.parallel_config.enable_expert_parallel
        ):
            check_sizes(self.name, needs, layout)

    def _check_ties(self, layout: Layout) -> None:
        """What vLLM has tied since it found it equal takes one tensor only."""
        names = {spec.name for spec in layout.tensors}
        for kept, other in self._tied:
            if other in names:
                raise CheckpointRefused(
                    self._name,
                    f"vLLM has tied {other} to {kept}, as they were equal when it started: publish "
                    f"without {other}, or start with --hf-overrides "
                    "'{\"tie_word_embeddings\": false}'",
                )

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        if self._is_to_compare:
            if (sinks := self._renewer.unknown(compares=True)) is not None:
                raise ProofFailed(sinks.name, sinks.reason)
            self._is_to_compare = False
        named = dict(self._model.named_modules(remove_duplicate=False))
        if modules is None:
            layers = list(dict.fromkeys(named.values()))
        else:
            layers = _with_attention(named, modules)
        with set_current_vllm_config(self._config), torch.device(self._device):
            processed = reload_layerwise(self._model, self._config.model_config, layers, weights)
        chosen = {n: m for n, m in named.items() if modules is None or n in modules}
        self._check_fed(chosen, processed.empty)
        if processed.moved and self._keeps_graphs():
            raise ProofFailed(
                processed.moved[0], "has new copies of its weights elsewhere: graphs keep the old"
            )
        if modules is None:
            names = {id(module): name for name, module in self._model.named_modules()}
            self._derived = {
                names[number]: attribute for number, (_, attribute) in processed.derived.items()
            }

    def _check_fed(self, named: Mapping[str, nn.Module], empty: Iterable[nn.Module]) -> None:
        """vLLM warns of a module that is given nothing, and serves it as it was.

        Raises:
            ProofFailed: there was something for it.
        """
        hungry = {id(module) for module in empty}
        for name, module in named.items():
            if id(module) in hungry and any(
                f"{name}.{parameter}".lstrip(".") in self._fed for parameter in module._parameters
            ):
                raise ProofFailed(name, "was given nothing by vLLM's reload, and has old weights")

    def _keeps_graphs(self) -> bool:
        """Whether something was compiled or captured of the model."""
        return not self._config.model_config.enforce_eager

    def derived(self) -> Mapping[str, str]:
        return self._derived

    def note_discarded(self) -> None:
        self._is_discarded = True

    def renew(self) -> bool:
        return self._renewer.renew()

    def synchronize(self) -> None:
        """On a CPU nothing runs beside the calling thread."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def free_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def takes_device_tensors(self) -> bool:
        """vLLM keeps the tensors until their layer is complete, and copies from wherever they
        are."""
        return self._device.type == "cuda"

    def may_stay_uncovered(self, buffer: str, *, persistent: bool) -> bool:
        return not persistent or buffer.rpartition(".")[2] in _NOT_OF_A_CHECKPOINT


def _load(model: Any, weights: Weights) -> None:
    model.load_weights(weights)


def _quantises(model: nn.Module) -> bool:
    """Whether a model quantises what it is given: on `meta` that raises whatever it likes."""
    return any(
        getattr(getattr(module, "quant_method", None), "uses_meta_device", False)
        for module in model.modules()
    )


def _with_attention(named: Mapping[str, nn.Module], modules: frozenset[str]) -> list[nn.Module]:
    """The modules of these names, and those above them that process what lies below them."""
    chosen = {id(named[name]): named[name] for name in modules}
    for name, module in named.items():
        if processes_itself(module):
            below = f"{name}." if name else ""
            if any(inner.startswith(below) for inner in modules):
                chosen[id(module)] = module
    return list(chosen.values())
