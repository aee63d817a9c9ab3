"""What travels in a call of SGLang's: constant bytes around a turn as JSON."""

from __future__ import annotations

import base64

import msgspec
import pytest

from tests.integration.engines.sglang.stand_in import payload_name
from weightbus.consumers.engines.sglang.payload import SglangTurn, serialised_turn
from weightbus.consumers.engines.turns import Turn


@pytest.mark.parametrize("directory", ["/run/engine", "/home/é/ü", "/" + 4000 * "x"])
def test_payload_says_the_turn_and_calls_nothing_but_an_empty_tensor(directory: str) -> None:
    turn = SglangTurn(directory=directory, turn=Turn(numbers=(7, -1, 2**60), wait_s=5.0))
    name = payload_name(base64.b64decode(serialised_turn(turn), validate=True))
    assert msgspec.json.decode(name, type=SglangTurn) == turn


def test_payload_is_these_bytes() -> None:
    """They were given to the unpicklers of SGLang 0.5.6, 0.5.10, 0.5.15 and 0.5.23: each makes of
    them one pair of the text and an empty tensor."""
    turn = SglangTurn(directory="/e", turn=Turn(numbers=(1,), wait_s=0.5))
    said = b'{"directory":"/e","turn":{"numbers":[1],"wait_s":0.5}}'
    assert base64.b64decode(serialised_turn(turn)) == (
        b"\x80\x02]X" + bytes([len(said), 0, 0, 0]) + said + b"ctorch\nTensor\n)R\x86a."
    )
