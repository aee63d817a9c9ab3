"""Which engine `weightbus consume` stands beside, by its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click.testing
import pytest

from weightbus.cli import consume
from weightbus.cli.engines import (
    ADMIN_KEY_VARIABLE,
    KEY_VARIABLE,
    OPTIONS_OF,
    SglangChoice,
    TorchChoice,
    VllmChoice,
)

URL = "http://127.0.0.1:8000"
VLLM = ("--engine", "vllm", "--url", URL)
SGLANG = ("--engine", "sglang", "--url", URL)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[consume.Options]:
    """What would have been run. The home directory is empty."""
    found: list[consume.Options] = []

    def run(_: Any, options: consume.Options) -> None:
        found.append(options)

    monkeypatch.setattr("anyio.run", run)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("WEIGHTBUS_NATS_URL", KEY_VARIABLE, ADMIN_KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return found


def invoke(*arguments: str) -> click.testing.Result:
    command = [*("--model", "m", "--engine-id", "e"), *arguments]
    return click.testing.CliRunner().invoke(consume.command, command)


def said(done: click.testing.Result) -> str:
    return " ".join(done.output.replace("│", " ").split())


def chosen(asked: list[consume.Options]) -> VllmChoice:
    (options,) = asked
    assert isinstance(options.engine, VllmChoice)
    return options.engine


def test_vllm_is_reached_by_its_url_with_the_careful_settings_when_nothing_else_is_said(
    asked: list[consume.Options],
) -> None:
    assert invoke(*VLLM).exit_code == 0
    choice = chosen(asked)
    assert choice.url == URL
    settings = choice.settings
    assert (settings.pause, settings.sleeping, settings.caches) == ("keep", "refuse", "reset")
    assert settings.api_key == ""
    assert asked[0].engine_dir is None, "a new directory, of mode 0700"


def test_vllm_is_treated_as_it_was_asked_for(asked: list[consume.Options], tmp_path: Path) -> None:
    options = ("--pause", "abort", "--sleeping", "wake", "--caches", "keep")
    assert invoke(*VLLM, *options, "--engine-dir", str(tmp_path)).exit_code == 0
    settings = chosen(asked).settings
    assert (settings.pause, settings.sleeping, settings.caches) == ("abort", "wake", "keep")
    assert asked[0].engine_dir == tmp_path


def test_api_key_comes_by_the_environment_alone(
    asked: list[consume.Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert invoke(*VLLM).exit_code == 0
    assert chosen(asked).settings.api_key == "secret"
    options = {option for parameter in consume.command.params for option in parameter.opts}
    assert not {option for option in options if "key" in option}


def test_sglang_is_treated_as_it_was_asked_for(
    asked: list[consume.Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "master")
    assert invoke(*SGLANG, "--pause", "abort", "--caches", "keep").exit_code == 0
    assert invoke(*SGLANG).exit_code == 0
    given, careful = (options.engine for options in asked)
    assert isinstance(given, SglangChoice)
    assert isinstance(careful, SglangChoice)
    assert (given.url, given.settings.pause, given.settings.caches) == (URL, "abort", "keep")
    assert (given.settings.api_key, given.settings.admin_key) == ("secret", "master")
    assert (careful.settings.pause, careful.settings.caches) == ("keep", "reset")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--engine", "vllm"), "--engine vllm needs --url"),
        ((*VLLM, "--architecture", "minilm"), "--architecture is an option of --engine torch"),
        ((*VLLM, "--tp", "2"), "--tp is an option of --engine torch: this is --engine vllm"),
        ((*VLLM, "--device", "cuda"), "--device is an option of --engine torch"),
        ((*VLLM, "--config", "{}"), "--config is an option of --engine torch"),
        (("--url", URL), "--url is an option of --engine vllm: this is --engine torch"),
        (("--architecture", "minilm", "--pause", "keep"), "--pause is an option of --engine vllm"),
        (("--engine-dir", "/d", "--caches", "keep"), "--caches is an option of --engine vllm"),
        (("--engine-dir", "/d", "--sleeping", "wake"), "--sleeping is an option of --engine vllm"),
        ((*VLLM, "--pause", "drop"), "'drop' is not one of"),
        (("--engine", "sglang"), "--engine sglang needs --url"),
        ((*SGLANG, "--pause", "wait"), "SGLang does not wait for requests"),
        ((*SGLANG, "--sleeping", "wake"), "--sleeping is an option of --engine vllm"),
        ((*SGLANG, "--tp", "2"), "--tp is an option of --engine torch: this is --engine sglang"),
        (("--engine", "tgi"), "'tgi' is not one of"),
        ((), "give --engine-dir of a running engine, or --architecture of a new one"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused_by_their_names(
    asked: list[consume.Options], arguments: tuple[str, ...], reason: str
) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert reason in said(done)
    assert asked == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:8000", "must be such as http://127.0.0.1:8000"),
        ("ftp://127.0.0.1", "must be such as http://127.0.0.1:8000"),
        ("http://", "must be such as http://127.0.0.1:8000"),
        ("http://host:junk", "is no URL"),
        ("http://host:99999", "is no URL"),
        ("http://host/?key=1", "must be such as http://127.0.0.1:8000"),
        ("http://me:secret@host", "credentials belong into WEIGHTBUS_ENGINE_KEY"),
    ],
)
def test_url_is_refused_when_it_cannot_be_a_server_s(
    asked: list[consume.Options], url: str, reason: str
) -> None:
    done = invoke("--engine", "vllm", "--url", url)
    assert done.exit_code == 2, done.output
    assert reason in said(done)
    assert "secret" not in done.output
    assert asked == []


def test_url_may_have_a_path_and_a_slash_at_its_end(asked: list[consume.Options]) -> None:
    assert invoke("--engine", "vllm", "--url", "https://host/vllm/").exit_code == 0
    assert chosen(asked).url == "https://host/vllm"


def test_torch_engine_that_runs_is_followed_as_before(asked: list[consume.Options]) -> None:
    assert invoke("--engine-dir", "/d", "--engine", "torch").exit_code == 0
    assert [options.engine for options in asked] == [TorchChoice()]


def test_every_option_of_a_kind_is_one_of_the_command_s() -> None:
    names = {parameter.name for parameter in consume.command.params}
    assert {name for options in OPTIONS_OF.values() for name in options} <= names
