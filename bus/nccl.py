"""NCCL by its own library, libnccl: communicators whose calls never block. No torch.

The only module that knows libnccl. It takes the library that this process has loaded already, as
torch does: two of them in one process would each keep buffers and threads.

Facts of NCCL that whoever calls this has to know:
- Communicators are non-blocking (`blocking = 0`): a call only begins something, on a thread of
  NCCL's own. Until `is_ready` nothing else may be begun. What was queued in a stream is there once
  the communicator is ready again: events are recorded after that.
- The first operation connects the members: it is not ready before all of them have begun it.
- A member that is lost is noticed where there is a network between, and never where there is none
  (NVLink, PCIe, shared memory): its peers' kernels wait for ever. Only `abort` ends them.
- `abort` is for one member alone, and may be called at any time. It waits for NCCL's threads, and
  frees device memory, which waits for the whole device: also for kernels of other communicators.
  So several are aborted side by side, each in a thread of its own.
- It works on the thread's current device: every call is made within `CudaRuntime.current`.
- Its settings are the environment's (`NCCL_SOCKET_IFNAME`, `NCCL_NVLS_ENABLE`, ...), shared with
  everybody else who uses NCCL in this process. They are left alone.

Symbols and constants: nccl.h of NCCL 2.28; all are in 2.18.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any, Final

from weightbus.bus.cuda import CudaRuntime
from weightbus.bus.errors import NcclFailed, NcclUnavailable

__all__ = (
    "LIBRARY",
    "MAX_CTAS",
    "NCCL_ID_BYTES",
    "OLDEST_VERSION",
    "Nccl",
    "NcclCommunicator",
    "find_nccl",
    "load_nccl",
    "open_nccl",
)

LIBRARY: Final = "libnccl.so.2"

OLDEST_VERSION: Final = 2_18_00
"""As `ncclGetVersion` says it: 10,000 of the major version, 100 of the minor one."""

NCCL_ID_BYTES: Final = 128
"""Of the id by which the members of a communicator find each other: NCCL_UNIQUE_ID_BYTES."""

MAX_CTAS: Final = 4
"""Blocks of a kernel, each with a channel of its own to the next member. A channel moves some
20 GB/s over NVLink and takes some 12 MiB of device memory (buffers of the protocols LL 0.5, LL128
4.7 and Simple 4 MiB, in pages of 2 MiB; over a network up to twice as much): 4 are faster than a
GPU's PCIe link and most network cards are, and leave nearly all of the GPU to others."""

MAPS: Final = Path("/proc/self/maps")

_NAME: Final = re.compile(r"libnccl\.so(\.\d+)*")
_PACKAGE: Final = "nvidia.nccl"
_REMEDY: Final = (
    "pip install torch built for CUDA, which brings it, or nvidia-nccl-cu13 (nvidia-nccl-cu12 "
    f"before CUDA 13), or the system's {LIBRARY}"
)

_SUCCESS: Final = 0
_SYSTEM_ERROR: Final = 2
_REMOTE_ERROR: Final = 6
_IN_PROGRESS: Final = 7

_UINT8: Final = 1  # ncclUint8

_CONFIG_MAGIC: Final = 0xCAFEBEEF
_CONFIG_VERSION: Final = 2_18_00
_UNDEFINED: Final = -(2**31)  # NCCL_CONFIG_UNDEF_INT: INT_MIN


class _Id(ctypes.Structure):
    """ncclUniqueId; `ncclCommInitRankConfig` takes it by value."""

    _fields_ = [("internal", ctypes.c_ubyte * NCCL_ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t of NCCL 2.18. It says its size and version, by which later ones (looked at: up
    to 2.30) know which fields are not in it: they take their own defaults for these."""

    _fields_ = [
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cga_cluster_size", c_int),
        ("min_ctas", c_int),
        ("max_ctas", c_int),
        ("net_name", c_char_p),
        ("split_share", c_int),
    ]


_Communicator = c_void_p  # ncclComm_t
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "ncclGetUniqueId": (POINTER(_Id),),
    "ncclCommInitRankConfig": (POINTER(_Communicator), c_int, _Id, c_int, POINTER(_Config)),
    "ncclCommGetAsyncError": (_Communicator, POINTER(c_int)),
    "ncclBroadcast": (c_void_p, c_void_p, c_size_t, c_int, c_int, _Communicator, c_void_p),
    "ncclCommAbort": (_Communicator,),
}
_TEXTS: Final[dict[str, tuple[Any, ...]]] = {
    "ncclGetErrorString": (c_int,),
    "ncclGetLastError": (_Communicator,),
}


def find_nccl(maps: Path = MAPS) -> str:
    """Where the library is: the one that is loaded, else torch's (which is a package of its own),
    else the system's, wherever the loader finds that. Loads nothing."""
    for line in maps.read_text("utf-8", "replace").splitlines():
        path = line.partition("/")
        if path[1] and _NAME.fullmatch(path[2].rpartition("/")[2]):
            return f"/{path[2]}"
    try:
        package = importlib.util.find_spec(_PACKAGE)
    except (ImportError, ValueError):
        package = None
    for folder in (package and package.submodule_search_locations) or ():
        path_in_package = Path(folder) / "lib" / LIBRARY
        if path_in_package.is_file():
            return str(path_in_package)
    return LIBRARY


def load_nccl(library: str | None = None) -> Nccl:
    """
    Args:
        library: None: `find_nccl`.

    Raises:
        NcclUnavailable: there is no NCCL, or it is too old.
    """
    library = library or find_nccl()
    try:
        nccl = ctypes.CDLL(library)
    except OSError as error:
        raise NcclUnavailable(f"{library} cannot be loaded ({error})", _REMEDY) from error
    version = c_int()
    code = _typed(nccl, library, "ncclGetVersion", c_int, (POINTER(c_int),))(version)
    if code:
        raise NcclUnavailable(f"{library} does not tell its version (code {code})", _REMEDY)
    if version.value < OLDEST_VERSION:
        needed = f"NCCL {_dotted(OLDEST_VERSION)} or later"
        raise NcclUnavailable(f"{library} is NCCL {_dotted(version.value)}", needed)
    for names, result in ((_SIGNATURES, c_int), (_TEXTS, c_char_p)):
        for name, arguments in names.items():
            _typed(nccl, library, name, result, arguments)
    return Nccl(nccl, library, version.value)


class Nccl:
    """The library, of `load_nccl`: one per process. Several threads may use it."""

    path: str
    version: str
    """Such as `2.28.9`. Members of different versions cannot form a communicator."""

    def __init__(self, library: ctypes.CDLL, path: str, version: int) -> None:
        """Takes a library whose functions' types are set."""
        self._nccl = library
        self.path = path
        self.version = _dotted(version)

    def make_id(self, group: str, place: int) -> bytes:
        """A new id (`NCCL_ID_BYTES`), for one communicator; its members bring it to each other.

        A thread of this process waits from now on for the members, until all of them have come:
        for ever, if one does not.

        Raises:
            NcclFailed: there is no network interface that it could listen on.
        """
        made = _Id()
        self.call("ncclGetUniqueId", group, place, ctypes.byref(made))
        return bytes(made)

    def begin(
        self, cuda: CudaRuntime, device: int, id: bytes, group: str, place: int, size: int
    ) -> NcclCommunicator:
        """Begin to form a communicator. It `is_ready` when all members have come.

        Args:
            device: of this member. No two members may be on the same GPU.
            group, place: for messages; the place is also the member's rank in the communicator.

        Raises:
            NcclFailed: there is none, and nothing is left of it.
        """
        assert len(id) == NCCL_ID_BYTES
        config = _Config(
            size=ctypes.sizeof(_Config),
            magic=_CONFIG_MAGIC,
            version=_CONFIG_VERSION,
            blocking=0,
            cga_cluster_size=_UNDEFINED,
            min_ctas=_UNDEFINED,
            max_ctas=MAX_CTAS,
            net_name=None,
            split_share=_UNDEFINED,
        )
        handle = _Communicator()
        name, arguments = "ncclCommInitRankConfig", (size, _Id.from_buffer_copy(id), place)
        with cuda.current(device):
            code = self._nccl.ncclCommInitRankConfig(handle, *arguments, config)
        if not handle.value:
            raise self.failure(name, group, place, code)
        formed = NcclCommunicator(self, cuda, device, handle.value, group, place)
        if code not in (_SUCCESS, _IN_PROGRESS):
            error = self.failure(name, group, place, code)
            with suppress(NcclFailed):
                formed.abort()
            raise error
        return formed

    def call(self, name: str, group: str, place: int, *arguments: Any) -> None:
        """Call a function that may say that it goes on.

        Raises:
            NcclFailed: it says something else.
        """
        code = getattr(self._nccl, name)(*arguments)
        if code not in (_SUCCESS, _IN_PROGRESS):
            raise self.failure(name, group, place, code)

    def failure(self, name: str, group: str, place: int, code: int) -> NcclFailed:
        """What a code means; NCCL's last message, of whichever communicator, is in it."""
        known = self._nccl.ncclGetErrorString(code) or b"unknown"
        last = self._nccl.ncclGetLastError(None) or b""
        texts = [text.decode("utf-8", "replace").strip() for text in (known, last)]
        reason = f"{': '.join(filter(None, texts))} (code {code})"
        return NcclFailed(name, group, place, reason, others=code in (_SYSTEM_ERROR, _REMOTE_ERROR))


class NcclCommunicator:
    """Of `Nccl.begin`. Several threads may use it: one to broadcast, another one to abort."""

    def __init__(
        self, nccl: Nccl, cuda: CudaRuntime, device: int, handle: int, group: str, place: int
    ) -> None:
        self._nccl, self._cuda, self._device = nccl, cuda, device
        self._group, self._place = group, place
        self._handle: int | None = handle
        self._lock = threading.Lock()
        """Held by calls that use the handle, which never wait; nobody has it who aborts."""

    def is_ready(self) -> bool:
        """Whether what was begun last is done, or queued. Does not wait.

        Raises:
            NcclFailed: it has failed, or something that was queued earlier has.
        """
        state, name = c_int(), "ncclCommGetAsyncError"
        with self._using(name) as handle:
            self._nccl.call(name, self._group, self._place, handle, ctypes.byref(state))
        if state.value not in (_SUCCESS, _IN_PROGRESS):
            raise self._nccl.failure("what it had begun", self._group, self._place, state.value)
        return state.value == _SUCCESS

    def broadcast(self, address: int, size_bytes: int, root: int, stream: int) -> None:
        """Begin to queue a broadcast: memory of the device, at all members, becomes as the root's.
        The communicator is ready before, and again when the broadcast is in the stream.

        Raises:
            NcclFailed: nothing is queued.
        """
        name = "ncclBroadcast"
        arguments = (address, address, size_bytes, _UINT8, root)
        with self._using(name) as handle:
            self._nccl.call(name, self._group, self._place, *arguments, handle, stream)

    def abort(self) -> None:
        """End it, and whatever it does. May wait: see above; nobody else waits for that. Whoever
        comes second returns at once.

        Raises:
            NcclFailed: what it held is not freed, and kernels may go on.
        """
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            with self._cuda.current(self._device):
                self._nccl.call("ncclCommAbort", self._group, self._place, handle)

    @contextmanager
    def _using(self, name: str) -> Iterator[int]:
        with self._lock:
            if self._handle is None:
                reason = "the communicator was aborted"
                raise NcclFailed(name, self._group, self._place, reason, others=False)
            with self._cuda.current(self._device):
                yield self._handle


_opened: list[Nccl] = []
_opening = threading.Lock()


def open_nccl() -> Nccl:
    """NCCL of this process: the same every time.

    Raises:
        NcclUnavailable: there is none, or it is too old.
    """
    with _opening:
        if not _opened:
            _opened.append(load_nccl())
        return _opened[0]


def _typed(
    library: ctypes.CDLL, path: str, name: str, result: Any, arguments: tuple[Any, ...]
) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError as error:
        needed = f"NCCL {_dotted(OLDEST_VERSION)} or later"
        raise NcclUnavailable(f"{path} has no {name}", needed) from error
    function.argtypes, function.restype = arguments, result
    return function


def _dotted(version: int) -> str:
    """Of what `ncclGetVersion` says: it counted by the thousand before 2.9."""
    unit = 10_000 if version >= 10_000 else 1_000
    return f"{version // unit}.{version % unit // 100}.{version % 100}"
