"""The worked examples of docs/messages.md, recomputed from its own words, without our code."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightbus.bus.digest import combine, digest_hex, digest_tensors, mix
from weightbus.schemas.shared_memory import (
    SHM_GENERATION_OFFSET,
    SHM_HEADER_BYTES,
    pack_shm_header,
)

GUIDE = (Path(__file__).parents[2] / "docs" / "messages.md").read_text()
MODULUS = 2**64


def section(title: str) -> str:
    return GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    (block,) = re.findall(r"```json\n(.*?)```", section("Weights digest"), re.DOTALL)
    told: dict[str, Any] = json.loads(block)
    return told


def mix_of_guide(index: int) -> int:
    step = (index + 1) * 0x9E3779B97F4A7C15 % MODULUS
    return ((step ^ (step >> 29)) | 1) * 0xBF58476D1CE4E5B9 % MODULUS


def words_of_guide(data: bytes) -> list[int]:
    padded = data + bytes(-len(data) % 4)
    return [int.from_bytes(padded[at : at + 4], "little") for at in range(0, len(padded), 4)]


def sum_of_guide(values: list[int]) -> int:
    return sum(value * mix_of_guide(index) for index, value in enumerate(values)) % MODULUS


def test_digest_example_is_right_when_recomputed_by_the_rules(example: dict[str, Any]) -> None:
    assert example["mix"] == [f"{mix_of_guide(index):016x}" for index in range(2)]
    digests = []
    for tensor in example["tensors"]:
        words = words_of_guide(bytes.fromhex(tensor["bytes"]))
        assert tensor["words"] == [f"{word:08x}" for word in words]
        digests.append(sum_of_guide(words))
        assert tensor["digest"] == f"{digests[-1]:016x}"
    assert example["weights_digest"] == f"{sum_of_guide(digests):016x}"
    blob = b"".join(digest.to_bytes(8, "little") for digest in digests)
    key = hashlib.sha256(blob).hexdigest()
    assert example["tensor_digests"] == {"bytes": blob.hex(), "key": key}


def test_digest_example_is_what_our_code_says(example: dict[str, Any]) -> None:
    assert example["mix"] == [digest_hex(mix(index)) for index in range(2)]
    digests = digest_tensors(
        [np.frombuffer(bytes.fromhex(each["bytes"]), np.uint8) for each in example["tensors"]]
    )
    assert [each["digest"] for each in example["tensors"]] == list(map(digest_hex, digests))
    assert example["weights_digest"] == digest_hex(combine(digests))
    assert example["tensor_digests"]["bytes"] == digests.astype("<u8").tobytes().hex()


def test_shared_memory_example_is_what_our_code_says() -> None:
    told = section("Shared memory")
    (header,) = re.findall(r"`([0-9a-f]{48})`", told)
    assert bytes.fromhex(header) == pack_shm_header(15, 2)
    assert f"\n| {SHM_GENERATION_OFFSET} | 8 | generation, little-endian" in told
    assert f"\n| {SHM_HEADER_BYTES:,} | size | the segment |" in told
