"""The benchmark of GPUs, on CPUs: the same flow through the same processes, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
END_S = 280
PARTS = {
    "event_to_plan_s",
    "pause_s",
    "transfer_s",
    "resume_s",
    "publish_s",
    "blocked_s",
    "undigested_s",
}


@pytest.mark.timeout(300)
def test_every_kind_of_run_is_measured_and_checked_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.h200", "--cpu", "--layers", "1"]
    options = ["--repetitions", "1", "--budget", str(END_S), "--output", str(output)]
    runs = ["--only", "link_h2d,link_peer,ce_broadcast,host_tp,staged_2hosts"]
    ended = subprocess.run(
        [*command, *options, *runs], cwd=ROOT, capture_output=True, text=True, timeout=END_S
    )
    assert ended.returncode == 0, ended.stderr
    written = json.loads(output.read_text())
    found = {run["name"]: run for run in written["runs"]}
    for name in ("link_h2d", "link_peer", "host_tp2", "staged_2hosts"):
        run = found[name]
        assert run["median_s"] is not None, f"{run}\n{ended.stdout}"
        assert 0 < run["min_s"] <= run["median_s"] <= run["max_s"]
        assert "early" not in run.get("note", ""), f"{run}\n{ended.stdout}"
        assert run["name"] in ended.stdout
    assert set(found["host_tp2"]["parts"]) >= PARTS
    assert found["host_tp2"]["extra_gpu_bytes"] is None
    assert found["ce_broadcast"]["median_s"] is None
    assert "needs GPUs" in found["ce_broadcast"]["note"]
