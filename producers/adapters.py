"""PEFT's wrappers: what they wrap, and what their adapters add to it in the copy.

Edge adapter of `peft`, which is not imported here: where nobody has imported it, nothing is wrapped
by it. Nothing is ever merged in place: to merge and unmerge is not the identity in floating point.

A weight W of a layer is published as W + B A s, and rounded to W's dtype once: what
`LoraLayer.merge` in PEFT makes (but of an embedding in 16 bits, where it rounds twice), bit for bit
where the library that multiplies matrices gives the same bits for some rows as for all. Where W is
cut over ranks, each computes its box alone, of its rows of B and its columns of A. So A (r x in),
which FSDP cuts along r, is gathered, layer by layer, for each version; so is B (out x r) where it
is not cut as W is. They are kept until the next version.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import nn
from torch.distributed import tensor as distributed

from weightbus.producers.dtensors import local_box
from weightbus.producers.errors import TensorInvalid
from weightbus.producers.shards import CASTABLE, Delta

__all__ = ("Adapted", "adapted", "known_type", "wrapped_by_peft")

_WAY_OUT: Final = (
    "LoRA of Linear and Embedding is known; publish a merged copy of the model, or its Shards"
)
_HALVES: Final = (torch.float16, torch.bfloat16)


def known_type(where: str, kind: str) -> type | None:
    """A type, if its module is loaded: what nobody has imported has no objects."""
    found: Any = getattr(sys.modules.get(where), kind, None)
    return found if isinstance(found, type) else None


def wrapped_by_peft(name: str, module: nn.Module) -> nn.Module | None:
    """The module that a wrapper of PEFT's stands for; None: it is none of them.

    Args:
        name: of the module, for errors.

    Raises:
        TensorInvalid: it changes the model's outputs in a way that no weight of the model shows.
    """
    if _is(module, "peft.peft_model", "PeftModel"):
        config: Any = module.active_peft_config
        if config.is_prompt_learning:
            _refuse(name, f"adapted by {type(config).__name__}")
        return _attribute(module, "base_model")
    if _is(module, "peft.mixed_model", "PeftMixedModel"):
        return _attribute(module, "base_model")
    if _is(module, "peft.tuners.tuners_utils", "BaseTuner"):
        return _attribute(module, "model")
    if _is(module, "peft.utils.other", "ModulesToSaveWrapper"):
        return _saved(name, module)
    if _is(module, "peft.utils.other", "AuxiliaryTrainingWrapper"):
        _refuse(name, f"wrapped in {type(module).__name__}")
    return None


class Adapted(NamedTuple):
    """A layer with adapters."""

    base: nn.Module
    delta: LowRank
    """Of its `weight`."""


def adapted(name: str, module: nn.Module) -> Adapted | None:
    """What a layer of PEFT's is made of; None: it is none of them.

    Args:
        name: of the layer.

    Raises:
        TensorInvalid: it is of a kind that is not known.
    """
    if not _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        return None
    layer: Any = module
    linear = _is(module, "peft.tuners.lora.layer", "Linear")
    embedding = _is(module, "peft.tuners.lora.layer", "Embedding")
    base = layer.base_layer
    if not (linear or embedding) or _is(base, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        _refuse(name, f"adapted by {type(layer).__module__}.{type(layer).__name__}")
    if base.weight.dtype not in CASTABLE:
        _refuse(name, f"adapted, its weight being {base.weight.dtype}")
    if embedding:
        pairs = {key: (layer.lora_embedding_A[key], b) for key, b in layer.lora_embedding_B.items()}
    else:
        pairs = {key: (layer.lora_A[key].weight, b.weight) for key, b in layer.lora_B.items()}
    delta = LowRank(name, layer, base.weight, pairs, turned=embedding or layer.fan_in_fan_out)
    delta.check()
    return Adapted(base, delta)


@dataclass(frozen=True)
class _Term:
    left: torch.Tensor
    right: torch.Tensor
    scaling: float


class LowRank(Delta):
    """Sum of the products of a layer's active adapters: for the box of its weight that is here."""

    def __init__(
        self,
        name: str,
        layer: Any,
        weight: torch.Tensor,
        pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        *,
        turned: bool,
    ) -> None:
        """
        Args:
            layer: `peft.tuners.lora.layer.LoraLayer`; kept, and asked for each version.
            weight: of the layer's base, [out, in].
            pairs: adapter -> (A [r, in], B [out, r]).
            turned: the weight has the shape of B A turned, [in, out].
        """
        self._name, self._layer, self._pairs, self._turned = name, layer, pairs, turned
        self._placing = _placing(weight)
        self._box = _box(name, weight)
        self._terms: Sequence[_Term] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowRank) and other._layer is self._layer

    def __hash__(self) -> int:
        return id(self._layer)

    def check(self) -> None:
        """
        Raises:
            TensorInvalid: what the layer computes is not W + B A s.
        """
        layer = self._layer
        for adapter in layer.active_adapters:
            if adapter in layer.lora_variant or layer.use_dora.get(adapter):
                kind = type(layer.lora_variant.get(adapter)).__name__
                said = "DoRA" if layer.use_dora.get(adapter) else kind
                _refuse(self._name, f"adapted by {adapter}, which is {said}")
            if layer.lora_bias.get(adapter):
                _refuse(self._name, f"adapted by {adapter}, which has a bias (lora_bias)")
        if layer.merged and layer.disable_adapters:
            limit = "unmerge it, or enable its adapters"
            raise TensorInvalid(self._name, "merged with adapters that are disabled", limit)

    def prepare(self) -> None:
        self.check()
        layer = self._layer
        active = () if layer.merged or layer.disable_adapters else layer.active_adapters
        terms = []
        with torch.no_grad():
            for adapter in active:
                if adapter in self._pairs:
                    terms += self._term(adapter)
                elif adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                    limit = "plan the module again once an adapter was added"
                    raise TensorInvalid(self._name, f"adapted by {adapter}", limit)
        self._terms = terms

    def add_to(self, source: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        total = source[begin:end]
        with torch.no_grad():
            for term in self._terms:
                if self._turned:
                    product = _product(term.left, term.right[:, begin:end], term.scaling).t()
                else:
                    product = _product(term.left[begin:end], term.right, term.scaling)
                if product.dtype == total.dtype:
                    total = product.add_(total)
                else:
                    total = torch.add(total, product).to(total.dtype)
        return total

    def _term(self, adapter: str) -> list[_Term]:
        """Empty if nothing of the weight is published here: all ranks call it all the same."""
        a, b = self._pairs[adapter]
        right = _whole(a)
        alike = not self._turned and _placing(b) == self._placing
        left = _local(b) if alike else _whole(b)
        if self._box is None:
            return []
        rows, columns = self._box[::-1] if self._turned else self._box
        if not alike:
            left = left[rows]
        return [_Term(left, right[:, columns], self._layer.scaling[adapter])]


def _product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """As PEFT does it: halves are multiplied as FP32 on a CPU."""
    if left.device.type == "cpu" and left.dtype in _HALVES:
        return (left.float() @ right.float()).mul_(scaling).to(left.dtype)
    return (left @ right).mul_(scaling)


def _placing(tensor: torch.Tensor) -> object:
    """Equal for two tensors only if every rank holds the same rows of both, and rows only."""
    if not isinstance(tensor, distributed.DTensor):
        return tensor.shape[0], None
    if any(getattr(placement, "dim", 0) != 0 for placement in tensor.placements):
        return object()
    return tensor.shape[0], tensor.device_mesh, tensor.placements


def _box(name: str, weight: torch.Tensor) -> tuple[slice, slice] | None:
    """Rows and columns of a weight that this rank publishes."""
    if not isinstance(weight, distributed.DTensor):
        return slice(None), slice(None)
    box = local_box(name, weight)
    if box is None:
        return None
    rows, columns = map(slice, box.starts, map(sum, zip(box.starts, box.local.shape, strict=True)))
    return rows, columns


def _whole(factor: torch.Tensor) -> torch.Tensor:
    """A collective, if it is cut."""
    if isinstance(factor, distributed.DTensor):
        return factor.full_tensor().detach()
    return factor.detach()


def _local(factor: torch.Tensor) -> torch.Tensor:
    if isinstance(factor, distributed.DTensor):
        return factor.to_local().detach()
    return factor.detach()


def _saved(name: str, wrapper: Any) -> nn.Module:
    """The module that is used, of the trained copies and the original."""
    active = [] if wrapper.disable_adapters else list(wrapper.active_adapters)
    if len(active) > 1:
        _refuse(name, f"saved for the adapters {', '.join(active)}, all active")
    if active and active[0] in wrapper.modules_to_save:
        return _attribute(wrapper.modules_to_save, active[0])
    return _attribute(wrapper, "original_module")


def _attribute(module: nn.Module, name: str) -> nn.Module:
    inner: nn.Module = module[name] if isinstance(module, nn.ModuleDict) else getattr(module, name)
    return inner


def _is(module: nn.Module, where: str, kind: str) -> bool:
    known = known_type(where, kind)
    return known is not None and isinstance(module, known)


def _refuse(name: str, value: str) -> NoReturn:
    raise TensorInvalid(name or "(the model)", value, _WAY_OUT)
