"""The real `Trainer` of transformers publishes: every version is read as an engine would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState

from tests.integration.producers.reader import digest_of_model, next_message, read_checkpoint
from tests.integration.producers.tiny_models import Tokens, arguments, saved, tiny_model, tiny_moe
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.producers.integrations.hooks import StepOptions, step_publisher
from weightbus.producers.integrations.transformers import WeightBusCallback
from weightbus.producers.publisher import PublisherOptions
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped
from weightbus.schemas.leases import ReaderLease

pytestmark = pytest.mark.anyio

DEADLINE_S = 60.0

State = dict[str, torch.Tensor]


class Reader(TrainerCallback):
    """After every step: reads what was announced, and what the model holds then."""

    def __init__(
        self, next_version: Callable[[], Any], holds: Callable[[PreTrainedModel], State]
    ) -> None:
        self._next_version, self._holds = next_version, holds
        self.seen: dict[int, tuple[int, State, State]] = {}
        """Step -> the version, what was read of it, and what the model held."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        ready, found = anyio.from_thread.run(self._next_version)
        assert ready.metadata == {"step": str(state.global_step)}
        self.seen[state.global_step] = ready.version, found, self._holds(given["model"])


@asynccontextmanager
async def reading(bus: Bus, model: str) -> AsyncIterator[Callable[[], Any]]:
    """Yields what waits for the next version, and reads it."""
    async with bus.subscribe(CheckpointReady, model=model) as messages:

        async def next_version() -> tuple[CheckpointReady, State]:
            with anyio.fail_after(DEADLINE_S):
                ready = (await next_message(messages)).message
                return ready, await read_checkpoint(bus, ready)

        yield next_version


def check(published: State, expected: State, dtype: torch.dtype | None = None) -> None:
    assert set(published) == set(expected)
    for name, tensor in expected.items():
        cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        assert torch.equal(published[name], cast), name


async def test_every_step_is_a_version_with_names_of_the_checkpoint_and_values_of_the_step(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    callback = WeightBusCallback(
        nats_server.settings, model, steps=StepOptions(dtype=torch.bfloat16)
    )
    async with reading(bus, model) as next_version:
        reader = Reader(next_version, lambda net: saved(net, tmp_path / "saved"))
        trainer = Trainer(
            tiny_model(), arguments(tmp_path, 3), train_dataset=Tokens(), callbacks=[callback]
        )
        trainer.add_callback(reader)
        await anyio.to_thread.run_sync(trainer.train)
    assert [version for version, _, _ in reader.seen.values()] == [1, 2, 3]
    for _, found, held in reader.seen.values():
        assert "lm_head.weight" not in held  # tied
        check(found, held, torch.bfloat16)
    before, after = reader.seen[1][1], reader.seen[3][1]
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert callback.publisher is not None
    counts = callback.publisher.published, callback.publisher.skipped, callback.publisher.failed
    assert counts == (3, 0, 0)


async def test_fused_experts_are_published_one_by_one(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    callback = WeightBusCallback(nats_server.settings, model)
    async with reading(bus, model) as next_version:
        reader = Reader(next_version, lambda net: saved(net, tmp_path / "saved"))
        trainer = Trainer(
            tiny_moe(), arguments(tmp_path, 2), train_dataset=Tokens(), callbacks=[callback, reader]
        )
        await anyio.to_thread.run_sync(trainer.train)
    assert list(reader.seen) == [1, 2]
    for _, found, held in reader.seen.values():
        assert "model.layers.0.mlp.experts.3.gate_proj.weight" in found
        check(found, held)


async def test_adapters_of_peft_are_merged_in_what_is_published_and_not_in_the_model(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    base = tiny_model()
    whole = saved(base, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    net = get_peft_model(base, config)

    def merged(net: Any) -> State:
        held = {}
        for name, layer in net.named_modules():
            if hasattr(layer, "get_delta_weight"):
                plain = name.removeprefix("base_model.model.") + ".weight"
                delta = layer.get_delta_weight("default").detach()
                held[plain] = layer.base_layer.weight.detach() + delta
        return whole | held

    callback = WeightBusCallback(nats_server.settings, model)
    async with reading(bus, model) as next_version:
        reader = Reader(next_version, merged)
        trainer = Trainer(
            net, arguments(tmp_path, 2), train_dataset=Tokens(), callbacks=[callback, reader]
        )
        await anyio.to_thread.run_sync(trainer.train)
    (_, first, held), (_, second, held_then) = reader.seen.values()
    check(first, held)
    check(second, held_then)
    adapted = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[adapted], whole[adapted])
    assert not torch.equal(first[adapted], second[adapted])


async def test_last_step_is_published_when_it_is_none_of_those_to_be_published(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    callback = WeightBusCallback(
        nats_server.settings, model, steps=StepOptions(every=2), at_begin=True
    )
    trainer = Trainer(
        tiny_model(), arguments(tmp_path, 5), train_dataset=Tokens(), callbacks=[callback]
    )
    await anyio.to_thread.run_sync(trainer.train)
    announced = await versions(bus, model)
    assert [ready.version for ready in announced] == [0, 2, 4, 5]
    assert announced[-1].weights_digest == digest_of(trainer.model)


async def test_best_weights_are_published_when_training_ends_with_them(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    callback = WeightBusCallback(nats_server.settings, model)
    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = Trainer(
        tiny_model(),
        arguments(tmp_path, 3, load_best_model_at_end=True, **often, **best),
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        callbacks=[callback],
    )
    await anyio.to_thread.run_sync(trainer.train)
    assert trainer.state.best_global_step == 1
    first, *_, last = await versions(bus, model)
    assert (last.version, last.metadata["step"]) == (4, "3")
    assert last.weights_digest == first.weights_digest == digest_of(trainer.model)


async def test_versions_go_on_when_training_resumes_from_an_older_step(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    saving = arguments(tmp_path, 4, save_strategy="steps", save_steps=2)
    for resume_from in (False, str(tmp_path / "checkpoint-2")):
        callback = WeightBusCallback(nats_server.settings, model)
        trainer = Trainer(tiny_model(), saving, train_dataset=Tokens(), callbacks=[callback])
        await anyio.to_thread.run_sync(trainer.train, resume_from)
    announced = [(ready.version, ready.metadata["step"]) for ready in await versions(bus, model)]
    assert announced == [(1, "1"), (2, "2"), (3, "3"), (4, "4"), (5, "3"), (6, "4")]


async def test_training_that_fails_leaves_a_publisher_that_the_next_one_goes_on_with(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    class Fault(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            raise ZeroDivisionError

    callback = WeightBusCallback(nats_server.settings, model)
    trainer = Trainer(
        tiny_model(), arguments(tmp_path, 2), train_dataset=Tokens(), callbacks=[callback]
    )
    with callback:
        trainer.add_callback(fault := Fault())
        with pytest.raises(ZeroDivisionError):
            await anyio.to_thread.run_sync(trainer.train)
        opened = callback.publisher
        trainer.remove_callback(fault)
        await anyio.to_thread.run_sync(trainer.train)
        assert callback.publisher is opened
    announced = [(ready.version, ready.metadata["step"]) for ready in await versions(bus, model)]
    assert announced == [(1, "1"), (2, "1"), (3, "2")]


async def test_training_goes_on_without_versions_while_an_engine_still_reads_when_so_told(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    callback = WeightBusCallback(
        nats_server.settings, model, options=PublisherOptions(when_busy="skip", close_wait_s=1)
    )
    lease = ReaderLease(model=model, version=1, engine="slow", consumer="c")

    class Slow(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                anyio.from_thread.run(bus.reader_leases.take, lease, 60)
            if state.global_step == 4:
                anyio.from_thread.run(bus.reader_leases.release, lease)

    trainer = Trainer(
        tiny_model(), arguments(tmp_path, 5), train_dataset=Tokens(), callbacks=[callback, Slow()]
    )
    await anyio.to_thread.run_sync(trainer.train)
    assert [ready.version for ready in await versions(bus, model)] == [1, 2, 5]
    assert callback.publisher is not None
    assert (callback.publisher.published, callback.publisher.skipped) == (3, 2)
    said = [past.message async for past in bus.replay(CheckpointSkipped, model=model)]
    assert [(skipped.version, skipped.cause) for skipped in said] == [(3, "busy"), (4, "busy")]


async def test_module_that_is_none_of_transformers_is_published_under_its_own_names(
    nats_server: NatsServer, bus: Bus, model: str, tmp_path: Path
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Embedding(64, 1)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> State:
            return {"loss": self.module(input_ids).sum()}

    callback = WeightBusCallback(nats_server.settings, model)
    async with reading(bus, model) as next_version:
        reader = Reader(next_version, lambda net: dict(net.state_dict()))
        trainer = Trainer(
            Net(), arguments(tmp_path, 1), train_dataset=Tokens(), callbacks=[callback, reader]
        )
        await anyio.to_thread.run_sync(trainer.train)
    _, found, held = reader.seen[1]
    assert list(found) == ["module.weight"]
    check(found, held)


async def test_loop_of_ones_own_publishes_after_the_newest_version_when_it_starts_again(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    net = nn.Linear(4, 4)

    def run() -> list[int | None]:
        with step_publisher(nats_server.settings, model) as on_step_end:
            return [on_step_end(net, step) for step in range(3)]

    assert await anyio.to_thread.run_sync(run) == [0, 1, 2]
    assert await anyio.to_thread.run_sync(run) == [3, 4, 5]
    assert [ready.version for ready in await versions(bus, model)] == [0, 1, 2, 3, 4, 5]


async def versions(bus: Bus, model: str) -> list[CheckpointReady]:
    """All that the bus keeps, in order."""
    return [past.message async for past in bus.replay(CheckpointReady, model=model)]


def digest_of(net: nn.Module) -> str:
    """Of a model that is published as it is, in the order of its parameters."""
    return digest_of_model(parameter.data for parameter in net.parameters())
