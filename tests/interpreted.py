"""Modules with Triton kernels, run by Triton's interpreter: on any machine that has the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

__all__ = ("interpreted",)

VARIABLE = "TRITON_INTERPRET"


@contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """A copy of a module whose kernels are interpreted; the module itself stays as it is.

    Skips the test where there is no Triton. Triton's own functions are interpreted meanwhile, too,
    also if they were loaded to be compiled: nothing else may launch a kernel.
    """
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        _interpret_library(patch)
        _mend_interpreter(patch)
        alias = f"interpreted.{name}"
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        spec = importlib.util.spec_from_file_location(alias, found.origin)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, alias, module)
        spec.loader.exec_module(module)
        yield module


def _interpret_library(patch: pytest.MonkeyPatch) -> None:
    """`tl.sum` and the like are kernels, compiled or interpreted as of when Triton was loaded."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    functions: dict[str, Any] = vars(tl)
    for name, function in list(functions.items()):
        if isinstance(function, JITFunction):
            patch.setattr(tl, name, InterpretedFunction(function.fn))


def _mend_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 takes the `int` of arrays of one element, which numpy 2.4 refuses; and of what it
    changes to call a function from a kernel, it does not change everything back."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        for one in scope:
            one.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.setattr(interpreter, "_patch_lang_tensor", patched)

    def called(function: Any, *arguments: Any, **named: Any) -> Any:
        scope = interpreter._patch_lang(function.fn)
        try:
            return function.rewrite()(*arguments, **named)
        finally:
            scope.restore()

    patch.setattr(interpreter.InterpretedFunction, "__call__", called)
