"""Needs: what one rank wants, relative to one layout. Does no I/O.

A copy says: element (i0, i1, ...) of a box of a checkpoint tensor goes to parameter element
`offset + (i0 - starts[0]) * strides[0] + (i1 - starts[1]) * strides[1] + ...`. That one form holds
slices, fused parameters, expert stacks and transposed weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from weightbus.schemas.base import DtypeName, Name
from weightbus.schemas.layout import Index, Shape
from weightbus.schemas.limits import MAX_COPIES, MAX_FILLS, MAX_PARAMETERS, MAX_TRANSFORMS

__all__ = ("Copy", "Fill", "Needs", "ParameterSpec", "Transform", "UnaryOp")

Elements = Annotated[int, Meta(ge=0, le=2**50)]
Strides = Annotated[tuple[Annotated[int, Meta(ge=-(2**50), le=2**50)], ...], Meta(max_length=8)]
UnaryOp = Literal["cast", "neg", "exp"]


class ParameterSpec(Struct, frozen=True, array_like=True, gc=False):
    """One live parameter or buffer of a rank."""

    name: Name
    dtype: DtypeName
    shape: Shape
    strides: Strides
    """In elements, per dimension of `shape`."""


class Transform(Struct, frozen=True, array_like=True):
    """Elementwise operations applied, in order, to what was read before it is written.

    `cast` converts to the named dtype (a key of `DTYPE_BYTES`); `neg` and `exp` keep the dtype.
    """

    ops: Annotated[tuple[tuple[UnaryOp, str], ...], Meta(min_length=1, max_length=16)]
    """Pairs (operation, dtype); the dtype is "" except for `cast`."""


class Copy(Struct, frozen=True, array_like=True, gc=False):
    """A box of a checkpoint tensor -> a window of a parameter."""

    tensor: Index
    starts: Shape
    sizes: Shape
    parameter: Index
    offset: Elements
    """Which element of the parameter's memory, counted from its first, takes the box's first."""
    strides: Strides
    """Elements of the parameter per step in each dimension of the tensor."""
    transform: Annotated[int, Meta(ge=-1)] = -1
    """Index into `Needs.transforms`; -1: the bytes are moved as they are."""


class Fill(Struct, frozen=True, array_like=True, gc=False):
    """A constant written to a window of a parameter (vocabulary padding)."""

    parameter: Index
    offset: Elements
    sizes: Shape
    strides: Strides
    value: float


class Needs(Struct, frozen=True, array_like=True, gc=False):
    """Everything one rank wants of one layout. Content-addressed like a layout."""

    parameters: Annotated[tuple[ParameterSpec, ...], Meta(max_length=MAX_PARAMETERS)]
    copies: Annotated[tuple[Copy, ...], Meta(max_length=MAX_COPIES)]
    fills: Annotated[tuple[Fill, ...], Meta(max_length=MAX_FILLS)] = ()
    transforms: Annotated[tuple[Transform, ...], Meta(max_length=MAX_TRANSFORMS)] = ()
