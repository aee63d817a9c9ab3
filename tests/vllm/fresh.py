"""Fresh engines, one after the other, each in a process of its own: what others are compared with.

    python -m tests.vllm.fresh

Owns the processes that it forks. vLLM is imported once, and nothing is computed here: each line on
stdin (`Ask`) forks a process that has seen nothing but those imports, makes vLLM's own engine of
a checkpoint on disk, asks it, answers on stdout (`Answer`), and ends. An import takes 20-60 s, an
engine then a few. Weight bus has no part in this.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import traceback
from typing import Any

import msgspec
from msgspec import Struct

from tests.integration.fleet.reports import take_stdout

__all__ = ("Answer", "Ask")


class Ask(Struct, frozen=True, kw_only=True):
    folder: str
    ranks: int
    prompts: list[list[int]]
    max_tokens: int
    """0: the engine embeds the prompts."""
    speculative: dict[str, Any] = {}
    """How it speculates; empty: not at all."""


class Answer(Struct, frozen=True, kw_only=True):
    outputs: list[list[int]]
    embeddings: list[list[float]]
    sums: list[dict[str, str]]
    """Of each rank, as `Probe.probe_sums` gives them."""
    drafted: list[list[list[int]]] = []
    """What a drafter proposed meanwhile; see `Probe.probe_drafted`."""


def answer(ask: Ask) -> Answer:
    """Make an engine, and ask it."""
    from vllm import LLM, SamplingParams

    from tests.vllm.probe import PROBE

    engine = LLM(
        model=ask.folder,
        runner="generate" if ask.max_tokens else "pooling",
        tensor_parallel_size=ask.ranks,
        enforce_eager=True,
        max_num_seqs=8,
        worker_extension_cls=PROBE,
        speculative_config=ask.speculative or None,
        seed=0,
    )
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in ask.prompts]
    outputs: list[list[int]] = []
    embeddings: list[list[float]] = []
    drafted: list[list[list[int]]] = []
    if ask.speculative:
        engine.collective_rpc("probe_watch_drafts")
    if ask.max_tokens:
        greedy = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True)
        for prompt in prompts:  # one by one: rounding depends on who is in a batch
            (done,) = engine.generate([prompt], greedy, use_tqdm=False)
            outputs.append(list(done.outputs[0].token_ids))
    else:
        embedded: Any = engine.embed(prompts, use_tqdm=False)
        embeddings = [list(one.outputs.embedding) for one in embedded]
    sums = engine.collective_rpc("probe_sums")
    if ask.speculative:
        (drafted,) = engine.collective_rpc("probe_drafted")
    engine.llm_engine.engine_core.shutdown()
    return Answer(outputs=outputs, embeddings=embeddings, sums=sums, drafted=drafted)


def main() -> None:
    replies = take_stdout()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _import()
    print("{}", file=replies)  # ready
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            _run_child(msgspec.json.decode(line, type=Ask), replies.fileno())
        _, status = os.waitpid(child, 0)
        if status != 0:
            print(
                msgspec.json.encode({"error": f"it ended with {status:#x}"}).decode(), file=replies
            )


def _import() -> None:
    """Everything that an engine needs, so that a fork has it."""
    import vllm.entrypoints.llm
    import vllm.model_executor.models.qwen2
    import vllm.model_executor.models.qwen3
    import vllm.model_executor.models.qwen3_moe
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker
    from vllm.v1.executor import multiproc_executor

    import tests.vllm.probe

    # vLLM spawns the workers of a CPU, each of which imports everything again.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    del vllm, tests
    gc.freeze()


def _run_child(ask: Ask, replies: int) -> None:
    """Answers, and ends this process, in whatever way."""
    status = 1
    try:
        encoded = msgspec.json.encode(answer(ask)) + b"\n"
        while encoded:
            encoded = encoded[os.write(replies, encoded) :]
        status = 0
    finally:
        if status:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
