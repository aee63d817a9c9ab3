"""transformers' `Trainer`, and those of TRL, which derive from it: publish after optimizer steps.

Owns a `StepPublisher` from the beginning of training to its end. Invariant: the weights that
training ends with are published, whatever step that is.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from weightbus.bus.settings import BusSettings
from weightbus.producers.fused import Split
from weightbus.producers.huggingface import split_of
from weightbus.producers.integrations.hooks import StepOptions, StepPublisher, step_publisher
from weightbus.producers.publisher import PublisherOptions
from weightbus.schemas.progress import EngineState
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import Telemetry

__all__ = ("WeightBusCallback",)


class WeightBusCallback(TrainerCallback):
    """`Trainer(..., callbacks=[WeightBusCallback(settings, "qwen3-rl")])`, on every rank.

    Publishes the model after every optimizer step (`StepOptions.every`), under the names of its
    checkpoint: without the prefixes of `torch.compile` and DDP, tied tensors once, adapters of PEFT
    merged, fused experts cut. The version is the trainer's `global_step`; see
    `StepPublisher.publish` for runs that resume. Each rank of FSDP2 publishes what it holds.

    The publisher is opened when training begins and closed when it ends well, which takes as long
    as present engines take to come to the last version (`PublisherOptions.linger_s`). No callback
    is called when training fails: then use `with` around it, or `close`; else the publisher lives
    on until the process ends, or training begins again, which goes on with it.
    """

    def __init__(
        self,
        settings: BusSettings,
        model: str,
        *,
        producer: str = "trainer",
        telemetry: Telemetry | None = None,
        otlp: OtlpSettings | None = None,
        options: PublisherOptions | None = None,
        steps: StepOptions | None = None,
        at_begin: bool = False,
    ) -> None:
        """Connects to nothing yet. `model` is the name that engines follow.

        `at_begin`: publish the weights that training begins with, too. `steps.split_of` is that of
        `producers.huggingface` unless one is given; a module of one's own around a model of
        transformers needs one, or `lambda model: None` for its own names.
        """
        steps = steps or StepOptions()
        self._steps = steps if steps.split_of else replace(steps, split_of=_split_of)
        self._settings, self._model, self._at_begin = settings, model, at_begin
        self._producer, self._telemetry, self._otlp = producer, telemetry, otlp
        self._options = options
        self._is_open = False
        self.publisher: StepPublisher | None = None
        """From the beginning of training. Its counts can still be read when it is closed."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """
        Raises:
            What `step_publisher` and `StepPublisher.publish` raise.
        """
        if not self._is_open:
            self.publisher = step_publisher(
                self._settings,
                self._model,
                producer=self._producer,
                rank=args.process_index,
                world_size=args.world_size,
                telemetry=self._telemetry,
                otlp=self._otlp,
                options=self._options,
                steps=self._steps,
            )
            self._is_open = True
        if self._at_begin:
            self._opened().publish(model, state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """
        Raises:
            What `StepPublisher.publish` raises.
        """
        self._opened()(model, state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """
        Raises:
            What `StepPublisher.publish` and `StepPublisher.close` raise.
        """
        is_another = args.load_best_model_at_end and state.best_model_checkpoint is not None
        with self:
            if is_another or self._opened().last_step != state.global_step:
                self._opened().publish(model, state.global_step)

    def wait_until_served(self, *, timeout_s: float, engines: int = 1) -> tuple[EngineState, ...]:
        """As `StepPublisher.wait_until_served`; while training.

        Raises:
            What that raises.
        """
        return self._opened().wait_until_served(timeout_s=timeout_s, engines=engines)

    def close(self) -> None:
        """End the publisher well, if one is open.

        Raises:
            What `StepPublisher.close` raises.
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_open:
            self._is_open = False
            self._opened().__exit__(kind, error, traceback)

    def _opened(self) -> StepPublisher:
        assert self.publisher is not None, "Trainer calls on_train_begin first"
        return self.publisher


def _split_of(module: nn.Module) -> Split | None:
    """A `Trainer` takes other modules, too, whose names are their own; before transformers 5 those
    of its models were the checkpoint's.
    """
    converts = find_spec("transformers.core_model_loading") is not None
    known = converts and any(isinstance(inner, PreTrainedModel) for inner in module.modules())
    return split_of(module) if known else None
