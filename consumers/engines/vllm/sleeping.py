"""What vLLM's sleep mode does to the memory of the device of one worker.

Owns nothing. vLLM tells nobody at which level an engine slept: at level 1 weights are copied to
main memory and come back, at level 2 they do not (`device_allocator/cumem.py` of 0.26 and 0.32).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Final
from weakref import WeakMethod

__all__ = (
    "KNOWN_BACKEND",
    "are_weights_asleep",
    "are_weights_discarded",
    "follow_sleep",
    "parts_asleep",
)

KNOWN_BACKEND: Final = "cumem"
"""Of vLLM's sleep mode; others do not go through its allocators."""

_ALLOCATORS: Final = (
    ("vllm.device_allocator.cumem", "CuMemAllocator"),
    ("vllm.device_allocator.xpumem", "XpuMemAllocator"),
)
"""Modules and classes of vLLM that take memory off a device when the engine sleeps."""

_CHANGING: Final = ("sleep", "discard", "wake_up")
"""Methods by which they do, and bring it back."""

_WEIGHTS: Final = "weights"


def parts_asleep() -> tuple[str, ...]:
    """What is not in the memory of the device now, by vLLM's tags: `weights`, `kv_cache`, ...
    Whoever writes to it faults."""
    return tuple(sorted({allocation.tag for allocation in _asleep()}))


def are_weights_asleep() -> bool:
    """Whether weights cannot be read or written now."""
    return _WEIGHTS in parts_asleep()


def are_weights_discarded() -> bool:
    """Whether weights are asleep of which vLLM keeps no copy: when they are woken, they may be
    anything."""
    return any(
        allocation.tag == _WEIGHTS and getattr(allocation, "cpu_backup_tensor", ...) is None
        for allocation in _asleep()
    )


def follow_sleep(changed: Callable[[], None]) -> None:
    """Have a method called, which must not raise, whenever something has fallen asleep or has been
    woken, on the thread that did it. Its object is not kept alive."""
    told = WeakMethod(changed)
    for allocator in _allocators():
        for name in _CHANGING:
            if callable(getattr(allocator, name, None)):
                vars(allocator)[name] = _followed(getattr(allocator, name), told)


def _followed(original: Callable[..., Any], told: WeakMethod[Callable[[], None]]) -> Any:
    """Its own attribute hides that of its class."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            if (changed := told()) is not None:
                changed()

    return call


def _asleep() -> Iterator[Any]:
    for allocator in _allocators():
        for allocation in allocator.pointer_to_data.values():
            if getattr(allocation, "is_asleep", False):
                yield allocation


def _allocators() -> Iterator[Any]:
    for module, name in _ALLOCATORS:
        allocator = getattr(getattr(sys.modules.get(module), name, None), "instance", None)
        if allocator is not None:
            yield allocator
