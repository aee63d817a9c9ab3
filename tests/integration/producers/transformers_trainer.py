"""One rank of a real `Trainer` for tests, over DDP: publishes after every step.

Arguments: bus URL, model, rank, world size, port of rank 0, directory of its own. Prints a JSON
line after every step, and waits for one on stdin. Rank 0 first saves what the model holds then.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerState

from tests.integration.producers.tiny_models import Tokens, arguments, saved, tiny_model
from weightbus.bus.settings import BusSettings
from weightbus.producers.integrations.transformers import WeightBusCallback

STEPS = 2


class Turn(TrainerCallback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        if args.process_index == 0:
            saved(given["model"], self.directory / f"step-{state.global_step}")
        print(json.dumps({"step": state.global_step}), flush=True)
        sys.stdin.readline()


def main() -> None:
    url, model, rank, world_size, port, directory = sys.argv[1:]
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=world_size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    callback = WeightBusCallback(BusSettings(url=url), model)
    trainer = Trainer(
        tiny_model(),
        arguments(Path(directory), STEPS),
        train_dataset=Tokens(),
        callbacks=[callback, Turn(Path(directory))],
    )
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert callback.publisher is not None
    print(json.dumps({"published": callback.publisher.published}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
