"""vLLM's workers, stood in for: their methods, their rules of order, and a model of ours inside.

Each worker has one thread, as vLLM's main one: whatever is called on it runs there, in order. Our
end is the real one (`VllmWorker`, `WeightBusExtension`); of vLLM there is what it says and refuses,
taken from 0.26 and 0.32 (`v1/worker/gpu_worker.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from torch import nn

from tests.integration.engines.checkpoints import Checkpoints
from weightbus.consumers.engines.torch.fingerprint import fingerprint
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.extension import WeightBusExtension
from weightbus.consumers.engines.vllm.worker import Draft, VllmWorker
from weightbus.consumers.reload.host import ModelHost, Weights

__all__ = ("Executor", "RenamedExtension", "StandInHost", "Worker", "WorkerError")

LONG_S = 60.0


class WorkerError(Exception):
    """What a worker's method raised, as vLLM passes it on."""


class StandInHost(TorchModelHost):
    """Loads when it is let."""

    def __init__(self, build: Callable[[], ServedModel], live: ServedModel) -> None:
        super().__init__("decoder", build, live)
        self.may_load = threading.Event()
        self.may_load.set()
        self.loading = threading.Event()
        self.draft: Draft | None = None

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        self.loading.set()
        assert self.may_load.wait(LONG_S)
        super().reload(weights, modules)


class Worker:
    """One rank."""

    def __init__(
        self, checkpoints: Checkpoints, rank: int, *, backend: str | None, drafts: bool
    ) -> None:
        """`backend` is that of its weight-transfer configuration; `drafts`: there is a drafter that
        is made of the same checkpoint."""
        build = partial(
            build_model, checkpoints.architecture, checkpoints.config, rank, checkpoints.ranks
        )
        self.model = build()
        self.model.requires_grad_(False)
        self.host = StandInHost(build, self.model)
        self.device = torch.device("cpu")
        self.model_runner = self
        self.vllm_config = _config(
            rank, checkpoints.ranks, drafts, backend, isinstance(self, WeightBusExtension)
        )
        self.draft = nn.Linear(2, 2) if drafts else None
        self._backend = backend
        self._ours: VllmWorker | None = None
        self._session = ""

    @property
    def has_session(self) -> bool:
        return bool(self._session)

    def get_model(self) -> nn.Module:
        return self.model

    def get_draft_model(self) -> nn.Module | None:
        return self.draft

    def make_host(
        self, config: object, model: nn.Module, device: object, draft: Draft | None
    ) -> ModelHost:
        assert model is self.model
        self.host.draft = draft
        return self.host

    # ------------------------------------------------------------ as vLLM's worker

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._check_backend()
        if self._backend != "weightbus" or set(init_info) != {"directory"}:
            raise ValueError("Invalid init_info for NCCLWeightTransferEngine: unexpected argument")
        if self._ours is None:
            self._ours = VllmWorker(self.vllm_config, self.model, self.device, self.make_host)
        self._ours.open(init_info["directory"])

    def start_weight_update(self) -> None:
        self._start("target")

    def start_draft_weight_update(self) -> None:
        if self.draft is None:
            raise RuntimeError("Draft model weight update requested, but no draft model is there.")
        self._start("draft")
        if self._ours is not None:
            config = self.vllm_config.speculative_config.draft_model_config
            self._ours.show_draft(self.draft, config)

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        self._check_backend()
        if not self._session:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            assert self._ours is not None
            self._ours.take(msgspec.convert(update_info, Turn))
        except BaseException:
            self._session = ""
            raise

    def finish_weight_update(self) -> None:
        self._check_backend()
        if not self._session:
            raise RuntimeError("finish_weight_update called without a matching start.")
        self._session = ""
        self._note_session()

    def _note_session(self) -> None:
        if self._ours is not None:
            self._ours.note_session(bool(self._session))

    def _start(self, session: str) -> None:
        self._check_backend()
        if self._session:
            raise RuntimeError("start_weight_update called while a weight update is active.")
        self._session = session
        self._note_session()

    def _check_backend(self) -> None:
        if self._backend is None:
            raise RuntimeError("Weight transfer not configured. Please set weight_transfer_config.")

    def close(self) -> None:
        """The process ends."""
        if self._ours is not None:
            self._ours.close()


class ExtendedWorker(WeightBusExtension, Worker):
    """Made by `--worker-extension-cls`."""

    def weightbus_make_host(
        self, config: object, model: nn.Module, device: object, draft: Draft | None
    ) -> ModelHost:
        return self.make_host(config, model, device, draft)

    def close(self) -> None:
        if (ours := getattr(self, "_weightbus", None)) is not None:
            ours.close()


class RenamedExtension(WeightBusExtension):
    """A user's own, by a name of its own."""


class Executor:
    """All workers, as vLLM's engine core calls them."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        backend: str | None = "weightbus",
        extended: bool = False,
        drafts: bool = False,
    ) -> None:
        kind = ExtendedWorker if extended else Worker
        self.workers = [
            kind(checkpoints, rank, backend=backend, drafts=drafts)
            for rank in range(checkpoints.ranks)
        ]
        self._threads = [ThreadPoolExecutor(1) for _ in self.workers]

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """
        Raises:
            WorkerError: of the first worker that raised, once all have ended.
        """
        del timeout
        futures = [
            thread.submit(_call, worker, method, tuple(args), dict(kwargs or {}))
            for worker, thread in zip(self.workers, self._threads, strict=True)
        ]
        results, errors = [], []
        for future in futures:
            try:
                results.append(future.result(LONG_S))
            except Exception as error:  # noqa: BLE001  (whatever it is, vLLM passes on its text)
                errors.append(error)
        if errors:
            raise WorkerError(f"Call to collective_rpc method failed: {errors[0]}")
        return results

    @property
    def hosts(self) -> list[StandInHost]:
        return [worker.host for worker in self.workers]

    def fingerprints(self) -> tuple[str, ...]:
        return tuple(fingerprint(worker.model) for worker in self.workers)

    def end(self) -> None:
        """The processes of the workers end."""
        for worker, thread in zip(self.workers, self._threads, strict=True):
            thread.submit(worker.close).result(LONG_S)
            thread.shutdown()


def _call(worker: Worker, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = getattr(worker, method, None)
    if found is None:
        raise AttributeError(f"'Worker' object has no attribute '{method}'")
    return found(*args, **kwargs)


def _config(rank: int, ranks: int, drafts: bool, backend: str | None, extended: bool) -> Any:
    model_config = SimpleNamespace(model="decoder")
    speculative = None
    if drafts:
        speculative = SimpleNamespace(draft_model_config=SimpleNamespace(model="decoder"))
    return SimpleNamespace(
        model_config=model_config,
        speculative_config=speculative,
        weight_transfer_config=backend and SimpleNamespace(backend=backend),
        parallel_config=SimpleNamespace(
            rank=rank,
            world_size=ranks,
            data_parallel_size=1,
            pipeline_parallel_size=1,
            distributed_executor_backend="mp",
            worker_extension_cls=f"{__name__}.WeightBusExtension" if extended else "",
        ),
    )
