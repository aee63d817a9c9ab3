"""The `weightbus` command: lazy subcommands, errors as one line, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import click
import pytest
from click.testing import CliRunner

from weightbus.cli.main import COMMANDS, cli, main, run
from weightbus.schemas import MessageInvalid, WeightBusError


def raising(error: BaseException) -> click.Command:
    """A command that does nothing but raise."""

    @click.command()
    def command() -> None:
        raise error

    return command


def test_help_lists_every_command_without_importing_it() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from weightbus.cli.main import COMMANDS, cli\n"
        "out = CliRunner().invoke(cli, ['--help']).output\n"
        "assert all(name in out for name in COMMANDS), out\n"
        "loaded = [name for name in COMMANDS if f'weightbus.cli.{name}' in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_has_a_module(name: str) -> None:
    assert find_spec(f"weightbus.cli.{name}") is not None


def test_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["fly"]) == 2
    assert "No such command 'fly'" in capsys.readouterr().err


def test_command_that_is_nearly_one_is_told_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["wacth"]) == 2
    assert "No such command 'wacth'. Did you mean 'watch'?" in capsys.readouterr().err


def test_command_that_ends_well_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Weight bus messages"


def test_command_may_set_its_exit_code() -> None:
    @click.command()
    @click.pass_context
    def command(context: click.Context) -> None:
        context.exit(7)

    assert run(command, []) == 7


def test_error_of_weight_bus_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    error = MessageInvalid("CheckpointReady", "version", -1, "must be int >= 0")
    assert run(raising(error), []) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "weightbus: CheckpointReady: version is -1: must be int >= 0\n"


def test_error_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(WeightBusError("first\n  second")), []) == 1
    assert capsys.readouterr().err == "weightbus: first second\n"


def test_errors_of_a_task_group_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    inner = ExceptionGroup("inner", [WeightBusError("lost"), WeightBusError("late")])
    group = ExceptionGroup("outer", [WeightBusError("lost"), inner])
    assert run(raising(group), []) == 1
    assert capsys.readouterr().err == "weightbus: lost\nweightbus: late\n"


def test_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), [])
    group = ExceptionGroup("outer", [WeightBusError("lost"), ZeroDivisionError()])
    with pytest.raises(ExceptionGroup):
        run(raising(group), [])


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        BaseExceptionGroup("tasks", [KeyboardInterrupt(), WeightBusError("closed")]),
    ],
    ids=["alone", "in a task group"],
)
def test_interrupt_exits_with_130(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error), []) == 130
    assert capsys.readouterr().err.strip() == "weightbus: interrupted"


def test_command_names_the_extra_to_install_when_a_package_is_missing() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['numpy'] = sys.modules['zmq'] = None\n"
        "from weightbus.cli.main import cli, run\n"
        "sys.exit(run(cli, ['consume', '--help']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"weightbus: this command needs \w+: pip install 'weightbus\[torch\]'\n", done.stderr
    )


def test_missing_package_of_no_extra_keeps_its_traceback() -> None:
    with pytest.raises(ModuleNotFoundError):
        run(raising(ModuleNotFoundError("gone", name="gone")), [])


def test_main_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["weightbus", "--version"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0


def test_schema_prints_asyncapi_for_a_prefix() -> None:
    result = CliRunner().invoke(cli, ["schema", "--format", "asyncapi", "--prefix", "lab"])
    document = json.loads(result.output)
    assert document["channels"]["checkpoint.ready"]["address"] == "lab.{model}.checkpoint.ready"


def test_schema_refuses_a_prefix_that_is_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["schema", "--format", "asyncapi", "--prefix", "a.b"]) == 1
    assert capsys.readouterr().err.startswith("weightbus: subject token: prefix is a.b")
