"""What an SGLang host refuses before anything is written, and how it builds a scratch model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.unit.engines.sglang.test_lifecycle import (
    Growing,
    Layer,
    QuantizeMethodBase,
    Turning,
)
from tests.unit.reload.models import layout_of
from weightbus.consumers.engines.sglang.host import SglangHost
from weightbus.consumers.engines.sglang.scratch import build_scratch, keeps_graphs, started_from
from weightbus.consumers.engines.vllm.refusing import Origin
from weightbus.consumers.errors import CheckpointRefused, ProofFailed, TraceRefused
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.tracer import trace_needs

CPU = torch.device("cpu")


def phases(decode: str, prefill: str) -> SimpleNamespace:
    """Graphs of SGLang 0.5.23."""
    return SimpleNamespace(
        decode=SimpleNamespace(backend=decode), prefill=SimpleNamespace(backend=prefill)
    )


class Repacking(QuantizeMethodBase):
    """Keeps the weight in another form, for good."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = nn.Parameter(layer.weight.data.reshape(-1), requires_grad=False)


class Fused(nn.Module):
    """As SGLang fuses: a parameter that is made of two checkpoint tensors, and a norm."""

    def __init__(self, method: QuantizeMethodBase | None = None) -> None:
        super().__init__()
        self.quant_method = method
        self.weight = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.norm = nn.Parameter(torch.empty(4), requires_grad=False)
        self.input_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.pooled = False

    def load_weights(self, weights: Weights) -> None:
        """Passes over what it does not know, and notices nothing that is missing."""
        places = {
            "a.weight": self.weight.data[:2],
            "b.weight": self.weight.data[2:],
            "norm": self.norm.data,
        }
        with ThreadPoolExecutor(2) as pool:
            for name, tensor in weights:
                place = places.get(name)
                if place is None:
                    continue
                if name == "norm":
                    tensor = tensor.narrow(0, 0, 4)
                assert place.shape == tensor.shape, f"{tuple(tensor.shape)} into {name}"
                if self.pooled:
                    pool.submit(place.copy_, tensor).result()
                else:
                    place.copy_(tensor)


def checkpoint(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor | None] = {
        "a.weight": torch.rand(2, 4),
        "b.weight": torch.rand(2, 4),
        "norm": torch.rand(4),
        **{name.replace("_", "."): tensor for name, tensor in changed.items()},
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def host_of(model: Fused, *, pooled: bool = False, has_scale: bool = True) -> SglangHost:
    def build(name: str) -> Fused:
        assert name == "Fused"
        with torch.device("meta"):
            scratch = Fused()
        scratch.pooled = pooled
        if not has_scale:
            del scratch.input_scale
        return scratch

    def load(model: nn.Module, weights: Weights, device: torch.device) -> None:
        assert device == CPU
        assert isinstance(model, Fused)
        model.load_weights(weights)

    return SglangHost(model, CPU, build=build, load=load)


@pytest.mark.parametrize("pooled", [False, True], ids=["one-thread", "thread-pool"])
def test_checkpoint_is_taken_and_traced_whole_on_whichever_threads_it_is_loaded(
    pooled: bool,
) -> None:
    """What the model does not know does not matter."""
    model = Fused()
    del model.input_scale
    host = host_of(model, pooled=pooled, has_scale=False)
    trace = trace_needs(host, layout_of(checkpoint(rotary=torch.rand(3))))
    assert sorted(copy.tensor for copy in trace.needs.copies) == [0, 1, 2]


def test_engine_loads_by_itself_when_a_checkpoint_lacks_what_it_has_values_for() -> None:
    with pytest.raises(TraceRefused, match="input_scale"):
        trace_needs(host_of(Fused()), layout_of(checkpoint()))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (torch.rand(6), "norm has shape"),
        (torch.ones(4, dtype=torch.int8), "norm is of I8"),
    ],
    ids=["larger", "another-dtype"],
)
def test_checkpoint_is_refused_when_the_engine_would_take_a_tensor_for_something_else(
    changed: torch.Tensor, said: str
) -> None:
    model = Fused()
    del model.input_scale
    with pytest.raises(CheckpointRefused, match=said):
        trace_needs(host_of(model, has_scale=False), layout_of(checkpoint(norm=changed)))


@pytest.mark.parametrize("lost", ["a_weight", "b_weight", "norm"])
def test_checkpoint_is_refused_when_it_lacks_a_tensor(lost: str) -> None:
    with pytest.raises(
        CheckpointRefused, match=r"(weight|norm): \d+ of its bytes are in no tensor"
    ):
        trace_needs(host_of(Fused()), layout_of(checkpoint(**{lost: None})))


def test_checkpoint_is_refused_when_a_tensor_has_another_shape() -> None:
    host = host_of(Fused())
    with pytest.raises(CheckpointRefused, match=r"at b.weight of shape \(3, 4\)"):
        host.load_weights(host.scratch_model(), checkpoint(b_weight=torch.rand(3, 4)).items())


def graphed(layer: Layer, *, keeps_graphs: bool) -> tuple[SglangHost, list[int]]:
    """A host, and how often SGLang has loaded."""
    loads: list[int] = []

    def load(model: nn.Module, weights: Weights, device: torch.device) -> None:
        loads.append(len(list(weights)))

    host = SglangHost(
        nn.ModuleDict({"layer": layer}), CPU, load=load, keeps_graphs=lambda: keeps_graphs
    )
    return host, loads


def test_nothing_is_written_any_more_when_a_copy_could_not_be_kept_where_graphs_read_it() -> None:
    host, loads = graphed(Layer(Growing()), keeps_graphs=True)
    said = r"layer\.packed.*graphs keep the old one; start SGLang with --disable-cuda-graph"
    for _ in range(2):
        with pytest.raises(ProofFailed, match=said):
            host.reload([], None)
    with pytest.raises(CheckpointRefused, match=said):
        host.load_weights(nn.Module(), [])
    assert loads == [0]


def test_copies_may_move_when_nothing_was_captured() -> None:
    host, loads = graphed(Layer(Growing()), keeps_graphs=False)
    for _ in range(2):
        host.reload([], None)
    assert loads == [0, 0]
    assert host.derived() == {"layer": "packed"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, True),
        ({"disable_cuda_graph": True}, False),
        ({"disable_cuda_graph": True, "enable_torch_compile": True}, True),
        ({"cuda_graph_config": phases("full", "disabled")}, True),
        ({"cuda_graph_config": phases("disabled", "disabled")}, False),
    ],
    ids=["default", "off", "compiled", "one-phase", "no-phase"],
)
def test_graphs_are_kept_unless_the_server_was_told_to_make_none(
    args: dict[str, Any], expected: bool
) -> None:
    accessor = {"get_server_args": lambda: SimpleNamespace(**args)}
    with sglang_of(sglang__srt__runtime_context=accessor):
        assert keeps_graphs() is expected


def test_it_is_known_of_which_snapshot_the_server_was_started() -> None:
    args = {"model_path": "some/one", "revision": "tuned", "download_dir": "/cache"}
    accessor = {"get_server_args": lambda: SimpleNamespace(**args)}
    with sglang_of(sglang__srt__runtime_context=accessor):
        assert started_from() == Origin("some/one", "tuned", "/cache")


def test_parameter_of_a_quantised_model_is_needed_when_the_engine_was_started_with_it(
    tmp_path: Path,
) -> None:
    """Others, which no checkpoint has, are for SGLang to make."""
    names = ("layers.0.w.qweight", "layers.0.w.scales", "layers.1.w.qweight")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    model = Fused()
    model.quant_config = object()  # type: ignore[assignment]

    def load(model: nn.Module, weights: Weights, device: torch.device) -> None:
        del model, device
        assert list(weights)

    host = SglangHost(model, CPU, load=load, started_from=lambda: Origin(str(tmp_path)))
    host.load_weights(Fused(), [(name, torch.zeros(1)) for name in names[::2]])
    assert host.unwritten("layers.1.w.g_idx_sort_indices") == ""
    assert "lacks layers.0.w.scales, which" in host.unwritten("layers.0.w.scales")
    host = SglangHost(model, CPU, load=load, started_from=lambda: Origin("no/such"))
    host.load_weights(Fused(), [(name, torch.zeros(1)) for name in names])
    assert "no safetensors file of no/such" in host.unwritten("layers.0.w.scales")
    assert host.unwritten("layers.0.input_scale") == ""


def test_every_checkpoint_is_refused_when_a_parameter_was_repacked_for_good() -> None:
    model = Fused(Repacking())
    assert model.quant_method is not None
    model.quant_method.process_weights_after_loading(model)
    host = host_of(model)
    with pytest.raises(CheckpointRefused, match=r"repacked weight for Repacking, for good"):
        host.load_weights(host.scratch_model(), checkpoint().items())


def test_checkpoint_is_taken_when_a_repacked_parameter_can_be_restored() -> None:
    model = Fused(Turning())
    model.weight.data = model.weight.data.reshape(2, 8)
    host = host_of(model)
    host.load_weights(host.scratch_model(), checkpoint().items())


def test_chosen_modules_alone_are_loaded_again() -> None:
    model = Fused()
    tensors = checkpoint()
    host = host_of(model)
    host.reload(tensors.items(), None)
    assert torch.equal(model.weight, torch.cat([tensors["a.weight"], tensors["b.weight"]]))
    assert torch.equal(model.norm, tensors["norm"])


@contextmanager
def sglang_of(**modules: Any) -> Iterator[None]:
    """An `sglang` of nothing but what building a model needs."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("sglang")}
    names = {name.replace("__", "."): content for name, content in modules.items()}
    parents = {
        ".".join(name.split(".")[:count])
        for name in names
        for count in range(1, name.count(".") + 1)
    }
    try:
        for name in sorted(parents | names.keys()):
            module = sys.modules[name] = ModuleType(name)
            module.__path__ = []
            vars(module).update(names.get(name, {}))
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("sglang")]:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Config:
    """As `ModelConfig`."""

    dtype = torch.bfloat16

    @staticmethod
    def from_server_args(server_args: object) -> Config:
        assert server_args == "started so"
        return Config()


@pytest.mark.parametrize("newer", [True, False])
def test_scratch_model_is_built_on_meta_and_leaves_shared_embeddings_alone(newer: bool) -> None:
    ropes: dict[str, nn.Module] = {"live": nn.Identity()}

    def built(arguments: Iterable[object]) -> Fused:
        ropes["scratch"] = nn.Identity()
        return Fused()

    def newer_way(model_config: Config, load_config: object, quant_config: object) -> Fused:
        assert quant_config == "quantised so"
        return built(())

    def older_way(model_config: Config, load_config: object) -> Fused:
        return built(())

    accessor = {"get_server_args": lambda: "started so"}
    global_accessor = {"get_global_server_args": lambda: "started so"}
    place = "sglang__srt__layers__rotary_embedding" + ("__factory" if newer else "")
    modules: dict[str, Any] = {
        "sglang__srt__configs__load_config": {"LoadConfig": SimpleNamespace},
        "sglang__srt__configs__model_config": {"ModelConfig": Config},
        "sglang__srt__model_loader__loader": {
            "_initialize_model": newer_way if newer else older_way,
            "_get_quantization_config": lambda model_config, load_config: "quantised so",
        },
        "sglang__srt__model_loader__utils": {"set_default_torch_dtype": default_dtype},
        place: {"_ROPE_DICT": ropes},
        "sglang__srt__runtime_context" if newer else "sglang__srt__server_args": (
            accessor if newer else global_accessor
        ),
    }
    with sglang_of(**modules):
        loader_module = sys.modules["sglang.srt.model_loader.loader"]
        sys.modules["sglang.srt.model_loader"].loader = loader_module  # type: ignore[attr-defined]
        scratch = build_scratch("Fused")
    assert {parameter.device.type for parameter in scratch.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in scratch.parameters()} == {torch.bfloat16}
    assert list(ropes) == ["live"]


def test_model_cannot_be_traced_when_it_cannot_be_built_on_meta() -> None:
    with pytest.raises(TraceRefused, match="cannot be built on meta: ModuleNotFoundError"):
        build_scratch("Fused")
