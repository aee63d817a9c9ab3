"""When a counter of tokens has first risen, and what is read of Prometheus' text format."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import anyio
import httpx
import pytest

from weightbus.consumers.engines.counter import HttpCounter
from weightbus.consumers.engines.http import HttpRefused, JsonServer
from weightbus.consumers.engines.tokens import (
    FIRST_POLL_S,
    LONGEST_POLL_S,
    MOST_OF_ENGINE,
    first_rise,
    total,
)
from weightbus.consumers.errors import EngineUnavailable

pytestmark = pytest.mark.anyio

LONG_S = 30.0

Count = float | None | Exception


class Counted:
    """Answers with some counts, one after the other; the last for ever."""

    def __init__(self, counts: Sequence[Count], takes_s: float = 0.0) -> None:
        self._counts = list(counts)
        self._takes_s = takes_s
        self.asked_s: list[float] = []
        self.answered_ns: list[int] = []

    async def __call__(self, deadline_s: float) -> float | None:
        assert deadline_s > 0
        self.asked_s.append(anyio.current_time())
        await anyio.sleep(self._takes_s)
        self.answered_ns.append(time.time_ns())
        found = self._counts.pop(0) if len(self._counts) > 1 else self._counts[0]
        if isinstance(found, Exception):
            raise found
        return found


def never() -> bool:
    return False


async def test_first_rise_is_seen_by_the_look_after_it() -> None:
    counted = Counted([7.0, 7.0, 7.0, 9.0])
    seen = await first_rise(counted, never, LONG_S)
    assert seen is not None
    assert len(counted.asked_s) == 4
    assert counted.answered_ns[3] <= seen.at_ns <= time.time_ns()
    least_ns = counted.answered_ns[3] - counted.answered_ns[2]
    assert least_ns <= seen.resolution_ns <= seen.at_ns - counted.answered_ns[1]


async def test_resolution_is_a_duration_when_the_wall_clock_is_set_back_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    falling = itertools.count(10**18, -(10**12))
    monkeypatch.setattr(time, "time_ns", lambda: next(falling))
    seen = await first_rise(Counted([7.0, 9.0]), never, LONG_S)
    assert seen is not None
    assert 0 < seen.resolution_ns < LONG_S * 1e9


async def test_rise_may_be_as_old_as_the_watch_when_the_first_look_might_have_missed_it() -> None:
    began_ns = time.time_ns()
    counted = Counted([7.0, 9.0], takes_s=0.05)
    seen = await first_rise(counted, never, LONG_S)
    assert seen is not None
    assert seen.resolution_ns >= counted.answered_ns[1] - counted.answered_ns[0] + 0.05e9 * 0.9
    assert seen.at_ns - seen.resolution_ns >= began_ns


async def test_looks_become_rarer_when_nothing_runs() -> None:
    counted = Counted([1.0])
    assert await first_rise(counted, never, 1.5) is None
    pauses = [after - before for before, after in itertools.pairwise(counted.asked_s)]
    assert pauses[0] >= FIRST_POLL_S
    assert len(counted.asked_s) < 1.5 / FIRST_POLL_S / 3
    assert max(pauses[:-1]) > 4 * FIRST_POLL_S
    assert LONGEST_POLL_S > 4 * FIRST_POLL_S


async def test_engine_is_asked_for_a_small_share_of_its_time_when_its_answers_take_long() -> None:
    counted = Counted([1.0], takes_s=0.02)
    await first_rise(counted, never, 1.0)
    assert len(counted.asked_s) * 0.02 <= 1.0 * MOST_OF_ENGINE + 2 * 0.02


@pytest.mark.parametrize(
    "counts",
    [[None], [EngineUnavailable("a", "it is gone")], [7.0, 3.0], [7.0, None]],
    ids=["not told", "refused", "started anew", "told no more"],
)
async def test_nothing_is_seen_and_nobody_asked_again_when_there_is_nothing_to_see(
    counts: list[Count],
) -> None:
    counted = Counted(counts)
    assert await first_rise(counted, never, LONG_S) is None
    assert len(counted.asked_s) == len(counts)


async def test_watch_ends_without_a_token_when_the_engine_is_paused() -> None:
    counted = Counted([7.0, 9.0])
    assert await first_rise(counted, lambda: len(counted.asked_s) == 2, LONG_S) is None


TEXT = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="a } b\\" 5"} 12.0
vllm:generation_tokens_total{engine="1",model_name="m"} 1.5e+02 1395066363000
vllm:generation_tokens_created{engine="0",model_name="m"} 1.79e+09
vllm:other_total 4.0
vllm:strange_total{a="b"} NaN
vllm:strange_total{a="c"} many
"""


def test_samples_of_a_name_are_added_up_over_all_labels() -> None:
    assert total(TEXT, ["vllm:generation_tokens_total"]) == 162.0
    assert total(TEXT, ["vllm:generation_tokens_total", "vllm:other_total"]) == 166.0


@pytest.mark.parametrize("name", ["vllm:generation_tokens", "vllm:strange_total", "engine"])
def test_nothing_is_added_up_when_there_is_no_such_number(name: str) -> None:
    assert total(TEXT, [name]) is None


class Server:
    """Shows what it is told to, chosen or whole."""

    def __init__(self, whole: str, *, can_choose: bool, is_mounted: bool = True) -> None:
        self.whole, self.can_choose, self.is_mounted = whole, can_choose, is_mounted
        self.queries: list[str] = []
        self.refusals = 0
        """Requests of some counters alone that are refused."""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.queries.append(request.url.query.decode())
        is_mount = request.url.path == "/metrics/"
        assert is_mount or request.url.path == "/metrics"
        if is_mount and not self.is_mounted:
            return httpx.Response(404)
        if is_mount and self.refusals:
            self.refusals -= 1
            return httpx.Response(503)
        assert request.headers["Authorization"] == "Bearer secret"
        names = request.url.params.get_list("name[]")
        if not (names and is_mount):
            return httpx.Response(200, text=self.whole)
        lines = self.whole.splitlines() if self.can_choose else ()
        chosen = [line for line in lines if line.partition("{")[0] in names]
        return httpx.Response(200, text="".join(f"{line}\n" for line in chosen))


async def read(server: Server, names: tuple[str, ...], times: int = 1) -> list[float | None]:
    transport = httpx.MockTransport(server.answer)
    async with httpx.AsyncClient(base_url="http://a", transport=transport) as client:
        counter = HttpCounter(JsonServer("http://a", client), names, "secret")
        return [await counter.read(LONG_S) for _ in range(times)]


async def test_counter_is_asked_for_alone_where_it_can_be() -> None:
    server = Server(TEXT, can_choose=True)
    assert await read(server, ("vllm:generation_tokens_total",), 2) == [162.0, 162.0]
    assert server.queries == 2 * ["name%5B%5D=vllm%3Ageneration_tokens_total"]


@pytest.mark.parametrize("is_mounted", [True, False])
async def test_all_metrics_are_asked_for_when_the_server_cannot_choose(is_mounted: bool) -> None:
    server = Server(TEXT, can_choose=False, is_mounted=is_mounted)
    assert await read(server, ("vllm:generation_tokens_total",), 2) == [162.0, 162.0]
    assert server.queries[1:] == ["", ""]


async def test_counter_is_asked_for_alone_again_when_that_was_refused_for_a_moment() -> None:
    server = Server(TEXT, can_choose=True)
    server.refusals = 1
    assert await read(server, ("vllm:generation_tokens_total",), 3) == [162.0, 162.0, 162.0]
    alone = "name%5B%5D=vllm%3Ageneration_tokens_total"
    assert server.queries == [alone, "", alone, alone]


async def test_nothing_was_counted_yet_when_the_engine_shows_other_metrics_only() -> None:
    server = Server(TEXT, can_choose=False)
    assert await read(server, ("vllm:not_yet_total",)) == [0.0]


async def test_nothing_is_counted_when_the_engine_shows_no_metrics_of_its_own() -> None:
    server = Server("# nothing\nhttp_requests_total 4.0\n", can_choose=False)
    assert await read(server, ("vllm:generation_tokens_total",)) == [None]


async def test_counter_is_refused_when_the_engine_has_no_metrics() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"detail": "Not Found"})

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(base_url="http://a", transport=transport) as client:
        with pytest.raises(HttpRefused, match="404: Not Found"):
            await HttpCounter(JsonServer("http://a", client), ("a:b",)).read(LONG_S)
