"""Copies that vLLM makes of weights once are made anew in their memory, or the model is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from weightbus.consumers.engines.vllm.renewing import Renewer
from weightbus.consumers.errors import ProofFailed

HEADS = 4


class Impl:
    """A kernel's side of attention."""

    def __init__(self, sinks: torch.Tensor | None) -> None:
        self.sinks = sinks


class FlashInfer(Impl):
    """As vLLM's: float32 after loading, and it knows of what."""

    def __init__(self, sinks: torch.Tensor | None) -> None:
        super().__init__(sinks)
        self._sinks_source = sinks

    def process_weights_after_loading(self) -> None:
        assert self._sinks_source is not None
        self.sinks = self._sinks_source.to(torch.float32)


class Composite:
    """Picks one for every batch."""

    def __init__(self, *impls: Impl) -> None:
        self._impls = impls

    def get_impl_variants(self) -> tuple[Impl, ...]:
        return self._impls


class Attention(nn.Module):
    def __init__(self, impl: Any) -> None:
        super().__init__()
        self.impl: Any = impl


class Block(nn.Module):
    """Of gpt-oss: the sinks hang above the attention that uses them."""

    def __init__(self, dtype: torch.dtype, make: Any) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(HEADS, dtype=dtype), requires_grad=False)
        self.other = nn.Parameter(torch.zeros(HEADS, dtype=dtype), requires_grad=False)
        self.attn = Attention(make(self.sinks))


def model_of(*blocks: Block) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(blocks)
    return model


def write(block: Block, value: float) -> None:
    block.sinks.data.fill_(value)


def test_float32_sinks_are_renewed_where_they_are() -> None:
    block = Block(torch.bfloat16, FlashInfer)
    impl = block.attn.impl
    impl.process_weights_after_loading()
    served = impl.sinks
    write(block, 3.0)
    assert served.tolist() == [0.0] * HEADS, "a write to the parameter does not reach it"
    assert Renewer(model_of(block)).renew()
    assert impl.sinks is served
    assert served.tolist() == [3.0] * HEADS


def test_every_kernel_is_renewed_when_there_are_several() -> None:
    block = Block(torch.bfloat16, lambda sinks: Composite(FlashInfer(sinks), FlashInfer(sinks)))
    impls = block.attn.impl.get_impl_variants()
    for impl in impls:
        impl.process_weights_after_loading()
    write(block, 2.0)
    assert Renewer(model_of(block)).renew()
    assert [impl.sinks.tolist() for impl in impls] == [[2.0] * HEADS] * 2


def test_sinks_that_were_cast_in_a_forward_pass_are_renewed_from_the_parameter_above() -> None:
    """As vLLM's kernel for CPUs does, which knows nothing of the parameter then."""
    blocks = [Block(torch.float16, Impl) for _ in range(2)]
    with torch.inference_mode():
        for block in blocks:
            block.attn.impl.sinks = block.sinks.to(torch.float32)
    for number, block in enumerate(blocks):
        write(block, 1.0 + number)
    assert Renewer(model_of(*blocks)).renew()
    assert [block.attn.impl.sinks.tolist() for block in blocks] == [[1.0] * HEADS, [2.0] * HEADS]


@pytest.mark.parametrize(
    "make", [Impl, FlashInfer, lambda sinks: Impl(None), lambda sinks: Impl(sinks[1:3])]
)
def test_nothing_is_done_when_the_kernel_reads_the_parameter(make: Any) -> None:
    model = model_of(Block(torch.float32, make))
    assert list(Renewer(model).sinks()) == []
    assert not Renewer(model).renew()


@pytest.mark.parametrize("change", ["no parameter", "two of them", "another shape"])
def test_model_is_refused_when_it_is_not_known_what_the_sinks_are_made_of(change: str) -> None:
    kept = torch.zeros(HEADS)
    block: Any = Block(torch.bfloat16, lambda sinks: Impl(kept))
    match change:
        case "no parameter":
            del block.sinks
        case "two of them":
            block.more_sinks = nn.Parameter(torch.ones(HEADS), requires_grad=False)
        case "another shape":
            block.attn.impl.sinks = torch.zeros(HEADS + 1)
    (sinks,) = Renewer(model_of(block)).sinks()
    assert (sinks.name, sinks.source) == ("layers.0.attn", None)
    with pytest.raises(ProofFailed, match=r"layers\.0\.attn: keeps a copy of its attention sinks"):
        Renewer(model_of(block)).renew()
    assert kept.tolist() == [0.0] * HEADS


@pytest.mark.parametrize("tells", [False, True])
def test_copy_that_is_not_what_its_parameter_holds_is_unknown(tells: bool) -> None:
    """Some kernels scale theirs by log2(e)."""
    block = Block(torch.bfloat16, FlashInfer if tells else Impl)
    write(block, 3.0)
    block.attn.impl.sinks = kept = block.sinks.float() * math.log2(math.e)
    renewer = Renewer(model_of(block))
    assert renewer.unknown(compares=False) is None
    sinks = renewer.unknown(compares=True)
    assert sinks is not None
    assert (sinks.name, sinks.source) == ("layers.0.attn", None)
    assert torch.equal(kept, torch.full((HEADS,), 3.0) * math.log2(math.e))


def test_copy_that_was_once_what_its_parameter_holds_stays_known() -> None:
    """An update that has failed may have written the parameter alone."""
    blocks = [Block(torch.bfloat16, FlashInfer) for _ in range(2)]
    for block in blocks:
        write(block, 2.0)
        block.attn.impl.process_weights_after_loading()
    renewer = Renewer(model_of(*blocks))
    assert renewer.unknown(compares=True) is None
    write(blocks[1], 4.0)
    assert renewer.unknown(compares=True) is None
    assert Renewer(model_of(*blocks)).unknown(compares=True) is not None


class Fourier(nn.Module):
    """As vLLM's FoPE."""

    def __init__(self) -> None:
        super().__init__()
        self.cos_coef = nn.Parameter(torch.ones(2, 3), requires_grad=False)
        self.register_buffer("cos_sin_cache", self._compute_cos_sin_cache(), persistent=False)
        self.update_cache = True

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return torch.arange(10.0)[:, None, None] * self.cos_coef

    def forward(self) -> torch.Tensor:
        cache = self.get_buffer("cos_sin_cache")
        if self.update_cache:
            cache.copy_(self._compute_cos_sin_cache())
            self.update_cache = False
        return cache.clone()


class Plain(nn.Module):
    """A rotary embedding without coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.zeros(3), persistent=False)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        raise AssertionError("there is nothing that could have changed")


@pytest.mark.parametrize("has_run", [False, True])
def test_sines_of_fourier_embeddings_are_renewed_where_they_are(has_run: bool) -> None:
    model: Any = nn.Module()
    model.rotary, model.other = Fourier(), Plain()
    served = model.rotary.cos_sin_cache
    if has_run:
        model.rotary()
    model.rotary.cos_coef.data.fill_(7.0)
    assert Renewer(model).renew()
    assert model.rotary.cos_sin_cache is served
    expected = torch.arange(10.0)[:, None, None].expand(10, 2, 3) * 7.0
    assert torch.equal(model.rotary(), expected)
    assert torch.equal(served, expected)
