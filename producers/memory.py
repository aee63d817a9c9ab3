"""The kinds of memory that slots lie in: makes their blocks, gives them up, says where they are.

Owns the blocks, what they are registered with (the transfer engine, for other hosts; CUDA, so that
GPUs copy into them at full speed), and the sign of life of GPU blocks. Blocking; runs in worker
threads.

A block in /dev/shm outlives its owner, and is locked by it: that is how a later publisher finds out
that the owner died (`weightbus.bus.sweep`). The driver frees a dead process's GPU memory by itself,
so that nobody would know that a version is gone: hence the sign, an empty block in /dev/shm.
"""

from __future__ import annotations

import logging
import secrets
from abc import ABC, abstractmethod
from typing import Final, NamedTuple, Protocol

from weightbus.bus.blocks import SHM_PREFIX, SharedBlock, check_room
from weightbus.bus.cuda import CUDA_ALIGNMENT_BYTES, CudaBlock, CudaRuntime
from weightbus.bus.endpoint import Endpoint, register_block, unregister_block
from weightbus.bus.errors import CudaFailed, EndpointFailed
from weightbus.producers.devices import Device
from weightbus.producers.errors import DeviceMemoryFull
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.placement import (
    CudaSegment,
    RemoteSegment,
    Segment,
    SharedMemorySegment,
)
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

__all__ = ("Block", "DeviceMemory", "HostMemory", "Memory", "Owner", "keep")

_logger = logging.getLogger(__name__)

_LEFT: Final[list[object]] = []
"""What stays registered, or may still be read, and so stays as long as this process."""


def keep(what: object) -> None:
    """As long as this process, with all that it holds: the driver may use it still."""
    _LEFT.append(what)


class Block(Protocol):
    """What all blocks have in common."""

    @property
    def size_bytes(self) -> int:
        """Of the data."""

    @property
    def generation(self) -> int:
        """Odd while it is written; only grows."""

    def end_write(self) -> int:
        """The data is whole."""


class Owner(NamedTuple):
    """Whose blocks they are; in their names."""

    model: str
    producer: str
    rank: int
    host_id: str

    def new_name(self) -> str:
        """Of a block in /dev/shm."""
        unique = secrets.token_hex(8)
        return f"{SHM_PREFIX}{self.model}.{self.producer}.{self.rank}.{unique}"


class Memory(ABC):
    """One kind. It knows the blocks that it made, and takes no others."""

    @abstractmethod
    def check_room(self, size_bytes: int, given_up: Block | None) -> None:
        """Whether there is room for a block of so many bytes once another one is given up.

        Raises:
            SharedMemoryFull, DeviceMemoryFull
            CudaFailed: the device does not tell.
        """

    @abstractmethod
    def make(self, size_bytes: int, generation: int) -> Block:
        """A new block; `generation` (even) is where its word goes on from.

        Raises:
            SharedMemoryFull, DeviceMemoryFull: there is no room for it.
            SharedMemoryUnavailable, EndpointFailed, CudaFailed: it cannot be had.
        """

    @abstractmethod
    def give_up(self, block: Block, *, may_be_read: bool) -> None:
        """Remove a block; `may_be_read`: a reader of a version in it may not have ended."""

    def leave(self, block: Block) -> None:
        """Let a block be, and all that it is registered with, until this process ends."""
        _logger.warning("a block of %s bytes stays: it may be written still", block.size_bytes)
        keep(block)

    @abstractmethod
    def ways(self, block: Block) -> tuple[Segment, ...]:
        """How readers reach a block while its present version is whole, the nearest way first."""


class HostMemory(Memory):
    """Shared memory. Readers that have a block mapped keep it when it is given up.

    With an endpoint its blocks are registered with it for as long as they are there. A read from
    another host that is still under way when a block is given up fails.
    """

    def __init__(self, owner: Owner, endpoint: Endpoint | None = None) -> None:
        self._owner, self._endpoint = owner, endpoint
        self._pinned: dict[str, CudaRuntime] = {}
        self._cannot_pin = False

    @property
    def is_remote(self) -> bool:
        """Whether other hosts can read it."""
        return self._endpoint is not None

    def check_room(self, size_bytes: int, given_up: Block | None) -> None:
        check_room(SHM_HEADER_BYTES + size_bytes, given_up.size_bytes if given_up else 0)

    def make(self, size_bytes: int, generation: int) -> SharedBlock:
        block = SharedBlock(self._owner.new_name(), size_bytes, generation)
        if self._endpoint is not None:
            try:
                register_block(self._endpoint, block)
            except EndpointFailed:
                block.close()
                raise
        return block

    def pin(self, block: SharedBlock, runtime: CudaRuntime, device: int) -> bool:
        """Register a block with CUDA, once: GPUs copy into it at full speed, and nobody waits.

        Returns whether it is, and so can be read by GPUs. Else it is slower to copy to.
        """
        if block.name in self._pinned:
            return True
        if self._cannot_pin:
            return False
        try:
            runtime.register(block.address, block.size_bytes, read_only=False, device=device)
        except CudaFailed as error:
            self.cannot_pin(error)
            return False
        self._pinned[block.name] = runtime
        return True

    def cannot_pin(self, error: WeightBusError) -> None:
        """Say so, once, and try it no more."""
        if not self._cannot_pin:
            self._cannot_pin = True
            _logger.warning(
                "slots in host memory are not pinned, copies and digests are slow: %s", error
            )

    def give_up(self, block: Block, *, may_be_read: bool) -> None:
        assert isinstance(block, SharedBlock)
        if self._endpoint is not None:
            try:
                unregister_block(self._endpoint, block)
            except EndpointFailed as error:
                _logger.warning("%s stays registered: %s", block.name, error)
                _LEFT.append(block.data)
        runtime = self._pinned.pop(block.name, None)
        if runtime is not None:
            try:
                runtime.unregister(block.address)
            except CudaFailed as error:
                _logger.warning("%s stays pinned: %s", block.name, error)
                _LEFT.append(block.data)
        block.close()

    def ways(self, block: Block) -> tuple[Segment, ...]:
        assert isinstance(block, SharedBlock)
        generation = block.generation
        local = SharedMemorySegment(
            name=block.name, host_id=self._owner.host_id, generation=generation
        )
        if self._endpoint is None:
            return (local,)
        remote = RemoteSegment(
            protocol=self._endpoint.protocol,
            session=self._endpoint.session,
            address=block.address,
            generation=generation,
        )
        return (local, remote)


class DeviceMemory(Memory):
    """Memory of one GPU, exported by CUDA IPC to the processes of this host.

    To free it while somebody reads is undefined in CUDA: a block that may be read is left to the
    end of this process.
    """

    def __init__(self, owner: Owner, runtime: CudaRuntime, device: Device) -> None:
        self._owner, self._runtime, self.device = owner, runtime, device
        self._sign: SharedBlock | None = None
        self._made: set[CudaBlock] = set()

    def check_room(self, size_bytes: int, given_up: Block | None) -> None:
        need_bytes = _allocated_bytes(size_bytes)
        given_up_bytes = _allocated_bytes(given_up.size_bytes) if given_up else 0
        if self._free_bytes() + given_up_bytes < need_bytes:
            self.device.give_back_unused()
        have_bytes = self._free_bytes() + given_up_bytes
        if have_bytes < need_bytes:
            raise self._full(need_bytes, have_bytes)

    def make(self, size_bytes: int, generation: int) -> CudaBlock:
        if self._sign is None:
            self._sign = SharedBlock(self._owner.new_name(), 0)
        try:
            block = CudaBlock(self._runtime, self.device.number, size_bytes, generation)
        except CudaFailed as error:
            self._drop_sign()
            need_bytes, have_bytes = _allocated_bytes(size_bytes), self._free_bytes()
            if have_bytes < need_bytes:
                raise self._full(need_bytes, have_bytes) from error
            raise
        self._made.add(block)
        return block

    def give_up(self, block: Block, *, may_be_read: bool) -> None:
        assert isinstance(block, CudaBlock)
        self._made.discard(block)
        if may_be_read:
            _logger.warning("%s stays allocated: it may be read still", block.name)
            _LEFT.append(block)
        else:
            try:
                block.close()
            except CudaFailed as error:
                _logger.warning("%s stays allocated: %s", block.name, error)
        self._drop_sign()

    def leave(self, block: Block) -> None:
        assert isinstance(block, CudaBlock)
        self._made.discard(block)
        super().leave(block)
        self._drop_sign()

    def ways(self, block: Block) -> tuple[Segment, ...]:
        assert isinstance(block, CudaBlock)
        segment = CudaSegment(
            handle=block.handle,
            host_id=self._owner.host_id,
            device_uuid=block.device_uuid,
            generation=block.generation,
        )
        return (segment,)

    def _free_bytes(self) -> int:
        return self._runtime.free_bytes(self.device.number)

    def _full(self, need_bytes: int, have_bytes: int) -> DeviceMemoryFull:
        uuid = self._runtime.device_uuid(self.device.number)
        return DeviceMemoryFull(self.device.number, uuid, need_bytes, have_bytes)

    def _drop_sign(self) -> None:
        """With the last block."""
        if self._sign is not None and not self._made:
            self._sign.close()
            self._sign = None


def _allocated_bytes(size_bytes: int) -> int:
    """Of the GPU allocation that holds a block."""
    pages = -(-(SHM_HEADER_BYTES + size_bytes) // CUDA_ALIGNMENT_BYTES)
    return pages * CUDA_ALIGNMENT_BYTES
