"""Files published where they lie: patterns, indexes, digests, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.integration.producers.reader import digest_of_model
from weightbus.bus.connection import Bus
from weightbus.bus.digest import digest_tensor
from weightbus.bus.errors import FileUnreadable
from weightbus.bus.files import read_layout_of_files
from weightbus.producers.errors import RankInvalid, VersionNotNew
from weightbus.producers.files import digest_files, find_files
from weightbus.producers.publisher import open_publisher
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.errors import MessageInvalid

pytestmark = pytest.mark.anyio


def write(folder: Path, name: str, seed: int) -> dict[str, torch.Tensor]:
    """One file of a few tensors, in the order in which they lie in the file."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.a": torch.randn(3, 5, generator=generator).bfloat16(),
        f"{name}.b": torch.randn(7, generator=generator),
        f"{name}.c": torch.randint(0, 255, (13,), generator=generator).to(torch.uint8),
        f"{name}.e": torch.zeros(0, 4),
    }
    save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    layout = read_layout_of_files([str(folder / f"{name}.safetensors")], None)
    return {spec.name: tensors[spec.name] for spec in layout.tensors}


async def test_digest_is_that_of_the_tensors_when_files_are_published(
    bus: Bus, model: str, tmp_path: Path
) -> None:
    tensors = {**write(tmp_path, "one", 1), **write(tmp_path, "two", 2)}
    async with open_publisher(bus, model) as publisher:
        ready = await publisher.publish_files(tmp_path / "*.safetensors", 7, {"step": "7"})
        assert ready.files == tuple(str(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
        assert ready.weights_digest == digest_of_model(tensors.values())
        assert ready.metadata == {"step": "7"}
        assert ready.layout_digest is None
        last = await bus.last(CheckpointReady, model=model)
        assert last is not None
        assert last.message == ready
        assert ready.tensor_digests is not None
        assert len(await bus.objects.get(ready.tensor_digests)) == 8 * len(tensors)
    assert await bus.last(CheckpointRetired, model=model) is None


async def test_nothing_is_offered_as_proof_when_no_digest_is_wanted(
    bus: Bus, model: str, tmp_path: Path
) -> None:
    write(tmp_path, "one", 1)
    async with open_publisher(bus, model) as publisher:
        ready = await publisher.publish_files(tmp_path / "one.safetensors", 1, digest=False)
    assert (ready.weights_digest, ready.tensor_digests) == (None, None)


async def test_digest_takes_many_blocks_when_a_tensor_is_large(tmp_path: Path) -> None:
    large = torch.randint(0, 255, (20 * 2**20 + 3,), dtype=torch.uint8)
    path = tmp_path / "large.safetensors"
    save_file({"large": large}, path)
    layout = read_layout_of_files([str(path)], None)
    digests = await digest_files(layout, [str(path)])
    assert digests.tolist() == [digest_tensor(large.numpy())]


async def test_digest_fails_when_a_file_became_shorter(tmp_path: Path) -> None:
    write(tmp_path, "one", 1)
    path = tmp_path / "one.safetensors"
    layout = read_layout_of_files([str(path)], None)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    with pytest.raises(FileUnreadable, match="became shorter"):
        await digest_files(layout, [str(path)])


def test_files_are_found_once_and_in_order_when_named_in_several_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path, name, 1)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "c.safetensors", "y": "b.safetensors"}}))
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    assert find_files("*.safetensors") == tuple(paths)
    assert find_files(index) == tuple(paths[1:])
    assert find_files([paths[2], "[ab].safetensors", "./c.safetensors"]) == (paths[2], *paths[:2])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "no file is named"),
        ("nothing-*.safetensors", "no file matches"),
        (".", "is a directory"),
        ("gone.safetensors.index.json", "No such file"),
    ],
)
def test_files_are_refused_when_there_are_none(
    files: str | list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileUnreadable, match=reason):
        find_files(files)


async def test_nothing_is_published_when_files_are_wrong(
    bus: Bus, model: str, tmp_path: Path
) -> None:
    write(tmp_path, "one", 1)
    good = tmp_path / "one.safetensors"
    same_names = tmp_path / "copy.safetensors"
    short = tmp_path / "short.safetensors"
    same_names.write_bytes(good.read_bytes())
    short.write_bytes(good.read_bytes()[:-1])
    async with open_publisher(bus, model) as publisher:
        with pytest.raises(MessageInvalid, match=r"file .*/copy"):
            await publisher.publish_files([good, same_names], 1)
        with pytest.raises(MessageInvalid, match=r"file .*/short"):
            await publisher.publish_files(short, 1)
        with pytest.raises(FileUnreadable, match="gone"):
            await publisher.publish_files(tmp_path / "gone.safetensors", 1)
        with pytest.raises(MessageInvalid, match="version"):
            await publisher.publish_files(good, -1)
        assert await bus.last(CheckpointReady, model=model) is None
        await publisher.publish_files(good, 1)
        with pytest.raises(VersionNotNew):
            await publisher.publish_files(good, 1)


async def test_files_and_tensors_follow_each_other_when_one_publisher_has_both(
    bus: Bus, model: str, tmp_path: Path
) -> None:
    write(tmp_path, "one", 1)
    async with open_publisher(bus, model) as publisher:
        for version in range(1, 7, 2):
            await publisher.publish({"w": torch.ones(3)}, version)
            await publisher.publish_files(tmp_path / "one.safetensors", version + 1)
    last = await bus.last(CheckpointRetired, model=model)
    assert last is not None
    assert last.message.version == 5


async def test_files_are_published_by_rank_zero_alone(bus: Bus, model: str, tmp_path: Path) -> None:
    write(tmp_path, "one", 1)
    async with open_publisher(bus, model, rank=1, world_size=2) as publisher:
        with pytest.raises(RankInvalid, match="rank 0 alone"):
            await publisher.publish_files(tmp_path / "one.safetensors", 1)
