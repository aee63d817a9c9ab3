"""Layouts by digest: put once, read once per process.

Owns a small cache in memory and, if a directory is given, one on disk that outlives the process and
may be shared: files are named by digest, appear whole, and are believed only if their content has
that digest.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

import anyio
import anyio.to_thread

from weightbus.bus.errors import ObjectCorrupt
from weightbus.bus.objects import ObjectStore
from weightbus.schemas.blobs import digest_of
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import check_layout, decode_layout, encode_layout
from weightbus.schemas.limits import DEFAULT_LIMITS, Limits

__all__ = ("LayoutStore",)

_CACHED_LAYOUTS = 8
"""A large layout takes some 100 MB as objects; a process works with one or two."""

_SUFFIX = ".layout"


class LayoutStore:
    """The bus's layouts. A `partial` layout is one rank's part of one: see `check_layout`."""

    def __init__(
        self, objects: ObjectStore, cache_dir: Path | None, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._objects = objects
        self._cache_dir = cache_dir
        self._limits = limits
        self._cached: OrderedDict[tuple[str, bool], tuple[Layout, bytes]] = OrderedDict()
        self._fetching = anyio.Lock()

    async def put(self, layout: Layout, *, partial: bool = False) -> str:
        """Store a layout, if it is not there yet, and return its digest.

        Raises:
            MessageInvalid: it breaks a rule.
            ObjectTooLarge, BusUnavailable, BusTimeout, RequestRefused
        """
        blob, digest = await anyio.to_thread.run_sync(self._encode, layout, partial)
        await self._objects.put(digest, blob)
        self._keep(digest, partial, layout, blob)
        return digest

    async def get(self, digest: str, *, partial: bool = False) -> tuple[Layout, bytes]:
        """A layout and its blob, as `encode_layout` made it.

        Raises:
            ObjectMissing: no layout has this digest.
            ObjectCorrupt: what lies under this digest has another one.
            MessageInvalid: the layout breaks a rule.
            ObjectTooLarge, BusUnavailable, BusTimeout, RequestRefused
        """
        async with self._fetching:
            if found := self._cached.get((digest, partial)):
                self._cached.move_to_end((digest, partial))
                return found
            blob = await anyio.to_thread.run_sync(self._read_file, digest)
            if blob is None:
                blob = await self._objects.get(digest)
                await anyio.to_thread.run_sync(self._check_digest, digest, blob)
                await anyio.to_thread.run_sync(self._write_file, digest, blob)
            layout = await anyio.to_thread.run_sync(self._decode, blob, partial)
            self._keep(digest, partial, layout, blob)
            return layout, blob

    def _encode(self, layout: Layout, partial: bool) -> tuple[bytes, str]:
        check_layout(layout, self._limits, partial=partial)
        blob = encode_layout(layout)
        return blob, digest_of(blob, self._limits)

    def _decode(self, blob: bytes, partial: bool) -> Layout:
        return decode_layout(blob, self._limits, partial=partial)

    def _keep(self, digest: str, partial: bool, layout: Layout, blob: bytes) -> None:
        self._cached[digest, partial] = (layout, blob)
        while len(self._cached) > _CACHED_LAYOUTS:
            self._cached.popitem(last=False)

    def _check_digest(self, digest: str, blob: bytes) -> None:
        try:
            found = digest_of(blob, self._limits)
        except MessageInvalid as error:
            raise ObjectCorrupt(digest, "content", str(error), "a layout") from None
        if found != digest:
            raise ObjectCorrupt(digest, "digest", found, digest)

    def _read_file(self, digest: str) -> bytes | None:
        """None: no directory, no file, or a file that does not hold what its name says."""
        if self._cache_dir is None:
            return None
        try:
            with open(self._cache_dir / f"{digest}{_SUFFIX}", "rb") as file:
                blob = file.read(self._limits.max_blob_bytes + 1)
            self._check_digest(digest, blob)
        except (OSError, ObjectCorrupt):
            return None
        return blob

    def _write_file(self, digest: str, blob: bytes) -> None:
        """A cache that cannot be written is no cache; the layout is in hand all the same."""
        if self._cache_dir is None:
            return
        with contextlib.suppress(OSError):
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=self._cache_dir, suffix=".part", delete=False
            ) as file:
                file.write(blob)
            os.replace(file.name, self._cache_dir / f"{digest}{_SUFFIX}")
