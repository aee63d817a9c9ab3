"""Which executor writes where, and what is said where none does; that kernels compile."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import PlanError
from weightbus.consumers.reload.accelerator import _as_ours
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.executor import check_device, make_executor
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

NOTHING = Layout((), (), ()), Needs((), ()), ()
HAS_TRITON = importlib.util.find_spec("triton") is not None


def test_main_memory_has_an_executor_of_its_own() -> None:
    assert isinstance(make_executor("cpu", *NOTHING), CpuExecutor)


def test_device_is_refused_when_nothing_writes_there() -> None:
    with pytest.raises(PlanError, match="device of the parameters is meta"):
        make_executor("meta", *NOTHING)
    with pytest.raises(PlanError, match="device of the parameters is meta"):
        check_device("meta")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton")
def test_gpu_is_not_asked_when_its_kind_is_checked() -> None:
    """There is none of this number on any machine."""
    check_device("cuda:99")
    check_device("cpu")


@pytest.mark.skipif(HAS_TRITON, reason="there is Triton here")
def test_gpu_is_refused_with_the_remedy_when_there_is_no_triton() -> None:
    with pytest.raises(PlanError, match="pip install triton"):
        make_executor("cuda:0", *NOTHING)
    with pytest.raises(PlanError, match="pip install triton"):
        check_device("cuda:0")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_error_is_ours_when_the_gpu_cannot_be_used() -> None:
    with pytest.raises(CudaFailed, match=r"a stream \(cuda:0\) failed"):
        make_executor("cuda:0", *NOTHING)


def test_errors_of_torch_become_ours_and_ours_stay() -> None:
    place = torch.device("cuda", 1)
    with (
        pytest.raises(CudaFailed, match=r"moving \(cuda:1\) failed: RuntimeError: gone") as caught,
        _as_ours("moving", place),
    ):
        raise RuntimeError("gone\nand more")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(PlanError), _as_ours("moving", place):
        raise PlanError("transform exp", "of U8", "there is none")


class CompilationError(Exception):
    """As one of Triton's own."""

    __module__ = "triton.compiler.errors"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        CompilationError("at 3:4"),
        subprocess.CalledProcessError(1, ["gcc"]),
    ],
)
def test_errors_of_gpu_libraries_become_ours(error: Exception) -> None:
    with (
        pytest.raises(CudaFailed, match=f"failed: {type(error).__name__}: "),
        _as_ours("moving", torch.device("cuda", 1)),
    ):
        raise error


@pytest.mark.parametrize("error", [KeyError("tiles"), AssertionError("ours"), IndexError("7")])
def test_faults_of_this_program_are_not_blamed_on_the_gpu(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, _as_ours("moving", torch.device("cuda", 1)):
        raise error
    assert caught.value is error


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weightbus.consumers.reload import kernels

names = ("tiles", "pieces", "bases", "sums")
signature = dict.fromkeys(names, "*i64") | {"first": "i32", "count": "i32"}
for width, mode, digest in ((8, 0, True), (8, 2, False), (2, 1, True), (1, 0, False)):
    chosen = {"width": width, "mode": mode, "digest": digest, "block": kernels.BLOCK_UNITS[width]}
    source = ASTSource(
        fn=kernels.gather,
        signature=signature | dict.fromkeys(chosen, "constexpr"),
        constexprs=chosen,
    )
    done = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    assert "atom" in done.asm["ptx"] or not (digest or mode == 2)
    assert ".local" not in done.asm["ptx"]
    print(width, len(done.asm["cubin"]))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton")
def test_kernels_compile_for_hopper_when_there_is_no_gpu() -> None:
    """Without Triton's cache, so that it is really done; ptxas comes with Triton."""
    environment = {**os.environ, "TRITON_ALWAYS_COMPILE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["8", "8", "2", "1"]
