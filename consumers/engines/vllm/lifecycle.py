"""vLLM's own reload lifecycle, for a whole model or for some of its modules.

Owns nothing between two calls. `reload_layerwise` takes the chosen modules back to how they were
before their post-processing, loads them, processes them again, and copies what comes out into the
memory that the engine uses: captured graphs stay valid.

What vLLM leaves out is done beside it:
    the kernels of unquantised experts repack their weights only when they are made, not when these
    are loaded again (on a CPU the update is then without effect, and nothing says so);
    what post-processing keeps in closures and kernel objects is bound anew, while a compiled graph
    keeps what it was traced with: such copies are renewed in their own memory;
    what a model copies into its parameters past their loaders is lost, or kept (`bypassing.py`);
    a module whose weight is tied to another's (a head on a CPU, which packs it) is not processed
    again when only the other is loaded;
    when loading fails, modules stay on `meta`: they are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from weightbus.consumers.engines.vllm.bypassing import bypasses_kept
from weightbus.consumers.engines.vllm.captured import (
    Bound,
    bound_attributes,
    keep_in_place,
    reaches_only,
    rebound,
    storage_address,
)
from weightbus.consumers.reload.host import Weights

__all__ = ("Processed", "processes_itself", "reload_layerwise")

_WHEN_STARTING: Final = torch.device("cpu")
"""Torch's default device when vLLM processes weights at its start, whatever the model's is: what it
makes anew without naming a device (constants of attention) lies in main memory, and has to again.
"""


@dataclass
class Processed:
    """What post-processing did to the modules of one reload."""

    derived: dict[int, tuple[nn.Module, str]] = field(default_factory=dict)
    """By id: the modules that keep a copy of their weights, and where."""
    layers: set[int] = field(default_factory=set)
    """Ids of the modules that were processed."""
    moved: list[str] = field(default_factory=list)
    """Copies that are elsewhere now: `module type.attribute`."""
    empty: list[nn.Module] = field(default_factory=list)
    """Modules with parameters of their own that were given nothing, and hold what they held."""


class _Chosen(nn.Module):
    """Some modules, as vLLM's lifecycle asks for them: each for itself, without those below it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        object.__setattr__(self, "_layers", tuple(layers))

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        yield from self._layers  # type: ignore[misc]


def reload_layerwise(
    model: Any,
    model_config: ModelConfig,
    layers: Sequence[nn.Module],
    weights: Weights,
) -> Processed:
    """Load `layers` of `model` with what they are made of, and process them.

    Called within the vLLM config and on the device of the model. If it raises, every parameter is
    in its place again, with some bytes of the old and some of the new version.

    Raises:
        Exception: whatever vLLM raises.
    """
    chosen = _Chosen(layers)
    processed = Processed()
    state = _storages((*model.parameters(), *model.buffers()))
    with (
        torch.no_grad(),
        _without_torchao_reload(model),
        _put_back(layers),
        _watched(layers, state, processed),
    ):
        initialize_layerwise_reload(chosen)
        with bypasses_kept(layers, processes_itself) as seeing:
            with seeing:
                model.load_weights(weights)
            seeing.end()
            processed.empty = _empty(layers)
            finalize_layerwise_reload(chosen, model_config)
        _process_tied(layers, processed)
    return processed


def _empty(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules to which nothing was loaded, neither to them nor to others that share with them."""
    infos = [(layer, get_layerwise_info(layer)) for layer in layers]
    waiting = [
        (layer, _taken_away(layer, info.kernel_tensors[0]))
        for layer, info in infos
        if info.can_load() and info.load_numel <= 0 and info.kernel_tensors is not None
    ]
    own = {id(parameter) for _, parameters in waiting for parameter in parameters.values()}
    shared = {
        id(parameter)
        for layer, info in infos
        if info.load_numel > 0 or not info.can_load()
        for parameter in (
            info.kernel_tensors[0] if info.kernel_tensors is not None else layer._parameters
        ).values()
        if id(parameter) in own
    }
    return [
        layer
        for layer, parameters in waiting
        if parameters and not any(id(parameter) in shared for parameter in parameters.values())
    ]


def _taken_away(layer: nn.Module, served: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Of the parameters that a layer serves: those that were put on `meta` to be loaded. vLLM lets
    some stay, which are then loaded where they are."""
    return {name: own for name, own in served.items() if layer._parameters.get(name) is not own}


def _process_tied(layers: Sequence[nn.Module], processed: Processed) -> None:
    """Process modules that were not loaded themselves, but hold a weight of one that was."""
    loaded = {
        id(parameter)
        for layer in layers
        if id(layer) in processed.layers
        for parameter in layer._parameters.values()
        if parameter is not None
    }
    for layer in layers:
        method = _method_of(layer)
        if method is None or id(layer) in processed.layers:
            continue
        if any(id(parameter) in loaded for parameter in layer._parameters.values()):
            method.process_weights_after_loading(layer)


@contextmanager
def _without_torchao_reload(model: Any) -> Iterator[None]:
    """`initialize_layerwise_reload` turns this off for the model that it is given, which is not
    the one whose `load_weights` looks at it."""
    before = getattr(model, "_do_torchao_reload", None)
    if not before:
        yield
        return
    model._do_torchao_reload = False
    try:
        yield
    finally:
        model._do_torchao_reload = before


@contextmanager
def _put_back(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever happens, no layer is left on `meta` or with a loader that only collects."""
    try:
        yield
    finally:
        for layer in layers:
            info = get_layerwise_info(layer)
            if info.kernel_tensors is not None:
                _place(layer, *info.kernel_tensors)
            info.reset()
            for tensor in (*layer._parameters.values(), *layer._buffers.values()):
                loader: Any = getattr(tensor, "weight_loader", None)
                while getattr(loader, "__name__", "") == "online_process_loader":
                    loader = loader.__wrapped__
                    tensor.weight_loader = loader  # type: ignore[union-attr]


def _place(layer: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    """Bind exactly these tensors, as they were when the reload began."""
    transient = set(layer._non_persistent_buffers_set)
    info = get_layerwise_info(layer)
    transient |= getattr(info, "kernel_non_persistent_buffers", set())
    for name in [name for name, tensor in layer._parameters.items() if tensor is not None]:
        delattr(layer, name)
    for name in [name for name, tensor in layer._buffers.items() if tensor is not None]:
        delattr(layer, name)
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)
    for name, buffer in buffers.items():
        layer.register_buffer(name, buffer, persistent=name not in transient)


@contextmanager
def _watched(
    layers: Iterable[nn.Module], state: frozenset[int], processed: Processed
) -> Iterator[None]:
    """Whoever processes one of the layers is watched, and completed."""
    with ExitStack() as stack:
        methods = {id(method): method for method in map(_method_of, layers) if method is not None}
        for method in methods.values():
            stack.enter_context(_method_watched(method, state, processed))
        for layer in layers:
            if processes_itself(layer):
                stack.enter_context(_layer_watched(layer, state, processed))
        yield


def processes_itself(layer: nn.Module) -> bool:
    """Whether vLLM processes a module by a method of its own, after all others: attention."""
    own = getattr(layer, "process_weights_after_loading", None)
    return callable(own) and not isinstance(layer, QuantizeMethodBase)


def _method_of(layer: nn.Module) -> QuantizeMethodBase | None:
    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


@contextmanager
def _method_watched(method: Any, state: frozenset[int], processed: Processed) -> Iterator[None]:
    original = method.process_weights_after_loading

    def process(layer: nn.Module) -> None:
        holders = (layer, method)
        before = [bound_attributes(holder) for holder in holders]
        with _WHEN_STARTING:
            _process_whole(method, original, layer)
        processed.layers.add(id(layer))
        for holder, bound in zip(holders, before, strict=True):
            _note(layer, holder, bound, state, processed)

    with _replaced(method, process):
        yield


@contextmanager
def _layer_watched(layer: Any, state: frozenset[int], processed: Processed) -> Iterator[None]:
    original = layer.process_weights_after_loading

    def process(*args: Any, **kwargs: Any) -> None:
        holders = (layer, getattr(layer, "impl", None))
        before = [bound_attributes(holder) for holder in holders]
        with _WHEN_STARTING:
            original(*args, **kwargs)
        for holder, bound in zip(holders, before, strict=True):
            _note(layer, holder, bound, state, processed)

    with _replaced(layer, process):
        yield


@contextmanager
def _replaced(thing: Any, process: Callable[..., None]) -> Iterator[None]:
    """Its own attribute hides that of its class."""
    vars(thing)["process_weights_after_loading"] = process
    try:
        yield
    finally:
        del vars(thing)["process_weights_after_loading"]


def _process_whole(method: Any, original: Callable[[nn.Module], None], layer: nn.Module) -> None:
    """As vLLM processes a layer when it starts.

    `UnquantizedFusedMoEMethod` asks its experts to repack (`fused_experts
    .process_weights_after_loading`) only in the call that makes its kernel.
    """
    kernel = getattr(method, "moe_kernel", None)
    original(layer)
    if (
        kernel is not None
        and kernel is method.moe_kernel
        and isinstance(method, UnquantizedFusedMoEMethod)
    ):
        experts = getattr(kernel, "fused_experts", None)
        repack = getattr(experts, "process_weights_after_loading", None)
        if repack is not None:
            repack(layer)


def _note(
    layer: nn.Module, holder: object, before: Bound, state: frozenset[int], processed: Processed
) -> None:
    """Find the copies that processing has bound anew, and renew the old ones in place.

    What is bound anew to the tensors that the layer was loaded into (kernels with their scales) is
    bound to what goes when these are copied into those of `state`: the old one stays.
    """
    own = state | _storages((*layer.parameters(), *layer.buffers()))
    copies = rebound(holder, before, own)
    for name, value in rebound(holder, before, state).items():
        old = before.get(name)
        has_room = name not in copies or not reaches_only(old, own)
        is_kept = old is not None and has_room and keep_in_place(old, value, own)
        if is_kept:
            vars(holder)[name] = old
            if name not in copies and reaches_only(old, state):
                continue
        processed.derived.setdefault(id(layer), (layer, name))
        if old is not None and not is_kept and name in copies:
            processed.moved.append(f"{type(layer).__name__}.{name}")


def _storages(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(storage_address(tensor) for tensor in tensors if tensor.numel())
