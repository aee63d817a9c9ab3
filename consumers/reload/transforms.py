"""Elementwise operations between reading and writing, and constants, as torch computes them.

Does no I/O and keeps nothing. Results are bit-identical to what `copy_`, `neg`, `exp` and `fill_`
make of a contiguous tensor: the loader that was traced called the same kernels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from weightbus.consumers.errors import PlanError
from weightbus.consumers.reload.dtypes import TORCH_DTYPES
from weightbus.schemas.needs import Transform

__all__ = ("INEXACT", "filled_bytes", "transformed", "transformed_bytes")

INEXACT: Final = frozenset({"exp"})
"""Operations whose last bit is another one on a GPU than on a processor. The others are exact, or
round to nearest."""

Bytes = npt.NDArray[np.uint8]


def transformed_bytes(data: Bytes, dtype: str, transform: Transform) -> Bytes:
    """What a transform makes of elements: `data` is contiguous, of `dtype`, and is not changed.

    Raises:
        PlanError: torch does not know a dtype, or cannot do an operation on it.
    """
    result: Bytes = transformed(torch.from_numpy(data), dtype, transform).view(torch.uint8).numpy()
    return result


def transformed(data: torch.Tensor, dtype: str, transform: Transform) -> torch.Tensor:
    """The same where `data`, contiguous bytes, is on any device.

    Raises:
        PlanError: torch does not know a dtype, or cannot do an operation on it.
    """
    values = data.view(_torch_dtype(dtype))
    for op, target in transform.ops:
        try:
            if op == "cast":
                values = values.to(_torch_dtype(target))
            elif op == "neg":
                values = torch.neg(values)
            else:
                values = torch.exp(values)
        except (NotImplementedError, RuntimeError) as error:  # torch has no such kernel
            raise PlanError(f"transform {op}", f"of {values.dtype}", str(error)) from error
    return values


def filled_bytes(dtype: str, value: float) -> Bytes:
    """The bytes of one element that holds a constant.

    Raises:
        PlanError: torch does not know the dtype, or it cannot hold the value.
    """
    try:
        element = torch.empty(1, dtype=_torch_dtype(dtype), device="cpu").fill_(value)
    except (NotImplementedError, RuntimeError) as error:
        raise PlanError(f"fill with {value}", f"of {dtype}", str(error)) from error
    result: Bytes = element.view(torch.uint8).numpy()
    return result


def _torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in TORCH_DTYPES:
        raise PlanError("dtype", dtype, "this torch does not know it")
    return TORCH_DTYPES[dtype]
