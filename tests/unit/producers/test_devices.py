"""What torch, Triton and compilers raise, as ours; whether kernels run, before they are used."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from typing import NoReturn

import pytest
import torch

from tests.unit.producers.fake_devices import FakeDevice
from weightbus.bus.errors import CudaFailed, CudaTimeout, CudaUnavailable
from weightbus.producers.devices import Devices, _mapped, try_kernels
from weightbus.producers.digests import Sums
from weightbus.producers.shards import Delta, plan_part
from weightbus.schemas.layout import Layout

CPU = torch.device("cpu")


def failure_of_triton(name: str) -> Exception:
    """As Triton names its own, whether it is installed or not."""
    base = type("TritonError", (Exception,), {"__module__": "triton.errors"})
    kind: type[Exception] = type(name, (base,), {"__module__": "triton.runtime.errors"})
    return kind("no shared memory left\nand more")


FOREIGN = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.OutOfMemoryError("none left"),
    subprocess.CalledProcessError(1, ["gcc"]),
    FileNotFoundError(2, "no such file", "gcc"),
    failure_of_triton("OutOfResources"),
    failure_of_triton("PTXASError"),
    failure_of_triton("CompilationError"),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_failure_is_ours_when_others_raise_it(error: Exception) -> None:
    pattern = f"launching .*{type(error).__name__}"
    with pytest.raises(CudaFailed, match=pattern) as told, _mapped("launching", "a kernel"):
        raise error
    assert told.value.__cause__ is error
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [KeyError("w"), AssertionError(), CudaTimeout("c", "s", 1.0)])
def test_failure_stays_as_it_is_when_it_is_our_own(error: Exception) -> None:
    with pytest.raises(type(error)) as told, _mapped("launching", "a kernel"):
        raise error
    assert told.value is error


class Uncompiled(FakeDevice):
    """Nothing can be compiled when the kernel of the digest is to start."""

    def open_digest(self, layout: Layout) -> Uncompiled:
        return self

    def start(self, address: int, begin: int = 0, end: int | None = None) -> NoReturn:
        with _mapped("queueing work", "stream"):
            raise subprocess.CalledProcessError(1, ["gcc"])

    def finish(self) -> Sums:
        raise AssertionError


def test_kernels_are_copied_and_digested_with_when_they_are_tried() -> None:
    device = FakeDevice(0)
    try_kernels(device, CPU)
    assert device.notes == ["copied on stream 1", "digested on stream 1", "waited for stream 1"]


def test_kernels_are_unavailable_when_they_cannot_be_compiled() -> None:
    with pytest.raises(CudaUnavailable, match=r"CalledProcessError.*gcc"):
        try_kernels(Uncompiled(0), CPU)


def test_kernels_are_unavailable_when_the_device_fails() -> None:
    device = FakeDevice(0)
    device.broken = True
    with pytest.raises(CudaUnavailable, match="ECC"):
        try_kernels(device, CPU)


def test_trainer_stands_still_from_before_a_part_is_prepared() -> None:
    prepared_s = []

    class Adapter(Delta):
        def prepare(self) -> None:
            prepared_s.append(time.perf_counter())

        def add_to(self, source: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            return source[begin:end]

    part = replace(plan_part({"w": torch.ones(2, 2)}), prepared=(Adapter(),))
    handover = Devices().hand_over(part)
    assert [handover.begun_s <= each_s for each_s in prepared_s] == [True]
