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
from vllm.model_executor.model_loader.reload import layerwise

from weightbus.consumers.errors import ProofFailed

__all__ = ("Bypasses", "bypasses_kept")

_COPY: Final = torch.ops.aten.copy_.default
_FILLS: Final = frozenset(
    (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)
)
"""What is filled may be copied to after that: it does not make a layer complete."""


class _Place(NamedTuple):
    """A parameter that is on `meta`."""

    layer: nn.Module
    name: str


class _Write(NamedTuple):
    """One that was meant for a part of a parameter, or all of it."""

    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    write: Callable[..., Any]
    arguments: tuple[Any, ...]


class Bypasses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this is entered, nothing that is written to these layers is lost."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places: dict[int, _Place] = {}
        """By storage."""
        self._kept: dict[int, list[_Write]] = {}
        """By the layer's id."""
        self._loaders = 0
        """How many of vLLM's loaders are at work: they count what they would copy."""
        for layer in layers:
            for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
                if tensor is not None and tensor.is_meta:
                    self._places[_storage(tensor)] = _Place(layer, name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        target = args[0] if args else None
        if (
            self._loaders
            or not func._schema.is_mutable
            or not isinstance(target, torch.Tensor)
            or not target.is_meta
            or (place := self._places.get(_storage(target))) is None
        ):
            return func(*args, **(kwargs or {}))
        name = f"{type(place.layer).__name__}.{place.name}"
        if func is not _COPY and func not in _FILLS:
            raise ProofFailed(name, f"is written by {func}, past its weight loader")
        if not layerwise.get_layerwise_info(place.layer).can_load():
            raise ProofFailed(name, "is written past its weight loader when it was complete")
        self._keep(place, target, func, args[1:])
        return target

    def _keep(self, place: _Place, target: torch.Tensor, func: Any, rest: tuple[Any, ...]) -> None:
        layer, info = place.layer, layerwise.get_layerwise_info(place.layer)
        size, stride = tuple(target.size()), tuple(target.stride())
        write = _Write(place.name, size, stride, int(target.storage_offset()), func, rest)
        self._kept.setdefault(id(layer), []).append(write)
        if func is _COPY:
            info.load_numel += target.numel()
        if info.load_numel >= layerwise.get_layer_size(layer):
            with self._at_work():
                layerwise._layerwise_process(layer, info)

    def end(self) -> None:
        """No more is loaded: layers that were filled only are complete, too."""
        for place in self._places.values():
            info = layerwise.get_layerwise_info(place.layer)
            if id(place.layer) in self._kept and info.can_load():
                info.load_numel = max(1, info.load_numel)

    def _do(self, layer: nn.Module) -> None:
        """Write what was kept for a layer whose parameters are real now."""
        for kept in self._kept.pop(id(layer), ()):
            whole: torch.Tensor = getattr(layer, kept.name)
            kept.write(whole.data.as_strided(kept.size, kept.stride, kept.offset), *kept.arguments)

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
def bypasses_kept(layers: Iterable[nn.Module]) -> Iterator[Bypasses]:
    """To be entered once the layers' parameters are on `meta`, and left once all are in their
    places again. Weights are loaded in the mode that it yields; then its `end` is called.

    Raises:
        ProofFailed: weights are written in a way that cannot be kept; out of the loading.
    """
    mode = Bypasses(layers)
    count, materialize = layerwise.get_numel_loaded, layerwise.materialize_layer
    layerwise.get_numel_loaded = mode.counted(count)
    layerwise.materialize_layer = mode.materialized(materialize)
    try:
        yield mode
    finally:
        layerwise.get_numel_loaded, layerwise.materialize_layer = count, materialize


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
