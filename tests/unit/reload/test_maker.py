"""What is made on a device is what is made in main memory: tensors, proofs, digests and errors.

The device is one of host memory: kernels are interpreted, and CUDA is a fake.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.fake_cuda import FakeCuda
from tests.unit.reload.interpreted import interpreted_executor, interpreting
from tests.unit.reload.models import Bag, Loader, ModuleHost, random_tensor
from tests.unit.reload.test_random_models import RandomModel
from tests.unit.reload.test_worker import Client, Fused, load_fused, make_tensors
from tests.unit.transfer.publishing import Kind, Trainer, cut_layout, open_trainer
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.planning.tiles import plan_tiles
from weightbus.consumers.reload import loading, loose, maker, making, split, streams
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.executor import Executor
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.loading import inexact_tensors, needs_of_tensors
from weightbus.consumers.reload.making import SLACK_BYTES, batch_bytes, made_parameters
from weightbus.consumers.reload.proof import Proof
from weightbus.consumers.reload.staging import StagedSources
from weightbus.consumers.reload.tracer import trace_needs
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.consumers.transfer.segments import SegmentCache
from weightbus.schemas.needs import Copy, Needs, ParameterSpec, Transform
from weightbus.schemas.worker import Applied, WorkerReply

MUCH_BYTES = 2**40
EXECUTORS = (split, streams, maker, loading, loose)


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with interpreting():
        yield


class DeviceHost(ModuleHost):
    """A model on a GPU, which is main memory."""

    def __init__(self, build: Callable[[], nn.Module], load: Loader, **rest: Any) -> None:
        super().__init__(build, load, **rest)
        self.free = MUCH_BYTES
        self.takes = True

    @property
    def device(self) -> str:
        return "cuda:0"

    def takes_device_tensors(self) -> bool:
        return self.takes

    def free_bytes(self) -> int:
        return self.free


class Device:
    """Counts what is run on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        """Modules that made an executor for it."""
        self.refused: set[str] = set()
        """Those that cannot."""
        for module in EXECUTORS:
            monkeypatch.setattr(module, "make_executor", self._maker(module.__name__))

    def _maker(self, name: str) -> Callable[..., Executor]:
        short = name.rpartition(".")[2]

        def make(device: str, *rest: Any) -> Executor:
            if device == "cpu":
                return CpuExecutor(*rest)
            if short in self.refused:
                raise CudaFailed("a stream", device, "out of memory")
            self.made.append(short)
            return interpreted_executor(*rest)

        return make


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def client_of(trainer: Trainer, host: ModuleHost) -> Client:
    cuda = FakeCuda(device_bytes=2**20)
    client = Client(ReloadWorker(host, 0, 1, lambda: cuda), trainer)
    client.attach()
    return client


def proof_of(client: Client) -> Proof:
    (known,) = client.worker._known.values()
    found = known.reloader._split
    assert found is not None
    return found.proof


def said(reply: WorkerReply, client: Client) -> tuple[object, ...]:
    """What must be the same wherever a version is made."""
    assert isinstance(reply, Applied), reply
    proof = proof_of(client)
    return (
        reply.bytes,
        reply.cell_digests,
        reply.reason,
        (reply.direct_parameters, reply.processed_parameters),
        (proof.direct, proof.undecided, proof.processed, proof.modules, proof.reasons),
    )


def bits_of(model: nn.Module) -> list[bytes]:
    return [
        parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for parameter in model.parameters()
    ]


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("seed", range(12))
def test_device_and_main_memory_agree_when_models_are_random(
    seed: int, kind: Kind, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "MADE_BYTES", 1 + 37 * seed)  # batches of all sizes
    model = RandomModel(seed)
    layout = cut_layout(model.tensors(0), segments=1 + seed % 3, seed=seed)
    hosts: list[ModuleHost] = [
        DeviceHost(model.build, model.load),
        ModuleHost(model.build, model.load),
    ]
    with open_trainer(layout, kind, tmp_path) as trainer:
        clients = [client_of(trainer, host) for host in hosts]
        assert {"maker", "loading"} <= set(device.made)
        for version in (1, 2, 3):
            tensors = model.tensors(1 if version == 2 else version)
            found = [said(client.apply(tensors, version), client) for client in clients]
            assert found[0] == found[1], (seed, version)
            assert bits_of(hosts[0].live) == bits_of(hosts[1].live)
        for client in clients:
            client.worker.close()


def repack_first(host: ModuleHost) -> None:
    """The engine keeps `block.qk` upside down."""
    qk = host.live.get_parameter("block.qk")
    qk.data.copy_(qk.flip(0).clone())


class RepackingOnDevice(DeviceHost):
    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        super().reload(weights, modules)
        repack_first(self)


class Repacking(ModuleHost):
    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        super().reload(weights, modules)
        repack_first(self)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_processed_module_is_found_and_loaded_on_the_device(
    kind: Kind, device: Device, tmp_path: Path
) -> None:
    hosts = [RepackingOnDevice(Fused, load_fused), Repacking(Fused, load_fused)]
    with open_trainer(cut_layout(make_tensors(0), 3), kind, tmp_path) as trainer:
        clients = [client_of(trainer, host) for host in hosts]
        for version in (1, 2, 3):
            tensors = make_tensors(10 * version)
            found = [said(client.apply(tensors, version), client) for client in clients]
            assert found[0] == found[1]
            assert bits_of(hosts[0].live) == bits_of(hosts[1].live)
        assert proof_of(clients[0]).modules == {"block"}
        assert hosts[0].reloads == hosts[1].reloads
        assert device.made.count("loading") == 1, "what is loaded again is not planned again"
        assert device.made.count("loose") == 1, "and what nobody needs is planned once, too"
        clients[0].attach()
        assert device.made.count("loading") == 2, "it is planned while the engine serves"
        found = [said(client.apply(make_tensors(40), 4), client) for client in clients]
        assert found[0] == found[1]
        assert device.made.count("loading") == 2
        assert device.made.count("maker") == 1, "there is nothing to prove"
        for client in clients:
            client.worker.close()


def test_undecided_parameter_is_compared_where_it_is(device: Device, tmp_path: Path) -> None:
    hosts: list[ModuleHost] = [DeviceHost(Fused, load_fused), ModuleHost(Fused, load_fused)]
    frozen = {"norm": torch.ones(5, dtype=torch.bfloat16)}
    with open_trainer(cut_layout(make_tensors(0), 2), "memory", tmp_path) as trainer:
        clients = [client_of(trainer, host) for host in hosts]
        direct = []
        for version, given in enumerate([frozen, frozen, frozen, {}, {}]):
            tensors = make_tensors(10 * version) | given
            found = [said(client.apply(tensors, version), client) for client in clients]
            assert found[0] == found[1], version
            direct.append(found[0][3])
        assert direct == [(0, 3), (3, 0), (3, 0), (0, 3), (3, 0)]
        for client in clients:
            client.worker.close()


@pytest.mark.parametrize("change", ["no room", "refused", "main memory only"])
def test_main_memory_is_taken_when_the_device_cannot_be(
    change: str, device: Device, tmp_path: Path
) -> None:
    host, plain = DeviceHost(Fused, load_fused), ModuleHost(Fused, load_fused)
    match change:
        case "no room":
            host.free = SLACK_BYTES
        case "refused":
            device.refused |= {"maker", "loading", "loose"}
        case "main memory only":
            host.takes = False
    with open_trainer(cut_layout(make_tensors(0), 2), "memory", tmp_path) as trainer:
        clients = [client_of(trainer, one) for one in (host, plain)]
        for version in (1, 2):
            tensors = make_tensors(10 * version)
            found = [said(client.apply(tensors, version), client) for client in clients]
            assert found[0] == found[1]
        assert ("loading" in device.made) is (change == "no room")
        for client in clients:
            client.worker.close()


@pytest.mark.parametrize("error", ["TornRead", "SegmentUnavailable", "ValueError"])
def test_errors_are_the_same_wherever_a_version_is_made(
    error: str, device: Device, tmp_path: Path
) -> None:
    def load(model: Any, weights: Weights) -> None:
        load_fused(model, weights)
        if error == "ValueError" and not model.head.weight.is_meta:
            raise ValueError("the engine's own")

    kind: Kind = "files" if error == "SegmentUnavailable" else "memory"
    replies = []
    for host in (DeviceHost(Fused, load), ModuleHost(Fused, load)):
        directory = tmp_path / host.device
        directory.mkdir()
        with open_trainer(cut_layout(make_tensors(0), 2), kind, directory) as trainer:
            client = client_of(trainer, host)
            sources = trainer.publish(make_tensors(10), 1)

            def spoilt(
                weights: Weights,
                modules: frozenset[str] | None,
                reload: Any = host.reload,
                trainer: Trainer = trainer,
                files: tuple[Path, ...] = tuple(directory.iterdir()),
            ) -> None:
                if error == "TornRead":
                    trainer.blocks[0].generation += 2
                if error == "SegmentUnavailable":
                    for path in files:
                        path.write_bytes(path.read_bytes()[:8])
                reload(weights, modules)

            host.reload = spoilt  # type: ignore[method-assign]
            failed = client.fail(client.request(sources, 1))
            replies.append((failed.error, failed.touched))
            client.worker.close()
    assert replies == [(error, True)] * 2


def test_no_more_is_held_than_a_batch_and_what_was_given_out_last(tmp_path: Path) -> None:
    tensors = {f"t{n}": random_tensor((10 + n, 4), torch.float32, n) for n in range(20)}
    layout = cut_layout(tensors, 1)
    needs = needs_of_tensors(layout, range(20))
    executor = CpuExecutor(layout, needs, ())
    held: list[weakref.ref[torch.UntypedStorage]] = []
    largest = max(tensor.nbytes for tensor in tensors.values())
    sizes = {tensor.nbytes for tensor in tensors.values()}
    with open_trainer(layout, "memory", tmp_path) as trainer:
        sources = trainer.publish(tensors, 1)
        cache = SegmentCache("test-host", trainer.roots)
        sizes_bytes = [layout.segments[0].size_bytes]
        with cache.open_all(sources, sizes_bytes) as opened, StagedSources(opened) as staged:
            plan, deadline = plan_tiles(layout, needs), Deadline("reload", 60.0)
            for number, tensor in made_parameters(
                plan, range(20), staged, executor.move, deadline, most_bytes=3 * largest
            ):
                want = tensors[f"t{number}"]
                assert torch.equal(tensor.view(torch.int32), want.view(torch.int32))
                memory = tensor.untyped_storage()
                assert memory.nbytes() in sizes, "its own"
                held.append(weakref.ref(memory))
                assert sum(one() is not None for one in held) <= 2


def test_batches_are_as_large_as_there_is_room_for() -> None:
    def specs(*sizes: int) -> list[ParameterSpec]:
        return [ParameterSpec("", "U8", (size,), (1,)) for size in sizes]

    mib = 2**20
    assert batch_bytes(specs(mib), MUCH_BYTES) == making.MADE_BYTES
    assert batch_bytes(specs(mib), 800 * mib) == 200 * mib
    assert batch_bytes(specs(mib), SLACK_BYTES) is None
    assert batch_bytes(specs(300 * mib), SLACK_BYTES + 600 * mib) == 300 * mib
    assert batch_bytes(specs(300 * mib), SLACK_BYTES + 600 * mib - 1) is None
    assert batch_bytes(specs(900 * mib), SLACK_BYTES + 1799 * mib) is None
    assert batch_bytes(specs(900 * mib), SLACK_BYTES + 1800 * mib) == making.MADE_BYTES


def test_tensors_that_differ_by_device_are_given_out_in_main_memory() -> None:
    copies = tuple(Copy(n, (0,), (3,), n, 0, (1,), n - 1) for n in range(3))
    needs = Needs(
        (),
        copies,
        (),
        (Transform((("cast", "F32"),)), Transform((("cast", "F32"), ("exp", "")))),
    )
    assert inexact_tensors(needs) == {2}


def test_loader_that_takes_exponentials_is_proven_on_the_device(
    device: Device, tmp_path: Path
) -> None:
    def load(model: Any, weights: Weights) -> None:
        for _, weight in weights:
            model.a.copy_(-torch.exp(weight.float()))

    host = DeviceHost(lambda: Bag(torch.float32, a=(64,)), load)
    tensors = {"log": torch.linspace(-3, 3, 64).to(torch.bfloat16)}
    layout = cut_layout(tensors)
    needs = trace_needs(host, layout).needs
    assert inexact_tensors(needs) == {0}
    with open_trainer(layout, "memory", tmp_path) as trainer:
        client = client_of(trainer, host)
        client.apply(tensors, 1)
        assert client.apply(tensors, 2).direct_parameters == 1
        client.worker.close()


def test_several_threads_digest_what_one_does(tmp_path: Path) -> None:
    model = RandomModel(3)
    layout = cut_layout(model.tensors(0), segments=2, seed=3)
    found = []
    for threads in (1, 3):
        with open_trainer(layout, "memory", tmp_path) as trainer:
            client = client_of(trainer, ModuleHost(model.build, model.load))
            client.worker._threads.count = threads
            applied = client.apply(model.tensors(1), 1)
            found.append(np.frombuffer(applied.cell_digests, dtype="<u8").tolist())
            client.worker.close()
    assert found[0] == found[1]
