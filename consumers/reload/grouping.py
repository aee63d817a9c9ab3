"""In which order an engine's own loader is given tensors, and how much of them it may hold on to.

Does no I/O. Engines that repack what they load hold the tensors of a module until it is complete.
So those that go to the same modules are given one after the other, whatever the layout's order:
one module is complete before the next one begins, and a model never piles up in a device's memory.
Where an engine holds more nevertheless, `Held` tells.

Invariant: tensors that are written to the same memory keep the order of the layout, as the last one
wins.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Sequence

import torch

__all__ = ("Held", "grouped_by_module")


def grouped_by_module(modules_of: Sequence[Collection[str]]) -> tuple[int, ...]:
    """Every tensor's number once. Modules come in the order of their first tensors: a layout that
    is grouped already stays as it is.

    Args:
        modules_of: for every tensor by number, the modules whose memory it is written to, also
            where another one is written over it. What goes nowhere stays behind the one before it.
    """
    above: dict[str, str] = {}

    def top(module: str) -> str:
        while (higher := above.setdefault(module, module)) != module:
            above[module] = above[higher]
            module = higher
        return module

    for modules in modules_of:
        tops = [top(module) for module in modules]
        for one in tops:
            above[top(one)] = top(tops[0])
    first: dict[str, int] = {}
    groups: list[int] = []
    for number, modules in enumerate(modules_of):
        if modules:
            groups.append(first.setdefault(top(next(iter(modules))), number))
        else:
            groups.append(groups[-1] if groups else 0)
    return tuple(sorted(range(len(groups)), key=groups.__getitem__))


class Held:
    """What somebody still holds of the tensors that were given out, up to a limit.

    Args:
        most_bytes: more than this is not to be held at once.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._given: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        """What was given out and is not known to be free again, by the reference's id."""
        self._freed: deque[weakref.ref[torch.UntypedStorage]] = deque()
        """Since it was last asked; whichever thread drops the last view of something adds to it."""
        self._used_bytes = 0

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether there is room for one more, which is given out then; a view of it counts as the
        whole."""
        while self._freed:
            _, size_bytes = self._given.pop(id(self._freed.popleft()))
            self._used_bytes -= size_bytes
        memory = tensor.untyped_storage()
        size_bytes = memory.nbytes()
        if self._used_bytes + size_bytes > self._most_bytes:
            return False
        given = weakref.ref(memory, self._freed.append)
        self._given[id(given)] = given, size_bytes
        self._used_bytes += size_bytes
        return True
