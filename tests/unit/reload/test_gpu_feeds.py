"""However the bytes come, an executor for GPUs makes what the loader makes. It is interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.reload.interpreted import interpreted_executor, interpreting
from tests.unit.reload.models import ModuleHost, same_bits
from tests.unit.reload.test_feeds import Wide, load_wide, open_feeder, wide_tensors
from tests.unit.reload.test_random_models import RandomModel
from tests.unit.reload.test_worker import make_client
from tests.unit.transfer.publishing import cut_layout, open_trainer
from weightbus.consumers.reload import split, streams
from weightbus.consumers.reload.executor import Executor


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture(autouse=True)
def _executors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are in main memory, and their executor believes that it is a GPU's."""

    def make(device: str, *rest: Any) -> Executor:
        return interpreted_executor(*rest)

    monkeypatch.setattr(split, "make_executor", make)
    monkeypatch.setattr(streams, "make_executor", make)


@pytest.mark.parametrize(("lanes", "slots", "bucket_bytes"), [(1, 1, 5000), (3, 2, 2**17)])
def test_slices_transposes_casts_and_fills_are_bit_identical_when_streamed(
    lanes: int, slots: int, bucket_bytes: int, tmp_path: Path
) -> None:
    host = ModuleHost(Wide, load_wide)
    with open_feeder(host, wide_tensors(0), tmp_path) as feeder:
        feeder.relay(wide_tensors(10), 1, window_bytes=4099, slots=3)
        tensors = wide_tensors(20)
        host.live.get_parameter("padded.weight")[50:] = 7.0
        applied = feeder.streamed(tensors, 2, bucket_bytes, slots, lanes)
        assert (applied.direct_parameters, applied.processed_parameters) == (6, 0)
        fresh = Wide()
        load_wide(fresh, iter(tensors.items()))
        for name, want in fresh.named_parameters():
            assert same_bits(host.live.get_parameter(name), want), name
        in_place = feeder.client.apply(tensors, 3)
        assert in_place.cell_digests == applied.cell_digests
        assert in_place.bytes == applied.bytes
        assert len(host.reloads) == 1


def test_undecided_parameter_that_changes_is_noticed_before_it_is_written(tmp_path: Path) -> None:
    host = ModuleHost(Wide, load_wide)
    equal = wide_tensors(0) | {"rows": torch.ones((120, 130), dtype=torch.bfloat16)}
    with open_feeder(host, equal, tmp_path) as feeder:
        feeder.relay(equal, 1, window_bytes=4099)
        same = wide_tensors(20) | {"rows": equal["rows"]}
        feeder.streamed(same, 2, 2**17, 2, 1)
        before = host.live.get_parameter("rows.weight").clone()
        reply = feeder.stream(wide_tensors(30), 3, 2**17, 2, 1)
        assert getattr(reply, "error", None) == "ProofNeeded", reply
        assert same_bits(host.live.get_parameter("rows.weight"), before)


@pytest.mark.parametrize("seed", range(6))
def test_worker_makes_what_the_loader_makes_when_it_reads_in_place(
    seed: int, tmp_path: Path
) -> None:
    model = RandomModel(seed)
    host = ModuleHost(model.build, model.load)
    layout = cut_layout(model.tensors(0), segments=1 + seed % 3, seed=seed)
    with open_trainer(layout, "memory", tmp_path) as trainer:
        client = make_client(trainer, host)
        for version in (1, 2):
            tensors = model.tensors(version)
            client.apply(tensors, version)
            fresh = model.build()
            model.load(fresh, iter(tensors.items()))
            for (name, want), (_, found) in zip(
                fresh.named_parameters(), host.live.named_parameters(), strict=True
            ):
                assert same_bits(found, want), f"seed {seed}, version {version}: {name}"
        client.worker.close()
