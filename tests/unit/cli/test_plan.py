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
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.cost import (
    ASSUMED_LINKS,
    BUCKET_S,
    DEVICE_BUCKET_S,
    GATHER_SHARE,
)
from weightbus.schemas import RoundPlan, encode, encode_layout

ROOT = Path(__file__).parents[3]
FLEET = ROOT / "examples" / "fleets" / "kimi-k2-32x8.json"
REPLICAS = ROOT / "examples" / "fleets" / "replicas-2x2.json"
GUIDE = (ROOT / "docs" / "cost-model.md").read_text()
KIMI = ("--model", "kimi-k2-fp8")
QWEN = ("--model", "qwen3-30b-a3b")


def invoke(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(command, [str(one) for one in arguments])


def run(*arguments: object) -> str:
    done = invoke(*arguments)
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
    besides = cost["buckets"] * BUCKET_S
    assert seconds["fetch"] == pytest.approx(whole / (8 * 40e9) + besides)
    assert seconds["broadcast"] == pytest.approx(whole / (8 * 40e9) + besides)
    assert seconds["reload"] == pytest.approx(part["rank_bytes"] / ASSUMED_LINKS.peer)
    assert f"| {printed['seconds']:.3f} |" in GUIDE
    assert f"{cost['buckets']:,} buckets" in GUIDE
    assert f"| pace | the largest of 3.216, {cost['pace_s']:.3f}, " in GUIDE
    gathered = part["rank_bytes"] / (GATHER_SHARE * ASSUMED_LINKS.device)
    pulled = 32 * whole / (8 * 40e9) + besides + gathered / cost["buckets"]
    assert f"| {pulled:.3f} |" in GUIDE
    assert part["rejected"]["p2p"] == (
        "104 s, at the pace of the source's transfer engine in fetch"
    )


def test_replicas_of_the_guide_are_those_that_are_printed(tmp_path: Path) -> None:
    guide = GUIDE.partition("## Replicas on one host")[2]
    printed = explained(*QWEN, "--fleet", REPLICAS)
    whole, part = printed["layout_bytes"], printed["parts"][0]
    cost = part["cost"]
    assert (printed["device"], printed["lanes"], cost["route"]) == (True, 4, "broadcast")
    assert numbers(guide.partition("`W` is ")[2][:120].replace("\n", " ")) == [
        whole,
        part["rank_bytes"],
    ]
    for stage in cost["stages"]:
        row = rf"^\| {stage['name']} \|[^|]*\| {stage['seconds']:.3f} \|$"
        assert re.search(row, guide, re.MULTILINE), row
    fetch_s = whole / (4 * ASSUMED_LINKS.device) + cost["buckets"] * DEVICE_BUCKET_S
    assert cost["stages"][0]["seconds"] == pytest.approx(fetch_s)
    assert f"= 0.278; + {cost['buckets']} x {DEVICE_BUCKET_S:.4f} | {fetch_s:.3f} |" in guide
    assert f"| together | 0.301 + (0.379 - 0.301) / {cost['buckets']} buckets" in guide
    assert f"| {cost['seconds']:.3f} |" in guide
    fleet = json.loads(REPLICAS.read_bytes())
    for tp, count, route, said in (
        (1, 2, "broadcast", "0.602 s together"),
        (4, 1, "local", "0.309 s"),
    ):
        fleet["engines"][0] |= {"tp": tp, "count": count, "hosts": ["h"] * count}
        (tmp_path / "fleet.json").write_text(json.dumps(fleet))
        (part, *_) = explained(*QWEN, "--fleet", tmp_path / "fleet.json")["parts"]
        assert part["cost"]["route"] == route
        assert said in guide
        assert said.startswith(f"{part['cost']['seconds']:.3f} s")


def test_text_tells_why_replicas_share_what_they_could_read_in_place() -> None:
    text = run(*QWEN, "--fleet", REPLICAS, "--explain")
    for line in (
        "broadcast in 4 lanes; 3 slots of 64 MiB each in memory of its GPU",
        r"  broadcast: 4 ranks of 1 host share it in 4 lanes: 0\.301 s, by local 0\.617 s",
        r"  bytes per card: 30\.5 GB written, 15\.3 GB staged",
        r"  fetch +[\d.]+ +61\.1 GB +a GPU's link to its host",
        r"  reload +[\d.]+ +122 GB +what a GPU reads of its peers",
        r"  not local: 0\.617 s, at the pace of a GPU's link to its host in reload",
        "  not p2p: nothing is nearer than local",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), text


def test_text_tells_bytes_per_card_and_seconds_per_stage() -> None:
    text = run(*KIMI, "--fleet", FLEET, "--explain")
    for line in (
        r"139,583 tensors, 1\.03 TB, to 256 ranks on 32 hosts",
        r"16 engines, kimi-0 \.\.\. kimi-15, on 32 hosts: 8 ranks of an engine on each",
        r"  bytes per card: 65\.5 GB written, 129 GB staged, 129 GB received",
        r"  broadcast +[\d.]+ +997 GB +the process groups",
        r"  not p2p: 104 s, at the pace of the source's transfer engine in fetch",
        "  not local: it is not offered",
        r"predicted in all: [\d.]+ s",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), text
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
    done = invoke("--families", families, "--fleet", fleet, "--explain")
    assert done.exit_code == 1
    assert "refused: engine e is short of memory for staging" in done.output
    assert "nobody can be planned for" in done.output
    assert "predicted in all" not in done.output
    assert invoke("--families", families, "--fleet", fleet, "--json").exit_code == 1


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            {"count": 3, "tp": 4, "ranks_per_host": 3},
            [
                "to 12 ranks on 6 hosts",
                "3 engines, e-0 ... e-2, on 3 hosts: 3 ranks of an engine on each",
                "3 engines, e-0 ... e-2, on 3 hosts: 1 rank of an engine on each",
            ],
        ),
        ({"count": 2, "hosts": ["h", "h"]}, ["2 engines, e-0 and e-1, on 1 host: 1 rank each"]),
        ({"routes": ["p2p"]}, ["to 1 rank on 1 host", "e on e-host: 1 rank"]),
    ],
)
def test_alike_parts_are_told_together(
    tmp_path: Path, engine: dict[str, object], said: list[str]
) -> None:
    text = run(*KIMI, "--fleet", fleet_file(tmp_path, **engine))
    for line in said:
        assert line in text.splitlines()[0] or line in text.splitlines(), text


def test_long_times_have_separators(tmp_path: Path) -> None:
    links = {"network": 10**8, "p2p": 10**8}
    text = run(*KIMI, "--fleet", fleet_file(tmp_path, routes=["p2p"], links=links), "--explain")
    assert re.search(r"^predicted in all: 10,[23]\d\d s$", text, re.MULTILINE), text
    assert "e+" not in text
    assert "in all" in text


@pytest.mark.parametrize(
    ("fleet", "reason"),
    [
        ('{"engines": []}', "Expected `array` of length >= 1"),
        ('{"engines": [{"id": "e", "rank": 3}]}', "unknown field `rank`"),
        ('{"engines": [{"id": "e", "links": {"netwrk": 1}}]}', "unknown field `netwrk`"),
        ('{"source": {"links": {"p2q": 1}}, "engines": [{"id": "e"}]}', "unknown field `p2q`"),
        ('{"engines": [{"id": "e", "device": "gpu"}]}', "Invalid enum value 'gpu'"),
        (
            '{"source": {"files": true, "memory": "host"}, "engines": [{"id": "e"}]}',
            "memory of the source is host: must be other, of files",
        ),
        ('{"engines": [{"id": "e", "routes": []}]}', "Expected `array` of length >= 1"),
        (
            '{"engines": [{"id": "e", "routes": ["p2p", "p2p"]}]}',
            "routes of engine e are p2p, p2p: each must stand once",
        ),
        (
            '{"engines": [{"id": "e", "tp": 2, "ranks_per_host": 3}]}',
            "ranks_per_host of engine e is 3: must be at most its tp, 2",
        ),
    ],
)
def test_fleet_is_refused_when_it_is_not_one(tmp_path: Path, fleet: str, reason: str) -> None:
    (tmp_path / "fleet.json").write_text(fleet)
    done = invoke(*KIMI, "--fleet", tmp_path / "fleet.json")
    assert done.exit_code == 2
    assert reason in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("engines", "reason"),
    [
        ([{"id": "e"}, {"id": "e"}], "id of an engine is e: it must be there once"),
        ([{"id": "e", "count": 2}, {"id": "e-1"}], "id of an engine is e-1: it must be there once"),
        ([{"id": "x" * 64, "tp": 2, "ranks_per_host": 1}], "must have at most 64 characters"),
        ([{"id": "x" * 63, "count": 2}], "must have at most 64 characters"),
        ([{"id": "e", "count": 6000}], "is 6,000 engines, or parts of them on a host"),
        ([{"id": "e", "count": 4096, "tp": 64}], "fleet is 262,144 ranks"),
        ([{"id": "e", "hosts": ["h", "h"]}], "hosts of engine e is 2 long"),
    ],
)
def test_fleet_is_refused_when_it_contradicts_itself_or_a_plan(
    tmp_path: Path, engines: list[dict[str, object]], reason: str
) -> None:
    (tmp_path / "fleet.json").write_text(json.dumps({"engines": engines}))
    done = invoke(*KIMI, "--fleet", tmp_path / "fleet.json")
    assert isinstance(done.exception, PlanError)
    assert reason in str(done.exception)


@pytest.mark.parametrize(
    ("families", "reason"),
    [
        ([], "Expected `array` of length >= 1"),
        ([{"dtype": "FOO"}], "dtype of x is FOO: must be one of BOOL, U8"),
        ([{"dtype": "F4"}], "dtype of x is F4"),
        ([{"shape": [-4, 4]}], "Expected `int` >= 0"),
        ([{"shape": [1] * 9}], "Expected `array` of length <= 8"),
        ([{"count": 0}], "Expected `int` >= 1"),
        ([{"cuont": 4}], "unknown field `cuont`"),
        ([{"name": ""}], "Expected `str` of length >= 1"),
    ],
)
def test_families_are_refused_when_they_are_none(
    tmp_path: Path, families: list[dict[str, object]], reason: str
) -> None:
    whole = [{"name": "x", "dtype": "BF16", "shape": [4], **family} for family in families]
    (tmp_path / "families.json").write_text(json.dumps(whole))
    done = invoke("--families", tmp_path / "families.json", "--fleet", FLEET)
    assert done.exit_code == 2, done.output
    assert reason in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("shape", [[], [0], [0, 7]])
def test_scalars_and_empty_tensors_are_planned_for(tmp_path: Path, shape: list[int]) -> None:
    family = {"name": "a.q_proj.weight", "dtype": "BF16", "shape": shape}
    (tmp_path / "families.json").write_text(json.dumps([family]))
    printed = explained("--families", tmp_path / "families.json", "--fleet", FLEET)
    assert printed["layout_bytes"] == (0 if shape else 2)


def test_model_is_refused_when_it_is_larger_than_any(tmp_path: Path) -> None:
    family = {"name": "a", "dtype": "U8", "shape": [99_999_999, 99_999_999]}
    (tmp_path / "families.json").write_text(json.dumps([family]))
    done = invoke("--families", tmp_path / "families.json", "--fleet", FLEET)
    assert "must be at most 1,125,899,906,842,624" in str(done.exception)


def test_model_must_be_given_once() -> None:
    done = click.testing.CliRunner().invoke(command, ["--fleet", str(FLEET)])
    assert done.exit_code == 2
    assert "give one of --model" in done.output


@pytest.mark.parametrize("option", ["--fleet", "--families"])
def test_option_is_named_when_its_file_is_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / "bad.json").write_text("junk")
    (tmp_path / "fleet.json").write_text('{"engines": [{"id": "e"}]}')
    files = {"--fleet": tmp_path / "fleet.json", option: tmp_path / "bad.json"}
    model = () if "--families" in files else KIMI
    done = invoke(*model, *(word for pair in files.items() for word in pair))
    assert done.exit_code == 2
    assert f"Invalid value for {option}" in done.output
