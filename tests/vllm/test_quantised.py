"""What a host of vLLM refuses of quantised checkpoints, whether they can be traced or not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightbus.consumers.errors import CheckpointRefused

NAMES = ("model.layers.0.w", "model.layers.0.w_scale")


def host_of(origin: Path) -> Any:
    from weightbus.consumers.engines.vllm.host import VllmHost

    config: Any = SimpleNamespace(
        quant_config=object(),
        model_config=SimpleNamespace(model=str(origin), revision=None),
        load_config=SimpleNamespace(download_dir=None),
    )
    return VllmHost(config, nn.Module(), torch.device("cpu"))


def test_checkpoint_is_refused_when_nothing_tells_what_it_must_have(tmp_path: Path) -> None:
    host = host_of(tmp_path / "absent")
    with pytest.raises(CheckpointRefused, match=r"no safetensors file of .*absent, which"):
        host.load_weights(nn.Module(), [(name, torch.zeros(1)) for name in NAMES])
    assert "no safetensors file of" in host.unwritten(NAMES[1])


def test_checkpoint_is_refused_when_it_lacks_a_scale(tmp_path: Path) -> None:
    save_file({name: torch.zeros(1) for name in NAMES}, tmp_path / "model.safetensors")
    host = host_of(tmp_path)
    with pytest.raises(CheckpointRefused, match=r"lacks model\.layers\.0\.w_scale"):
        host.load_weights(nn.Module(), [(NAMES[0], torch.zeros(1))])
