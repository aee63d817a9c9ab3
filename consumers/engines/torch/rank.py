"""One rank of a `torch` engine: its model, what it is asked to compute and what to load.

Owns the model and both of the rank's sockets. Runs on one thread, so an update and a request never
run beside each other; it also refuses an update unless the front holds it.

An error that is not the fault of a request or an update ends the process: beside a rank that has
failed in the middle of a layer the others would wait forever.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import zmq
from safetensors import SafetensorError
from safetensors.torch import load_file

from weightbus.consumers.engines.channel import WorkerEndpoint
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.engines.torch.device import (
    GROUP_BACKENDS,
    computing_on,
    open_device,
)
from weightbus.consumers.engines.torch.fingerprint import fingerprint
from weightbus.consumers.engines.torch.host import TorchModelHost, process_weights_after_loading
from weightbus.consumers.engines.torch.messages import (
    RANK_REQUESTS,
    AskFingerprints,
    Done,
    Fingerprints,
    Infer,
    Inferred,
    Ping,
    RankReply,
    RankRequest,
    Refused,
)
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.words import Held, RankWords
from weightbus.consumers.errors import EngineUnavailable, PlanError
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import (
    Apply,
    Attach,
    Describe,
    Detach,
    Failed,
    Inspect,
    Prepare,
    WorkerReply,
    WorkerRequest,
)

__all__ = ("Rank", "run_rank")

_PARENT_CHECK_MS = 1000
_CONTROL_REQUESTS = (Describe, Attach, Prepare, Apply, Inspect, Detach)
_MAX_REASON = 4096


def run_rank(
    directory: EngineDirectory, spec: TorchEngineSpec, rank: int, words: RankWords, parent: int
) -> None:
    """Serve until the parent process is gone.

    Raises:
        DeviceLost: a GPU does nothing for this process any more.
        PlanError: there is no such device, the model cannot be built as specified, or its weights
            not be read.
    """
    torch.set_num_threads(spec.threads)
    device = open_device(spec.device_of(rank))
    build = partial(build_model, spec.architecture, spec.config, rank, spec.tp)
    with computing_on(device):
        model = build()
    model.requires_grad_(False)
    if spec.weights:
        _load(model, Path(spec.weights))
    if spec.tp > 1:
        dist.init_process_group(
            GROUP_BACKENDS[device.type],
            store=dist.FileStore(str(directory.rendezvous), spec.tp),  # type: ignore[attr-defined]
            rank=rank,
            world_size=spec.tp,
            timeout=timedelta(seconds=spec.step_timeout_s),
            device_id=None if device.type == "cpu" else device,  # NCCL meets now, not in a request
        )
    host = TorchModelHost(spec.architecture, build, model, device)
    host.warm_up()
    Rank(directory, host, ReloadWorker(host, rank, spec.tp), words).run(parent)


class Rank:
    """The loop over both sockets."""

    def __init__(
        self,
        directory: EngineDirectory,
        host: TorchModelHost,
        reload: ReloadWorker,
        words: RankWords,
    ) -> None:
        self._name = host.name
        self._device = torch.device(host.device)
        self._model = host.live_model()
        self._reload = reload
        self._words = words
        self._consumer: WorkerEndpoint[WorkerRequest] = WorkerEndpoint(
            directory.control, reload.rank, reload.instance, _CONTROL_REQUESTS, self._failed
        )
        self._front: WorkerEndpoint[RankRequest] = WorkerEndpoint(
            directory.ranks, reload.rank, reload.instance, RANK_REQUESTS, _refused
        )

    def run(self, parent: int) -> None:
        poller = zmq.Poller()
        poller.register(self._consumer.socket, zmq.POLLIN)
        poller.register(self._front.socket, zmq.POLLIN)
        while os.getppid() == parent:
            poller.poll(_PARENT_CHECK_MS)
            instruction = self._consumer.receive_nowait()
            if instruction is not None:
                self._consumer.reply(self._carry_out(instruction))
                if self._reload.lost is not None:
                    self._leave()
                    raise self._reload.lost
            request = self._front.receive_nowait()
            if request is not None:
                self._front.reply(self._answer(request))

    def _leave(self) -> None:
        """Hand over the last replies."""
        self._consumer.close()
        self._front.close()

    def _carry_out(self, request: WorkerRequest) -> WorkerReply:
        """An instruction of the consumer."""
        if not isinstance(request, Apply):
            return self._reload.handle(request)
        self._words.report(self._held()._replace(touched=True))
        reply: WorkerReply
        if self._words.is_held():
            reply = self._reload.handle(request)
        else:
            serving = EngineUnavailable(self._name, "it is not paused: its weights must not change")
            reply = self._failed(request.request, serving)
        self._words.report(self._held())
        return reply

    def _held(self) -> Held:
        return Held(self._reload.version, self._reload.touched, self._reload.updates)

    def _answer(self, request: RankRequest) -> RankReply:
        """A request that came through the front."""
        match request:
            case Ping():
                return Done(request=request.request)
            case AskFingerprints():
                return Fingerprints(
                    request=request.request,
                    version=self._reload.version,
                    fingerprints=(fingerprint(self._model),),
                )
            case Infer():
                try:
                    with torch.no_grad(), computing_on(self._device):
                        outputs = self._model.infer(request.inputs)
                except RequestRefused as error:
                    return _refused(request.request, error)
                return Inferred(
                    request=request.request, version=self._reload.version, outputs=outputs
                )

    def _failed(self, number: int, error: WeightBusError) -> Failed:
        return Failed(
            request=number,
            rank=self._reload.rank,
            error=type(error).__name__,
            reason=str(error)[:_MAX_REASON],
            touched=self._reload.touched,
        )


def _refused(number: int, error: WeightBusError) -> Refused:
    return Refused(request=number, error=type(error).__name__, reason=str(error)[:_MAX_REASON])


def _load(model: ServedModel, path: Path) -> None:
    """Load a whole checkpoint from a safetensors file.

    Raises:
        PlanError: the file cannot be read, or lacks a tensor of the model.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PlanError("weights", path, f"cannot be read: {error}") from None
    try:
        model.load_checkpoint(tensors.items())
    except PlanError as error:
        raise PlanError("weights", path, f"must make the model: {error}") from None
    process_weights_after_loading(model)
