"""Safetensors files that a message names: found, checked, and their headers read.

Blocking: call it in a thread. Paths come from others: a file is opened only if it lies below an
allowed root after every link is resolved, and read only as far as the limits go.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from weightbus.bus.errors import FileUnreadable
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout
from weightbus.schemas.limits import DEFAULT_LIMITS, Limits
from weightbus.schemas.safetensors import (
    LENGTH_WORD_BYTES,
    SafetensorsHeader,
    layout_of_files,
    parse_safetensors_header,
    safetensors_header_bytes,
)

__all__ = ("INDEX_SUFFIX", "expand_index_files", "read_layout_of_files")

INDEX_SUFFIX: Final = ".safetensors.index.json"
"""Ending of the file that names the files of a checkpoint that is spread over several."""


class _Index(Struct):
    weight_map: dict[str, Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^/\0]+\Z")]]
    """Tensor name -> name of a file in the index's directory."""


def read_layout_of_files(
    paths: Sequence[str], roots: Sequence[str] | None, limits: Limits = DEFAULT_LIMITS
) -> Layout:
    """The layout of a checkpoint made of safetensors files: one segment per file, in their order.

    Indexes are expanded as by `expand_index_files`. `roots`: directories below which the files must
    lie; None: anywhere, for files that we were told of by our own user.

    Raises:
        MessageInvalid: a path outside the roots, a file that is no safetensors file, too many
            files, or headers that are too long in all.
        FileUnreadable: a file is absent, or cannot be read.
    """
    files = expand_index_files(paths, roots, limits)
    return layout_of_files(_read_headers(files, roots, limits), limits)


def expand_index_files(
    paths: Sequence[str], roots: Sequence[str] | None, limits: Limits = DEFAULT_LIMITS
) -> tuple[str, ...]:
    """`paths`, with every `*.safetensors.index.json` replaced by the files it names, by name.

    Raises:
        MessageInvalid: a path outside the roots, an index that cannot be read, or too many files.
        FileUnreadable
    """
    _check_number(paths, limits)
    found: list[str] = []
    for path in paths:
        if path.endswith(INDEX_SUFFIX):
            found += _read_index(path, roots, limits)
            _check_number(found, limits)
        else:
            found.append(path)
    _check_number(found, limits)
    return tuple(found)


def _check_number(files: Sequence[str], limits: Limits) -> None:
    """Every file becomes a segment."""
    if len(files) > limits.max_segments:
        limit = f"at most {limits.max_segments} files"
        raise MessageInvalid("checkpoint", "files", f"{len(files)} files", limit)


def _read_index(path: str, roots: Sequence[str] | None, limits: Limits) -> list[str]:
    kind = f"safetensors index {path}"
    with _open_below(path, roots) as (file, size_bytes):
        if size_bytes > limits.max_safetensors_header_bytes:
            limit = f"at most {limits.max_safetensors_header_bytes} bytes"
            raise MessageInvalid(kind, "$", f"{size_bytes} bytes", limit)
        text = _read(file, path, size_bytes, 0)
    try:
        index = msgspec.json.decode(text, type=_Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageInvalid(kind, "$", "not readable", str(error)) from None
    directory = os.path.dirname(path)
    return [os.path.join(directory, name) for name in sorted(set(index.weight_map.values()))]


def _read_headers(
    files: Sequence[str], roots: Sequence[str] | None, limits: Limits
) -> list[SafetensorsHeader]:
    """What the files hold. All headers together may be as long as one."""
    headers: list[SafetensorsHeader] = []
    total_bytes = 0
    for path in files:
        with _open_below(path, roots) as (file, size_bytes):
            length_word = _read(file, path, LENGTH_WORD_BYTES, 0)
            header_bytes = safetensors_header_bytes(length_word, size_bytes, path, limits)
            total_bytes += header_bytes
            if total_bytes > limits.max_safetensors_header_bytes:
                limit = f"at most {limits.max_safetensors_header_bytes} bytes in all"
                found = f"{total_bytes} bytes of headers, up to {path}"
                raise MessageInvalid("checkpoint", "files", found, limit)
            header = _read(file, path, header_bytes, LENGTH_WORD_BYTES)
        headers.append(parse_safetensors_header(header, size_bytes, path, limits))
    return headers


@contextmanager
def _open_below(path: str, roots: Sequence[str] | None) -> Iterator[tuple[int, int]]:
    """(descriptor, size in bytes) of a regular file below the roots.

    Checked before opening, so that nothing else is touched, and after, because a link may have been
    changed in between.
    """
    if not os.path.isabs(path) or "\0" in path:
        raise MessageInvalid("file", "path", path, "must be absolute, without zero bytes")
    _check_below(path, os.path.realpath(path), roots)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FileUnreadable(path, str(error.strerror)) from None
    try:
        _check_below(path, os.readlink(f"/proc/self/fd/{file}"), roots)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise FileUnreadable(path, "is not a regular file")
        yield file, status.st_size
    finally:
        os.close(file)


def _check_below(path: str, real: str, roots: Sequence[str] | None) -> None:
    if roots is None:
        return
    for root in map(os.path.realpath, roots):
        if os.path.commonpath((root, real)) == root:
            return
    limit = f"must lie below an allowed root: {', '.join(roots) or 'there is none'}"
    raise MessageInvalid("file", "path", path if path == real else f"{path} -> {real}", limit)


def _read(file: int, path: str, size_bytes: int, offset_bytes: int) -> bytes:
    """As many bytes as there are, up to `size_bytes`."""
    parts: list[bytes] = []
    try:
        while size_bytes and (part := os.pread(file, size_bytes, offset_bytes)):
            parts.append(part)
            size_bytes -= len(part)
            offset_bytes += len(part)
    except OSError as error:
        raise FileUnreadable(path, str(error.strerror)) from None
    return b"".join(parts)
