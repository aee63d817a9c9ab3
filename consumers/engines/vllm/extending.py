"""Whether the extension that vLLM's workers were started with can do what ours can.

Owns nothing. vLLM cannot be asked: a call of a method that its workers do not have fails in each of
them, and no call of theirs must (`status.py`). So the class is looked at here.
"""

from __future__ import annotations

import importlib
from typing import Final

import anyio
import anyio.to_thread

from weightbus.consumers.errors import DeadlineExceeded

__all__ = ("EXTENSION", "why_not_ours")

EXTENSION: Final = "weightbus.consumers.engines.vllm.extension.WeightBusExtension"

_METHODS: Final = ("weightbus_open", "weightbus_turn")


async def why_not_ours(extension: str, deadline_s: float) -> str:
    """Empty: it has our methods, as far as can be seen. A class that cannot be imported here is
    taken for ours by its name.

    Args:
        extension: its module and name, as in vLLM's `--worker-extension-cls`. Its module is
            imported, on a thread.

    Raises:
        DeadlineExceeded: that takes longer; it goes on.
    """
    if extension == EXTENSION:
        return ""
    try:
        with anyio.fail_after(deadline_s):
            return await anyio.to_thread.run_sync(_look, extension, abandon_on_cancel=True)
    except TimeoutError:
        raise DeadlineExceeded(f"import of {extension}", deadline_s) from None


def _look(extension: str) -> str:
    module, _, name = extension.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001  (it is the user's module: it may raise anything)
        if name == EXTENSION.rpartition(".")[2]:
            return ""
        return f", which cannot be looked at from here: {type(error).__name__}: {error}"
    missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
    return f", which has no {', '.join(missing)}" if missing else ""
