"""A vLLM of one rank in this process: brought to a version by updates, or started from it.

    python -m tests.vllm.alone KIND VERSIONS [--updated]

Prints one line of JSON (`Found`). With `--updated` the engine is started from version 0, and every
version up to VERSIONS is written into it by Weight bus's worker; else from that version's files.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tests.integration.fleet.reports import take_stdout
from tests.vllm.bringing import bring
from tests.vllm.kinds import KINDS, tensors_of, write_checkpoint
from tests.vllm.oracle import MAX_TOKENS, PROMPTS
from tests.vllm.probe import PROBE
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import Applied

__all__ = ("Found", "Update")

CACHE_BYTES = 64 * 2**20


class Update(Struct, frozen=True):
    """What became of one version."""

    processed: int
    direct: int
    reason: str


class Found(Struct, frozen=True):
    outputs: list[list[int]]
    sums: dict[str, str]
    """As `Probe.probe_sums` gives them."""
    updates: list[Update] = []


class Engine:
    def __init__(self, name: str, folder: Path) -> None:
        from vllm import LLM

        options: dict[str, Any] = {"quantization": "fp8"} if KINDS[name].online else {}
        self.llm: Any = LLM(
            model=str(folder),
            enforce_eager=True,
            max_num_seqs=8,
            max_model_len=512,
            kv_cache_memory_bytes=CACHE_BYTES,
            gpu_memory_utilization=0.02,
            worker_extension_cls=PROBE,
            seed=0,
            **options,
        )

    def find(self) -> Found:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        self.llm.reset_prefix_cache()
        prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
        done = [self.llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
        (sums,) = self.llm.collective_rpc("probe_sums")
        return Found([list(one.outputs[0].token_ids) for one in done], sums)

    def worker(self) -> ReloadWorker:
        from weightbus.consumers.engines.vllm.host import VllmHost

        core: Any = self.llm.llm_engine.engine_core
        worker = core.engine_core.model_executor.driver_worker.worker
        model = worker.model_runner.get_model()
        return ReloadWorker(VllmHost(worker.vllm_config, model, worker.device, None), 0, 1)


def update(worker: ReloadWorker, name: str, version: int, directory: Path) -> Update:
    """Bring a version."""
    applied = bring(worker, tensors_of(name, version), version, directory)
    assert isinstance(applied, Applied), applied
    return Update(applied.processed_parameters, applied.direct_parameters, applied.reason)


def main(name: str, versions: int, *, is_updated: bool) -> None:
    replies = take_stdout()
    with tempfile.TemporaryDirectory() as scratch:
        first = 0 if is_updated else versions
        engine = Engine(name, write_checkpoint(Path(scratch, "model"), name, first))
        updates = []
        if is_updated:
            engine.find()  # what is made lazily, and kept, is made of the first version
            worker = engine.worker()
            updates = [
                update(worker, name, version, Path(scratch)) for version in range(1, versions + 1)
            ]
        found = msgspec.structs.replace(engine.find(), updates=updates)
        print(msgspec.json.encode(found).decode(), file=replies)
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its one worker is in this process
    main(sys.argv[1], int(sys.argv[2]), is_updated="--updated" in sys.argv)
