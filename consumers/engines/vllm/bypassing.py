"""What a model's `load_weights` copies into its parameters itself, past their weight loaders.

vLLM's reload lifecycle sees only what goes through a parameter's `weight_loader`. Until a layer is
complete its parameters are on `meta`, where a copy is lost: vLLM then puts the old bytes back, and
warns. gpt-oss loads its experts and attention sinks so. Here such writes are kept, count as loaded,
and are done once the layer's parameters are real.

Owns nothing between two reloads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import layerwise

from weightbus.consumers.errors import ProofFailed

__all__ = ("Bypasses", "bypasses_kept")

_COPY: Final = torch.ops.aten.copy_.default
_FILLS: Final = frozenset(
    (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)
)
"""What is filled may be copied to after that: it does not make a layer complete."""


class _Place(NamedTuple):
    """A parameter or buffer that is on `meta`."""

    layer: nn.Module
    name: str
    dtype: torch.dtype
    numel: int

    @property
    def told(self) -> str:
        return f"{type(self.layer).__name__}.{self.name}"


class _Window(NamedTuple):
    """A part of a parameter, or all of it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Write(NamedTuple):
    name: str
    window: _Window
    write: Callable[..., Any]
    arguments: tuple[Any, ...]


class Bypasses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this is entered, nothing that is written to these layers is lost."""

    def __init__(
        self, layers: Iterable[nn.Module], is_deferred: Callable[[nn.Module], bool]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_deferred = is_deferred
        self._places: dict[int, _Place] = {}
        """By storage."""
        self._kept: dict[nn.Module, list[_Write]] = {}
        self._copied: dict[tuple[nn.Module, str], dict[_Window, int]] = {}
        """How many elements each window has that was copied to."""
        self._loaders = 0
        """How many of vLLM's loaders are at work: they count what they would copy."""
        for layer in layers:
            for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
                if tensor is not None and tensor.is_meta:
                    place = _Place(layer, name, tensor.dtype, tensor.numel())
                    self._places[_storage(tensor)] = place

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._loaders or not func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        places = [self._places.get(_storage(one)) for one in _written(func, args, kwargs or {})]
        place = next(filter(None, places), None)
        if place is None:
            return func(*args, **(kwargs or {}))
        target = args[0]
        if func is not _COPY and func not in _FILLS:
            raise ProofFailed(place.told, f"is written by {func}, past its weight loader")
        if target.dtype != place.dtype:
            reason = f"is written as {target.dtype}, past its weight loader"
            raise ProofFailed(place.told, reason)
        if self._is_deferred(place.layer):
            raise ProofFailed(place.told, "is written past its weight loader: vLLM loses it")
        if not layerwise.get_layerwise_info(place.layer).can_load():
            raise ProofFailed(place.told, "is written past its weight loader when it was complete")
        self._keep(place, target, func, args[1:])
        return target

    def _keep(self, place: _Place, target: torch.Tensor, func: Any, rest: tuple[Any, ...]) -> None:
        layer, info = place.layer, layerwise.get_layerwise_info(place.layer)
        window = _Window(tuple(target.size()), tuple(target.stride()), int(target.storage_offset()))
        self._kept.setdefault(layer, []).append(_Write(place.name, window, func, rest))
        if func is _COPY:
            before = self._copied_of(place)
            self._copied.setdefault((layer, place.name), {})[window] = target.numel()
            info.load_numel += self._copied_of(place) - before
        info.load_numel_total = layerwise.get_layer_size(layer)
        if info.load_numel >= info.load_numel_total:
            self._process(layer)

    def _copied_of(self, place: _Place) -> int:
        """Elements of a parameter that were copied to, as far as windows tell."""
        windows = self._copied.get((place.layer, place.name), {})
        return min(place.numel, sum(windows.values()))

    def _process(self, layer: nn.Module) -> None:
        with self._at_work():
            layerwise._layerwise_process(layer, layerwise.get_layerwise_info(layer))

    def end(self) -> None:
        """No more is loaded: layers that were filled only are complete, too."""
        for layer in list(self._kept):
            info = layerwise.get_layerwise_info(layer)
            if info.can_load() and info.load_numel <= 0:
                self._process(layer)

    def check_done(self) -> None:
        """
        Raises:
            ProofFailed: something that was kept was not written.
        """
        for layer, kept in self._kept.items():
            told = f"{type(layer).__name__}.{kept[0].name}"
            raise ProofFailed(told, "was written past its weight loader, and vLLM lost it")

    def _do(self, layer: nn.Module) -> None:
        """Write what was kept for a layer whose parameters are real now."""
        writes = self._kept.pop(layer, [])
        for name in dict.fromkeys(kept.name for kept in writes):
            self._begin(layer, name)
        for kept in writes:
            whole: torch.Tensor = getattr(layer, kept.name)
            kept.write(whole.data.as_strided(*kept.window), *kept.arguments)

    def _begin(self, layer: nn.Module, name: str) -> None:
        """What is not written whole begins as it is served, or with zeros: not with whatever the
        memory holds."""
        made: torch.Tensor = getattr(layer, name)
        if sum(self._copied.get((layer, name), {}).values()) >= made.numel():
            return
        tensors = layerwise.get_layerwise_info(layer).kernel_tensors
        served = None if tensors is None else tensors[0].get(name, tensors[1].get(name))
        is_repacked = isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase)
        if (
            served is not None
            and not is_repacked
            and (served.shape, served.dtype) == (made.shape, made.dtype)
        ):
            made.data.copy_(served)
        else:
            made.data.zero_()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._loaders += 1
        try:
            yield
        finally:
            self._loaders -= 1

    def counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's way to count what a loader would copy, seen."""

        def count(*args: Any, **kwargs: Any) -> Any:
            with self._at_work():
                return original(*args, **kwargs)

        return count

    def materialized(self, original: Callable[..., None]) -> Callable[..., None]:
        """vLLM's way to make a layer's parameters real, followed by what was kept for them."""

        def materialize(layer: nn.Module, *args: Any) -> None:
            with self._at_work():
                original(layer, *args)
                self._do(layer)

        return materialize


@contextmanager
def bypasses_kept(
    layers: Iterable[nn.Module], is_deferred: Callable[[nn.Module], bool]
) -> Iterator[Bypasses]:
    """To be entered once the layers' parameters are on `meta`, and left once all are in their
    places again. Weights are loaded in the mode that it yields; then its `end` is called.

    Args:
        is_deferred: whether vLLM processes a layer by itself, after all others.

    Raises:
        ProofFailed: weights are written in a way that cannot be kept; also out of the loading.
    """
    mode = Bypasses(layers, is_deferred)
    count, materialize = layerwise.get_numel_loaded, layerwise.materialize_layer
    layerwise.get_numel_loaded = mode.counted(count)
    layerwise.materialize_layer = mode.materialized(materialize)
    try:
        yield mode
    finally:
        layerwise.get_numel_loaded, layerwise.materialize_layer = count, materialize
    mode.check_done()


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors on `meta` that an operation writes to."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, torch.Tensor) and one.is_meta:
                yield one


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
