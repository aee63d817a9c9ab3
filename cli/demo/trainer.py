"""The demo's trainer, a process of its own: trains two small models and publishes each version.

Reads one JSON command per line from stdin and answers each with one JSON line on stdout; all else
goes to stderr. It publishes as any trainer would, through `BlockingPublisher`, and says what an
engine must hold afterwards: computed here, by the engine's own loader, from the same tensors.

Invariant: the n-th version of a model is the same in every run (seeded, one thread).
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TextIO

import msgspec
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file

from weightbus.bus.endpoint import P2pOptions
from weightbus.bus.settings import BusSettings
from weightbus.cli.demo.sentences import PAIRS, PROBE
from weightbus.cli.demo.words import DECODER_CONFIG, Expected, Publish
from weightbus.consumers.engines.torch.decoder import Decoder
from weightbus.consumers.engines.torch.fingerprint import fingerprint
from weightbus.consumers.engines.torch.minilm import MiniLM, minilm_folder
from weightbus.consumers.engines.torch.models import build_model, initialise
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.publisher import PublisherOptions
from weightbus.tracing.otlp import OtlpSettings

__all__ = ("main",)

ADDRESS = "127.0.0.1"
"""The engines' other hosts are virtual."""

MINILM_STEPS = 2
DECODER_STEPS = 40
BATCH_PAIRS = 8
TEMPERATURE = 0.05
SEED = 20


class Training(ABC):
    """One model in training."""

    architecture: ClassVar[str]
    config: ClassVar[Mapping[str, Any]] = {}
    ranks: ClassVar[int] = 1
    """Of the engines that follow the model."""

    @abstractmethod
    def train(self) -> float:
        """A few optimizer steps; returns the last loss."""

    @abstractmethod
    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Every tensor of the checkpoint, by name; views."""

    def embedding(self) -> tuple[float, ...]:
        """What an engine should answer to `PROBE`; empty if it embeds nothing."""
        return ()


class MiniLMTraining(Training):
    """Fine-tunes the real model on sentence pairs (in-batch negatives, InfoNCE)."""

    architecture = "minilm"

    def __init__(self) -> None:
        model = build_model(self.architecture, self.config)
        assert isinstance(model, MiniLM)
        self._model = model
        whole = load_file(minilm_folder() / "model.safetensors")
        model.load_weights(whole.items())
        served = model.checkpoint_tensors()
        self._frozen = {name: tensor for name, tensor in whole.items() if name not in served}
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        self._step = 0

    def train(self) -> float:
        loss = torch.zeros(())
        for _ in range(MINILM_STEPS):
            first = self._step * BATCH_PAIRS % len(PAIRS)
            batch = PAIRS[first : first + BATCH_PAIRS]
            left = self._model.embed([one for one, _ in batch])
            right = self._model.embed([other for _, other in batch])
            loss = F.cross_entropy(left @ right.T / TEMPERATURE, torch.arange(len(batch)))
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._step += 1
        return loss.item()

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """With the tensors that are not trained and no engine needs (pooler, position ids)."""
        return {**self._model.checkpoint_tensors(), **self._frozen}

    def embedding(self) -> tuple[float, ...]:
        with torch.inference_mode():
            return tuple(self._model.embed([PROBE])[0].tolist())


class DecoderTraining(Training):
    """Trains a small mixture-of-experts decoder from scratch to count in steps."""

    architecture = "decoder"
    config = DECODER_CONFIG
    ranks = 2

    def __init__(self) -> None:
        model = build_model(self.architecture, self.config)
        assert isinstance(model, Decoder)
        self._model = model
        initialise(model, SEED)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        self._random = torch.Generator().manual_seed(SEED)

    def train(self) -> float:
        loss = torch.zeros(())
        for _ in range(DECODER_STEPS):
            start, step = torch.randint(1, 20, (2,), generator=self._random).tolist()
            tokens = (start + step * torch.arange(24)) % 100
            logits = self._model(tokens[:-1])
            loss = F.cross_entropy(logits, tokens[1:])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        return loss.item()

    def checkpoint(self) -> dict[str, torch.Tensor]:
        return self._model.checkpoint_tensors()


def _fingerprints(training: Training, tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """What every rank of an engine must hold, by the engine's own loader."""
    found = []
    for rank in range(training.ranks):
        model = build_model(training.architecture, training.config, rank, training.ranks)
        model.load_weights(tensors.items())
        found.append(fingerprint(model))
    return tuple(found)


def _publish(publisher: BlockingPublisher, training: Training, command: Publish) -> Expected:
    loss = training.train()
    tensors = training.checkpoint()
    ready = publisher.publish(tensors, version=command.version)
    return Expected(
        model=command.model,
        version=command.version,
        loss=loss,
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        weights_digest=ready.weights_digest or "",
        fingerprints=_fingerprints(training, tensors),
        embedding=training.embedding(),
    )


def _take_stdout() -> TextIO:
    """What was stdout; from now on the native libraries, which print there, print to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def main() -> None:
    """Carry out the commands of stdin until it is closed."""
    answers = _take_stdout()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    settings = BusSettings.from_env(os.environ)
    options = PublisherOptions(  # every version was checked already: nobody is waited for
        linger_s=0.0, close_wait_s=5.0, p2p=P2pOptions(address=ADDRESS, required=False)
    )
    otlp = OtlpSettings.from_env(os.environ)
    with (
        BlockingPublisher(settings, model="minilm", otlp=otlp, options=options) as minilm,
        BlockingPublisher(settings, model="decoder", otlp=otlp, options=options) as decoder,
    ):
        trainings: dict[str, tuple[BlockingPublisher, Training]] = {
            "minilm": (minilm, MiniLMTraining()),
            "decoder": (decoder, DecoderTraining()),
        }
        for line in sys.stdin:
            command = msgspec.json.decode(line, type=Publish)
            expected = _publish(*trainings[command.model], command)
            answers.write(msgspec.json.encode(expected).decode() + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
