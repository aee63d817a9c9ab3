"""The names of dtypes in a layout, and torch's dtypes. Does no I/O."""

from __future__ import annotations

from typing import Final

import torch

from weightbus.schemas.dtypes import TORCH_NAMES

__all__ = ("DTYPE_NAMES", "TORCH_DTYPES")

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, attribute)
    for name, attribute in TORCH_NAMES.items()
    if hasattr(torch, attribute)
}
"""Layout dtype name -> torch dtype; without the names that this torch does not know (F8_E8M0)."""

DTYPE_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch dtype -> layout dtype name."""
