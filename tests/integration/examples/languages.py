"""The examples in other languages as commands, and what their files must hold. Starts nothing.

A language whose toolchain is missing is skipped, and the reason says what to install.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

__all__ = ("CONFIG", "LANGUAGES", "Published", "command_of", "publish", "tensors_of")

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
LANGUAGES = ("bash", "c", "node")
COMPILE_S = 60.0
GRACE_S = 20.0
"""To start an interpreter on a slow machine, beside what the example waits for."""

CONFIG = {
    "vocab_size": 2,
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
}
"""Of the decoder whose tensors the examples write."""

NAMES = (
    "model.embed_tokens",
    "model.layers.0.input_layernorm",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.post_attention_layernorm",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.norm",
    "lm_head",
)


def tensors_of(version: int) -> dict[str, torch.Tensor]:
    """What every example writes as `version`: element n of the file is 1 + (version + n) / 128."""
    tensors, begin = {}, version
    for name in NAMES:
        shape = (2,) if name.endswith("norm") else (2, 2)
        numbers = torch.arange(begin, begin := begin + 2 ** len(shape))
        tensors[f"{name}.weight"] = (1 + (numbers & 127) / 128).reshape(shape)
    return tensors


def command_of(language: str, directory: Path) -> list[str]:
    """Runs the example; what has to be built is built in `directory`. Skips what cannot be run."""
    if language == "bash":
        return [_program("bash"), str(EXAMPLES / "publish.sh")]
    if language == "node":
        node = _program("node")
        if not (EXAMPLES / "node_modules" / "@nats-io" / "transport-node").is_dir():
            pytest.skip("examples/node_modules is missing: npm ci --prefix examples")
        return [node, str(EXAMPLES / "publish.mjs")]
    compiler = _program(os.environ.get("CC", "cc"))
    header = b"#include <nats/nats.h>\n"
    found = subprocess.run([compiler, "-E", "-"], input=header, capture_output=True, check=False)
    if found.returncode != 0:
        pytest.skip("nats/nats.h is missing: apt-get install libnats-dev")
    target = directory / "publish"
    flags = ("-O2", "-Wall", "-Wextra", "-Werror")
    argv = [compiler, *flags, "-o", str(target), str(EXAMPLES / "publish.c"), "-lnats"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    assert done.returncode == 0, done.stderr
    return [str(target)]


class Published:
    """How an example ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.exit_code, self.error = done.returncode, done.stderr
        self.said = json.loads(done.stdout) if done.stdout else None
        """`RoundComplete`; None: it printed nothing."""


def publish(
    command: Sequence[str], url: str, model: str, version: int | str, file: Path, wait_s: int
) -> Published:
    """Run the example to its end. Blocking."""
    done = subprocess.run(
        [*command, model, str(version), str(file), str(wait_s)],
        env={**os.environ, "WEIGHTBUS_NATS_URL": url},
        capture_output=True,
        text=True,
        timeout=wait_s + GRACE_S,
        check=False,
    )
    return Published(done)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: .ci/libraries languages installs it")
    return found
