"""Every kernel compiles for a Hopper GPU, on machines that have Triton and no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

HOPPER = 90
"""Compute capability 9.0: H100, H200."""


def compile_kernel(kernel: Any, pointers: dict[str, str], constants: dict[str, object]) -> str:
    """PTX; what it takes besides are numbers of 64 bits."""
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    kinds = dict.fromkeys(constants, "constexpr")
    signature = {name: (pointers | kinds).get(name, "i64") for name in kernel.arg_names}
    source = compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    ptx: str = compiler.compile(source, target=GPUTarget("cuda", HOPPER, 32)).asm["ptx"]
    return ptx


@pytest.fixture(autouse=True)
def triton() -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")


@pytest.mark.parametrize("unit_bytes", [1, 2, 4])
@pytest.mark.parametrize("has_rows", [False, True])
def test_digest_compiles(unit_bytes: int, has_rows: bool) -> None:
    from weightbus.bus import digest_gpu

    ptx = compile_kernel(
        digest_gpu._digest_tiles,
        {"tiles": "*i64", "sums": "*i64"},
        {"UNIT_BYTES": unit_bytes, "HAS_ROWS": has_rows, "BLOCK": digest_gpu.BLOCK_UNITS},
    )
    assert ptx.count("atom.global.gpu.relaxed.add.u64") == 1


@pytest.mark.parametrize("lane_bytes", [1, 2, 4, 8, 16])
def test_copy_compiles(lane_bytes: int) -> None:
    from weightbus.producers import gpu_copy

    ptx = compile_kernel(
        gpu_copy._copy_pieces,
        {"data": "*u8", "addresses": "*i64", "pieces": "*i64"},
        {"LANE_BYTES": lane_bytes, "BLOCK": gpu_copy.BLOCK_LANES},
    )
    assert ("ld.global.v2.b64" in ptx and "st.global.v2.b64" in ptx) == (lane_bytes == 16)
