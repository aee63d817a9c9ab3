"""What the tests of this folder need of the machine, and what is missing here."""

from __future__ import annotations

import importlib.util
from functools import cache

__all__ = ("gpu_count", "why_not")


@cache
def gpu_count() -> int:
    """How many GPUs torch can use here."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@cache
def why_not(gpus: int = 1) -> str:
    """Why tests that need so many GPUs cannot run here; empty: they can."""
    if importlib.util.find_spec("torch") is None:
        return "needs PyTorch built for CUDA"
    import torch

    if torch.version.cuda is None:
        return f"needs PyTorch built for CUDA: this is {torch.__version__}"
    if not gpu_count():
        return "needs an NVIDIA GPU and its driver: torch finds none"
    if gpu_count() < gpus:
        return f"needs {gpus} GPUs: there are {gpu_count()}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    return ""
