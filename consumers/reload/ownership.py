"""Which parameter or buffer of a model owns which memory, when several lie in the same. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightbus.consumers.errors import TraceRefused
from weightbus.consumers.reload.dtypes import DTYPE_NAMES
from weightbus.consumers.reload.memory import ByteWindow, StateTensor, storage_id, window_of
from weightbus.schemas.needs import ParameterSpec

__all__ = ("Owner", "owners_of", "spec_of")


@dataclass(frozen=True)
class Owner:
    """A parameter or buffer, with all whose memory lies inside its own."""

    spec: ParameterSpec
    storage: int
    window: ByteWindow
    held: list[tuple[StateTensor, ByteWindow]]
    """Itself, then the others."""


def owners_of(model: str, state: Sequence[StateTensor]) -> list[Owner]:
    """The largest of the tensors that share memory, in the order of `state`.

    Raises:
        TraceRefused: a tensor has no memory of its own, or shares only a part of it.
    """
    order = {item.name: number for number, item in enumerate(state)}
    placed = []
    for item in state:
        if is_traceable_wrapper_subclass(item.tensor):
            kind = type(item.tensor).__name__
            raise TraceRefused(model, f"{item.name} is a {kind}: not memory of its own")
        window = window_of(item.tensor)
        place = (storage_id(item.tensor), window.offset, -window.end, order[item.name])
        placed.append((place, item, window))
    owners: list[Owner] = []
    for (storage, *_), item, window in sorted(placed, key=lambda entry: entry[0]):
        last = owners[-1] if owners and owners[-1].storage == storage else None
        if last is None or window.offset >= last.window.end:
            owners.append(Owner(spec_of(model, item), storage, window, [(item, window)]))
        elif window.end <= last.window.end:
            last.held.append((item, window))
        else:
            names = f"{item.name} and {last.spec.name}"
            raise TraceRefused(model, f"{names} share memory, but neither holds the other")
    return sorted(owners, key=lambda owner: order[owner.spec.name])


def spec_of(model: str, item: StateTensor) -> ParameterSpec:
    """A parameter or buffer as needs tell it.

    Raises:
        TraceRefused: its dtype is not one of a layout's.
    """
    if item.tensor.dtype not in DTYPE_NAMES:
        raise TraceRefused(model, f"{item.name} is of dtype {item.tensor.dtype}")
    return ParameterSpec(
        item.name,
        DTYPE_NAMES[item.tensor.dtype],
        tuple(item.tensor.shape),
        tuple(item.tensor.stride()),
    )
