"""NCCL's functions are called as nccl.h says, on a current device, and its codes become our errors.

A stub of libnccl is compiled for it; where there is no C compiler this is skipped.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from tests.nccl_stub import FOLDER, StubCuda, build_stub, load_stub, why_no_stub
from weightbus.bus.errors import NcclFailed, NcclUnavailable
from weightbus.bus.nccl import LIBRARY, Nccl, NcclCommunicator, find_nccl, load_nccl

INVALID_ARGUMENT, REMOTE, SYSTEM, CUDA = 4, 6, 2, 1
WAIT_S = 20.0


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if why_no_stub():
        pytest.skip(why_no_stub())
    return build_stub(tmp_path_factory.mktemp("nccl"))


@pytest.fixture
def stub(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    stub = load_stub(library)
    yield stub
    stub.stub_version(22809)
    stub.stub_refuse(b"nothing", 0, b"")
    assert stub.stub_communicators() == 0, "every communicator was aborted"


@pytest.fixture
def nccl(library: str, stub: ctypes.CDLL) -> Nccl:
    return load_nccl(library)


@pytest.fixture
def pair(nccl: Nccl, stub: ctypes.CDLL) -> Iterator[list[tuple[StubCuda, NcclCommunicator]]]:
    """Both members of a group."""
    made = nccl.make_id("g", 0)
    cudas = [StubCuda(stub), StubCuda(stub)]
    members = [(cuda, nccl.begin(cuda, 0, made, "g", n, 2)) for n, cuda in enumerate(cudas)]
    for _, member in members:
        until(member.is_ready)
    yield members
    for _, member in members:
        member.abort()


def until(is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < end
        time.sleep(1e-3)


def maps(folder: Path, *paths: str) -> Path:
    lines = [f"7f00-7f{n:02x} r-xp 00000000 fe:00 1 {path:>30}" for n, path in enumerate(paths)]
    file = folder / "maps"
    file.write_text("\n".join(["7fff-8000 rw-p 00000000 00:00 0", *lines]))
    return file


def test_library_that_is_loaded_already_is_taken(tmp_path: Path) -> None:
    others = (
        "/usr/lib/libnccl-net.so",
        "/old/libnccl.so.2 (deleted)",
        "/x/libnccl.so.2/y",
        "[heap]",
    )
    loaded = maps(tmp_path, *others, "/with a space/libnccl.so.2.28.9", "/z/libnccl.so.2")
    assert find_nccl(loaded) == "/with a space/libnccl.so.2.28.9"


def test_library_of_its_package_is_taken_when_none_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {name: ModuleType(name) for name in ("nvidia", "nvidia.nccl")}
    spec = importlib.util.spec_from_loader("nvidia.nccl", None, is_package=True)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations[:] = [str(tmp_path / "nvidia" / "nccl")]
    packages["nvidia.nccl"].__spec__ = spec
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    assert find_nccl(maps(tmp_path)) == LIBRARY, "the package holds none"
    path = tmp_path / "nvidia" / "nccl" / "lib" / LIBRARY
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_nccl(maps(tmp_path)) == str(path)


def test_loader_finds_the_library_when_nobody_else_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    assert find_nccl(maps(tmp_path)) == LIBRARY


@pytest.mark.parametrize(
    ("code", "version"), [(22809, "2.28.9"), (21800, "2.18.0"), (23007, "2.30.7")]
)
def test_version_is_told_as_it_is_written(
    library: str, stub: ctypes.CDLL, code: int, version: str
) -> None:
    stub.stub_version(code)
    assert load_nccl(library).version == version


def test_nccl_is_unavailable_when_it_is_absent_or_too_old(
    library: str, stub: ctypes.CDLL, tmp_path: Path
) -> None:
    with pytest.raises(NcclUnavailable, match=r"cannot be loaded .*pip install torch"):
        load_nccl("/nowhere/libnccl.so.2")
    with pytest.raises(NcclUnavailable, match="has no ncclGetVersion"):
        load_nccl("libc.so.6")
    for code, version in ((21706, r"2\.17\.6"), (2708, r"2\.7\.8")):
        stub.stub_version(code)
        with pytest.raises(NcclUnavailable, match=rf"is NCCL {version}\. .*NCCL 2\.18\.0 or later"):
            load_nccl(library)
    with pytest.raises(NcclUnavailable, match=r"has no ncclCommAbort\. .*2\.18\.0 or later"):
        load_nccl(build_stub(tmp_path, "-DWITHOUT_ABORT"))


def test_bytes_of_the_root_reach_the_other_member_in_order(
    pair: list[tuple[StubCuda, NcclCommunicator]],
) -> None:
    streams = [cuda.create_stream(0) for cuda, _ in pair]
    buffers = [cuda.allocate(0, 3000) for cuda, _ in pair]
    for number in range(4):
        root = number % 2
        for place, (cuda, member) in enumerate(pair):
            cuda.write(0, buffers[place], bytes([10 * number + place]) * 3000)
            member.broadcast(buffers[place], 2999, root, streams[place])
        for _, member in pair:
            until(member.is_ready)
        for (cuda, _), stream, buffer in zip(pair, streams, buffers, strict=True):
            until(partial(cuda.is_done, 0, stream))
            assert cuda.read(0, buffer, 2999) == bytes([10 * number + root]) * 2999
    assert cuda.read(0, buffers[1], 3000)[-1] == 10 * number + 1, "no byte beyond is touched"


def test_first_broadcast_is_in_progress_until_all_members_have_begun_it(
    pair: list[tuple[StubCuda, NcclCommunicator]],
) -> None:
    (cuda, first), (other_cuda, second) = pair
    stream, buffer = cuda.create_stream(0), cuda.allocate(0, 8)
    first.broadcast(buffer, 8, 0, stream)
    assert not first.is_ready()
    with pytest.raises(NcclFailed, match=r"ncclBroadcast \(place 0 of group g\) .*invalid usage"):
        first.broadcast(buffer, 8, 0, stream)
    second.broadcast(other_cuda.allocate(0, 8), 8, 0, other_cuda.create_stream(0))
    until(first.is_ready)


def test_calls_leave_the_threads_device_as_it_was(
    pair: list[tuple[StubCuda, NcclCommunicator]],
) -> None:
    cuda, member = pair[0]
    assert cuda.calls["current"] >= 2
    assert cuda.current_device is None
    with cuda.current(0):
        member.is_ready()
        assert cuda.current_device == 0


def test_communicator_is_not_used_after_it_was_aborted(
    pair: list[tuple[StubCuda, NcclCommunicator]], stub: ctypes.CDLL
) -> None:
    cuda, member = pair[0]
    before = stub.stub_aborts()
    member.broadcast(cuda.allocate(0, 8), 8, 0, stream := cuda.create_stream(0))
    member.abort()
    member.abort()
    assert stub.stub_aborts() == before + 1
    assert cuda.is_done(0, stream), "what it did has ended"
    for call in (member.is_ready, lambda: member.broadcast(0, 8, 0, 0)):
        with pytest.raises(NcclFailed, match="was aborted") as raised:
            call()
        assert not raised.value.others


def test_nobody_waits_for_who_aborts(
    pair: list[tuple[StubCuda, NcclCommunicator]], stub: ctypes.CDLL
) -> None:
    _, member = pair[0]
    stub.stub_slow(500)
    aborting = threading.Thread(target=member.abort)
    aborting.start()

    def is_refused() -> bool:
        try:
            return not member.is_ready()
        except NcclFailed:
            return True

    until(is_refused)
    assert aborting.is_alive()
    aborting.join()
    stub.stub_slow(0)


@pytest.mark.parametrize(
    ("code", "others"), [(INVALID_ARGUMENT, False), (CUDA, False), (REMOTE, True), (SYSTEM, True)]
)
def test_error_says_what_failed_where_and_whether_others_may_be_at_fault(
    pair: list[tuple[StubCuda, NcclCommunicator]], stub: ctypes.CDLL, code: int, others: bool
) -> None:
    _, member = pair[1]
    stub.stub_refuse(b"ncclCommGetAsyncError", code, b"the last message\n")
    expected = rf"GetAsyncError \(place 1 of group g\) .*: the last message \(code {code}\)"
    with pytest.raises(NcclFailed, match=expected) as raised:
        member.is_ready()
    assert raised.value.others is others


def test_what_fails_beside_is_told_when_it_is_asked_for(
    pair: list[tuple[StubCuda, NcclCommunicator]], stub: ctypes.CDLL
) -> None:
    members = [member for _, member in pair]
    stub.stub_refuse(b"what runs", REMOTE, b"")

    def is_told() -> bool:
        try:
            return not all(member.is_ready() for member in members)
        except NcclFailed as error:
            return "remote process exited" in str(error) and error.others

    until(is_told)


def test_nothing_is_left_of_what_does_not_begin(nccl: Nccl, stub: ctypes.CDLL) -> None:
    cuda = StubCuda(stub)
    stub.stub_refuse(b"ncclGetUniqueId", SYSTEM, b"no interface")
    with pytest.raises(NcclFailed, match=r"ncclGetUniqueId .*no interface"):
        nccl.make_id("g", 0)
    stub.stub_refuse(b"ncclCommInitRankConfig", CUDA, b"out of memory")
    with pytest.raises(NcclFailed, match=r"ncclCommInitRankConfig .*out of memory"):
        nccl.begin(cuda, 0, bytes(128), "g", 0, 2)
    with pytest.raises(NcclFailed, match="invalid argument"):
        nccl.begin(cuda, 0, bytes(128), "g", 2, 2)
    stub.stub_refuse(b"the end of ncclCommInitRankConfig", CUDA, b"no thread")
    before = stub.stub_aborts()
    with pytest.raises(NcclFailed, match=r"ncclCommInitRankConfig .*no thread"):
        nccl.begin(cuda, 0, nccl.make_id("g", 0), "g", 0, 2)
    assert stub.stub_aborts() == before + 1
