"""Rounds of real engines as a collector has them: one whole tree, on one clock, documented."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import anyio
import pytest
from safetensors.torch import save_file

from tests.integration.faults.staged import BROADCAST, bring_to_first_version
from tests.integration.fleet.elsewhere import elsewhere, filler
from tests.integration.fleet.fleet import Fleet, Follower, Trainer
from tests.integration.fleet.log import DEADLINE_S
from tests.integration.fleet.weights import weights_of
from tests.integration.tracing.collector import Collector, open_collector, open_grpc_collector
from tests.integration.tracing.tree import Node, Tree, tree_of
from weightbus.consumers.engines.torch.messages import Inputs
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import (
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import RoundComplete, RoundPlan
from weightbus.tracing.ids import derived_trace_id
from weightbus.tracing.otlp import OtlpProtocol, OtlpSettings
from weightbus.tracing.telemetry import Telemetry, open_telemetry

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

NS_PER_S = 10**9
MINUTE_NS = 60 * NS_PER_S

LEAST_SHARE = 0.2
"""Of an update, within stages: 0.6 to 0.9 were measured; between them it pauses and is proven."""

PROMPT = Inputs(prompts=((1, 2, 3),), new_tokens=1)


@dataclass
class Exported:
    """A collector, and services that export to it until `end`."""

    collector: Collector
    protocol: OtlpProtocol
    stack: ExitStack = field(default_factory=ExitStack)

    def service(self, name: str) -> Telemetry:
        path = "/v1/traces" if self.protocol == "http/protobuf" else ""
        settings = OtlpSettings(endpoint=self.collector.url + path, protocol=self.protocol)
        return self.stack.enter_context(open_telemetry(name, otlp=settings, shutdown_s=30))

    async def tree(self, fleet: Fleet, version: int) -> Tree:
        """Of a version, once every service has sent what it has."""
        await anyio.to_thread.run_sync(self.stack.close)
        return tree_of(self.collector, fleet.model, version)


@contextmanager
def exporting(protocol: OtlpProtocol) -> Iterator[Exported]:
    opened = open_collector() if protocol == "http/protobuf" else open_grpc_collector()
    with opened as collector:
        exported = Exported(collector, protocol)
        with exported.stack:
            yield exported


@pytest.fixture
def exported() -> Iterator[Exported]:
    with exporting("http/protobuf") as exported:
        yield exported


async def all_is_said(fleet: Fleet, version: int, *followers: Follower) -> list[UpdateComplete]:
    """Ask the engines for tokens of a version, and wait until they and its leader have told all."""
    complete = []
    for follower in followers:
        engine = follower.name
        complete.append(await fleet.log.wait(UpdateComplete, engine=engine, version=version))
        await follower.client.infer(PROMPT, DEADLINE_S)
        await fleet.log.wait(FirstToken, engine=engine, version=version)
    await fleet.log.wait(RoundComplete, version=version)
    return complete


def check_round(fleet: Fleet, tree: Tree, version: int, *engines: str) -> None:
    """A round that went well, for engines of the services of their names."""
    ready = fleet.log.said(CheckpointReady, version=version)[0]
    publish = tree.one("publish")
    updates = [tree.one("update", engine) for engine in engines]
    assert ready.clock_residual_ns is not None
    residuals = [residual_of(node) for node in (publish, *updates)]
    within_ns = residuals[0] + max(residuals)
    tree.check(roots=["publish"], within_ns=within_ns)
    tree.check_twins(
        fleet.log.said(StageComplete, version=version), fleet.log.said(FirstToken, version=version)
    )
    assert publish.start_ns <= ready.created_ns <= publish.end_ns
    assert {node.error for node in tree.nodes} == {""}
    leaders = [node.attributes["weightbus.leader"] for node in tree.named("plan")]
    assert sorted(leaders) == [False] * (len(engines) - 1) + [True]
    for update in updates:
        check_update(fleet, tree, update, within_ns)
        assert update.parent_id == publish.span_id
        assert update.links == (publish.span_id,)
        for key in ("messaging.message.id", "messaging.destination.name", "server.port"):
            assert update.attributes[key] == publish.attributes[key], key
        assert ready.created_ns - within_ns <= update.start_ns


def check_update(fleet: Fleet, tree: Tree, update: Node, within_ns: int) -> None:
    """The sum of an engine's stages against the wall."""
    engine = update.service
    (done,) = fleet.log.said(
        UpdateComplete, engine=engine, version=update.attributes["weightbus.version"]
    )
    (plan,) = fleet.log.said(RoundPlan, version=done.version)
    negotiate, commit = tree.one("negotiate", engine), tree.one("commit", engine)
    join, planned, token = (tree.one(word, engine) for word in ("join", "plan", "first token"))
    assert negotiate.start_ns == join.start_ns == update.start_ns
    assert join.end_ns == planned.start_ns
    assert planned.end_ns == negotiate.end_ns
    assert planned.attributes["weightbus.epoch"] == plan.epoch
    assert planned.attributes["weightbus.leader"] == (plan.leader == engine)
    assert token.end_ns == update.end_ns, "it is what was waited for"
    for rank in range(len(next(p for p in plan.engines if p.engine == engine).ranks)):
        moved = [n for n in tree.children(update) if n.attributes.get("weightbus.rank") == rank]
        assert moved, f"rank {rank} did something"
        busy_ns = union_ns([negotiate, *moved, commit])
        wall_ns = done.end_ns - done.start_ns
        assert LEAST_SHARE * wall_ns <= busy_ns <= wall_ns + within_ns, (engine, rank)
    assert done.clock_residual_ns is not None
    assert abs(done.start_ns - update.start_ns) < NS_PER_S
    assert commit.end_ns <= done.end_ns <= update.end_ns


def union_ns(nodes: list[Node]) -> int:
    """How long one of them at least lasted."""
    total_ns = end_ns = 0
    for node in sorted(nodes, key=lambda each: each.start_ns):
        total_ns += max(0, node.end_ns - max(node.start_ns, end_ns))
        end_ns = max(end_ns, node.end_ns)
    return total_ns


def residual_of(node: Node) -> int:
    residual = node.attributes["weightbus.clock.residual_ns"]
    assert isinstance(residual, int)
    assert 0 < residual < NS_PER_S
    return residual


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_round_of_two_engines_is_one_whole_tree_when_it_is_exported(
    fleet: Fleet, protocol: OtlpProtocol
) -> None:
    with exporting(protocol) as exported:
        async with (
            fleet.publisher(telemetry=exported.service("trainer")) as trainer,
            fleet.follow("t", ranks=2, telemetry=exported.service("t")) as t,
            fleet.follow("b", telemetry=exported.service("b")) as b,
        ):
            version = (await trainer.publish()).version
            await all_is_said(fleet, version, t, b)
        tree = await exported.tree(fleet, version)
    check_round(fleet, tree, version, "t", "b")
    assert [n.attributes["weightbus.rank"] for n in tree.named("reload", "t")] in ([0, 1], [1, 0])


async def test_tree_nests_when_every_host_has_another_time(
    fleet: Fleet, exported: Exported
) -> None:
    skews = {"trainer": -7 * MINUTE_NS, "t": 11 * MINUTE_NS, "b": -180 * MINUTE_NS}
    async with (
        fleet.publisher(telemetry=exported.service("trainer"), skew_ns=skews["trainer"]) as trainer,
        fleet.follow("t", ranks=2, telemetry=exported.service("t"), skew_ns=skews["t"]) as t,
        fleet.follow("b", telemetry=exported.service("b"), skew_ns=skews["b"]) as b,
    ):
        version = (await trainer.publish()).version
        complete = await all_is_said(fleet, version, t, b)
    tree = await exported.tree(fleet, version)
    check_round(fleet, tree, version, "t", "b")
    for word, service in (("publish", "trainer"), ("update", "t"), ("update", "b")):
        node = tree.one(word, service)
        offset_ns = node.attributes["weightbus.clock.offset_ns"]
        assert abs(int(offset_ns) + skews[service]) < NS_PER_S, "the server has this machine's"
    for done in complete:
        assert 0 < done.paused_s < (done.end_ns - done.start_ns) / NS_PER_S
        assert done.clock_residual_ns is not None


async def test_buckets_of_a_broadcast_lie_in_their_stages(fleet: Fleet, exported: Exported) -> None:
    async with fleet.publisher(telemetry=exported.service("trainer"), p2p=fleet.p2p) as trainer:
        await bring_to_first_version(fleet, trainer, "b", "c")
        async with (
            fleet.follow("b", telemetry=exported.service("b"), **elsewhere("b")) as b,
            fleet.follow("c", telemetry=exported.service("c"), **elsewhere("c")) as c,
        ):
            version = await publish_much(trainer)
            for done in await all_is_said(fleet, version, b, c):
                assert done.routes == BROADCAST
    tree = await exported.tree(fleet, version)
    check_round(fleet, tree, version, "b", "c")
    for engine in ("b", "c"):
        assert tree.named("broadcast", engine)
        assert tree.named("reload", engine)
    assert len(tree.named("bucket")) > 4, "it streamed"


async def publish_much(trainer: Trainer) -> int:
    return (await trainer.publish(filler=filler())).version


async def test_update_that_was_put_down_is_a_whole_tree_with_its_reason(
    fleet: Fleet, exported: Exported
) -> None:
    async with (
        fleet.publisher(telemetry=exported.service("trainer")) as trainer,
        fleet.follow("a", telemetry=exported.service("a"), hold="before_describe") as a,
    ):
        first = (await trainer.publish()).version
        await a.held.reached.wait()
        second = (await trainer.publish()).version
        a.held.release()
        await all_is_said(fleet, second, a)
    tree = await exported.tree(fleet, first)
    tree.check(roots=["publish"], within_ns=NS_PER_S)
    assert {node.word for node in tree.nodes} == {"publish", "update", "negotiate", "join"}
    failed = {node.word: node.attributes["error.type"] for node in tree.nodes if node.error}
    assert failed == dict.fromkeys(("update", "negotiate", "join"), "Superseded")
    check_round(fleet, tree_of(exported.collector, fleet.model, second), second, "a")


async def test_attempts_are_in_one_tree_and_linked_when_a_version_is_tried_again(
    fleet: Fleet, exported: Exported
) -> None:
    path = fleet.directory / "w.safetensors"
    version = fleet.next_version()
    ready = CheckpointReady(
        model=fleet.model, version=version, producer="foreign", files=(str(path),), created_ns=5
    )
    async with (
        fleet.follow("a", telemetry=exported.service("a")) as a,
        fleet.follow("b", telemetry=exported.service("b")) as b,
    ):
        await fleet.say(ready)
        for name in ("a", "b"):
            await fleet.log.wait(UpdateFailed, engine=name, version=version)
        save_file(weights_of(fleet.model, version), path)
        await all_is_said(fleet, version, a, b)
    tree = await exported.tree(fleet, version)
    updates = {name: tree.named("update", name) for name in ("a", "b")}
    tree.check(roots=["update"] * sum(map(len, updates.values())), within_ns=0)
    assert tree.nodes[0].trace_id == derived_trace_id(ready), "nobody had begun one"
    for attempts in updates.values():
        numbers = [node.attributes["weightbus.attempt"] for node in attempts]
        assert numbers == list(range(1, len(attempts) + 1))
        assert len(attempts) > 1
        for before, after in pairwise(attempts):
            assert before.end_ns <= after.start_ns
            assert before.attributes["error.type"] == "FileUnreadable"
            assert after.links == (before.span_id,)
        assert attempts[-1].error == ""
        assert attempts[-1].end_ns == tree.children(attempts[-1])[-1].end_ns
