"""What is asked of an SGLang engine before it is taken, and why it is refused."""

from __future__ import annotations

from typing import cast

import anyio
import pytest

from tests.integration.engines.harness import LONG_S
from tests.integration.engines.sglang.setting import Consumers
from tests.integration.engines.sglang.stand_in import ROUTES, Answer, Rank, Route
from weightbus.consumers.engines.sglang.engine import SglangSettings
from weightbus.consumers.engines.sglang.worker import SglangWorker
from weightbus.consumers.errors import EngineUnavailable

pytestmark = pytest.mark.anyio


async def refusal(consumers: Consumers, settings: SglangSettings | None = None) -> str:
    """Why a consumer does not take the engine."""
    with pytest.raises(EngineUnavailable) as raised:
        async with consumers.open(settings):
            pass
    return str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dp_size", 2),
        ("attn_dp_size", 2),
        ("pp_size", 2),
        ("nnodes", 2),
        ("tokenizer_worker_num", 4),
        ("speculative_algorithm", "EAGLE"),
        ("enable_lora", True),
        ("enable_memory_saver", True),
        ("weight_cache_mode", "client"),
        ("cpu_offload_gb", 8),
        ("offload_group_size", 2),
        ("enable_eplb", True),
        ("elastic_ep_backend", "mooncake"),
        ("torchao_config", "int4wo-128"),
        ("disaggregation_mode", "decode"),
        ("hicache_storage_backend", "file"),
    ],
)
async def test_engine_is_refused_before_it_is_paused_when_it_was_started_with(
    consumers: Consumers, field: str, value: object
) -> None:
    consumers.stand_in.started_as[field] = value
    assert f"{field}={value!r}" in await refusal(consumers)
    assert consumers.stand_in.paths == []


async def test_engine_is_refused_when_it_was_started_without_our_loader(
    consumers: Consumers,
) -> None:
    consumers.stand_in.started_as["custom_weight_loader"] = ["other.loader"]
    assert "--custom-weight-loader weightbus." in await refusal(consumers)
    assert consumers.stand_in.paths == []


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weights_from_tensor"])
async def test_engine_is_refused_when_it_lacks_an_endpoint(consumers: Consumers, path: str) -> None:
    del consumers.stand_in.routes[path]
    assert f"has no {path}" in await refusal(consumers)


async def test_engine_is_refused_when_a_pause_would_end_every_request(
    consumers: Consumers,
) -> None:
    assert ROUTES["/pause_generation"].fields is not None
    consumers.stand_in.routes["/pause_generation"] = Route("POST")
    assert "one way to pause" in await refusal(consumers)
    assert consumers.stand_in.paths == []


async def test_engine_is_refused_when_it_does_not_say_what_it_has(consumers: Consumers) -> None:
    consumers.stand_in.refusals["/openapi.json"] = Answer(404, {"detail": "Not Found"})
    assert "DISABLE_OPENAPI_DOC" in await refusal(consumers)


@pytest.mark.parametrize("key", ["", "guessed"])
async def test_engine_is_refused_at_once_when_the_key_is_wrong(
    consumers: Consumers, key: str
) -> None:
    consumers.stand_in.api_key = "secret"
    with anyio.fail_after(LONG_S / 2):
        said = await refusal(consumers, SglangSettings(api_key=key))
    assert "401" in said
    assert "--api-key" in said
    assert "secret" not in said


async def test_engine_is_left_alone_when_the_admin_key_is_wrong(consumers: Consumers) -> None:
    consumers.stand_in.api_key, consumers.stand_in.admin_key = "secret", "master"
    said = await refusal(consumers, SglangSettings(api_key="secret"))
    assert "--admin-api-key" in said
    assert not consumers.stand_in.paused


@pytest.mark.parametrize(
    ("api_key", "admin_key"), [("secret", ""), ("secret", "master"), ("", "master")]
)
async def test_engine_is_updated_when_the_keys_are_right(
    consumers: Consumers, api_key: str, admin_key: str
) -> None:
    consumers.stand_in.api_key, consumers.stand_in.admin_key = api_key, admin_key
    async with consumers.prepared(SglangSettings(api_key=api_key, admin_key=admin_key)) as (
        _engine,
        updates,
    ):
        await updates.update(1)


async def test_engine_is_refused_when_it_has_another_consumer(consumers: Consumers) -> None:
    async with consumers.open():
        assert "another process is bound" in await refusal(consumers)
    assert not consumers.stand_in.paused


class _Failing:
    """A worker whose turns all come to nothing before it can say so."""

    def take(self, message: str) -> None:
        raise OSError("no such file")

    def close(self) -> None:
        pass


async def test_engine_goes_on_and_its_log_is_pointed_to_when_a_rank_does_not_connect(
    consumers: Consumers,
) -> None:
    stand_in = consumers.stand_in
    stand_in.restart([stand_in.ranks[0], Rank(lambda: cast(SglangWorker, _Failing()))])
    said = await refusal(consumers)
    assert "rank 1" in said
    assert "log" in said
    assert not stand_in.paused


async def test_engine_is_refused_when_nothing_answers(consumers: Consumers) -> None:
    consumers.stand_in.stopped = True
    consumers.start_timeout_s = 0.5
    assert "not there within 0.5 s" in await refusal(consumers)
