"""The dtypes of safetensors and the size of one element of each. Does no I/O."""

from __future__ import annotations

from typing import Final

__all__ = ("DTYPE_BYTES",)

DTYPE_BYTES: Final[dict[str, int]] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""dtype name (as in a safetensors header) -> bytes of one element. Sub-byte dtypes are refused."""
