"""What a call of SGLang's `/update_weights_from_tensor` carries: a turn, and no tensor. No I/O.

SGLang hands every tensor-parallel rank a list of (name, tensor) that the caller has serialised in
the format of Python's pickle, one byte string per rank, and gives it to the weight loader that
`load_format` names. Our list has one entry: its name is a `SglangTurn` as JSON, its tensor empty.
The bytes around the name are constant, so nothing is pickled here; and nothing is unpickled by us:
SGLang does that, in its own process, and gives the loader the name.
"""

from __future__ import annotations

import base64
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from weightbus.consumers.engines.turns import Turn

__all__ = ("LOADER", "SglangTurn", "serialised_turn")

LOADER: Final = "weightbus.consumers.engines.sglang.loader.take_turn"
"""What `--custom-weight-loader` and `load_format` name."""

_BEFORE: Final = b"\x80\x02]X"
"""Protocol 2; an empty list; a text whose size in bytes follows, little endian, in 4 bytes."""

_AFTER: Final = b"ctorch\nTensor\n)R\x86a."
"""`torch.Tensor` called with nothing; a pair of the text and that; appended to the list; the end.
Every version of SGLang that was looked at lets its unpickler find `torch.Tensor`."""


class SglangTurn(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn, and where its consumer is: workers that were started anew need no other call."""

    directory: Annotated[str, Meta(min_length=1, max_length=4096)]
    turn: Turn


def serialised_turn(turn: SglangTurn) -> str:
    """One rank's element of `serialized_named_tensors`: base64, as it travels in JSON."""
    name = msgspec.json.encode(turn)
    return base64.b64encode(_BEFORE + len(name).to_bytes(4, "little") + name + _AFTER).decode(
        "ascii"
    )
