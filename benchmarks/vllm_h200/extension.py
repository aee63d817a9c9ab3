"""What the benchmark does inside vLLM's workers: an extension class, for `--worker-extension-cls`.

Owns nothing. vLLM makes the class a base of its worker's and calls its methods by `collective_rpc`,
with strings only. On CPUs, where vLLM packs weights anew, it is kept from doing so: there only the
flow is tried, and what a rank holds shall be as on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from benchmarks.h200.setup import ARCHITECTURE, TINY, build_meta
from benchmarks.vllm_h200.held import bind, holding
from weightbus.consumers.engines.torch.model import ServedModel
from weightbus.consumers.engines.torch.models import build_model

__all__ = ("Extension",)


def _theirs() -> Any:
    """checkpoint-engine's extension, where it is installed."""
    try:
        from checkpoint_engine.worker import VllmColocateWorkerExtension
    except ImportError:
        return object
    return VllmColocateWorkerExtension


Theirs: Any = _theirs()


def keep_unpacked() -> None:
    """Have vLLM multiply with parameters as they were loaded, and the kernel allow AMX, which
    vLLM 0.32 takes without asking. What mixtures of experts compute then is of no use."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    def dispatch(layer: nn.Module, remove_weight: bool) -> None:
        del remove_weight
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    utils.dispatch_cpu_unquantized_gemm = dispatch
    cpu_moe.cpu_prepack_moe_weight = lambda weight, isa: weight
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


if not torch.cuda.is_available():
    keep_unpacked()  # vLLM imports this module in every worker before it makes the model


class Extension(Theirs):  # type: ignore[misc]
    """`self` is the worker."""

    def bench_warm(self) -> None:
        """Load what `bench_check` needs: its kernels are part of the engine at rest."""
        with self.device:
            model = build_model(ARCHITECTURE, TINY)
        model.requires_grad_(False)
        holding(model)
        self._bench_tidy()

    @torch.inference_mode()
    def bench_clear(self) -> None:
        """No parameter holds anything afterwards."""
        for parameter in self._bench_model().parameters():
            parameter.zero_()
        self._bench_tidy()

    @torch.inference_mode()
    def bench_check(self, config: str) -> list[str]:
        """Which version this rank holds, bit for bit, or why none.

        Args:
            config: of the model's shapes, as JSON.
        """
        shapes: ServedModel | None = getattr(self, "_bench_shapes", None)
        if shapes is None:
            parallel = self.vllm_config.parallel_config
            sizes = msgspec.json.decode(config)
            shapes = build_meta(sizes, parallel.rank, parallel.tensor_parallel_size)
            self._bench_shapes = shapes
        try:
            bind(shapes, self._bench_model().named_parameters())
        except ValueError as error:
            return [f"no version: {error}"]
        found = holding(shapes)
        self._bench_tidy()
        return [found]

    def bench_reload(self, folder: str) -> None:
        """vLLM's own way to take new weights: `reload_weights`, from files that vLLM's own
        iterator maps."""
        from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

        files = sorted(str(path) for path in Path(folder).glob("*.safetensors"))
        self.reload_weights(weights_iterator=safetensors_weights_iterator(files, False))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _bench_model(self) -> nn.Module:
        model: nn.Module = self.model_runner.get_model()
        return model

    def _bench_tidy(self) -> None:
        """Nothing is under way on the GPU, and none of its memory is held for later."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
