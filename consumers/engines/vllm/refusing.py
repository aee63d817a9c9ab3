"""Checkpoints that do not make a model of vLLM, told before anything is written.

vLLM's `load_weights` mostly raises where it finds no place for a tensor, or one of another shape.
Without a word it goes on where a tensor is missing, takes a part of one that is too large, and
casts any dtype to any other. A tensor too many that it skips does no harm, and is not refused:
models skip by design what belongs to drafters, to other ranks, or to nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from weightbus.consumers.errors import CheckpointRefused
from weightbus.consumers.reload.host import Weights
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

__all__ = (
    "Origin",
    "Reached",
    "check_dtypes",
    "check_sizes",
    "half_there",
    "lacking",
    "lacking_quantised",
    "names_on_disk",
    "near",
    "padding_of",
    "refusing",
    "untold",
)

_DISAGREES: Final = (
    "exceeds dimension size",
    "must match",
    "is invalid for input of size",
    "size mismatch",
    "split_with_sizes expects",
)
"""What torch says where shapes do not fit."""

_VALUES: Final = ("F64", "F32", "F16", "BF16")
"""Dtypes that are cast to each other without a scale."""


class Origin(NamedTuple):
    """Where the checkpoint is that an engine was started with."""

    name: str
    """A directory, or a name on the Hugging Face hub."""
    revision: str | None = None
    download_dir: str | None = None
    """Where the hub's snapshots are on this host; None: where they are by default."""


class Reached:
    """How far a `load_weights` has come."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.last = ""

    def noted(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.names.add(name)
            self.last = f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype}"
            yield name, tensor
        self.last = ""


@contextmanager
def refusing(model: str, reached: Reached) -> Iterator[None]:
    """
    Raises:
        CheckpointRefused: vLLM finds no place for a tensor, or one of another shape.
    """
    try:
        yield
    except (KeyError, ValueError, AssertionError, IndexError) as error:
        raise _refused(model, reached, error) from error
    except RuntimeError as error:
        if not any(said in str(error) for said in _DISAGREES):
            raise
        raise _refused(model, reached, error) from error


def _refused(model: str, reached: Reached, error: Exception) -> CheckpointRefused:
    where = f"at {reached.last}" if reached.last else "after its last tensor"
    said = str(error) or "the engine expects another shape"
    return CheckpointRefused(model, f"{where}: {type(error).__name__}: {said}")


def lacking(
    parameter: str,
    names: Collection[str],
    packed: Mapping[str, Sequence[str]],
    *,
    is_padded: bool = False,
) -> str:
    """What the checkpoint should have had for a parameter of an unquantised model.

    Args:
        names: what it has.
        packed: vLLM's `packed_modules_mapping`: fused module -> what it is made of.
        is_padded: no checkpoint has all of it.

    Returns:
        Empty if nothing is known to be missing.
    """
    module, _, attribute = parameter.rpartition(".")
    layer = near(parameter, names)
    gaps = _gaps(layer)
    if gaps:
        return f"the checkpoint lacks {', '.join(gaps[:3])}"
    above, _, leaf = module.rpartition(".")
    parts = packed.get(leaf, [leaf])
    expected = [".".join(filter(None, (above, part, attribute))) for part in parts]
    missing = [name for name in expected if not any(_alike(name, other) for other in names)]
    numbered_alike = layer or not _layer(parameter)  # drafters count their layers from others' on
    if missing and numbered_alike and attribute in ("weight", "bias"):
        return f"the checkpoint lacks {', '.join(missing)}"
    if is_padded:
        return ""
    return f"the checkpoint lacks a tensor of {module}, or has a smaller one than vLLM takes"


def lacking_quantised(
    parameter: str, names: Collection[str], on_disk: Collection[str], origin: Origin
) -> str:
    """What the checkpoint should have had for a parameter of a quantised model: of what the engine
    was started with, since it has defaults for scales, and makes parameters that no checkpoint has.

    Args:
        names: what it has.
        on_disk: see `names_on_disk`.

    Returns:
        Empty if nothing is known to be missing.
    """
    if not on_disk:
        return untold(origin)
    missing = near(parameter, set(on_disk).difference(names))
    if not missing:
        return ""
    return f"the checkpoint lacks {', '.join(missing[:3])}, which the engine started with"


def untold(origin: Origin) -> str:
    """Why no checkpoint is taken by a quantised model of which `names_on_disk` has nothing."""
    return (
        f"no safetensors file of {origin.name}, which the engine was started with, is found on "
        "this host: only these tell which tensors a quantised model needs. Start it from a "
        "directory that has them"
    )


def padding_of(model: nn.Module) -> dict[str, int]:
    """Bytes of every parameter that vLLM has made larger than what any checkpoint has of it, as it
    says itself: of experts, where their kernel asks for it."""
    padding: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        added = parameter.numel() - getattr(parameter, "weight_loader_numel", parameter.numel())
        if added > 0:
            padding[name] = added * parameter.itemsize
    return padding


def _gaps(names: Collection[str]) -> list[str]:
    """What is missing where numbered things (experts) have the same tensors each."""
    rows: dict[str, dict[int, set[str]]] = {}
    for name in names:
        steps = name.split(".")
        numbers = [place for place, step in enumerate(steps) if step.isdigit()]
        if len(numbers) > 1:
            start = ".".join(steps[: numbers[-1]])
            number, rest = int(steps[numbers[-1]]), ".".join(steps[numbers[-1] + 1 :])
            rows.setdefault(start, {}).setdefault(number, set()).add(rest)
    return [
        f"{start}.{number}.{rest}"
        for start, row in sorted(rows.items())
        for number in range(max(row) + 1)
        for rest in sorted(set().union(*row.values()) - row.get(number, set()))
    ]


def _alike(name: str, other: str) -> bool:
    """Equal from the last number on the way on: models name what is above it as they like."""
    ways = [way.split(".") for way in (name, other)]
    starts = [max((n for n, step in enumerate(way) if step.isdigit()), default=-1) for way in ways]
    left, right = (way[max(start, 0) :] for way, start in zip(ways, starts, strict=True))
    return left == right or (min(starts) < 0 and left[-2:] == right[-2:])


def check_sizes(model: str, needs: Needs, layout: Layout) -> None:
    """Of an unquantised model, by the last of its tensor-parallel ranks: it reads to the end.

    Raises:
        CheckpointRefused: a tensor is larger than what vLLM takes of it.
    """
    ends: dict[int, list[int]] = {}
    for copy in needs.copies:
        found = [start + size for start, size in zip(copy.starts, copy.sizes, strict=True)]
        known = ends.setdefault(copy.tensor, found)
        ends[copy.tensor] = [max(pair) for pair in zip(known, found, strict=True)]
    for number, end in ends.items():
        spec = layout.tensors[number]
        if tuple(end) != tuple(spec.shape):
            raise CheckpointRefused(
                model, f"{spec.name} has shape {spec.shape}: the engine takes {tuple(end)} of it"
            )


def check_dtypes(model: str, needs: Needs, layout: Layout) -> None:
    """
    Raises:
        CheckpointRefused: values would be cast that mean nothing without a scale.
    """
    for copy in needs.copies:
        spec, parameter = layout.tensors[copy.tensor], needs.parameters[copy.parameter]
        if spec.dtype != parameter.dtype and not {spec.dtype, parameter.dtype} <= set(_VALUES):
            raise CheckpointRefused(
                model,
                f"{spec.name} is of {spec.dtype}: {parameter.name} takes {parameter.dtype}",
            )


def names_on_disk(origin: Origin) -> frozenset[str]:
    """Of every tensor in the safetensors files of a checkpoint; none if it is not there. Nothing is
    downloaded."""
    names: set[str] = set()
    try:
        for path in sorted(_directory_of(origin).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names.update(file.keys())
    except (OSError, SafetensorError):
        return frozenset()
    return frozenset(names)


def _directory_of(origin: Origin) -> Path:
    """A snapshot's, where there is no such directory, but one of that name."""
    if not Path(origin.name).is_dir():
        with suppress(ImportError, OSError, ValueError):  # what the hub's client raises is one
            from huggingface_hub import snapshot_download

            return Path(
                snapshot_download(
                    origin.name,
                    revision=origin.revision,
                    cache_dir=origin.download_dir,
                    local_files_only=True,
                    allow_patterns=[],  # engines do not download all that a repository has
                )
            )
    return Path(origin.name)


def half_there(names: Collection[str], on_disk: Collection[str]) -> list[str]:
    """What the checkpoint on disk has of layers of which a layout has a part.

    Layers that it has nothing of (those of a drafter) are nobody's here; nor is what has no number,
    as a head that is tied.
    """
    layers = {_up_to_layer(name) for name in names}
    absent = (name for name in on_disk if name not in names and _layer(name))
    return sorted(name for name in absent if _up_to_layer(name) in layers)


def _up_to_layer(name: str) -> str:
    start, found, _ = name.partition(f".{_layer(name)}.")
    return start + found


def near(parameter: str, names: Collection[str]) -> list[str]:
    """Those of the same layer as a parameter: equal up to their first number."""
    layer = _layer(parameter)
    return sorted(name for name in names if layer and _layer(name) == layer)


def _layer(name: str) -> str:
    return next((step for step in name.split(".") if step.isdigit()), "")
