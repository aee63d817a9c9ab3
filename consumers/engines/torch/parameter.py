"""A parameter that knows which part of which checkpoint tensors it is made of. Does no I/O.

Large engines give every parameter a `weight_loader` that narrows the checkpoint tensor to this
rank's part, narrows the parameter to the place of that part, and copies. So does this one; the
places are data (`Window`), so that the same table also gives the checkpoint tensors back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from weightbus.consumers.errors import PlanError

__all__ = ("Shard", "ShardedParameter", "Window", "whole")

Shard = str | int | tuple[str, int] | None
"""Which of the checkpoint tensors that are fused into one parameter; None: there is only one."""


class Window(NamedTuple):
    """Rows (or columns) of a checkpoint tensor, and where a parameter takes them."""

    dim: int
    """The dimension that is cut, of the checkpoint tensor and of `parameter[place]`."""
    total: int
    """Extent of the checkpoint tensor in `dim`."""
    source: int
    """First index taken of the checkpoint tensor."""
    start: int
    """First index in the parameter."""
    size: int
    """How many indices are copied."""
    padding: int = 0
    """How many indices after them hold no checkpoint value and are filled with 0."""
    place: int | None = None
    """Stacked parameters: the place in dimension 0 of the parameter that holds this tensor."""


def whole(shape: tuple[int, ...]) -> Mapping[Shard, Window]:
    """The table of a parameter that every rank holds whole."""
    return {None: Window(0, shape[0], 0, 0, shape[0])}


class ShardedParameter(nn.Parameter):
    """One rank's part of one or more checkpoint tensors."""

    windows: Mapping[Shard, Window]

    @staticmethod
    def of(
        shape: tuple[int, ...], dtype: torch.dtype, windows: Mapping[Shard, Window] | None = None
    ) -> ShardedParameter:
        """An unset parameter on the default device; without `windows` every rank holds it whole."""
        parameter = ShardedParameter(torch.empty(shape, dtype=dtype))
        parameter.windows = whole(shape) if windows is None else windows
        return parameter

    def weight_loader(self, loaded: torch.Tensor, shard: Shard = None) -> None:
        """Copy this rank's part of a checkpoint tensor into its place.

        Raises:
            PlanError: the checkpoint tensor has another shape than this parameter is made for.
        """
        window = self.windows[shard]
        target = self._place(window)
        expected = list(target.shape)
        expected[window.dim] = window.total
        if list(loaded.shape) != expected:
            raise PlanError(
                "shape of a checkpoint tensor", list(loaded.shape), f"must be {expected}"
            )
        target.copy_(loaded.narrow(window.dim, window.source, window.size))
        if window.padding:
            rows = self._rows(window)
            rows.narrow(window.dim, window.start + window.size, window.padding).fill_(0)

    def checkpoint_view(self, shard: Shard = None) -> torch.Tensor:
        """What this rank holds of a checkpoint tensor: a view of the parameter's memory."""
        return self._place(self.windows[shard])

    def _rows(self, window: Window) -> torch.Tensor:
        return self.data if window.place is None else self.data[window.place]

    def _place(self, window: Window) -> torch.Tensor:
        return self._rows(window).narrow(window.dim, window.start, window.size)
