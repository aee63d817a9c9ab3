"""SHA-256 over everything that one rank of a model holds: a check that shares no code with updates.

Does no I/O. Blocks the caller while it hashes (about 1 GB/s).
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ("fingerprint",)


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and bits of all parameters and buffers."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    total = hashlib.sha256()
    for name in sorted(held):
        tensor = held[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()
