"""CUDA by the driver's own library, libcuda. The only module that knows it; reach it by
`weightbus.bus.cuda.open_cuda`.

The driver's API and not the runtime's (libcudart), because
- libcuda comes with the driver, one per machine, with stable symbols: nothing has to be found, and
  no version has to fit that of torch's runtime. Both share the primary contexts, and with them
  streams, events and addresses;
- contexts are named: the runtime's `cudaSetDevice` makes one, of some 500 MB, on whichever device
  it is told, also when it is told to go back to where it was;
- a call that fails leaves no last error behind for torch to find.

Symbols and constants: cuda.h of CUDA 13.0; all are in drivers for CUDA 11.4 and later.
"""

from __future__ import annotations

import ctypes
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Final

from weightbus.bus.cuda import CUDA_HANDLE_BYTES, CudaRuntime
from weightbus.bus.errors import CudaFailed, CudaTimeout, CudaUnavailable

__all__ = ("LIBRARY", "Driver", "load_driver")

LIBRARY: Final = "libcuda.so.1"

SMALL_COPY_S: Final = 10.0
"""The longest that a few bytes may take; a device that is this late does not work any more."""

_FIRST_PAUSE_S: Final = 10e-6
_LONGEST_PAUSE_S: Final = 1e-3

_NOT_READY: Final = 600
_NO_DEVICE: Final = 100

_HOST_POINTER_WORKS: Final = 91
_READ_ONLY_REGISTRATION: Final = 113
"""Attributes of devices: CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM and
READ_ONLY_HOST_REGISTER_SUPPORTED."""

_REGISTER_PORTABLE: Final = 0x01
_REGISTER_MAPPED: Final = 0x02
_REGISTER_READ_ONLY: Final = 0x08
_LAZY_PEER_ACCESS: Final = 1
_NON_BLOCKING: Final = 1
_DISABLE_TIMING: Final = 2


class _Handle(ctypes.Structure):
    """CUipcMemHandle; `cuIpcOpenMemHandle` takes it by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * CUDA_HANDLE_BYTES)]


class _Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = [("bytes", ctypes.c_ubyte * 16)]


_Address = c_uint64  # CUdeviceptr
_Device = c_int  # CUdevice
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(_Device), c_int),
    "cuDeviceGetUuid": (POINTER(_Uuid), _Device),
    "cuDeviceGetUuid_v2": (POINTER(_Uuid), _Device),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, _Device),
    "cuDevicePrimaryCtxGetState": (_Device, POINTER(c_uint), POINTER(c_int)),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), _Device),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(_Address), c_size_t),
    "cuMemFree_v2": (_Address,),
    "cuMemGetAddressRange_v2": (POINTER(_Address), POINTER(c_size_t), _Address),
    "cuIpcGetMemHandle": (POINTER(_Handle), _Address),
    "cuIpcOpenMemHandle_v2": (POINTER(_Address), _Handle, c_uint),
    "cuIpcCloseMemHandle": (_Address,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemcpyAsync": (_Address, _Address, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _Address, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (_Address, c_void_p, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamQuery": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
}


def load_driver(library: str = LIBRARY) -> Driver:
    """
    Raises:
        CudaUnavailable: there is no driver, it is too old, or it has no device for this process.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise CudaUnavailable(
            f"the NVIDIA driver's {LIBRARY} cannot be loaded ({error})",
            "run on a machine with an NVIDIA driver; in a container, with its GPUs passed in",
        ) from error
    for name, arguments in _SIGNATURES.items():
        try:
            function = getattr(driver, name)
        except AttributeError as error:
            raise CudaUnavailable(
                f"the NVIDIA driver has no {name}", "a driver for CUDA 11.4 or later"
            ) from error
        function.argtypes, function.restype = arguments, c_int
    count = c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(count)
    if code not in (0, _NO_DEVICE):
        raise CudaUnavailable(
            f"the NVIDIA driver does not start ({_reason(driver, code)})",
            "see what nvidia-smi and the kernel's log say",
        )
    if not count.value:
        raise CudaUnavailable(
            "the NVIDIA driver has no device for this process",
            "see what nvidia-smi says, and CUDA_VISIBLE_DEVICES",
        )
    return Driver(driver)


class Driver(CudaRuntime):
    """Of `load_driver`, one per process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Takes a library that was initialised, its functions' types set."""
        self._cuda = library
        self._lock = threading.Lock()
        self._contexts: dict[int, int] = {}
        """Device -> primary context that is kept alive."""
        self._small: dict[int, int] = {}
        """Device -> stream for small copies."""
        self._owners: dict[int, int] = {}
        """Address that was allocated -> device."""
        self._exported: dict[bytes, int] = {}
        """Handle -> address."""
        self._registered: dict[int, int] = {}
        """Host address -> device in whose context it was registered."""
        self._late: list[object] = []
        """Memory of small copies that may still come."""

    # -- questions

    def device_count(self) -> int:
        count = c_int()
        self._call("cuDeviceGetCount", "", count)
        return count.value

    def device_uuid(self, device: int) -> str:
        """The second function tells the instance's UUID where there is MIG, the first the GPU's."""
        of_gpu, of_instance = _Uuid(), _Uuid()
        value, number = f"device {device}", self._number(device)
        self._call("cuDeviceGetUuid", value, of_gpu, number)
        self._call("cuDeviceGetUuid_v2", value, of_instance, number)
        kind = "GPU" if bytes(of_gpu) == bytes(of_instance) else "MIG"
        return f"{kind}-{uuid.UUID(bytes=bytes(of_instance))}"

    def find_device(self, uuid: str) -> int | None:
        for device in range(self.device_count()):
            if self.device_uuid(device) == uuid:
                return device
        return None

    def can_register_read_only(self, device: int) -> bool:
        return self._attribute(device, _READ_ONLY_REGISTRATION) != 0

    # -- device memory

    def free_bytes(self, device: int) -> int:
        free, total = c_size_t(), c_size_t()
        with self._on(device):
            self._call("cuMemGetInfo_v2", f"device {device}", free, total)
        return free.value

    def allocate(self, device: int, size_bytes: int) -> int:
        address = _Address()
        with self._on(device):
            self._call(
                "cuMemAlloc_v2", f"{size_bytes:,} bytes of device {device}", address, size_bytes
            )
        self._owners[address.value] = device
        return address.value

    def free(self, device: int, address: int) -> None:
        with self._on(device):
            self._call("cuMemFree_v2", _place(device, address), address)
        self._owners.pop(address, None)
        for handle in [key for key, value in self._exported.items() if value == address]:
            del self._exported[handle]

    def size_bytes(self, device: int, address: int) -> int:
        begin, size = _Address(), c_size_t()
        with self._on(device):
            value = _place(device, address)
            self._call("cuMemGetAddressRange_v2", value, begin, size, address)
        return begin.value + size.value - address

    def export(self, address: int) -> bytes:
        device = self._owners.get(address)
        if device is None:
            raise CudaFailed("cuIpcGetMemHandle", f"{address:#x}", "it was not allocated here")
        handle = _Handle()
        with self._on(device):
            self._call("cuIpcGetMemHandle", _place(device, address), handle, address)
        self._exported[bytes(handle)] = address
        return bytes(handle)

    def open_handle(self, device: int, handle: bytes) -> int:
        value = f"a handle of {len(handle)} bytes, on device {device}"
        if len(handle) != CUDA_HANDLE_BYTES:
            reason = f"must have {CUDA_HANDLE_BYTES} bytes"
            raise CudaFailed("cuIpcOpenMemHandle_v2", value, reason)
        if handle in self._exported:
            reason = "this process exported it itself, and cannot open it"
            raise CudaFailed("cuIpcOpenMemHandle_v2", value, reason)
        address = _Address()
        with self._on(device):
            self._call(
                "cuIpcOpenMemHandle_v2",
                value,
                address,
                _Handle.from_buffer_copy(handle),
                _LAZY_PEER_ACCESS,
            )
        return address.value

    def close_handle(self, device: int, address: int) -> None:
        with self._on(device):
            self._call("cuIpcCloseMemHandle", _place(device, address), address)

    # -- host memory

    def register(
        self, address: int, size_bytes: int, *, read_only: bool, device: int | None = None
    ) -> None:
        device = self._any_device() if device is None else device
        value = f"{size_bytes:,} bytes at {address:#x}{', read-only' if read_only else ''}"
        if not self._attribute(device, _HOST_POINTER_WORKS):
            raise CudaFailed(
                "cuMemHostRegister_v2",
                value,
                f"device {device} cannot read host memory at its host address",
            )
        if read_only and not self.can_register_read_only(device):
            raise CudaFailed(
                "cuMemHostRegister_v2", value, f"device {device} knows no read-only registration"
            )
        flags = _REGISTER_PORTABLE | _REGISTER_MAPPED | (_REGISTER_READ_ONLY if read_only else 0)
        with self._on(device):
            self._call("cuMemHostRegister_v2", value, address, size_bytes, flags)
        self._registered[address] = device

    def unregister(self, address: int) -> None:
        device = self._registered.get(address)
        if device is None:
            raise CudaFailed("cuMemHostUnregister", f"{address:#x}", "it was not registered here")
        with self._on(device):
            self._call("cuMemHostUnregister", f"{address:#x}", address)
        self._registered.pop(address, None)

    # -- copies

    def read(self, device: int, address: int, size_bytes: int) -> bytes:
        buffer = bytearray(size_bytes)
        self.read_into(device, address, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, device: int, address: int, buffer: memoryview) -> None:
        if buffer.nbytes:
            memory = (ctypes.c_char * buffer.nbytes).from_buffer(buffer)
            self._copy_small("cuMemcpyDtoHAsync_v2", device, address, memory, (memory, address))

    def write(self, device: int, address: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        self._copy_small("cuMemcpyHtoDAsync_v2", device, address, buffer, (address, buffer))

    def copy_async(
        self, device: int, destination: int, source: int, size_bytes: int, stream: int
    ) -> None:
        value = f"{size_bytes:,} bytes from {source:#x} to {destination:#x}, on device {device}"
        with self._on(device):
            self._call("cuMemcpyAsync", value, destination, source, size_bytes, stream)

    def create_stream(self, device: int) -> int:
        stream = c_void_p()
        with self._on(device):
            self._call("cuStreamCreate", f"device {device}", stream, _NON_BLOCKING)
        return stream.value or 0

    def destroy_stream(self, device: int, stream: int) -> None:
        with self._on(device):
            self._call("cuStreamDestroy_v2", _stream(device, stream), stream)

    def is_done(self, device: int, stream: int) -> bool:
        return self._query("cuStreamQuery", device, stream)

    def synchronise(self, device: int, stream: int, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        pause_s = _FIRST_PAUSE_S
        while not self._query("cuStreamQuery", device, stream):
            if time.monotonic() >= end:
                raise CudaTimeout("synchronising", _stream(device, stream), deadline_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def record_event(self, device: int, stream: int) -> int:
        event = c_void_p()
        with self._on(device):
            self._call("cuEventCreate", f"device {device}", event, _DISABLE_TIMING)
            try:
                self._call("cuEventRecord", _stream(device, stream), event, stream)
            except CudaFailed:
                self._cuda.cuEventDestroy_v2(event)
                raise
        return event.value or 0

    def is_event_done(self, device: int, event: int) -> bool:
        return self._query("cuEventQuery", device, event)

    def wait_event(self, device: int, stream: int, event: int) -> None:
        with self._on(device):
            self._call("cuStreamWaitEvent", _stream(device, stream), stream, event, 0)

    def destroy_event(self, device: int, event: int) -> None:
        with self._on(device):
            self._call("cuEventDestroy_v2", f"an event of device {device}", event)

    # -- other libraries

    def current(self, device: int) -> AbstractContextManager[None]:
        return self._on(device)

    # -- the driver

    def _call(self, name: str, value: str, *arguments: Any) -> None:
        """Pointers to results are passed as the results themselves: ctypes makes pointers."""
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise CudaFailed(name, value, _reason(self._cuda, code))

    def _query(self, name: str, device: int, what: int) -> bool:
        with self._on(device):
            code = getattr(self._cuda, name)(what)
        if code not in (0, _NOT_READY):
            raise CudaFailed(name, _stream(device, what), _reason(self._cuda, code))
        return not code

    def _copy_small(
        self, name: str, device: int, address: int, buffer: Any, ends: tuple[Any, Any]
    ) -> None:
        stream = self._small_stream(device)
        value = f"{len(buffer)} bytes {_place(device, address)}"
        with self._on(device):
            self._call(name, value, *ends, len(buffer), stream)
        try:
            self.synchronise(device, stream, SMALL_COPY_S)
        except CudaTimeout as error:
            self._late.append(buffer)
            raise CudaTimeout(name, value, SMALL_COPY_S) from error

    def _small_stream(self, device: int) -> int:
        if device not in self._small:
            stream = self.create_stream(device)
            with self._lock:
                kept = self._small.setdefault(device, stream)
            if kept != stream:
                self.destroy_stream(device, stream)
        return self._small[device]

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """Within it, the device's primary context is the thread's current one."""
        context = self._contexts.get(device)
        if context is None:
            context = self._retained(device)
        self._call("cuCtxPushCurrent_v2", f"device {device}", context)
        try:
            yield
        finally:
            self._cuda.cuCtxPopCurrent_v2(c_void_p())

    def _retained(self, device: int) -> int:
        number = self._number(device)
        with self._lock:
            if device not in self._contexts:
                context = c_void_p()
                self._call("cuDevicePrimaryCtxRetain", f"device {device}", context, number)
                self._contexts[device] = context.value or 0
            return self._contexts[device]

    def _any_device(self) -> int:
        """One that has a context already, if any has: another context costs memory."""
        devices: list[int] = [*self._contexts, *range(self.device_count())]
        for device in devices:
            flags, active = c_uint(), c_int()
            number = self._number(device)
            self._call("cuDevicePrimaryCtxGetState", f"device {device}", number, flags, active)
            if active.value:
                return device
        return 0

    def _number(self, device: int) -> int:
        """The driver's own number of a device."""
        number = c_int()
        self._call("cuDeviceGet", f"device {device}", number, device)
        return number.value

    def _attribute(self, device: int, attribute: int) -> int:
        found = c_int()
        self._call(
            "cuDeviceGetAttribute", f"device {device}", found, attribute, self._number(device)
        )
        return found.value


def _reason(library: ctypes.CDLL, code: int) -> str:
    name, text = c_char_p(), c_char_p()
    library.cuGetErrorName(code, name)
    library.cuGetErrorString(code, text)
    known = [found.value.decode("ascii", "replace") for found in (name, text) if found.value]
    return ": ".join(known) or f"code {code}"


def _place(device: int, address: int) -> str:
    return f"at {address:#x} of device {device}"


def _stream(device: int, stream: int) -> str:
    return f"{stream:#x} of device {device}"
