"""SGLang's own way to load a model again, for a whole model or for some of its modules.

Owns nothing between two calls. As SGLang does in `update_weights_from_disk`: quantisation methods
take their modules back to how they were before post-processing (`restore_weights_before_loading`,
where this SGLang has it), the model loads, and they process their modules again.

What SGLang leaves out is done beside it: tensors that were bound anew are copied into the memory
that they had before, and stay there, since captured CUDA graphs go on reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from weightbus.consumers.engines.vllm.captured import (
    Bound,
    bound_attributes,
    keep_in_place,
    reaches_only,
    rebound,
    tensors_within,
)
from weightbus.consumers.errors import ProofFailed
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.memory import state_tensors

__all__ = ("Reloaded", "can_restore", "load_checkpoint", "reload_modules")

_RESTORING = (
    "restore_weights_before_loading",
    "maybe_restore_flashinfer_trtllm_bf16_weight_shape_for_load",
)
"""Methods by which a quantisation method takes back what it did to the shape of a parameter: before
a load, or, in older versions, whenever its parameter is loaded."""


@dataclass(frozen=True)
class _Kept:
    """A parameter or buffer before a reload."""

    module: nn.Module
    name: str
    label: str
    """Its whole name."""
    tensor: torch.Tensor
    """The object that the module had: SGLang's loaders hang on it."""
    memory: torch.Tensor
    """What it showed; keeps its storage alive."""


@dataclass(frozen=True)
class _Holder:
    """A module or its quantisation method before a reload."""

    module: str
    thing: object
    bound: Bound


class Reloaded(NamedTuple):
    """What SGLang's post-processing keeps of weights elsewhere than in parameters and buffers."""

    derived: dict[str, str]
    """The modules that keep it on themselves, or on their quantisation method, and where."""
    moved: tuple[str, ...]
    """`module.attribute` of what is elsewhere now than it was: what captured it holds the old."""


def can_restore(module: nn.Module) -> bool:
    """Whether SGLang says that it can load a module again whose parameters it has repacked."""
    kind = type(getattr(module, "quant_method", None))
    return any(_overrides(kind, name) for name in _RESTORING)


def load_checkpoint(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """The mapping alone: `model.load_weights`, with what SGLang's loader does to names before it,
    where this SGLang has that apart."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    if hasattr(DefaultModelLoader, "load_weights_only"):
        DefaultModelLoader.load_weights_only(model, weights, device)
    else:
        any_model: Any = model
        any_model.load_weights(weights)


def reload_modules(
    model: nn.Module, names: frozenset[str] | None, load: Callable[[], None]
) -> Reloaded:
    """Restore modules of a model, let `load` write to them, and process them.

    If it raises, they may hold anything.

    Args:
        names: of the modules; None: all.

    Raises:
        ProofFailed: a parameter has another form than before: what captured it holds the old one.
        Exception: whatever SGLang raises.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    modules = named if names is None else {name: named[name] for name in sorted(names)}
    kept = list(_kept(modules))
    methods = list(_methods(modules))
    holders = list(_holders(modules, methods))
    with torch.no_grad():
        for name, method in methods:
            if hasattr(method, _RESTORING[0]):
                method.restore_weights_before_loading(modules[name])
        load()
        for name, method in methods:
            method.process_weights_after_loading(modules[name])
        for item in kept:
            _put_back(item)
        state = frozenset(item.tensor.untyped_storage().data_ptr() for item in state_tensors(model))
        renewed = [(holder.module, *found) for holder in holders for found in _renew(holder, state)]
        return Reloaded(
            derived={module: attribute for module, attribute, _ in renewed},
            moved=tuple(f"{module}.{attribute}" for module, attribute, moved in renewed if moved),
        )


def _overrides(kind: type, name: str) -> bool:
    """Whether a class has a method that is not the empty one of SGLang's base class."""
    for ancestor in kind.__mro__:
        if name in vars(ancestor):
            return ancestor.__name__ != "QuantizeMethodBase"
    return False


def _methods(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Each module's quantisation method that processes what was loaded, once."""
    seen: set[int] = set()
    for name, module in modules.items():
        method = getattr(module, "quant_method", None)
        if id(module) not in seen and hasattr(method, "process_weights_after_loading"):
            seen.add(id(module))
            yield name, method


def _holders(modules: Mapping[str, nn.Module], methods: list[tuple[str, Any]]) -> Iterator[_Holder]:
    for name, thing in (*modules.items(), *methods):
        yield _Holder(name, thing, bound_attributes(thing))


def _kept(modules: Mapping[str, nn.Module]) -> Iterator[_Kept]:
    for prefix, module in modules.items():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    label = f"{prefix}.{name}" if prefix else name
                    yield _Kept(module, name, label, tensor, tensor.detach())


def _put_back(kept: _Kept) -> None:
    """Let a tensor be the object that it was, where it was.

    Raises:
        ProofFailed: it is gone, or has another form.
    """
    module, memory = kept.module, kept.memory
    held: dict[str, Any] = (
        module._parameters if kept.name in module._parameters else module._buffers
    )
    new = held.get(kept.name)
    if new is None:
        raise ProofFailed(kept.label, "SGLang's post-processing has taken it away")
    if _form(new) != _form(memory):
        found = f"{_form(new)}, and was {_form(memory)}"
        raise ProofFailed(kept.label, f"loaded again by SGLang, it is {found}")
    if new.data_ptr() != memory.data_ptr():
        memory.copy_(new)
    if new is not kept.tensor or new.data_ptr() != memory.data_ptr():
        kept.tensor.data = memory
        held[kept.name] = kept.tensor


def _renew(holder: _Holder, state: frozenset[int]) -> Iterator[tuple[str, bool]]:
    """The attributes that reach tensors, not of the model's own state, and were bound anew; the
    tensors move to where the old ones are, if they have the same structure. And whether something
    could still hold old ones."""
    for attribute, value in rebound(holder.thing, holder.bound, state).items():
        old = holder.bound.get(attribute)
        is_kept = reaches_only(old, state) or _places(old, state) == _places(value, state)
        if not is_kept and keep_in_place(old, value, state):
            vars(holder.thing)[attribute] = old
            is_kept = True
        yield attribute, not is_kept


def _places(value: object, state: frozenset[int]) -> list[tuple[object, ...]]:
    """Where every tensor is that is reached from a value, those of the model's state left out."""
    return [
        (way, tensor.data_ptr(), *_form(tensor))
        for way, tensor in tensors_within(value)
        if not reaches_only(tensor, state)
    ]


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device)
