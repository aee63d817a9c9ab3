"""transformers' models: which tensors of a checkpoint lie where in those of a module.

Since version 5 a module's names are not the checkpoint's: the experts of a layer are one tensor,
and some models are renamed throughout. transformers knows how to turn that back, but copies what it
cuts, and would gather a `DTensor`. So its own conversion is run once, on tensors without data, and
watched: what comes out as a view of a module's tensor is a `Window`. Talks to no rank; every rank
gets the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weightbus.producers.errors import TensorInvalid, TrainerInvalid
from weightbus.producers.fused import Split, Window

__all__ = ("split_of",)

_aten = torch.ops.aten
_SAME_VALUES: Final = (_aten.clone.default, _aten.contiguous.default, _aten.detach.default)


def split_of(model: torch.nn.Module) -> Split:
    """How the tensors of a transformers model are called in its checkpoint, and cut for it.

    `model` may be wrapped (DDP, `torch.compile`, PEFT, FSDP2) and sharded. It is not run, and none
    of its tensors is read: its class is made a second time without data, from its config. The
    result maps names as `model.named_parameters()` gives them without wrappers; it gives None for a
    tensor whose name and shape are the checkpoint's, or which the class does not have. Takes
    seconds for a model of 70,000 experts: call it once.

    Raises:
        TrainerInvalid: the model is none of transformers', or quantized.
        TensorInvalid: the checkpoint's tensor is no box of a module's (rotary embeddings permuted,
            gate and up interleaved). From the result: a tensor has not the shape that the model's
            config gives it.
    """
    pretrained = _pretrained(model)
    skeleton = _skeleton(pretrained)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    dropped = frozenset(getattr(skeleton, "_keys_to_ignore_on_save", None) or ())
    windows = dict.fromkeys(dropped & shapes.keys(), ()) | _windows(skeleton, shapes, dropped)

    def split(name: str, shape: tuple[int, ...]) -> Sequence[Window] | None:
        if name not in shapes:
            return None
        found, expected = windows[name], shapes[name]
        if len(found) != 1 or not _is_whole(found[0], expected):
            if shape != expected:
                raise TensorInvalid(
                    name, f"of shape {shape}", f"the model's config says {expected}"
                )
            return found
        if found[0].name == name:
            return None
        return (Window(found[0].name, shape, (0,) * len(shape), shape),)

    return split


def _is_whole(window: Window, shape: tuple[int, ...]) -> bool:
    """Whether it is the fused tensor and the checkpoint's, nothing turned."""
    turned = any(a not in (-1, number) for number, a in enumerate(window.axes or ()))
    return window.sizes == window.shape == shape and not turned


def _pretrained(model: torch.nn.Module) -> Any:
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    except ImportError as error:
        limit = "transformers 5 or later; before, names were the checkpoint's own: give no split"
        raise TrainerInvalid("transformers", f"not usable ({error})", limit) from error
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if getattr(module, "hf_quantizer", None) is not None:
                value = f"quantized ({type(module.hf_quantizer).__qualname__})"
                raise TrainerInvalid("the model", value, "must hold values that were trained")
            return module
    value = f"of type {type(model).__qualname__}"
    raise TrainerInvalid(
        "the model", value, "must be a PreTrainedModel of transformers, or wrap one"
    )


def _skeleton(pretrained: Any) -> Any:
    """The same model without data and wrappers: FSDP changes classes, PEFT modules."""
    from transformers.initialization import no_init_weights

    kind: Any = next(c for c in type(pretrained).__mro__ if not issubclass(c, FSDPModule))
    with torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
        skeleton = kind(copy.deepcopy(pretrained.config))
    conversions = getattr(pretrained, "_weight_conversions", None)
    if conversions is not None:
        skeleton._weight_conversions = conversions
    return skeleton


def _windows(
    skeleton: Any, shapes: Mapping[str, tuple[int, ...]], dropped: frozenset[str]
) -> dict[str, tuple[Window, ...]]:
    """For every tensor of a module the checkpoint's in it, in the order of its memory."""
    from transformers.core_model_loading import revert_weight_conversion

    sources = {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes.items()
        if name not in dropped
    }
    watcher = _Watcher(sources)
    with torch.no_grad(), watcher:
        found = revert_weight_conversion(skeleton, dict(sources))
    windows: dict[str, list[Window]] = {name: [] for name in sources}
    for name, tensor in found.items():
        shape = tuple(tensor.shape)
        for piece in watcher.pieces(name, tensor):
            window = Window(name, shape, piece.starts, piece.sizes, piece.at, piece.axes)
            windows[piece.source].append(window)
    for name, parts in windows.items():
        count = sum(torch.Size(part.sizes).numel() for part in parts)
        if count != sources[name].numel():
            value = f"{sources[name].numel():,} elements long, {count:,} of them in the checkpoint"
            raise TensorInvalid(name, value, "transformers' conversion must keep all, and once")
    return {n: tuple(sorted(parts, key=lambda p: p.starts)) for n, parts in windows.items()}


class _Piece(NamedTuple):
    """A box of a module's tensor, and where it lies in the tensor that is asked for."""

    source: str
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    at: tuple[int, ...]
    axes: tuple[int, ...]


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows of which memory tensors without data are views, and which were joined of others.

    A copy counts as the tensor that it copies. Memory that another operation made is known by that
    operation's name, to refuse what lies in it.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = {_memory(tensor): name for name, tensor in sources.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in sources.items()}
        self._joined: dict[int, list[tuple[torch.Tensor, tuple[int, ...]]]] = {}
        self._made: dict[int, str] = {}
        self._alive: list[torch.Tensor] = list(sources.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAME_VALUES:
            return args[0]
        if func is _aten._unsafe_view.default:
            try:
                return _aten.view.default(*args)
            except RuntimeError:  # it moves elements
                return self._note(torch.empty(args[1], device="meta"), "reshape")
        if func is _aten.cat.default or func is _aten.stack.default:
            return self._join(func, *args, **(kwargs or {}))
        known = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in known:
                self._note(tensor, str(func))
        return results

    def pieces(self, name: str, tensor: torch.Tensor) -> Iterator[_Piece]:
        """What `tensor` consists of."""
        memory = _memory(tensor)
        if memory in self._sources:
            source = self._sources[memory]
            yield _piece_of_view(name, tensor, source, self._shapes[source])
            return
        joined = self._joined.get(memory)
        if joined is None or tensor.storage_offset() != 0 or not tensor.is_contiguous():
            made = self._made.get(memory, "a view of what was joined")
            raise TensorInvalid(name, f"made by {made}", "must be boxes of the module's tensors")
        for part, first in joined:
            if part.ndim != tensor.ndim:
                raise TensorInvalid(name, "joined and reshaped", "must be boxes of the module's")
            for piece in self.pieces(name, part):
                at = tuple(map(sum, zip(first, piece.at, strict=True)))
                yield piece._replace(at=at)

    def _note(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        self._made[_memory(tensor)] = operation
        self._alive.append(tensor)
        return tensor

    def _join(self, func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        if func is _aten.stack.default:
            tensors = [tensor.unsqueeze(dim) for tensor in tensors]
        result = torch.cat(tuple(tensors), dim)
        first, parts = 0, []
        for tensor in tensors:
            at = [0] * result.ndim
            at[dim] = first
            parts.append((tensor, tuple(at)))
            first += tensor.shape[dim]
        self._joined[_memory(result)] = parts
        return self._note(result, "a view of what was joined")


def _piece_of_view(name: str, view: torch.Tensor, source: str, shape: tuple[int, ...]) -> _Piece:
    """Which box of `source` (contiguous) a view is: its strides are those of some dimensions."""
    strides = [max(torch.Size(shape[n + 1 :]).numel(), 1) for n in range(len(shape))]
    number_of = {strides[n]: n for n in range(len(shape)) if shape[n] > 1}
    axes, sizes = [], [1] * len(shape)
    for extent, stride in zip(view.shape, view.stride(), strict=True):
        axis = -1 if extent == 1 else number_of.get(stride, -1)
        if extent != 1 and (axis < 0 or axis in axes):
            value = f"{tuple(view.shape)} of strides {view.stride()} in {source} {shape}"
            raise TensorInvalid(name, value, "must be a box of it, dimension by dimension")
        axes.append(axis)
        if axis >= 0:
            sizes[axis] = extent
    starts, offset = [], view.storage_offset()
    for stride in strides:
        starts.append(offset // stride)
        offset %= stride
    ends = (start + size for start, size in zip(starts, sizes, strict=True))
    if any(end > extent for end, extent in zip(ends, shape, strict=True)):
        value = f"{tuple(view.shape)} from element {view.storage_offset()} of {source} {shape}"
        raise TensorInvalid(name, value, "must be a box of it, dimension by dimension")
    return _Piece(source, tuple(starts), tuple(sizes), (0,) * view.ndim, tuple(axes))


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
