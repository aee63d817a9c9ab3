"""When a slot in host memory is digested: beside the copy, or after it where cores are few."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from weightbus.producers import writing
from weightbus.producers.copying import Copier
from weightbus.producers.devices import Devices
from weightbus.producers.digesting import ThreadDigester
from weightbus.producers.memory import HostMemory, Owner
from weightbus.producers.shards import Part, plan_part
from weightbus.producers.slots import Slot
from weightbus.producers.writers import Writers
from weightbus.producers.writing import write_part

THREADS = 3
OWNER = Owner("digest-order", "t", 0, "h")


def part_of_batches() -> Part:
    """Of three batches of shards."""
    count = 2 * writing._BATCH_SHARDS + 1
    return plan_part({f"t{n}": torch.tensor([n], dtype=torch.int32) for n in range(count)})


class Noting(ThreadDigester):
    def __init__(self, part: Part, data: bytearray, note: Callable[[str], None]) -> None:
        super().__init__(part.layout, memoryview(data), 1)
        self._note = note

    def start(self, begin: int, end: int, copier: Copier) -> None:
        self._note("digest")
        super().start(begin, end, copier)


@pytest.mark.parametrize(
    ("beside", "order"),
    [
        (True, ["digest", "digest", "digest", "copied"]),
        (False, ["copied", "digest", "digest", "digest"]),
    ],
)
def test_same_digests_come_when_they_are_taken_beside_the_copy_or_after_it(
    beside: bool, order: list[str]
) -> None:
    part, noted = part_of_batches(), list[str]()
    size_bytes = part.layout.segments[0].size_bytes
    data, plain = bytearray(size_bytes), bytearray(size_bytes)
    digests = write_part(
        part,
        memoryview(data),
        Noting(part, data, noted.append),
        lambda: None,
        None,
        lambda: noted.append("copied"),
        beside=beside,
    )
    assert noted == order
    plainly = ThreadDigester(part.layout, memoryview(plain), 1)
    assert digests.tolist() == write_part(part, memoryview(plain), plainly, lambda: None).tolist()
    assert data == plain


def test_write_ends_when_it_is_cancelled_between_the_copy_and_the_digest() -> None:
    part, noted = part_of_batches(), list[str]()
    data = bytearray(part.layout.segments[0].size_bytes)

    def check() -> None:
        if "copied" in noted:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write_part(
            part,
            memoryview(data),
            Noting(part, data, noted.append),
            check,
            None,
            lambda: noted.append("copied"),
            beside=False,
        )
    assert noted == ["copied"]


@pytest.mark.parametrize(("cores", "beside"), [(1, False), (5, False), (6, True), (64, True)])
def test_slot_is_digested_beside_the_copy_when_there_are_two_cores_for_each_thread(
    monkeypatch: pytest.MonkeyPatch, cores: int, beside: bool
) -> None:
    seen = list[bool]()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    write = writing.write_part

    def noted(*given: object, **more: object) -> object:
        seen.append(bool(more["beside"]))
        return write(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("weightbus.producers.writers.write_part", noted)
    part, devices = plan_part({"w": torch.ones(8)}), Devices()
    host = HostMemory(OWNER)
    writer = Writers("host", OWNER, host, devices, THREADS).choose(part)
    slot = Slot()
    slot.blocks[host] = host.make(part.layout.segments[0].size_bytes, 0)
    try:
        writer.write(part, slot, devices.hand_over(part), lambda: None)
    finally:
        host.give_up(slot.blocks[host], may_be_read=False)
    assert seen == [beside]
