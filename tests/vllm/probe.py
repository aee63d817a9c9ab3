"""What the tests look at inside vLLM's workers: an extension class, for `--worker-extension-cls`.

Owns nothing. vLLM makes the class a base of its worker's and calls its methods by `collective_rpc`,
with strings only. Nothing here is of weightbus: what an engine holds is read by other means than
those under test.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ("DRAFTER", "PROBE", "Probe", "allow_amx")

NOT_WEIGHTS = ("kv_cache",)
"""Attributes of modules that hold what requests left there."""
PROBE = "tests.vllm.probe.Probe"
DRAFTER = "drafter: "
"""What the names of a drafter's tensors begin with."""


def allow_amx() -> None:
    """Have the kernel let this process use AMX, where there is any.

    vLLM 0.32 takes its AMX kernels wherever the processor has them, and asks nobody: the first
    attention in BF16 ends the worker with SIGILL.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


allow_amx()  # vLLM imports this module in every worker before it makes the model


class Probe:
    """`self` is the worker."""

    model_runner: Any

    def probe_sums(self) -> dict[str, str]:
        """SHA-256 of all that this rank's model holds, by name: every parameter and buffer, every
        tensor that a module has captured, and every matrix that one has packed, read back; and of
        what its drafter holds."""
        sums = {name: _sha256(tensor) for name, tensor in _held(self.model_runner.get_model())}
        draft = self.model_runner.get_draft_model()
        if draft is not None:
            sums |= {f"{DRAFTER}{name}": _sha256(tensor) for name, tensor in _held(draft)}
        return sums

    def probe_watch_drafts(self) -> None:
        """From now on, note what the drafter proposes."""
        runner = self.model_runner
        propose = runner.propose_draft_token_ids
        self.probe_drafts: list[list[list[int]]] = []

        def noted(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            self.probe_drafts.append(torch.as_tensor(drafts).tolist())
            return drafts

        runner.propose_draft_token_ids = noted

    def probe_drafted(self) -> list[list[list[int]]]:
        """What it has proposed since this was asked last: of each step, for each request."""
        drafts, self.probe_drafts = self.probe_drafts, []
        return drafts

    def probe_slow_down(self, step_s: str) -> None:
        """From now on every step takes at least this long, however fast the machine is."""
        runner = self.model_runner
        execute = runner.execute_model

        def slowed(*args: Any, **kwargs: Any) -> Any:
            time.sleep(float(step_s))
            return execute(*args, **kwargs)

        runner.execute_model = slowed

    def probe_pid(self) -> list[int]:
        return [os.getpid()]

    def probe_kill(self, rank: str) -> None:
        """SIGKILL to one worker's process."""
        if self.rank == int(rank):  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)

    def probe_reload(self, folder: str) -> None:
        """vLLM's own way to take new weights, of a checkpoint on disk."""
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]


def _held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in NOT_WEIGHTS:
                continue
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key} (attribute)", value
            elif callable(value) and getattr(value, "__closure__", None):
                for number, tensor in enumerate(_captured(value)):
                    yield f"{name}.{key} (captured {number})", tensor
        linear = getattr(module, "cpu_linear", None)
        if linear is not None:
            yield f"{name} (packed)", _unpacked(module, linear)


def _captured(function: Callable[..., Any]) -> Iterator[torch.Tensor]:
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, torch.Tensor):
            yield cell.cell_contents


def _unpacked(module: nn.Module, linear: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The matrix that a linear layer of a CPU multiplies with, wherever it keeps it, transposed.

    It is multiplied with the unit matrix, which is exact: every sum has one term that is not zero.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    widths = (getattr(module, name, 0) for name in ("input_size_per_partition", "input_size"))
    unit = torch.eye(next(filter(None, widths), weight.shape[-1]), dtype=weight.dtype)
    with torch.inference_mode():
        return linear(unit, weight, None)


def _sha256(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bits."""
    plain = tensor.detach().cpu().contiguous()
    told = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.sha256(told + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
