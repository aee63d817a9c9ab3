"""The route `local` beside a file server that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest

from weightbus.consumers.errors import DeadlineExceeded
from weightbus.consumers.transfer.local import LocalRoute
from weightbus.consumers.transfer.route import Transfer
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import Placement, Segment

pytestmark = pytest.mark.anyio

SHORT_S = 0.05
NEVER = cast(Any, None)


class HungRoute(LocalRoute):
    """Its files are on a server that hangs until the test has ended."""

    def __init__(self) -> None:
        super().__init__("host")
        self.answered = threading.Event()

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        self.answered.wait()
        return ()


async def test_transfer_ends_untouched_at_its_deadline_when_files_cannot_be_reached() -> None:
    began = []

    async def begin_write() -> None:
        began.append(True)

    route = HungRoute()
    transfer = Transfer(
        engine=NEVER,
        ranks=(0,),
        version=1,
        layout=Layout((), (), ()),
        layout_digest="0" * 64,
        placement=(),
        plan=NEVER,
        begin_write=begin_write,
        deadline_s=SHORT_S,
    )
    try:
        with pytest.raises(DeadlineExceeded) as caught:
            await route.transfer(transfer)
        assert not route.answered.is_set()
    finally:
        route.answered.set()
    assert not caught.value.touched
    assert not began
