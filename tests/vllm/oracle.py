"""What an engine must hold and say at a version: told by a fresh engine, made for that version.

Owns the process that makes them (`fresh.py`), from the first question on. Each is made once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.vllm.checkpoints import SPECULATIVE, Architecture, write_checkpoint
from tests.vllm.fresh import Answer, Ask
from tests.vllm.processes import START_S, LineProcess, environment, running_group

__all__ = ("MAX_TOKENS", "PROMPTS", "Oracle")

PROMPTS: Final = ((5, 6, 7, 8), (400, 30, 20, 10, 9), tuple(range(100, 400)))
"""Token ids. The last fills whole blocks of the KV cache, which the prefix cache keeps: what was
computed with older weights must not be found there."""
MAX_TOKENS: Final = 24


class Oracle:
    """Blocking; not thread-safe."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._process: LineProcess | None = None
        self._known: dict[tuple[str, int], Answer] = {}

    def folder(self, architecture: Architecture, version: int) -> Path:
        """The checkpoint of a version, on disk."""
        folder = self._directory / f"{architecture}-{version}"
        if not folder.exists():
            write_checkpoint(folder, architecture, version)
        return folder

    def generates(self, architecture: Architecture, version: int, ranks: int) -> Answer:
        """What a fresh engine generates, and what its ranks hold."""
        folder = self.folder(architecture, version)
        speculative = SPECULATIVE.get(architecture, {})
        return self.answers(folder, ranks, PROMPTS, MAX_TOKENS, speculative)

    def answers(
        self,
        folder: Path,
        ranks: int,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        speculative: Mapping[str, Any] | None = None,
    ) -> Answer:
        """As `fresh.Ask` says."""
        if (known := self._known.get((str(folder), ranks))) is not None:
            return known
        ask = Ask(
            folder=str(folder),
            ranks=ranks,
            prompts=[*map(list, prompts)],
            max_tokens=max_tokens,
            speculative=dict(speculative or {}),
        )
        answer = self._ready().ask(msgspec.to_builtins(ask), START_S)
        made = self._known[str(folder), ranks] = msgspec.convert(answer, Answer)
        return made

    def _ready(self) -> LineProcess:
        if self._process is None:
            command = [sys.executable, "-m", "tests.vllm.fresh"]
            group = running_group(command, self._directory / "fresh.log", environment(), lines=True)
            self._process = LineProcess(self._stack.enter_context(group))
            self._process.answer(START_S)
        return self._process
