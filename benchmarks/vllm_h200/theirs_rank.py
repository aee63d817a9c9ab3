"""One rank of checkpoint-engine's parameter server, beside a vLLM server.

    python -m benchmarks.vllm_h200.theirs_rank ARGUMENTS

Its engine is vLLM's worker, which checkpoint-engine's own extension makes take weights: the first
rank asks for that as checkpoint-engine's example does, by one `collective_rpc`. Answers each line
of JSON on stdin (`Command`) with one on stdout (`Done`).
"""

from __future__ import annotations

import gc
import sys
from typing import Any, Final

import httpx
import msgspec
from msgspec import Struct

from benchmarks.h200.processes import answer_commands
from benchmarks.h200.setup import Setup
from benchmarks.h200.theirs_rank import Command, Done, Rank, join

__all__ = ("Arguments",)

REQUEST_S: Final = 60.0


class Arguments(Struct, frozen=True, kw_only=True):
    setup: Setup
    rank: int
    port: int
    """Where the ranks meet."""
    file: str
    """What this rank serves."""
    url: str
    """Of vLLM."""


def main(arguments: Arguments) -> None:
    commands = answer_commands(Command)
    join(arguments.setup, arguments.rank, arguments.port)
    server = Rank(arguments.setup, arguments.rank)

    def request(sockets: Any) -> None:
        if arguments.rank == 0:
            httpx.post(
                f"{arguments.url}/collective_rpc",
                json={"method": "update_weights_from_ipc", "args": [dict(sockets)]},
                timeout=REQUEST_S,
                trust_env=False,
            ).raise_for_status()

    gc.freeze()
    for command, answer in commands:
        done: Done
        match command.what:
            case "register":
                done = server.register(files=[arguments.file])
            case "update":
                done = server.update(request)
            case what:
                raise SystemExit(f"a rank is asked to {what} by vLLM itself")
        answer(done)


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Arguments))
