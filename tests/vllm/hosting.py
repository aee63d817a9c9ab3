"""A vLLM with Weight bus's host of its only rank, in one process, without a consumer.

    python -m tests.vllm.hosting FOLDER ARCHITECTURE

Serves the checkpoint in FOLDER. Says `{}` on stdout once it does; then each line on stdin is an
`Order`, answered there by one `Report`. It ends with stdin.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from tests.integration.fleet.reports import take_stdout
from tests.vllm.bringing import bring
from tests.vllm.checkpoints import SPECULATIVE, Architecture, tensors_of
from tests.vllm.probe import PROBE
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.memory import state_tensors
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import Failed

__all__ = ("Order", "Report")


class Order(Struct, frozen=True, kw_only=True):
    version: int
    """Of which the tensors are: see `tensors_of`."""
    without: list[str] = []
    """Tensors that are left out."""
    reshaped: dict[str, list[int]] = {}
    """Tensors that are of another shape, or are there beside the others, of zeros."""
    stops_after: int = -1
    """Not negative: vLLM's lifecycle is given so many tensors; then their source fails."""


class Report(Struct, frozen=True, kw_only=True):
    error: str = ""
    """Empty: the version was applied; else what was said."""
    processed: int = 0
    reason: str = ""
    derived: dict[str, str] = {}
    on_meta: list[str] = []
    """Tensors of the live model that are on `meta`, and modules that vLLM would load there."""
    shared: list[str] = []
    """Modules of the live model that another one made on `meta` is made of, too."""
    registered: int = 0
    """Layers that vLLM's compilation config knows by name."""
    outputs: list[list[int]] = []
    sums: dict[str, str] = {}
    drafted: list[list[list[int]]] = []
    """What the drafter proposed meanwhile, if there is one."""


class SourceGone(Exception):
    """A checkpoint that cannot be read any more."""


class Hosting:
    """The engine, and what a consumer would ask of its worker."""

    def __init__(self, folder: str, architecture: Architecture, directory: Path) -> None:
        from vllm import LLM

        from weightbus.consumers.engines.vllm.host import VllmHost
        from weightbus.consumers.engines.vllm.worker import drafts_from_checkpoint

        self._llm = LLM(
            model=folder,
            enforce_eager=True,
            max_num_seqs=8,
            worker_extension_cls=PROBE,
            speculative_config=SPECULATIVE.get(architecture),
            seed=0,
        )
        core: Any = self._llm.llm_engine.engine_core
        worker = core.engine_core.model_executor.driver_worker.worker
        self._config = worker.vllm_config
        runner = worker.model_runner
        draft = None
        if drafts_from_checkpoint(self._config):
            draft = (runner.get_draft_model(), self._config.speculative_config.draft_model_config)
        self._host = VllmHost(self._config, runner.get_model(), worker.device, draft)
        self._drafts = draft is not None
        if self._drafts:
            self._llm.collective_rpc("probe_watch_drafts")
        self._worker = ReloadWorker(self._host, 0, 1)
        self._architecture, self._directory = architecture, directory

    def carry_out(self, order: Order) -> Report:
        tensors = tensors_of(self._architecture, order.version)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in order.without}
        for name, shape in order.reshaped.items():
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
        if order.stops_after < 0:
            report = self._update(tensors, order.version)
        else:
            with suppress(SourceGone):
                self._host.reload(_stopping(tensors, order.stops_after), None)
            report = Report(error="SourceGone")
        return msgspec.structs.replace(
            report,
            derived=dict(self._host.derived()),
            shared=self._shared(),
            on_meta=self._on_meta(),
            registered=len(self._config.compilation_config.static_forward_context),
            **({} if order.stops_after >= 0 else self._serve()),
        )

    def _shared(self) -> list[str]:
        live = self._host.live_model().named_modules()
        scratch = {id(module) for module in self._host.scratch_model().modules()}
        return [name for name, module in live if id(module) in scratch]

    def _on_meta(self) -> list[str]:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        live = self._host.live_model()
        return [
            *(item.name for item in state_tensors(live) if item.tensor.is_meta),
            *(
                name
                for name, module in live.named_modules()
                if get_layerwise_info(module).restore_device.type == "meta"
            ),
        ]

    def _update(self, tensors: dict[str, torch.Tensor], version: int) -> Report:
        applied = bring(self._worker, tensors, version, self._directory)
        if isinstance(applied, Failed):
            return Report(error=f"{applied.error}: {applied.reason}")
        return Report(processed=applied.processed_parameters, reason=applied.reason)

    def _serve(self) -> dict[str, Any]:
        from vllm import SamplingParams

        from tests.vllm.oracle import MAX_TOKENS, PROMPTS

        sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
        self._llm.reset_prefix_cache()
        done: Any = [
            *(self._llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts)
        ]
        (sums,) = self._llm.collective_rpc("probe_sums")
        told = {"outputs": [list(one.outputs[0].token_ids) for one in done], "sums": sums}
        if self._drafts:
            (told["drafted"],) = self._llm.collective_rpc("probe_drafted")
        return told


def _stopping(tensors: dict[str, torch.Tensor], after: int) -> Weights:
    for number, (name, tensor) in enumerate(tensors.items()):
        if number == after:
            raise SourceGone
        yield name, tensor


def main(folder: str, architecture: Architecture) -> None:
    replies = take_stdout()
    with tempfile.TemporaryDirectory() as directory:
        hosting = Hosting(folder, architecture, Path(directory))
        print("{}", file=replies)
        for line in sys.stdin.buffer:
            report = hosting.carry_out(msgspec.json.decode(line, type=Order))
            told = msgspec.to_builtins(report)
            told["said"] = told.pop("error")  # the other end takes `error` for one of this program
            print(msgspec.json.encode(told).decode(), file=replies)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])  # type: ignore[arg-type]
