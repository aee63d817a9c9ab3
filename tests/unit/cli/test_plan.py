"""`weightbus plan`: what is printed is what docs/cost-model.md derives."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import click.testing
import msgspec
import pytest

from tests.contract.examples import LAYOUT
from weightbus.cli.plan import command
from weightbus.schemas import RoundPlan, encode, encode_layout

ROOT = Path(__file__).parents[3]
FLEET = ROOT / "examples" / "fleets" / "kimi-k2-32x8.json"
GUIDE = (ROOT / "docs" / "cost-model.md").read_text()
KIMI = ("--model", "kimi-k2-fp8")


def run(*arguments: object) -> str:
    done = click.testing.CliRunner().invoke(command, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def explained(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def fleet_file(path: Path, **engine: object) -> Path:
    fleet = {"engines": [{"id": "e", **engine}]}
    (path / "fleet.json").write_text(json.dumps(fleet))
    return path / "fleet.json"


def numbers(cell: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"[\d,]{7,}", cell)]


def test_table_of_the_guide_adds_up_to_what_is_printed() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in GUIDE.partition("## Kimi-K2")[2].splitlines()
        if line.startswith("| ") and line.count("|") == 6
    ][1:]
    whole = own = everywhere = 0
    for name, _, _, size, on_a_rank in rows[:-1]:
        (size_bytes,) = numbers(size)
        whole += size_bytes
        if on_a_rank == "all":
            everywhere += size_bytes
        else:
            assert size_bytes == 16 * numbers(on_a_rank)[0], name
            own += size_bytes // 16
    totals = rows[-1]
    printed = explained(*KIMI, "--fleet", FLEET)
    assert [whole] == numbers(totals[3]) == [printed["layout_bytes"]]
    (part, *_) = printed["parts"]
    assert [own + everywhere] == numbers(totals[4]) == [part["rank_bytes"]]
    assert f"{own:,} of its own share and {everywhere:,} that" in GUIDE
    assert f"{printed['tensors']:,} tensors" in totals[2] + totals[1]


def test_stages_of_the_guide_are_those_that_are_printed() -> None:
    printed = explained(*KIMI, "--fleet", FLEET)
    assert (printed["hosts"], printed["ranks"], printed["lanes"]) == (32, 256, 8)
    whole = printed["layout_bytes"]
    for part in printed["parts"]:
        cost = part["cost"]
        assert cost["route"] == "broadcast"
        for stage in cost["stages"]:
            row = rf"^\| {stage['name']} \|[^|]*\| {stage['seconds']:.3f} \|$"
            assert re.search(row, GUIDE, re.MULTILINE), row
        assert cost["lane_bytes"] == cost["card_bytes"] == -(-whole // 8)
    seconds = {stage["name"]: stage["seconds"] for stage in cost["stages"]}
    assert seconds["fetch"] == pytest.approx(whole / (8 * 2 * 40e9))
    assert seconds["broadcast"] == pytest.approx(whole / (8 * 40e9))
    assert seconds["reload"] == pytest.approx(8 * part["rank_bytes"] / 376e9)
    assert f"| {printed['seconds']:.3f} |" in GUIDE
    assert f"{cost['buckets']:,} buckets" in GUIDE
    assert "| 10.292 |" in GUIDE
    assert part["rejected"]["p2p"].startswith("10.3 s: the source's network takes 10.3 s in fetch")


def test_text_tells_bytes_per_card_and_seconds_per_stage() -> None:
    text = run(*KIMI, "--fleet", FLEET, "--explain")
    for line in (
        "139,583 tensors, 1.03 TB, to 256 ranks on 32 hosts",
        "bytes per card: 65.5 GB written, 129 GB staged, 129 GB received",
        "broadcast  3.216    997 GB          the process groups",
        "not p2p: 10.3 s",
        "not local: it is not offered",
        "predicted in all: 3.47 s",
    ):
        assert line in text
    assert "the process groups" not in run(*KIMI, "--fleet", FLEET)


def test_plan_of_4096_ranks_takes_seconds_and_fits_into_a_message(tmp_path: Path) -> None:
    fleet = json.loads(FLEET.read_bytes())
    fleet["engines"][0]["count"] = 256
    (tmp_path / "fleet.json").write_text(json.dumps(fleet))
    start = time.perf_counter()
    printed = explained(*KIMI, "--fleet", tmp_path / "fleet.json")
    assert time.perf_counter() - start < 10
    assert (printed["ranks"], printed["hosts"]) == (4096, 512)
    plan = msgspec.convert(printed["plan"], RoundPlan)
    assert len(plan.groups[0].members) == 512
    assert len(encode(plan)) < 2**20


def test_layout_may_be_a_stored_one_or_files(tmp_path: Path) -> None:
    stored = tmp_path / "layout"
    stored.write_bytes(encode_layout(LAYOUT))
    fleet = fleet_file(tmp_path, routes=["p2p"])
    assert explained("--layout", stored, "--fleet", fleet)["tensors"] == len(LAYOUT.tensors)
    header = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    printed = explained("--layout", file, "--fleet", fleet)
    assert printed["layout_bytes"] == 3
    assert printed["parts"][0]["route"] == "p2p"


def test_reason_is_given_when_an_engine_is_refused(tmp_path: Path) -> None:
    families = tmp_path / "families.json"
    families.write_text('[{"name": "a", "dtype": "U8", "shape": [5]}]')
    fleet = fleet_file(tmp_path, routes=["p2p"], device="cpu", free_bytes=1000)
    text = run("--families", families, "--fleet", fleet, "--explain")
    assert "refused: engine e is short of memory for staging" in text


@pytest.mark.parametrize(
    ("fleet", "reason"),
    [
        ('{"engines": []}', "Expected `array` of length >= 1"),
        ('{"engines": [{"id": "e", "rank": 3}]}', "unknown field `rank`"),
    ],
)
def test_fleet_is_refused_when_it_is_not_one(tmp_path: Path, fleet: str, reason: str) -> None:
    (tmp_path / "fleet.json").write_text(fleet)
    done = click.testing.CliRunner().invoke(
        command, [*KIMI, "--fleet", str(tmp_path / "fleet.json")]
    )
    assert done.exit_code == 2
    assert reason in " ".join(done.output.split())


def test_model_must_be_given_once() -> None:
    done = click.testing.CliRunner().invoke(command, ["--fleet", str(FLEET)])
    assert done.exit_code == 2
    assert "give one of --model" in done.output
