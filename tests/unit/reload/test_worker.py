"""The worker: every request, every way to update, and how it is left by whatever goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.reload.models import (
    Bag,
    ModuleHost,
    random_tensor,
    same_bits,
)
from tests.unit.transfer.publishing import (
    HOST,
    Kind,
    Trainer,
    cut_layout,
    open_trainer,
    weights_digest,
)
from weightbus.consumers.planning.cells import plan_cells, verify_cells
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.worker import LAYOUTS_KEPT, ReloadWorker
from weightbus.schemas.placement import Segment
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Attached,
    Cell,
    Describe,
    Described,
    Detach,
    Detached,
    Failed,
    InPlace,
    Inspect,
    Inspected,
    WorkerReply,
)

DEADLINE_S = 60.0


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Of the fused model below."""
    return {
        "q": random_tensor((6, 5), torch.bfloat16, seed),
        "k": random_tensor((3, 5), torch.bfloat16, seed + 1),
        "head.weight": random_tensor((7, 3), torch.float32, seed + 2),
        "norm": random_tensor((5,), torch.bfloat16, seed + 3),
        "unused": random_tensor((9,), torch.uint8, seed + 4),
    }


class Fused(nn.Module):
    """`block.qk` fuses two tensors, `block.norm` is cast, `head.weight` is loaded transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Bag(torch.bfloat16, qk=(9, 5))
        self.norm = Bag(torch.bfloat16, weight=(5,))
        self.head = Bag(torch.float32, weight=(3, 7))


def load_fused(model: Any, weights: Weights) -> None:
    for name, weight in weights:
        match name:
            case "q":
                model.block.qk.data[:6].copy_(weight)
            case "k":
                model.block.qk.data[6:].copy_(weight)
            case "norm":
                model.norm.weight.data.copy_(weight)
            case "head.weight":
                model.head.weight.data.copy_(weight.t())


class Client:
    """Speaks to one worker as a consumer does, and knows what must come out."""

    def __init__(self, worker: ReloadWorker, trainer: Trainer) -> None:
        self.worker, self.trainer = worker, trainer
        self.cells: tuple[Cell, ...] = ()

    def describe(self) -> Described:
        reply = self.worker.handle(
            Describe(
                request=1,
                layout_digest=self.trainer.layout_digest,
                layout=self.trainer.layout_blob,
                deadline_s=DEADLINE_S,
            )
        )
        assert isinstance(reply, Described), reply
        return reply

    def attach(self) -> Attached:
        """Describe, and attach the cells of the only rank."""
        described = self.describe()
        self.plan = plan_cells(self.trainer.layout, [described.needs])
        (self.cells,) = self.plan.cells
        reply = self.worker.handle(
            Attach(
                request=2,
                layout_digest=self.trainer.layout_digest,
                needs_digest=described.needs_digest,
                cells=self.cells,
                roots=self.trainer.roots,
                host_id=HOST,
                deadline_s=DEADLINE_S,
            )
        )
        assert isinstance(reply, Attached), reply
        return reply

    def request(self, sources: tuple[Segment, ...], version: int) -> Apply:
        return Apply(
            request=3,
            version=version,
            layout_digest=self.trainer.layout_digest,
            feed=InPlace(sources=sources),
            deadline_s=DEADLINE_S,
        )

    def apply(self, tensors: Mapping[str, torch.Tensor], version: int) -> Applied:
        """Publish and apply a version; its digest must be the publisher's."""
        reply = self.worker.handle(self.request(self.trainer.publish(tensors, version), version))
        return self.verified(reply, tensors, version)

    def verified(
        self, reply: WorkerReply, tensors: Mapping[str, torch.Tensor], version: int
    ) -> Applied:
        """A reply that must say that this version has been applied."""
        assert isinstance(reply, Applied), reply
        sums = np.frombuffer(reply.cell_digests, dtype="<u8")
        verdict = verify_cells(self.trainer.layout, self.plan, [sums], weights_digest(tensors))
        assert verdict.ok, verdict.reason
        assert (self.worker.version, self.worker.touched) == (version, False)
        return reply

    def fail(self, request: Apply) -> Failed:
        reply = self.worker.handle(request)
        assert isinstance(reply, Failed), reply
        assert reply.touched == self.worker.touched
        return reply

    def inspect(self, *, read_back: bool = False) -> Inspected:
        digest = self.trainer.layout_digest if read_back else None
        reply = self.worker.handle(Inspect(request=4, layout_digest=digest, deadline_s=DEADLINE_S))
        assert isinstance(reply, Inspected), reply
        return reply


@pytest.fixture(params=["memory", "files"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def trainer(kind: Kind, tmp_path: Path) -> Iterator[Trainer]:
    with open_trainer(cut_layout(make_tensors(0), 3), kind, tmp_path) as trainer:
        yield trainer


def make_client(trainer: Trainer, host: ModuleHost, *, attached: bool = True) -> Client:
    client = Client(ReloadWorker(host, 0, 1), trainer)
    if attached:
        client.attach()
    return client


def check_model(live: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The live model holds what a fresh one is loaded with."""
    fresh = Fused()
    load_fused(fresh, iter(tensors.items()))
    for (name, want), (_, found) in zip(
        fresh.named_parameters(), live.named_parameters(), strict=True
    ):
        assert same_bits(found, want), name


def test_first_version_proves_the_plan_and_later_ones_are_written_directly(
    trainer: Trainer,
) -> None:
    host = ModuleHost(Fused, load_fused)
    client = make_client(trainer, host)
    assert client.describe().untraced_reason == ""
    first = client.apply(make_tensors(10), 1)
    assert (first.direct_parameters, first.processed_parameters) == (0, 3)
    assert "proof of the plan, 3 of 3 parameters are written directly" in first.reason
    for version in (2, 3, 4):
        tensors = make_tensors(10 * version)
        applied = client.apply(tensors, version)
        assert (applied.direct_parameters, applied.processed_parameters) == (3, 0)
        assert applied.reason == ""
        assert applied.bytes == sum(tensors[name].nbytes for name in tensors if name != "unused")
        assert [stage.stage for stage in applied.stages] == ["reload"]
        check_model(host.live, tensors)
    assert len(host.reloads) == 1


def test_parameters_are_read_back_when_asked(trainer: Trainer) -> None:
    host = ModuleHost(Fused, load_fused)
    client = make_client(trainer, host)
    assert len(client.inspect(read_back=True).unreadable) == len(client.cells)
    applied = client.apply(make_tensors(10), 1)
    inspected = client.inspect(read_back=True)
    assert (inspected.version, inspected.touched) == (1, False)
    readable = [n for n in range(len(client.cells)) if n not in inspected.unreadable]
    assert [client.cells[n].copy < 0 for n in inspected.unreadable] == [True]
    found = np.frombuffer(inspected.cell_digests, dtype="<u8")
    assert found[readable].tolist() == np.frombuffer(applied.cell_digests, "<u8")[readable].tolist()
    host.live.get_parameter("block.qk").view(torch.uint8)[0, 0] ^= 1
    changed = np.frombuffer(client.inspect(read_back=True).cell_digests, dtype="<u8")
    assert (changed != found).sum() == 1


def test_repacked_module_goes_through_the_engine_every_time(trainer: Trainer) -> None:
    """An engine that stores `block.qk` upside down, in the same shape."""

    class Repacking(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            super().reload(weights, modules)
            qk = self.live.get_parameter("block.qk")
            qk.copy_(qk.flip(0).clone())

    host = Repacking(Fused, load_fused)
    client = make_client(trainer, host)
    client.apply(make_tensors(10), 1)
    for version in (2, 3):
        tensors = make_tensors(10 * version)
        applied = client.apply(tensors, version)
        assert (applied.direct_parameters, applied.processed_parameters) == (2, 1)
        assert "block.qk holds other bytes than the plan makes" in applied.reason
        assert host.reloads[-1] == (frozenset({"block"}), ("q", "k"))
        assert same_bits(
            host.live.get_parameter("block.qk"), torch.cat([tensors["q"], tensors["k"]]).flip(0)
        )
        assert same_bits(host.live.get_parameter("norm.weight"), tensors["norm"])
    assert len(client.inspect(read_back=True).unreadable) == 3


@pytest.mark.parametrize(
    ("process", "reason", "processed"),
    [
        (
            lambda model: model.block.register_parameter("qk", None),
            "block.qk is gone from the live model",
            {"block"},
        ),
        (
            lambda model: setattr(model.block, "scale", nn.Parameter(torch.ones(1))),
            "block derives scale from weights",
            {"block"},
        ),
        (
            lambda model: setattr(model.head, "derived", [model.head.weight * 2]),
            "head derives derived[0] from weights",
            {"head"},
        ),
        (lambda model: setattr(model, "table", torch.ones(3)), "derives table", None),
        (
            lambda model: setattr(
                model.norm, "weight", nn.Parameter(model.norm.weight.double(), requires_grad=False)
            ),
            "norm.weight is of torch.float64, not torch.bfloat16",
            {"norm"},
        ),
    ],
)
def test_module_is_processed_when_the_engine_changes_its_form(
    process: Any, reason: str, processed: set[str] | None, tmp_path: Path
) -> None:
    class Processing(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            if self.reloads:  # a real engine restores, loads and processes; the form stays
                self.reloads.append((modules, tuple(name for name, _ in weights)))
                return
            super().reload(weights, modules)
            process(self.live)

    host = Processing(Fused, load_fused)
    with open_trainer(cut_layout(make_tensors(0)), "memory", tmp_path) as trainer:
        client = make_client(trainer, host)
        assert reason in client.apply(make_tensors(10), 1).reason
        client.apply(make_tensors(20), 2)
        modules, names = host.reloads[-1]
        assert modules == processed
        assert "unused" in names or modules is not None


def test_modules_are_processed_together_when_they_share_a_tensor(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (Bag(torch.float32, p=(2,)) for _ in range(3))

    def load(model: Any, weights: Weights) -> None:
        for name, weight in weights:
            if name == "ab":
                model.a.p.copy_(weight[:2])
                model.b.p.copy_(weight[2:])
            else:
                model.c.p.copy_(weight)

    class Negating(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            super().reload(weights, modules)
            self.live.get_parameter("a.p").neg_()

    host = Negating(Shared, load)
    with open_trainer(
        cut_layout({"ab": torch.ones(4), "c": torch.ones(2)}), "memory", tmp_path
    ) as trainer:
        client = make_client(trainer, host)
        for version in (1, 2):
            tensors = {"ab": torch.arange(4.0) + version, "c": torch.arange(2.0) - version}
            client.apply(tensors, version)
        assert host.reloads[-1] == (frozenset({"a", "b"}), ("ab",))
        assert host.live.get_parameter("a.p").tolist() == [-2.0, -3.0]
        assert host.live.get_parameter("b.p").tolist() == [4.0, 5.0]
        assert host.live.get_parameter("c.p").tolist() == [-2.0, -1.0]


def test_untraced_model_is_loaded_by_its_engine_every_time(trainer: Trainer) -> None:
    def load(model: Any, weights: Weights) -> None:
        load_fused(model, ((name, weight * 1) for name, weight in weights))

    host = ModuleHost(Fused, load)
    client = make_client(trainer, host)
    described = client.describe()
    assert "aten.mul.Tensor makes of a checkpoint tensor" in described.untraced_reason
    assert described.needs.parameters == ()
    for version in (1, 2):
        tensors = make_tensors(10 * version)
        applied = client.apply(tensors, version)
        assert applied.reason == described.untraced_reason
        assert applied.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert same_bits(host.live.get_parameter("norm.weight"), tensors["norm"] * 1)
    assert len(client.inspect(read_back=True).unreadable) == len(client.cells)


def test_loader_cannot_change_what_is_digested_or_published(trainer: Trainer) -> None:
    """The engine gets private copies: spoiling one spoils neither digest nor segment."""

    def spoil(model: Any, weights: Weights) -> None:
        for name, weight in weights:
            load_fused(model, [(name, weight.clone())])
            weight.view(torch.uint8).fill_(0)

    host = ModuleHost(Fused, spoil)
    client = make_client(trainer, host)
    assert "changes a checkpoint tensor in place" in client.describe().untraced_reason
    for version in (1, 2):
        client.apply(make_tensors(10), version)
        check_model(host.live, make_tensors(10))


def test_plan_is_proven_anew_when_parameters_have_moved(trainer: Trainer) -> None:
    host = ModuleHost(Fused, load_fused)
    client = make_client(trainer, host)
    client.apply(make_tensors(10), 1)
    host.live.head.weight = nn.Parameter(torch.zeros(3, 7), requires_grad=False)  # type: ignore[union-attr]
    applied = client.apply(make_tensors(20), 2)
    assert applied.direct_parameters == 0
    assert "proof of the plan" in applied.reason
    check_model(host.live, make_tensors(20))
    assert client.apply(make_tensors(30), 3).direct_parameters == 3


def test_update_fails_touched_and_the_next_is_whole_when_the_read_was_torn(
    trainer: Trainer,
) -> None:
    class Tearing(ModuleHost):
        """Its trainer writes on while the engine synchronises."""

        tear = False

        def synchronize(self) -> None:
            if self.tear:
                self.tear = False
                tear(trainer)

    host = Tearing(Fused, load_fused)
    client = make_client(trainer, host)
    assert client.inspect().updates == 0
    for version in (1, 3):
        client.apply(make_tensors(version), version)
        assert client.inspect().updates == version
        host.tear = True
        sources = trainer.publish(make_tensors(50), version + 1)
        failed = client.fail(client.request(sources, version + 1))
        assert (failed.error, failed.touched) == ("TornRead", True)
        assert "must be" in failed.reason
        inspected = client.inspect()
        assert (inspected.version, inspected.touched) == (version, True)
        assert inspected.updates == version + 1
    applied = client.apply(make_tensors(70), 5)
    assert applied.direct_parameters == 3
    check_model(host.live, make_tensors(70))


def tear(trainer: Trainer) -> None:
    """Write to a segment that is being read."""
    if trainer.kind == "memory":
        trainer.blocks[1].generation += 2
        return
    newest = max(
        trainer.path(1, version) for version in range(9) if trainer.path(1, version).exists()
    )
    newest.write_bytes(b"\\0" * newest.stat().st_size)


def test_failed_proof_is_made_again_when_its_version_was_torn(trainer: Trainer) -> None:
    class Tearing(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            super().reload(weights, modules)
            if len(self.reloads) == 1:
                tear(trainer)

    host = Tearing(Fused, load_fused)
    client = make_client(trainer, host)
    failed = client.fail(client.request(trainer.publish(make_tensors(10), 1), 1))
    assert (failed.error, failed.touched) == ("TornRead", True)
    assert "proof" in client.apply(make_tensors(20), 2).reason
    check_model(host.live, make_tensors(20))


def test_nothing_is_touched_when_a_segment_cannot_be_opened(trainer: Trainer) -> None:
    host = ModuleHost(Fused, load_fused)
    client = make_client(trainer, host)
    client.apply(make_tensors(10), 1)
    sources = trainer.publish(make_tensors(20), 2)
    if trainer.kind == "memory":
        trainer.blocks[0].unlink()
    else:
        trainer.path(0, 2).unlink()
    failed = client.fail(client.request(sources, 2))
    assert (failed.error, failed.touched) == ("SegmentUnavailable", False)
    failed = client.fail(client.request(sources[:2], 2))
    assert (failed.error, failed.touched) == ("PlanError", False)
    check_model(host.live, make_tensors(10))


def test_update_fails_touched_when_the_engine_raises(trainer: Trainer) -> None:
    class Raising(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            super().reload(weights, modules)
            if len(self.reloads) == 1:
                raise KeyError("qkv")

    host = Raising(Fused, load_fused)
    client = make_client(trainer, host)
    failed = client.fail(client.request(trainer.publish(make_tensors(10), 1), 1))
    assert (failed.error, failed.reason, failed.touched) == ("KeyError", "'qkv'", True)
    client.apply(make_tensors(20), 2)
    check_model(host.live, make_tensors(20))


def test_proof_is_dropped_when_the_engine_moves_parameters_of_others(tmp_path: Path) -> None:
    class Moving(ModuleHost):
        def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
            super().reload(weights, modules)
            self.live.get_parameter("block.qk").neg_()
            if len(self.reloads) == 2:
                head: Any = self.live.get_submodule("head")
                head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)

    host = Moving(Fused, load_fused)
    with open_trainer(cut_layout(make_tensors(0)), "memory", tmp_path) as trainer:
        client = make_client(trainer, host)
        client.apply(make_tensors(10), 1)
        failed = client.fail(client.request(trainer.publish(make_tensors(20), 2), 2))
        assert (failed.error, failed.touched) == ("ProofFailed", True)
        assert "proof" in client.apply(make_tensors(30), 3).reason


def test_deadline_is_looked_at_between_steps(trainer: Trainer) -> None:
    client = make_client(trainer, ModuleHost(Fused, load_fused))
    request = client.request(trainer.publish(make_tensors(10), 1), 1)
    failed = client.fail(msgspec.structs.replace(request, deadline_s=0.0))
    assert (failed.error, failed.touched) == ("DeadlineExceeded", False)
    assert client.apply(make_tensors(10), 1).version == 1


def test_nothing_is_touched_when_the_time_is_up_before_the_engine_s_own_steps_have_ended(
    trainer: Trainer,
) -> None:
    class Busy(ModuleHost):
        steps_s = 0.0

        def synchronize(self) -> None:
            time.sleep(self.steps_s)

    host = Busy(Fused, load_fused)
    client = make_client(trainer, host)
    client.apply(make_tensors(10), 1)
    host.steps_s = 0.2
    request = client.request(trainer.publish(make_tensors(20), 2), 2)
    failed = client.fail(msgspec.structs.replace(request, deadline_s=0.1))
    assert (failed.error, failed.touched) == ("DeadlineExceeded", False)
    check_model(host.live_model(), make_tensors(10))


def test_requests_are_refused_when_they_do_not_fit(trainer: Trainer) -> None:
    client = make_client(trainer, ModuleHost(Fused, load_fused), attached=False)
    sources = trainer.publish(make_tensors(10), 1)
    unknown = client.fail(client.request(sources, 1))
    assert (unknown.error, unknown.touched) == ("NotAttached", False)
    assert "is not described" in unknown.reason
    described = client.describe()
    unattached = client.fail(client.request(sources, 1))
    assert (unattached.error, unattached.touched) == ("NotAttached", False)
    assert "is not attached" in unattached.reason
    attach = Attach(
        request=7,
        layout_digest=trainer.layout_digest,
        needs_digest=described.needs_digest,
        cells=(),
        deadline_s=DEADLINE_S,
    )
    for changed, reason in (
        ({"needs_digest": "0" * 64}, "this rank's are"),
        ({"cells": (Cell(99, (), (), -1),)}, "there are 5"),
        ({"cells": (Cell(0, (0, 0), (7, 5), -1),)}, "must lie in"),
        ({"cells": (Cell(0, (0,), (6,), -1),)}, "must lie in"),
        ({"cells": (Cell(0, (0, 0), (6, 5), 99),)}, "must be one of tensor 0"),
        ({"cells": (Cell(4, (0,), (9,), 0),)}, "must be one of tensor 4"),
    ):
        reply = client.worker.handle(msgspec.structs.replace(attach, **changed))
        assert isinstance(reply, Failed)
        assert (reply.request, reply.error, reply.touched) == (7, "PlanError", False)
        assert reason in reply.reason
    wrong = Describe(
        request=8, layout_digest="0" * 64, layout=trainer.layout_blob, deadline_s=DEADLINE_S
    )
    reply = client.worker.handle(wrong)
    assert isinstance(reply, Failed)
    assert "digest of the layout" in reply.reason


def test_plans_are_forgotten_when_detached_or_too_many(tmp_path: Path) -> None:
    worker = ReloadWorker(ModuleHost(Fused, load_fused), 0, 1)
    clients = []
    for seed in range(LAYOUTS_KEPT + 1):
        with open_trainer(cut_layout(make_tensors(0), 2, seed), "memory", tmp_path) as trainer:
            clients.append(Client(worker, trainer))
            clients[-1].attach()
            clients[-1].apply(make_tensors(seed), seed)
    sources = clients[0].trainer.publish(make_tensors(0), 9)
    assert "is not described" in clients[0].fail(clients[0].request(sources, 9)).reason
    detached = worker.handle(Detach(request=5, deadline_s=1.0))
    assert isinstance(detached, Detached)
    sources = clients[-1].trainer.publish(make_tensors(0), 9)
    assert "is not described" in clients[-1].fail(clients[-1].request(sources, 9)).reason
    assert worker.version == LAYOUTS_KEPT
