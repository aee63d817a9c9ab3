"""Kernels for tests, in a file of their own: it can only be imported where there is Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ("peek",)

BLOCK_WORDS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _peek(source, target, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0) * block
    words = tl.load(source).to(tl.pointer_type(tl.int64))
    place = start + tl.arange(0, block)
    mask = place < count
    tl.store(target + place, tl.load(words + place, mask=mask), mask=mask)


def peek(device: int, address: int, size_bytes: int) -> bytes:
    """What a kernel on a device finds at an address; both are multiples of 8."""
    where = torch.device("cuda", device)
    count = size_bytes // 8
    with torch.cuda.device(where):
        source = torch.tensor([address], dtype=torch.int64, device=where)
        target = torch.zeros(count, dtype=torch.int64, device=where)
        _peek[(triton.cdiv(count, BLOCK_WORDS),)](source, target, count, block=BLOCK_WORDS)
        found = target.cpu().numpy().tobytes()
    assert isinstance(found, bytes)
    return found
