"""The form of the benchmark's results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.h200.memory import Samples
from benchmarks.h200.report import Report, read_report, run_of, verdicts, write_report
from benchmarks.h200.runs import KINDS, kind_of, run_name
from benchmarks.h200.setup import MODELS, sources_of
from benchmarks.h200.trainer import owned_by, slice_of


def test_report_has_the_fields_that_readers_know(tmp_path: Path) -> None:
    run = run_of("host_tp4", [0.3, 0.4, 0.35], 61_064_245_248, {"pause_s": [0.1, 0.2, 0.3]})
    report = Report(machine={}, versions={}, command="", checkpoint={}, runs=(run,))
    path = tmp_path / "below" / "results.json"
    write_report(report, path)
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "versions", "command", "checkpoint", "runs"}
    assert written["runs"] == [
        {
            "name": "host_tp4",
            "median_s": 0.35,
            "min_s": 0.3,
            "max_s": 0.4,
            "gb": 61.0642,
            "extra_gpu_bytes": None,
            "parts": {"pause_s": 0.2},
            "repetitions": [0.3, 0.4, 0.35],
        }
    ]
    assert read_report(path) == report


def test_run_without_figures_says_why() -> None:
    run = run_of("ce_broadcast", [], 1000, {"update_s": []}, note="not installed")
    assert (run.median_s, run.parts, run.note) == (None, {}, "not installed")


def test_extra_memory_is_that_of_the_gpu_that_needs_most_of_it_since_the_event() -> None:
    samples = Samples([(1, [900, 100]), (5, [110, 130]), (6, [150, 120])])
    assert samples.over([100, 100], since_ns=5) == 50
    assert samples.over([100, 100]) == 800


@pytest.mark.parametrize(
    ("model", "tensors", "gb"), [("qwen3-30b-a3b", 18_867, 61.06), ("qwen3-32b", 707, 65.5)]
)
def test_trainers_share_all_tensors_about_evenly(model: str, tensors: int, gb: float) -> None:
    sources = sources_of(MODELS[model])
    parts = [owned_by(sources, rank, 4) for rank in range(4)]
    assert [source for part in parts for source in part] == sources
    assert len(sources) == tensors
    total = sum(source.size_bytes for source in sources)
    assert total / 1e9 == pytest.approx(gb, abs=0.05)
    for part in parts:
        assert sum(source.size_bytes for source in part) == pytest.approx(total / 4, rel=0.07)


def test_slices_hold_every_row_once_when_they_cannot_be_even() -> None:
    source = sources_of(MODELS["qwen3-32b"])[0]
    rows = [row for rank in range(5) for row in slice_of(source, rank, 5)]
    assert rows == list(range(source.shape[0]))


def test_targets_are_held_against_what_was_measured_in_the_same_run() -> None:
    parts = {"event_to_plan_s": [0.004], "transfer_s": [0.35], "undigested_transfer_s": [0.34]}
    runs = [
        run_of("link_h2d", [0.33], 61 * 10**9, {}),
        run_of("ce_broadcast", [2.5], 61 * 10**9, {}),
        run_of("host_tp4", [0.36], 61 * 10**9, parts, extra_gpu_bytes=20 * 2**20),
        run_of(
            "host_tp2dp2",
            [0.45],
            61 * 10**9,
            {"event_to_plan_s": [0.02]},
            extra_gpu_bytes=900 * 2**20,
            page_table_bytes=200 * 2**20,
        ),
    ]
    assert list(verdicts(runs)) == [
        ("host_tp4: times link_h2d 1.091, at most 1.15", True),
        ("host_tp4: of checkpoint-engine's time 0.144, at most 0.2", True),
        ("host_tp4: share of the transfer that the digest adds 0.02941, at most 0.05", True),
        ("host_tp4: MiB of extra GPU memory 20, at most 16: missed", False),
        ("host_tp4: seconds from the event to the plan 0.004, at most 0.01", True),
        ("host_tp2dp2: seconds 0.45, at most 0.42: missed", False),
        (
            "host_tp2dp2: MiB of extra GPU memory, without 200 of page tables, 700, at most 768",
            True,
        ),
        ("host_tp2dp2: seconds from the event to the plan 0.02, at most 0.01: missed", False),
    ]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_runs_are_called_after_how_many_gpus_there_are(devices: int) -> None:
    names = [run_name(kind, devices) for kind in KINDS]
    assert [kind_of(name) for name in names] == list(KINDS)
    assert len(set(names)) == len(names)


def test_runs_of_four_gpus_have_the_names_that_are_known() -> None:
    assert {run_name(kind, 4) for kind in KINDS} == {
        "ce_broadcast",
        "gpu_tp4",
        "host_tp2dp2",
        "host_tp4",
        "link_h2d",
        "link_peer",
        "staged_2hosts",
    }


def test_name_of_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="'host_tq4' is the name of no run"):
        kind_of("host_tq4")
