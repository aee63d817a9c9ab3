"""The gate in front of the ranks."""

from __future__ import annotations

import anyio
import pytest

from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.engines.torch.gate import Gate
from weightbus.consumers.errors import DeadlineExceeded

pytestmark = pytest.mark.anyio

LONG_S = 30.0


class Visitor:
    """A request that stays inside until it is told to go."""

    def __init__(self, gate: Gate, log: list[str], name: str) -> None:
        self.gate, self.log, self.name = gate, log, name
        self.go = anyio.Event()

    async def visit(self) -> None:
        async with self.gate.enter(LONG_S):
            self.log.append(f"{self.name} on {self.gate.version}")
            await self.go.wait()
            self.log.append(f"{self.name} leaves")


async def test_request_waits_when_gate_was_never_opened() -> None:
    gate = Gate(max_waiting=8)
    with pytest.raises(DeadlineExceeded, match="the engine is paused"):
        async with gate.enter(0.01):
            pass
    assert gate.waiting == 0


async def test_requests_enter_one_at_a_time_and_in_order_when_open() -> None:
    gate = Gate(max_waiting=8)
    log: list[str] = []
    visitors = [Visitor(gate, log, name) for name in "abc"]
    async with anyio.create_task_group() as tasks:
        for visitor in visitors:
            tasks.start_soon(visitor.visit)
            await anyio.wait_all_tasks_blocked()
        assert gate.waiting == 3
        gate.open(4)
        for visitor in visitors:
            await anyio.wait_all_tasks_blocked()
            assert log[-1] == f"{visitor.name} on 4"
            visitor.go.set()
    assert log == ["a on 4", "a leaves", "b on 4", "b leaves", "c on 4", "c leaves"]


async def test_close_returns_after_the_running_request_when_one_is_inside() -> None:
    gate = Gate(max_waiting=8)
    log: list[str] = []
    gate.open(1)
    running, waiting = Visitor(gate, log, "a"), Visitor(gate, log, "b")

    async def close() -> None:
        await gate.close()
        log.append("closed")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.visit)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(close)
        tasks.start_soon(waiting.visit)
        await anyio.wait_all_tasks_blocked()
        assert log == ["a on 1"]
        running.go.set()
        await anyio.wait_all_tasks_blocked()
        assert log == ["a on 1", "a leaves", "closed"]
        gate.open(2)
        waiting.go.set()
    assert log[3:] == ["b on 2", "b leaves"]


async def test_gate_is_open_again_when_closing_was_given_up() -> None:
    gate = Gate(max_waiting=8)
    log: list[str] = []
    gate.open(1)
    running, later = Visitor(gate, log, "a"), Visitor(gate, log, "b")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.visit)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.01) as scope:
            await gate.close()
        assert scope.cancelled_caught
        assert not gate.closed
        running.go.set()
        later.go.set()
        tasks.start_soon(later.visit)
    assert log[-1] == "b leaves"


async def test_gate_stays_closed_when_closing_twice_was_given_up_once() -> None:
    gate = Gate(max_waiting=8)
    log: list[str] = []
    gate.open(1)
    running = Visitor(gate, log, "a")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.visit)
        await anyio.wait_all_tasks_blocked()
        gate.close_nowait()
        with anyio.move_on_after(0.01):
            await gate.close()
        assert gate.closed
        running.go.set()


async def test_request_that_waits_is_let_in_when_gate_was_reset_and_opened_again() -> None:
    gate = Gate(max_waiting=8)
    log: list[str] = []
    visitor = Visitor(gate, log, "a")
    visitor.go.set()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(visitor.visit)
        await anyio.wait_all_tasks_blocked()
        gate.reset()
        await anyio.wait_all_tasks_blocked()
        assert log == []
        gate.open(4)
        await anyio.wait_all_tasks_blocked()
        assert log == ["a on 4", "a leaves"]


async def test_gate_stays_closed_when_reset_while_closing_was_given_up() -> None:
    gate = Gate(max_waiting=8)
    log: list[str] = []
    gate.open(1)
    running = Visitor(gate, log, "a")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.visit)
        await anyio.wait_all_tasks_blocked()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as closing:
                closing.start_soon(gate.close)
                await anyio.wait_all_tasks_blocked()
                gate.reset()
                scope.cancel()
        assert gate.closed
        assert gate.version == -1
        running.go.set()


async def test_request_is_refused_when_too_many_wait() -> None:
    gate = Gate(max_waiting=1)
    async with anyio.create_task_group() as tasks:
        first = Visitor(gate, [], "a")
        tasks.start_soon(first.visit)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RequestRefused, match="requests that wait is 1"):
            async with gate.enter(LONG_S):
                pass
        tasks.cancel_scope.cancel()
    assert gate.waiting == 0


async def test_turn_is_passed_on_when_a_waiting_request_gives_up() -> None:
    gate = Gate(max_waiting=8)
    log: list[str] = []
    impatient, patient = Visitor(gate, log, "a"), Visitor(gate, log, "b")
    patient.go.set()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as leaving:
                leaving.start_soon(impatient.visit)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(patient.visit)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        gate.open(3)
    assert log == ["b on 3", "b leaves"]


async def test_gate_is_empty_again_when_a_request_fails_inside() -> None:
    gate = Gate(max_waiting=8)
    gate.open(1)
    with pytest.raises(ZeroDivisionError):
        async with gate.enter(LONG_S):
            raise ZeroDivisionError
    with anyio.fail_after(LONG_S):
        await gate.close()
