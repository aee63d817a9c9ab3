"""Records what `load_weights` does to tensors, and moves nothing.

Does no I/O. A `LoadRecorder` is a dispatch mode: while it is active it sees every operation of
torch, follows the checkpoint's tensors (*sources*) through views and through the operations that a
plan can express, and notes each write to the model's state in order.

What a plan cannot express is recorded as a refusal, and raised at once: `refusal` holds the first
one even if the loader catches exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NoReturn

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from weightbus.consumers.reload.dtypes import DTYPE_NAMES
from weightbus.consumers.reload.memory import ByteWindow, storage_id, window_of
from weightbus.schemas.needs import UnaryOp

__all__ = ("Derived", "LoadRecorder", "Part", "Source", "Window", "Write")

_aten = torch.ops.aten

Op = tuple[UnaryOp, str]
"""As in `Transform.ops`."""


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor: contiguous in a storage of its own."""

    tensor: int
    """Its number in the layout."""
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Window:
    """A strided window of a source or of what was derived from one, in elements of `dtype`."""

    base: Source | Derived
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """A box of a derived tensor, and the window that it was made of, element by element."""

    starts: tuple[int, ...]
    window: Window
    op: Op | None
    """None: the elements as they are."""


@dataclass(frozen=True)
class Derived:
    """A tensor that an operation made out of windows: contiguous in a storage of its own.

    Its dimensions are in the order of its memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Write:
    """One write to the state: a window of it takes a window of a source, or a constant."""

    name: str
    """One of the names of the memory written to."""
    storage: int
    """`storage_id` of that memory."""
    target: ByteWindow
    dtype: torch.dtype
    """Of the view that was written through."""
    value: Window | float


@dataclass(frozen=True)
class _Constant:
    """A tensor that holds one value everywhere."""

    value: object


@dataclass(frozen=True)
class _Opaque:
    """A tensor that depends on a source in a way that no plan can express."""

    reason: str


class LoadRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Active as a context manager while `load_weights` runs.

    Args:
        sources: the checkpoint's tensors on `meta`, by layout number.
        state: storage id -> a name, of everything that belongs to the model. The caller keeps all
            of these tensors alive.
    """

    def __init__(self, sources: Mapping[int, torch.Tensor], state: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes: list[Write] = []
        """In the order they were made."""
        self.refusal: str | None = None
        """Why no plan can be made; None: nothing was met so far."""
        self._state = state
        self._known: dict[int, Source | Derived | _Constant | _Opaque] = {
            storage_id(tensor): Source(number, tuple(tensor.shape), tensor.dtype)
            for number, tensor in sources.items()
        }
        self._kept: list[torch.Tensor] = list(
            sources.values()
        )  # a freed storage's id may be reused

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        written = _tensors(_written(func, args, kwargs))
        for tensor in written:
            if storage_id(tensor) in self._state:
                return self._write(func, tensor, args)
            match self._known.get(storage_id(tensor)):
                case Source() | Derived():
                    self._refuse(f"{func} changes a checkpoint tensor in place")
                case _Constant():
                    del self._known[storage_id(tensor)]
        known = (self._known.get(storage_id(tensor)) for tensor in _tensors((args, kwargs)))
        from_sources = any(isinstance(what, Source | Derived | _Opaque) for what in known)
        if from_sources and func is _aten._to_copy.default:  # to another device: stay on meta
            kwargs = {key: kwargs[key] for key in ("dtype", "memory_format") if key in kwargs}
        result = func(*args, **kwargs)
        if from_sources:
            self._follow(func, args, _tensors(result), written)
        elif func in _CONSTANTS:
            self._know(result, _Constant(_rounded(_CONSTANTS[func](*args), result.dtype)))
        return result

    def _refuse(self, reason: str) -> NoReturn:
        self.refusal = self.refusal or reason
        raise RuntimeError(reason)

    # -- writes to the state

    def _write(self, func: OpOverload, target: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        name = self._state[storage_id(target)]
        what = f"{func} to {name}"
        if func is _aten.zero_.default:
            value: Window | float = 0.0
        elif func in _ASSIGNMENTS:
            value = self._value(args[1], target, what)
        else:
            self._refuse(f"{what}: only copies of checkpoint tensors and constants can be planned")
        if target.is_conj() or target.is_neg():
            self._refuse(f"{what} through a lazily conjugated or negated view")
        self.writes.append(Write(name, storage_id(target), window_of(target), target.dtype, value))
        return target

    def _value(self, value: object, target: torch.Tensor, what: str) -> Window | float:
        if not isinstance(value, torch.Tensor):
            return self._constant(value, what)
        base = self._known.get(storage_id(value))
        shown = (
            _window(base, value.expand(target.shape))
            if isinstance(base, Source | Derived)
            else base
        )
        match shown:
            case Window():
                return shown
            case _Constant():
                return self._constant(shown.value, what)
            case _Opaque():
                self._refuse(f"{what} takes what {shown.reason}")
        if storage_id(value) in self._state:
            self._refuse(f"{what} reads {self._state[storage_id(value)]}")
        if value.numel() == 1 and not value.is_meta:
            return self._constant(value.item(), what)
        return self._refuse(f"{what} takes a tensor that is not of the checkpoint")

    def _constant(self, value: object, what: str) -> float:
        if not isinstance(value, bool | int | float) or value != value:
            self._refuse(f"{what}: the constant {value!r} is not a real number")
        if isinstance(value, int) and abs(value) > _EXACT_INTEGERS:
            self._refuse(f"{what}: the constant {value} cannot be told exactly as a float")
        return float(value)

    # -- what is made of sources

    def _follow(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        results: Sequence[torch.Tensor],
        written: Sequence[torch.Tensor],
    ) -> None:
        """Know every tensor that now depends on a source; views are known by their storage."""
        for tensor in results:
            if storage_id(tensor) not in self._known and storage_id(tensor) not in self._state:
                self._know(tensor, self._derive(func, args, tensor))
        for tensor in written:
            self._know(tensor, _Opaque(f"{func} put into a temporary tensor"))

    def _know(self, tensor: torch.Tensor, what: Derived | _Constant | _Opaque) -> None:
        self._known[storage_id(tensor)] = what
        self._kept.append(tensor)

    def _derive(
        self, func: OpOverload, args: tuple[Any, ...], result: torch.Tensor
    ) -> Derived | _Opaque:
        opaque = _Opaque(f"{func} makes of a checkpoint tensor")
        boxes = _boxes(func, args, result)
        order = _dense_order(result)
        if boxes is None or order is None:
            return opaque
        parts = []
        for starts, tensor in boxes:
            base = self._known.get(storage_id(tensor))
            if not isinstance(base, Source | Derived):
                return base if isinstance(base, _Opaque) else opaque
            op = _ELEMENTWISE.get(func)
            if tensor.dtype != result.dtype:
                if op is not None or result.dtype not in DTYPE_NAMES:
                    return opaque
                op = ("cast", DTYPE_NAMES[result.dtype])
            window = _window(base, tensor.permute(order))
            if isinstance(window, _Opaque):
                return window
            parts.append(Part(tuple(starts[dim] for dim in order), window, op))
        return Derived(tuple(result.shape[dim] for dim in order), result.dtype, tuple(parts))


_ASSIGNMENTS: Final = (_aten.copy_.default, _aten.fill_.Scalar, _aten.fill_.Tensor)

_ELEMENTWISE: Final[dict[OpOverload, Op | None]] = {
    _aten.clone.default: None,
    _aten._to_copy.default: None,  # its cast shows in the result's dtype
    _aten.neg.default: ("neg", ""),
    _aten.exp.default: ("exp", ""),
}

_CONSTANTS: Final[dict[OpOverload, Callable[..., complex]]] = {
    _aten.scalar_tensor.default: lambda value: value,
    _aten.full.default: lambda size, value: value,
    _aten.zeros.default: lambda size: 0,
    _aten.ones.default: lambda size: 1,
}
"""Operations that make tensors of one value, which is then a constant like any other."""

_EXACT_INTEGERS: Final = 2**53
"""Every integer up to here has a double of its own."""

Box = tuple[list[int], torch.Tensor]
"""Where a tensor begins in the result, and the tensor."""


def _rounded(value: complex, dtype: torch.dtype) -> object:
    """What a tensor of `dtype` holds after it was filled with `value`."""
    return torch.full((), value, dtype=dtype, device="cpu").item()


def _window(base: Source | Derived, view: torch.Tensor) -> Window | _Opaque:
    if view.itemsize != base.dtype.itemsize:
        return _Opaque(f"is read as {view.dtype}, of another size than {base.dtype}")
    if view.is_conj() or view.is_neg():
        return _Opaque("is lazily conjugated or negated")
    return Window(
        base, int(view.storage_offset()), tuple(view.shape), tuple(view.stride()), view.dtype
    )


def _boxes(func: OpOverload, args: tuple[Any, ...], result: torch.Tensor) -> list[Box] | None:
    """The tensors that lie side by side in a result; None: the operation cannot be planned."""
    if func in _ELEMENTWISE:
        return [([0] * result.dim(), args[0])]
    if func is _aten.cat.default:
        dim = args[1] % result.dim() if len(args) > 1 else 0
        tensors = [tensor for tensor in args[0] if tensor.shape != (0,) or result.dim() == 1]
    elif func is _aten.stack.default:
        dim = args[1] % result.dim() if len(args) > 1 else 0
        tensors = [tensor.unsqueeze(dim) for tensor in args[0]]
    else:
        return None
    boxes, start = [], 0
    for tensor in tensors:
        boxes.append(([start if d == dim else 0 for d in range(result.dim())], tensor))
        start += tensor.shape[dim]
    return boxes


def _dense_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions as they lie in memory, outermost first; None: the memory has gaps."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], shape[dim]))
    step = 1
    for dim in reversed(order):
        if shape[dim] > 1 and strides[dim] != step:
            return None
        step *= shape[dim]
    return tuple(order) if tensor.numel() else tuple(range(tensor.dim()))


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[object]:
    """The arguments that an operation writes to; most write to none."""
    if not _written_arguments(func):
        return []
    return [
        args[position] if position < len(args) else kwargs.get(name)
        for position, name in _written_arguments(func)
    ]


@cache
def _written_arguments(func: OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of every argument that an operation's schema says it writes to."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _tensors(tree: object) -> list[torch.Tensor]:
    """The tensors in what an operation takes or gives: lists, tuples and dicts, nested."""
    found: list[torch.Tensor] = []
    waiting = [tree]
    while waiting:
        branch = waiting.pop()
        if isinstance(branch, torch.Tensor):
            found.append(branch)
        elif isinstance(branch, list | tuple):
            waiting.extend(reversed(branch))
        elif isinstance(branch, dict):
            waiting.extend(reversed(branch.values()))
    return found
