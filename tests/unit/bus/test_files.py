"""Files that a message names: only below the roots, only regular ones, only as far as needed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from weightbus.bus.errors import FileUnreadable
from weightbus.bus.files import expand_index_files, read_layout_of_files
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import SegmentSpec
from weightbus.schemas.limits import Limits


def write_safetensors(path: Path, *names: str) -> str:
    """A file of 4-byte tensors."""
    header = msgspec.json.encode(
        {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
            for i, name in enumerate(names)
        }
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4 * len(names))
    return str(path)


def write_index(path: Path, weight_map: object) -> str:
    path.write_bytes(msgspec.json.encode({"metadata": {}, "weight_map": weight_map}))
    return str(path)


def test_layout_has_a_segment_per_file_when_files_are_read(tmp_path: Path) -> None:
    files = [
        write_safetensors(tmp_path / "b.safetensors", "x", "y"),
        write_safetensors(tmp_path / "a.safetensors", "z"),
    ]
    layout = read_layout_of_files(files, [str(tmp_path)])
    assert [tensor.name for tensor in layout.tensors] == ["x", "y", "z"]
    assert layout.segments == tuple(SegmentSpec(os.stat(path).st_size) for path in files)


def test_index_stands_for_its_files_when_it_is_named(tmp_path: Path) -> None:
    one = write_safetensors(tmp_path / "model-00001-of-00002.safetensors", "x")
    two = write_safetensors(tmp_path / "model-00002-of-00002.safetensors", "y")
    names = {"y": os.path.basename(two), "x": os.path.basename(one)}
    index = write_index(tmp_path / "model.safetensors.index.json", names)
    assert expand_index_files([index], [str(tmp_path)]) == (one, two)
    layout = read_layout_of_files([index], [str(tmp_path)])
    assert layout == read_layout_of_files([one, two], None)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"weight_map": {"x": 1}}'])
def test_index_is_refused_when_it_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(MessageInvalid, match="safetensors index"):
        expand_index_files([str(index)], None)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "", "a\0b"])
def test_index_is_refused_when_it_names_files_elsewhere(tmp_path: Path, name: str) -> None:
    index = write_index(tmp_path / "model.safetensors.index.json", {"x": name})
    with pytest.raises(MessageInvalid, match="safetensors index"):
        expand_index_files([index], None)


def test_index_is_refused_unread_when_it_is_too_long(tmp_path: Path) -> None:
    index = write_index(tmp_path / "model.safetensors.index.json", {"x": "a.safetensors"})
    with pytest.raises(MessageInvalid, match="at most 16 bytes"):
        expand_index_files([index], None, Limits(max_safetensors_header_bytes=16))


def test_files_are_refused_unread_when_there_are_too_many(tmp_path: Path) -> None:
    absent = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    index = write_index(
        tmp_path / "model.safetensors.index.json",
        {path: os.path.basename(path) for path in absent},
    )
    limits = Limits(max_segments=2)
    for paths in (absent, [index], [absent[0], absent[1], index], [index] * 3):
        with pytest.raises(MessageInvalid, match="at most 2 files"):
            read_layout_of_files(paths, None, limits)


def test_files_are_refused_when_their_headers_are_too_long_in_all(tmp_path: Path) -> None:
    files = [
        write_safetensors(tmp_path / "a.safetensors", "x"),
        write_safetensors(tmp_path / "b.safetensors", "y"),
    ]
    header_bytes = int.from_bytes(Path(files[0]).read_bytes()[:8], "little")
    one = Limits(max_safetensors_header_bytes=2 * header_bytes - 1)
    for path in files:
        assert read_layout_of_files([path], None, one).tensors
    with pytest.raises(MessageInvalid, match=f"at most {2 * header_bytes - 1} bytes in all"):
        read_layout_of_files(files, None, one)
    both = Limits(max_safetensors_header_bytes=2 * header_bytes)
    assert len(read_layout_of_files(files, None, both).tensors) == 2


def test_file_is_refused_when_it_lies_outside_the_roots(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed-not").mkdir()
    outside = write_safetensors(tmp_path / "allowed-not" / "a.safetensors", "x")
    roots = [str(tmp_path / "allowed")]
    dots = str(tmp_path / "allowed" / ".." / "allowed-not" / "a.safetensors")
    for path in (outside, dots, "/etc/passwd"):
        with pytest.raises(MessageInvalid, match="must lie below an allowed root"):
            read_layout_of_files([path], roots)
    with pytest.raises(MessageInvalid, match="there is none"):
        read_layout_of_files([outside], [])


def test_file_is_refused_when_a_link_leads_outside_the_roots(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    outside = write_safetensors(tmp_path / "a.safetensors", "x")
    link = tmp_path / "allowed" / "link.safetensors"
    link.symlink_to(outside)
    with pytest.raises(MessageInvalid, match=f"-> {outside}"):
        read_layout_of_files([str(link)], [str(tmp_path / "allowed")])


def test_file_is_read_when_the_root_itself_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    write_safetensors(tmp_path / "real" / "a.safetensors", "x")
    path = str(tmp_path / "root" / "a.safetensors")
    assert len(read_layout_of_files([path], [str(tmp_path / "root")]).tensors) == 1


def test_file_is_refused_when_its_path_is_relative() -> None:
    with pytest.raises(MessageInvalid, match="must be absolute"):
        read_layout_of_files(["a.safetensors"], None)


def test_file_is_refused_when_its_path_holds_a_zero_byte() -> None:
    with pytest.raises(MessageInvalid, match="path"):
        read_layout_of_files(["/a\0b"], None)


def test_file_is_refused_when_it_is_absent_or_not_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileUnreadable, match="No such file"):
        read_layout_of_files([str(tmp_path / "none")], None)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(FileUnreadable, match="is not a regular file"):
            read_layout_of_files([str(path)], None)


@pytest.mark.parametrize("size_bytes", [0, 7, 8, 60])
def test_file_is_refused_when_it_is_cut_short(tmp_path: Path, size_bytes: int) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", "x")
    os.truncate(path, size_bytes)
    with pytest.raises(MessageInvalid, match=r"a\.safetensors"):
        read_layout_of_files([path], None)
