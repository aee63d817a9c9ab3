"""transformers' models: which tensors of a checkpoint lie where in those of a module.

Since version 5 a module's names are not the checkpoint's: the experts of a layer are one tensor,
and some models are renamed throughout. transformers knows how to turn that back, but copies what it
cuts, and would gather a `DTensor`. So its own conversion is run once, on tensors without data, and
watched (`conversions`). Talks to no rank; every rank gets the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from weightbus.producers.conversions import Tensors, windows_of
from weightbus.producers.errors import TensorInvalid, TrainerInvalid
from weightbus.producers.fused import Split, Window

__all__ = ("split_of",)


def split_of(model: torch.nn.Module) -> Split:
    """How the tensors of a transformers model are called in its checkpoint, and cut for it.

    `model` may be wrapped (DDP, `torch.compile`, PEFT, FSDP2) and sharded. It is not run, and none
    of its tensors is read: its class is made a second time without data, from its config. The
    result maps names as `model.named_parameters()` gives them without wrappers; it gives None for a
    tensor whose name and shape are the checkpoint's, or which the class does not have. Takes
    seconds for a model of 70,000 experts: call it once.

    Raises:
        TrainerInvalid: the model is none of transformers', or quantized, or its class cannot be
            made of its config alone.
        TensorInvalid: the checkpoint's tensor is no box of a module's (rotary embeddings permuted,
            gate and up interleaved). From the result: a tensor has not the shape that the model's
            config gives it.
    """
    pretrained = _pretrained(model)
    skeleton = _skeleton(pretrained)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    dropped = shapes.keys() & set(getattr(skeleton, "_keys_to_ignore_on_save", None) or ())
    kept = {name: shape for name, shape in shapes.items() if name not in dropped}
    windows = dict.fromkeys(dropped, ()) | windows_of(_conversion_of(skeleton), kept)

    def split(name: str, shape: tuple[int, ...]) -> Sequence[Window] | None:
        if name not in shapes:
            return None
        found, expected = windows[name], shapes[name]
        if len(found) != 1 or not _is_whole(found[0], expected):
            if shape != expected:
                limit = f"the model's config says {expected}"
                raise TensorInvalid(name, f"of shape {shape}", limit)
            return found
        if found[0].name == name:
            return None
        return (Window(found[0].name, shape, (0,) * len(shape), shape),)

    return split


def _is_whole(window: Window, shape: tuple[int, ...]) -> bool:
    """Whether it is the fused tensor and the checkpoint's, nothing turned."""
    turned = any(a not in (-1, number) for number, a in enumerate(window.axes or ()))
    return window.sizes == window.shape == shape and not turned


def _pretrained(model: torch.nn.Module) -> Any:
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    except ImportError as error:
        limit = "transformers 5 or later; before, names were the checkpoint's own: give no split"
        raise TrainerInvalid("transformers", f"not usable ({error})", limit) from error
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        outer, inner = inner, _inner(inner)
        if inner is None:
            value = f"of type {type(outer).__qualname__}"
            limit = "must be a PreTrainedModel of transformers, in wrappers that are known or none"
            raise TrainerInvalid("the model", value, limit)
    if getattr(inner, "hf_quantizer", None) is not None:
        value = f"quantized ({type(inner.hf_quantizer).__qualname__})"
        raise TrainerInvalid("the model", value, "must hold values that were trained")
    return inner


def _inner(module: Any) -> Any:
    """What a wrapper holds that leaves no trace in the names of a planned module; or None."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return module.module
    if hasattr(module, "get_base_model"):  # PEFT
        return module.get_base_model()
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):  # torch.compile, checkpointing
        if name in module._modules:
            return module._modules[name]
    return None


def _skeleton(pretrained: Any) -> Any:
    """The same model without data, adapters and FSDP: FSDP2's classes make those they stand for."""
    from transformers.initialization import no_init_weights

    kind, config = type(pretrained), copy.deepcopy(pretrained.config)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
            skeleton = kind(config)
    except TypeError as error:
        value = f"of type {kind.__qualname__}, which is not made of its config alone ({error})"
        limit = "give split_of=lambda model: None if it has its checkpoint's names, or your own"
        raise TrainerInvalid("the model", value, limit) from error
    skeleton._weight_conversions = _conversions(pretrained, skeleton)
    return skeleton


def _conversions(pretrained: Any, skeleton: Any) -> Any:
    """As `revert_weight_conversion` finds them, for checkpoints as they are published on the hub.

    Where transformers reads experts both ways, and turns them only if it must, it writes its own
    way; engines read that of the hub.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, Transpose

    conversions = getattr(pretrained, "_weight_conversions", None)
    if conversions is None:
        found = get_model_conversion_mapping(skeleton, add_legacy=False)
        conversions = [each for each in found if not isinstance(each, PrefixChange)]
    conversions = copy.deepcopy(conversions)
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            if isinstance(operation, Transpose):
                operation.check_dims = False
    return conversions


def _conversion_of(skeleton: Any) -> Callable[[Tensors], Tensors]:
    from transformers.core_model_loading import revert_weight_conversion

    return lambda tensors: dict(revert_weight_conversion(skeleton, dict(tensors)))
