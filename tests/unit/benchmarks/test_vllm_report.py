"""The rows of the benchmark of vLLM, what is asked of them, and what vLLM is started with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks.h200.report import Report, Run, read_report, run_of, write_report
from benchmarks.h200.setup import MODELS
from benchmarks.vllm_h200.report import KINDS, run_name, verdicts
from benchmarks.vllm_h200.setup import (
    TINY,
    config_of,
    server_environment,
    server_options,
    tokenizer_of,
    write_folder,
)

SIZE_BYTES = 61 * 10**9


def ours(name: str, seconds: float, paused_s: float, **counts: float) -> Run:
    parts = {"paused_s": [paused_s], "transfer_s": [seconds - 0.02]}
    return structs.replace(run_of(name, [seconds], SIZE_BYTES, parts), counts=counts)


def test_rows_of_four_gpus_have_the_names_that_are_known() -> None:
    assert {run_name(kind, 4) for kind in KINDS} == {
        "link_h2d",
        "weightbus_host_tp4",
        "weightbus_gpu_tp4",
        "vllm_reload",
        "checkpoint_engine",
    }


def test_targets_are_held_against_what_was_measured_in_the_same_run() -> None:
    runs = [
        run_of("link_h2d", [0.33], SIZE_BYTES, {}),
        ours("weightbus_host_tp4", 0.4, 0.405, requests_failed=0, tokens_lost=0),
        ours("weightbus_gpu_tp4", 0.1, 0.2, requests_failed=1, tokens_lost=12),
        run_of("vllm_reload", [8.0], SIZE_BYTES, {}),
        run_of("checkpoint_engine", [1.6], SIZE_BYTES, {}),
    ]
    host, gpu = "weightbus_host_tp4", "weightbus_gpu_tp4"
    beside = "seconds that requests wait longer than the transfer"
    assert list(verdicts(runs)) == [
        (f"{host}: times link_h2d 1.21", True),
        (f"{host}: times as fast as checkpoint_engine 4, at least 5: missed", False),
        (f"{host}: times as fast as vllm_reload 20, at least 20", True),
        (f"{host}: {beside} 0.025, at most 0.05", True),
        (f"{host}: requests failed 0, at most 0", True),
        (f"{host}: tokens lost 0, at most 0", True),
        (f"{gpu}: times link_h2d 0.303", True),
        (f"{gpu}: times as fast as checkpoint_engine 16, at least 5", True),
        (f"{gpu}: times as fast as vllm_reload 80, at least 20", True),
        (f"{gpu}: {beside} 0.12, at most 0.05: missed", False),
        (f"{gpu}: requests failed 1, at most 0: missed", False),
        (f"{gpu}: tokens lost 12, at most 0: missed", False),
    ]


def test_nothing_is_judged_that_was_not_measured() -> None:
    rows = [run_of("weightbus_host_tp4", [], SIZE_BYTES, {}, note="ended early")]
    assert list(verdicts(rows)) == []


def test_counts_are_kept_in_the_report(tmp_path: Path) -> None:
    run = ours("weightbus_host_tp1", 0.4, 0.4, tokens_lost=0)
    report = Report(machine={}, versions={}, command="", checkpoint={}, runs=(run,))
    write_report(report, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["counts"] == {
        "tokens_lost": 0
    }
    assert read_report(tmp_path / "results.json") == report


def test_model_has_the_true_width() -> None:
    config = config_of(MODELS["qwen3-30b-a3b"])
    assert config["vocab_size"] == 151_936
    assert config["num_experts_per_tok"] == 8
    assert (config["num_experts"], config["moe_intermediate_size"]) == (128, 768)
    assert (config["num_attention_heads"], config["head_dim"]) == (32, 128)


def test_every_token_has_a_word() -> None:
    words = tokenizer_of(500)["model"]["vocab"]
    assert sorted(words.values()) == list(range(500))


def test_folder_has_no_weights(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", {**TINY, "num_hidden_layers": 2})
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("cpu", [True, False])
def test_server_leaves_gpus_to_the_trainers(cpu: bool) -> None:
    options = server_options(Path("/model"), 8000, 4, cpu=cpu)
    assert options[options.index("--tensor-parallel-size") + 1] == "4"
    assert ("--kv-cache-memory-bytes" in options) is not cpu


def test_server_decodes_eagerly_unless_it_is_to_use_graphs() -> None:
    eager = server_options(Path("/model"), 8000, 1, cpu=False)
    graphs = server_options(Path("/model"), 8000, 1, cpu=False, graphs=True)
    assert "--enforce-eager" in eager
    assert "--enforce-eager" not in graphs
    said = json.loads(graphs[graphs.index("--compilation-config") + 1])
    assert said["cudagraph_mode"] == "FULL_DECODE_ONLY"


def test_workers_find_the_benchmark_beside_what_they_found_before() -> None:
    path = server_environment(1, cpu=False, path="/site")["PYTHONPATH"].split(":")
    assert path[-1] == "/site"
    assert (Path(path[0]) / "benchmarks" / "vllm_h200").is_dir()
    assert server_environment(2, cpu=True)["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
