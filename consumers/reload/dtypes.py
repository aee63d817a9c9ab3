"""The names of dtypes in a layout, and torch's dtypes. Does no I/O."""

from __future__ import annotations

from typing import Final

import torch

from weightbus.schemas.dtypes import DTYPE_BYTES

__all__ = ("DTYPE_NAMES", "TORCH_DTYPES")

_TORCH_NAMES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, _TORCH_NAMES[name])
    for name in DTYPE_BYTES
    if hasattr(torch, _TORCH_NAMES[name])
}
"""Layout dtype name -> torch dtype; without the names that this torch does not know (F8_E8M0)."""

DTYPE_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch dtype -> layout dtype name."""
