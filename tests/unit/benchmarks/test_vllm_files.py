"""Files of a version, as vLLM and checkpoint-engine read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.h200.setup import Setup, sources_of
from benchmarks.h200.weights import fill
from benchmarks.vllm_h200.files import Arguments, file_of, header_of, write
from benchmarks.vllm_h200.setup import TINY

CONFIG = {**TINY, "num_hidden_layers": 1}


@pytest.mark.parametrize("ranks", [1, 2])
def test_files_of_all_ranks_hold_every_tensor_of_the_version_once(
    ranks: int, tmp_path: Path
) -> None:
    setup = Setup(model="tiny", config=CONFIG, devices=ranks, cpu=True)
    found: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        write(Arguments(setup=setup, rank=rank, folder=str(tmp_path)), 3)
        with safe_open(file_of(tmp_path, rank, ranks), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.get_tensor(name)
    sources = sources_of(CONFIG)
    assert found.keys() == {source.name for source in sources}
    for source in sources:
        expected = torch.empty(source.shape, dtype=source.dtype)
        fill(expected, source.name, 3)
        assert torch.equal(found[source.name].view(torch.int16), expected.view(torch.int16))
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_tensors_begin_at_an_aligned_place_and_follow_each_other() -> None:
    sources = sources_of(CONFIG)
    head, places = header_of(sources)
    assert len(head) % 256 == 0
    ends = [0, *(end for _, end in places.values())]
    assert [begin for begin, _ in places.values()] == ends[:-1]
    assert ends[-1] == sum(source.size_bytes for source in sources)


def test_file_that_is_there_is_kept(tmp_path: Path) -> None:
    setup = Setup(model="tiny", config=CONFIG, devices=1, cpu=True)
    file_of(tmp_path, 0, 1).write_bytes(b"kept")
    write(Arguments(setup=setup, rank=0, folder=str(tmp_path)), 3)
    assert file_of(tmp_path, 0, 1).read_bytes() == b"kept"
