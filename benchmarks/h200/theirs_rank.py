"""One rank of checkpoint-engine's parameter server, and the engine process beside it.

    python -m benchmarks.h200.theirs_rank ARGUMENTS

Answers each line of JSON on stdin (`Command`) with one on stdout (`Done`).
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import torch
import torch.multiprocessing as mp
from msgspec import Struct

from benchmarks.h200.held import holding
from benchmarks.h200.processes import answer_commands
from benchmarks.h200.setup import ARCHITECTURE, Setup, sources_of
from benchmarks.h200.trainer import owned_by
from benchmarks.h200.weights import fill
from weightbus.consumers.engines.torch.models import build_model

__all__ = ("VERSION", "Arguments", "Command", "Done", "Rank", "What", "join")

VERSION: Final = 1
CHECKPOINT: Final = "benchmark"
ENGINE_S: Final = 120.0

What = Literal["register", "clear", "update", "check"]


class Arguments(Struct, frozen=True, kw_only=True):
    setup: Setup
    rank: int
    port: int
    """Where the ranks meet."""


class Command(Struct, frozen=True):
    what: What


class Done(Struct, frozen=True, kw_only=True):
    start_ns: int
    gathered_ns: int = 0
    """When this rank had the metadata of all."""
    end_ns: int
    held: str = ""
    """What the engine's rank holds, if it was checked."""


class Rank:
    """The parameter server of one rank, in this process.

    Args:
        setup: of the run.
        rank: of the parameter servers, and of the GPU that this one feeds.
    """

    def __init__(self, setup: Setup, rank: int) -> None:
        import checkpoint_engine.distributed as group
        from checkpoint_engine.ps import ParameterServer
        from loguru import logger

        logger.remove()
        self._setup, self._rank, self._group = setup, rank, group
        self._server: Any = ParameterServer(auto_pg=True, gpu_count=setup.devices)

    def register(self, **what: Any) -> Done:
        """Files or tensors."""
        start_ns = time.time_ns()
        self._server.register_checkpoint(CHECKPOINT, **what)
        return Done(start_ns=start_ns, end_ns=time.time_ns())

    def update(self, request: Callable[[Any], None]) -> Done:
        """
        Args:
            request: is called with the sockets of all ranks, and has the engine connect to them.
        """
        self._meet()
        _synchronize(self._setup)
        start_ns = time.time_ns()
        self._server.gather_metas(CHECKPOINT)
        gathered_ns = time.time_ns()
        self._server.update(CHECKPOINT, request, ranks=[])
        return Done(start_ns=start_ns, gathered_ns=gathered_ns, end_ns=time.time_ns())

    def _meet(self) -> None:
        """Forming the group is not counted."""
        if not self._group.is_initialized():
            self._server.init_process_group()
        self._group.barrier()


class Server(Rank):
    """One rank, with the engine in another process."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments.setup, arguments.rank)
        spawn = mp.get_context("spawn")
        self._orders, self._answers = spawn.Queue(), spawn.Queue()
        self._engine = spawn.Process(
            target=serve,
            args=(arguments, self._server._device_uuid, self._orders, self._answers),
            daemon=True,
        )
        self._engine.start()

    def carry_out(self, what: What) -> Done:
        match what:
            case "register":
                return self._register()
            case "update":
                return self._update()
            case _:
                start_ns = time.time_ns()
                self._orders.put(what)
                held = self._answers.get(timeout=ENGINE_S)
                return Done(start_ns=start_ns, end_ns=time.time_ns(), held=held)

    def _register(self) -> Done:
        """The tensors are made on the GPU, and copied: from there on they are in host memory."""
        setup, rank = self._setup, self._rank
        tensors = {}
        for source in owned_by(sources_of(setup.config), rank, setup.devices):
            tensor = torch.empty(source.shape, dtype=source.dtype, device=setup.device(rank))
            fill(tensor, source.name, VERSION)
            tensors[source.name] = tensor.cpu()
        if not setup.cpu:
            torch.cuda.empty_cache()
        self._expect("ready")
        return self.register(named_tensors=tensors)

    def _update(self) -> Done:
        done = self.update(self._orders.put)
        self._expect("updated")
        return done

    def _expect(self, wanted: str) -> None:
        said = self._answers.get(timeout=ENGINE_S)
        if said != wanted:
            raise SystemExit(f"the engine said {said!r}, not {wanted!r}")


def serve(arguments: Arguments, uuid: str, orders: Any, answers: Any) -> None:
    """The engine's rank: copies its slice of every tensor that comes by, and nothing else."""
    import zmq
    from checkpoint_engine import update_weights_from_ipc

    setup, rank = arguments.setup, arguments.rank
    if not setup.cpu:
        torch.cuda.set_device(rank)
    with setup.device(rank):
        model = build_model(ARCHITECTURE, setup.config, rank, setup.devices)
    model.requires_grad_(False)
    slices = {
        part.name: (
            part.parameter.checkpoint_view(part.shard),
            part.parameter.windows[part.shard],
        )
        for part in model.checkpoint_parts()
    }

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            target, window = slices[name]
            target.copy_(tensor.narrow(window.dim, window.source, window.size))

    context = zmq.Context()
    for parameter in model.parameters():
        parameter.zero_()
    holding(model)  # its kernels are part of the engine at rest
    gc.freeze()  # an update collects garbage: it need not look at tens of thousands of views
    _synchronize(setup)
    answers.put("ready")
    while (order := orders.get()) is not None:
        if order == "clear":
            for parameter in model.parameters():
                parameter.zero_()
            _synchronize(setup)
            answers.put("")
        elif order == "check":
            held = holding(model)
            _synchronize(setup)
            answers.put(held)
        else:
            update_weights_from_ipc(context, dict(order)[uuid], device_id=rank, run=load)
            answers.put("updated")


def _synchronize(setup: Setup) -> None:
    """Nothing is under way on the GPU, and none of its memory is held for later."""
    if not setup.cpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def join(setup: Setup, rank: int, port: int) -> None:
    """Say to checkpoint-engine, by the environment, which rank this process is."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(setup.devices),
    )
    if not setup.cpu:
        torch.cuda.set_device(rank)


def main(arguments: Arguments) -> None:
    commands = answer_commands(Command)
    join(arguments.setup, arguments.rank, arguments.port)
    server = Server(arguments)
    gc.freeze()
    for command, answer in commands:
        answer(server.carry_out(command.what))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Arguments))
