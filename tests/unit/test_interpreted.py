"""What is changed to interpret kernels is changed back, also when a test fails."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.unit.reload.interpreted import HostAccelerator, interpreting

pytest.importorskip("triton", reason="needs Triton: pip install triton")


def test_interpreter_is_as_it_was_when_a_test_has_ended() -> None:
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    before = interpreter._patch_lang_tensor
    with interpreting():
        assert interpreter._patch_lang_tensor is not before
    assert interpreter._patch_lang_tensor is before


def test_kernels_are_those_of_the_outer_test_when_an_inner_one_has_failed() -> None:
    with interpreting():
        outer = HostAccelerator().kernels()
        with pytest.raises(ZeroDivisionError), interpreting():
            _ = 1 / 0
        assert HostAccelerator().kernels() is outer
