"""Our end in a worker of vLLM, without vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm import plugin
from weightbus.consumers.engines.vllm.extension import WeightBusExtension
from weightbus.consumers.engines.vllm.status import (
    WorkerStatus,
    forget_statuses,
    read_status,
)
from weightbus.consumers.engines.vllm.worker import VllmWorker, drafts_from_checkpoint


def config(*, copies: int = 1, draft: Any = None) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(model="/models/one"),
        speculative_config=draft and SimpleNamespace(draft_model_config=draft),
        parallel_config=SimpleNamespace(rank=0, world_size=1, data_parallel_size=copies),
    )


def test_status_tells_the_refusal_when_the_engine_is_data_parallel(short_path: Path) -> None:
    worker = VllmWorker(config(copies=2), nn.Linear(1, 1), torch.device("cpu"))
    worker.open(str(short_path))
    status = read_status(short_path, 0)
    assert status is not None
    assert "/models/one" in status.error
    assert "data parallel (2 copies)" in status.error


def test_status_tells_the_refusal_when_the_directory_is_open_to_others(short_path: Path) -> None:
    short_path.chmod(0o755)
    worker = VllmWorker(config(), nn.Linear(1, 1), torch.device("cpu"))
    worker.open(str(short_path))
    status = read_status(short_path, 0)
    assert status is not None
    assert "mode 0755" in status.error
    worker.open(str(short_path / "absent"))
    assert read_status(short_path / "absent", 0) is None


def test_status_tells_the_refusal_when_sleep_cannot_be_followed(short_path: Path) -> None:
    sleeping = config()
    sleeping.model_config.sleep_mode_backend = "snapshot"
    worker = VllmWorker(sleeping, nn.Linear(1, 1), torch.device("cpu"))
    worker.open(str(short_path))
    assert read_status(short_path, 0) == WorkerStatus(rank=0)
    worker.close()
    sleeping.model_config.enable_sleep_mode = True
    worker.open(str(short_path))
    status = read_status(short_path, 0)
    assert status is not None
    assert "its sleep-mode backend is snapshot" in status.error
    assert "must be cumem, or off" in status.error


def test_status_tells_whether_a_session_is_open(short_path: Path) -> None:
    worker = VllmWorker(config(), nn.Linear(1, 1), torch.device("cpu"))
    worker.note_session(True)
    worker.open(str(short_path))
    assert read_status(short_path, 0) == WorkerStatus(rank=0, session=True)
    worker.note_session(False)
    assert read_status(short_path, 0) == WorkerStatus(rank=0, session=False)
    forget_statuses(short_path, 1)
    assert read_status(short_path, 0) is None
    worker.close()


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        (None, False),
        (SimpleNamespace(model="/models/one"), True),
        (SimpleNamespace(model="/models/drafter"), False),
    ],
    ids=["none", "of the same checkpoint", "of another"],
)
def test_drafter_needs_updates_when_it_is_made_of_the_same_checkpoint(
    draft: Any, expected: bool
) -> None:
    assert drafts_from_checkpoint(config(draft=draft)) is expected


def test_drafter_needs_no_updates_when_it_is_the_model_itself() -> None:
    drafts = config()
    drafts.speculative_config = SimpleNamespace(draft_model_config=drafts.model_config)
    assert not drafts_from_checkpoint(drafts)


def test_extension_raises_nothing_when_it_is_given_no_turn(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extension = WeightBusExtension()
    turn = '{"numbers": [-1], "wait_s": 0}'
    extension.weightbus_turn(turn)
    assert "no consumer has opened" in caplog.text
    model = nn.Linear(1, 1)
    extension.__dict__.update(
        vllm_config=config(),
        device=torch.device("cpu"),
        model_runner=SimpleNamespace(get_model=lambda: model),
    )
    extension.weightbus_open(str(short_path))
    extension.weightbus_turn('{"numbers": "all"}')
    assert "not a turn" in caplog.text
    caplog.clear()
    extension.weightbus_turn(turn)
    assert not caplog.text
    extension.weightbus_turn('{"numbers": [-1, -1], "wait_s": 0}')
    assert "there are 1" in caplog.text


LOST = """
import multiprocessing, sys
from types import SimpleNamespace
import torch
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.worker import VllmWorker
from weightbus.consumers.errors import DeviceLost

class Taker:
    lost = DeviceLost("cuda:0", "illegal access")
    def take(self, turn): print("took", flush=True)
    def disconnect(self): print("said so", flush=True)

def serve():
    parallel = SimpleNamespace(rank=0, world_size=1, data_parallel_size=1)
    config = SimpleNamespace(
        model_config=None, speculative_config=None, parallel_config=parallel
    )
    worker = VllmWorker(config, torch.nn.Linear(1, 1), torch.device("cpu"))
    worker._taker = Taker()
    try:
        worker.take(Turn(numbers=(-1,), wait_s=0))
    except DeviceLost as error:
        print("raised", error, flush=True)

if sys.argv[1] == "process":
    process = multiprocessing.get_context("fork").Process(target=serve)
    process.start()
    process.join(60)
    sys.exit(process.exitcode)
serve()
"""


@pytest.mark.parametrize(("where", "status"), [("process", 1), ("inside", 0)])
def test_worker_ends_when_its_device_is_lost_unless_it_is_the_users_process(
    where: str, status: int
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOST, where],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.split("\n")[:2] == ["took", "said so"]
    assert ("raised device cuda:0 is lost" in ended.stdout) == (where == "inside")


def test_plugin_does_nothing_when_there_is_no_vllm() -> None:
    code = f"import sys; sys.modules['vllm'] = None; import {plugin.__name__} as plugin\n"
    subprocess.run(
        [sys.executable, "-c", f"{code}plugin.register(); plugin.register()"],
        check=True,
        timeout=120,
    )


def test_consumers_side_starts_without_vllm_and_without_an_http_client() -> None:
    code = (
        "import sys\nsys.modules['vllm'] = sys.modules['httpx'] = None\n"
        "import weightbus.consumers.engines.vllm.engine\n"
        "import weightbus.consumers.engines.vllm.handle\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_turn_of_nobody_is_taken_in_silence(short_path: Path) -> None:
    place = EngineDirectory(short_path / "engine")
    place.prepare()
    worker = VllmWorker(config(), nn.Linear(1, 1), torch.device("cpu"))
    worker.open(str(place.path))
    worker.take(Turn(numbers=(-1,), wait_s=0.0))
    worker.close()
