"""What updates cost the requests that run meanwhile, and a client of vLLM that notices it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio.lowlevel
import httpx
import pytest

from benchmarks.h200.processes import BenchFailed
from benchmarks.vllm_h200.load import Arrival, Load, Window, counts_of, open_load, rate_of
from benchmarks.vllm_h200.server import Server

S = 10**9
TOKENS = 6

Answer = Callable[[httpx.Request], httpx.Response]


def test_rate_counts_the_tokens_that_came_within() -> None:
    arrivals = [Arrival(1 * S, 4), Arrival(2 * S, 4), Arrival(3 * S, 4)]
    assert rate_of(arrivals, 1 * S, 3 * S) == 4.0


def load_of(arrivals: list[Arrival], rate: float) -> Load:
    load = Load(Server("", httpx.AsyncClient()), TOKENS)
    load.arrivals, load.rate = arrivals, rate
    return load


def test_delayed_are_the_tokens_that_would_have_come_while_requests_waited_and_shortly_after() -> (
    None
):
    load = load_of([Arrival(10 * S, 3), Arrival(11 * S + S // 4, 5), Arrival(13 * S, 7)], 20.0)
    counts = counts_of(load, [Window(10 * S, 11 * S)])
    assert counts["tokens_delayed"] == 20 * 1.5 - 3 - 5


def test_requests_that_come_on_all_the_same_count_as_none_delayed() -> None:
    load = load_of([Arrival(10 * S, 100)], 20.0)
    assert counts_of(load, [Window(10 * S, 11 * S)])["tokens_delayed"] == 0
    assert "tokens_delayed" not in counts_of(load, [])


def streamed(*pieces: list[int], end: str = "data: [DONE]\n\n") -> httpx.Response:
    events = "".join(
        f"data: {json.dumps({'choices': [{'token_ids': piece}]})}\n\n" for piece in pieces
    )
    return httpx.Response(200, text=events + end)


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    async def handle(request: httpx.Request) -> httpx.Response:
        await anyio.lowlevel.checkpoint()
        return answer(request)

    transport = httpx.MockTransport(handle)
    async with httpx.AsyncClient(base_url="http://vllm", transport=transport) as client:
        yield Server("http://vllm", client)


@pytest.mark.anyio
async def test_requests_follow_each_other_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.vllm_h200.load.BASELINE_S", 0.05)
    async with (
        serving(lambda _: streamed([1, 2, 3], [4, 5], [6])) as server,
        open_load(server, TOKENS, streams=2) as load,
    ):
        assert load.rate > 0
    counts = counts_of(load, [])
    assert counts["requests"] > 2
    assert (counts["requests_failed"], counts["tokens_lost"]) == (0, 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (streamed([1], end=""), "broke off"),
        (httpx.Response(500, text="the engine is dead"), "500: the engine is dead"),
        (streamed([1], end='data: {"error": "dead"}\n\n'), "a request failed"),
    ],
    ids=["broken off", "refused", "failed"],
)
async def test_request_that_fails_is_told_with_the_tokens_that_it_lost(
    answer: httpx.Response, said: str
) -> None:
    async with serving(lambda _: answer) as server:
        load = Load(server, TOKENS)
        await load.follow(0)
        with pytest.raises(BenchFailed, match=said):
            await load.warm_up(1)
    assert len(load.failures) == 1
    assert said in load.failures[0]
    assert load.lost in (TOKENS, TOKENS - 1)


@pytest.mark.anyio
async def test_answer_that_is_too_short_is_lost_tokens() -> None:
    answers = iter([streamed([1, 2]), httpx.Response(500)])
    async with serving(lambda _: next(answers)) as server:
        load = Load(server, TOKENS)
        await load.follow(0)
    assert (load.finished, load.lost) == (0, (TOKENS - 2) + TOKENS)


@pytest.mark.anyio
async def test_call_returns_what_every_worker_returned_and_says_why_it_was_refused() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["method"] == "none":
            return httpx.Response(404, text="no  such\nmethod")
        return httpx.Response(200, json={"results": [body["args"], None]})

    async with serving(answer) as server:
        assert await server.call("both", "a", "b", deadline_s=5) == [["a", "b"], None]
        with pytest.raises(BenchFailed, match="/collective_rpc of vLLM answered 404: no such me"):
            await server.call("none", deadline_s=5)
