"""The tracer: what it records equals what the loader does, and what it cannot tell it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.reload.models import (
    Bag,
    Loader,
    ModuleHost,
    layout_of,
    load_by_name,
    random_tensor,
    replay,
    same_bits,
)
from weightbus.consumers.errors import TraceRefused
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.memory import state_tensors
from weightbus.consumers.reload.tracer import Tie, Trace, trace_needs, whole_needs
from weightbus.schemas.layout import Layout, TensorSpec
from weightbus.schemas.needs import ParameterSpec, Transform
from weightbus.schemas.needs_codec import check_needs


def check_trace(
    build: Callable[[], nn.Module], load: Loader, tensors: dict[str, torch.Tensor]
) -> Trace:
    """Trace, replay, and compare every parameter with what the loader itself does."""
    trace = trace_needs(ModuleHost(build, load), layout_of(tensors))
    made = replay(trace.needs, list(tensors.values()))
    model = build()
    with torch.no_grad():
        load(model, iter([(name, tensor.clone()) for name, tensor in tensors.items()]))
    owners = {tie.spec.name: trace.needs.parameters[tie.parameter].name for tie in trace.ties}
    for item in state_tensors(model):
        if item.tensor.numel() and item.name not in trace.excused and item.name not in owners:
            assert same_bits(made[item.name], item.tensor), item.name
    return trace


Assignment = Callable[[torch.Tensor, torch.Tensor], object]


def one(load: Assignment) -> Loader:
    """A loader that does one thing with the parameter `p` and every tensor."""

    def run(model: Any, weights: Weights) -> None:
        for _, weight in weights:
            load(model.p, weight)

    return run


def f32(*shape: int, seed: int = 1) -> torch.Tensor:
    return random_tensor(shape, torch.float32, seed)


def test_fused_and_sharded_parameters_are_traced_when_loaded_by_slices() -> None:
    """Rank 1 of 2: fused qkv and gate_up, stacked experts, padded vocabulary, transposed weight."""

    def build() -> nn.Module:
        return Bag(qkv=(16, 6), gate_up=(8, 6), w13=(3, 4, 6), embed=(11, 6), conv=(6, 5), scale=())

    def load(model: Any, weights: Weights) -> None:
        params = dict(model.named_parameters())
        for name, weight in weights:
            match name.split("."):
                case ["q"]:
                    params["qkv"].data[:8].copy_(weight.narrow(0, 8, 8))
                case ["k"]:
                    params["qkv"].data.narrow(0, 8, 4).copy_(weight.chunk(2)[1])
                case ["v"]:
                    params["qkv"][12:16] = weight[4:8]
                case ["fused"]:
                    for half, part in enumerate(weight.chunk(2)):
                        params["gate_up"].view(2, 4, 6)[half].copy_(part[4:])
                case ["expert", number, half]:
                    params["w13"].data[int(number)].narrow(0, 2 * int(half), 2).copy_(weight)
                case ["embed"]:
                    params["embed"].data[:9].copy_(weight)
                    params["embed"].data[9:].fill_(0)
                case ["conv"]:
                    params["conv"].data.copy_(weight.t())
                case ["scale"]:
                    params["scale"].data.copy_(weight)

    tensors = {
        "q": f32(16, 6),
        "unused": f32(3),
        "k": f32(8, 6),
        "v": f32(8, 6),
        "fused": f32(16, 6),
        **{f"expert.{e}.{h}": f32(2, 6, seed=2 * e + h) for e in range(3) for h in range(2)},
        "embed": f32(9, 6),
        "conv": f32(5, 6),
        "scale": f32(),
    }
    trace = check_trace(build, load, tensors)
    assert len(trace.needs.fills) == 1
    assert 1 not in {copy.tensor for copy in trace.needs.copies}


def test_casts_and_operations_become_transforms_when_not_views() -> None:
    def load(model: Any, weights: Weights) -> None:
        params = dict(model.named_parameters())
        for name, weight in weights:
            match name:
                case "a":
                    params["a"].copy_(-torch.exp(weight.float()))
                case "b":
                    params["b"].copy_(weight)
                case "c":
                    params["c"].copy_(weight.t().contiguous().clone()[1:])

    tensors = {
        "a": torch.randn(4, 3).bfloat16(),
        "b": torch.randn(5).half(),
        "c": f32(3, 4),
    }
    trace = check_trace(lambda: Bag(a=(4, 3), b=(5,), c=(3, 3)), load, tensors)
    assert trace.needs.transforms == (
        Transform((("cast", "F32"), ("exp", ""), ("neg", ""))),
        Transform((("cast", "F32"),)),
    )


def test_concatenated_sources_are_cut_into_copies_when_written_across_their_seam() -> None:
    def load(model: Any, weights: Weights) -> None:
        given = dict(weights)
        fused = torch.cat([given["a"], given["b"].to(torch.float32)], dim=1)
        stacked = torch.stack([given["a"], given["c"]], 1)
        model.p.copy_(fused[1:, 2:7].t())
        model.r.copy_(stacked[:, :, :2])

    tensors = {"a": f32(4, 4), "b": torch.randn(4, 5).half(), "c": f32(4, 4, seed=9)}
    trace = check_trace(lambda: Bag(p=(5, 3), r=(4, 2, 2)), load, tensors)
    assert len(trace.needs.copies) == 4


@pytest.mark.parametrize(
    ("shape", "load"),
    [
        ((4, 6), lambda p, w: p.copy_(w.expand(4, 6))),
        ((4, 6), lambda p, w: p.copy_(w)),
        ((3, 2), lambda p, w: p.copy_(w.view(3, 2))),
        ((2, 3), lambda p, w: p.copy_(w.view(3, 2).permute(1, 0))),
        ((6,), lambda p, w: p.view(2, 3).copy_(w.reshape(3, 2).t())),
        ((3,), lambda p, w: p.copy_(w[1::2])),
        ((12,), lambda p, w: (p[::2].copy_(w), p[1::2].copy_(w))),
        ((6,), lambda p, w: (p.zero_(), p[:3].copy_(w[3:]), p[3:].copy_(w[:3]))),
        ((6,), lambda p, w: (p[:3].copy_(w[:3]), p.copy_(w))),
        ((6,), lambda p, w: (p.copy_(w), p.fill_(2.5))),
        ((6,), lambda p, w: (p.fill_(1), p[1:5].fill_(2), p[2:3].copy_(w[:1]))),
        ((6,), lambda p, w: p.view(torch.int32).copy_(w.view(torch.int32))),
        ((7,), lambda p, w: (p[:6].copy_(w), p.__setitem__(6, 0.5))),
        ((6,), lambda p, w: p.copy_(torch.full((6,), 0.1, dtype=torch.bfloat16))),
        ((6,), lambda p, w: p.copy_(torch.zeros(2, 3).view(-1))),
        ((6,), lambda p, w: p.fill_(torch.tensor(3.5))),
    ],
)
def test_window_is_traced_when_its_form_is(shape: tuple[int, ...], load: Assignment) -> None:
    check_trace(lambda: Bag(p=shape), one(load), {"w": f32(6)})


def test_hidden_copies_are_dropped_when_a_later_one_covers_them() -> None:
    """A checkpoint that holds both names of a tied weight: the last counts, as for the loader."""

    class Tied(Bag):
        def __init__(self) -> None:
            super().__init__(embed=(4, 2))
            self.head = self.embed

    def load(model: Any, weights: Weights) -> None:
        params = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in weights:
            params[name].data.copy_(weight)

    trace = check_trace(Tied, load, {"embed": f32(4, 2), "head": f32(4, 2, seed=5)})
    assert [copy.tensor for copy in trace.needs.copies] == [1]
    assert trace.ties == (Tie(ParameterSpec("head", "F32", (4, 2), (2, 1)), 0, 0),)


def test_views_of_one_flat_storage_are_traced_when_strided_and_offset() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.zeros(40)
            self.a = nn.Parameter(flat[3:15].view(3, 4), requires_grad=False)
            self.b = nn.Parameter(flat[16:40].view(4, 6)[:, :5].t(), requires_grad=False)
            self.register_buffer("inner", flat[4:6])

    trace = check_trace(Flat, load_by_name, {"a": f32(3, 4), "b": f32(5, 4)})
    assert [spec.name for spec in trace.needs.parameters] == ["a", "b"]
    assert trace.needs.parameters[1].strides == (1, 6)
    assert trace.ties == (Tie(ParameterSpec("inner", "F32", (2,), (1,)), 0, 4),)


def _rebind(model: Any, weights: Weights) -> None:
    for name, weight in weights:
        setattr(model, name, nn.Parameter(weight, requires_grad=False))


def _rebind_data(model: Any, weights: Weights) -> None:
    for _, weight in weights:
        model.p.data = weight


def _keep(model: Any, weights: Weights) -> None:
    load_by_name(model, weights := list(weights))
    model.kept = weights[0][1]


def _skip(model: Any, weights: Weights) -> None:
    pass


def _swallow(model: Any, weights: Weights) -> None:
    for _, weight in weights:
        try:
            model.p.add_(weight)
        except RuntimeError:
            model.p.copy_(weight)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (_rebind, "p was bound to another tensor"),
        (_rebind_data, "p was bound to another tensor"),
        (_keep, "kept was bound to another tensor"),
        (_skip, "p: 24 of its bytes are not written"),
        (_swallow, "aten.add_.Tensor to p"),
        (one(lambda p, w: p.copy_(w.mul(2))), "aten.mul.Tensor makes of a checkpoint tensor"),
        (
            one(lambda p, w: p.copy_(w.neg().mul_(2))),
            "aten.mul_.Tensor changes a checkpoint tensor",
        ),
        (one(lambda p, w: w.zero_()), "aten.zero_.default changes a checkpoint tensor in place"),
        (one(lambda p, w: torch.neg(w, out=p.data)), "aten.neg.out to p"),
        (one(lambda p, w: p.index_copy_(0, torch.arange(6), w)), "aten.index_copy_.default to p"),
        (one(lambda p, w: p.copy_(w[torch.arange(6)])), "aten.index.Tensor makes of"),
        (
            one(lambda p, w: p.copy_(torch.arange(6.0))),
            "takes a tensor that is not of the checkpoint",
        ),
        (one(lambda p, w: p.copy_(p.flip(0))), "takes a tensor that is not of the checkpoint"),
        (one(lambda p, w: p[:3].copy_(p[3:])), "aten.copy_.default to p reads p"),
        (
            one(lambda p, w: p.copy_(torch.empty(6, device=w.device).copy_(w))),
            "put into a temporary tensor",
        ),
        (
            one(lambda p, w: p.copy_(torch.cat([w[:3], torch.zeros(3, device=w.device)]))),
            "aten.cat.default makes of",
        ),
        (one(lambda p, w: p.copy_(w[:1].view(torch.uint8)[0])), "of another size"),
        (one(lambda p, w: p.copy_(w.view(torch.int32))), "must be torch.float32 to compute with"),
        (one(lambda p, w: p[:5].copy_(w[:5])), "p: 4 of its bytes are not written"),
        (one(lambda p, w: (p.copy_(w), p[:1].fill_(0))), "is overwritten, but only in part"),
        (one(lambda p, w: p.fill_(2**60 + 1)), "cannot be told exactly"),
        (one(lambda p, w: p.fill_(float("nan"))), "the constant nan is not a real number"),
        (one(lambda p, w: p.copy_(w) if w.sum().item() > 0 else None), "RuntimeError"),
        (one(lambda p, w: torch._foreach_copy_([p.data], [w])), "aten._foreach_copy_.default to p"),
        (one(lambda p, w: p.set_(w.untyped_storage())), "aten.set_.source_Storage to p"),
    ],
)
def test_loader_is_refused_when_it_is_no_plan(load: Loader, reason: str) -> None:
    host = ModuleHost(lambda: Bag(p=(6,)), load)
    with pytest.raises(TraceRefused, match="load_weights of Test cannot be traced") as caught:
        trace_needs(host, layout_of({"p": f32(6)}))
    assert reason in caught.value.reason


def test_buffer_is_excused_only_when_known_not_to_be_of_the_checkpoint() -> None:
    class Rotary(Bag):
        def __init__(self) -> None:
            super().__init__(p=(2,))
            self.register_buffer("cache", torch.zeros(4), persistent=False)
            self.register_buffer("mean", torch.zeros(4))

    layout = layout_of({"p": f32(2)})
    trace = trace_needs(ModuleHost(Rotary, load_by_name, excused=["mean"]), layout)
    assert trace.excused == {"cache", "mean"}
    with pytest.raises(TraceRefused, match="mean: 16 of its bytes are not written"):
        trace_needs(ModuleHost(Rotary, load_by_name), layout)


def test_write_is_refused_when_it_goes_to_a_plain_attribute() -> None:
    class Plain(Bag):
        def __init__(self) -> None:
            super().__init__(p=(2,))
            self.extra = [torch.zeros(2)]

    def load(model: Any, weights: Weights) -> None:
        for _, weight in weights:
            model.p.copy_(weight)
            model.extra[0].copy_(weight)

    with pytest.raises(TraceRefused, match=r"extra\[0\]: written outside of every parameter"):
        trace_needs(ModuleHost(Plain, load), layout_of({"p": f32(2)}))


def test_trace_is_refused_when_torch_has_no_such_dtype() -> None:
    layout = Layout((TensorSpec("w", "F4", (2,)),), (), ())
    with pytest.raises(TraceRefused, match="this torch has no dtype for w: F4"):
        trace_needs(ModuleHost(lambda: Bag(p=(2,)), load_by_name), layout)


def test_whole_needs_hold_every_element_once_when_not_traced() -> None:
    layout = layout_of({"a": f32(2, 3), "b": random_tensor((), torch.bfloat16, 1), "c": f32(0, 2)})
    needs = whole_needs(layout)
    check_needs(needs, layout)
    assert [(copy.tensor, copy.sizes, copy.strides) for copy in needs.copies] == [
        (0, (2, 3), (3, 1)),
        (1, (), ()),
    ]


VIEWS: list[Callable[[torch.Tensor, int], torch.Tensor]] = [
    lambda t, n: t.narrow(n % t.dim(), 0, max(1, t.shape[n % t.dim()] - 1)),
    lambda t, n: t.narrow(n % t.dim(), t.shape[n % t.dim()] // 2, 1),
    lambda t, n: t.transpose(n % t.dim(), -1),
    lambda t, n: t.unsqueeze(n % (t.dim() + 1)) if t.dim() < 5 else t,
    lambda t, n: t.reshape(-1),
    lambda t, n: t[(slice(None),) * (n % t.dim()) + (slice(None, None, 2),)],
    lambda t, n: t.chunk(2, n % t.dim())[-1],
    lambda t, n: t.unfold(0, min(2, t.shape[0]), min(2, t.shape[0])),
    lambda t, n: torch.cat([t, t], n % t.dim()) if t.numel() < 400 else t,
    lambda t, n: t.clone(),
    lambda t, n: t.neg(),
    lambda t, n: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    lambda t, n: t.flatten(0, -1).view(-1, 1),
    lambda t, n: t.expand(2, *t.shape) if t.dim() < 4 else t,
]


@settings(max_examples=300, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.integers(0, len(VIEWS) - 1), st.integers(0, 4)), max_size=6),
    parameter_dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    transpose=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_chain_of_views_is_replayed_when_traced(
    shape: list[int],
    steps: list[tuple[int, int]],
    parameter_dtype: torch.dtype,
    transpose: bool,
    seed: int,
) -> None:
    def through(tensor: torch.Tensor) -> torch.Tensor:
        for step, number in steps:
            tensor = VIEWS[step](tensor, number)
        return tensor

    source = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    result = through(source)

    def build() -> nn.Module:
        return Bag(parameter_dtype, p=tuple(result.shape[::-1] if transpose else result.shape))

    def load(p: torch.Tensor, weight: torch.Tensor) -> None:
        (p.permute(*reversed(range(p.dim()))) if transpose else p).copy_(through(weight))

    check_trace(build, one(load), {"w": source})
