"""The HTML report as a text: whole, and closed to what is outside and to what comes in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import msgspec
from msgspec import structs

from tests.unit.tracing.rounds import MODEL, whole_round
from weightbus.tracing.exports.html import SCRIPTS, html_report
from weightbus.tracing.history import Heard, build_waterfall
from weightbus.tracing.waterfall import Waterfall

HOSTILE = "</script><script>alert(1)</script><!--\u2028&amp;"


def waterfall() -> Waterfall:
    made = build_waterfall(MODEL, "v7", [Heard(message) for message in whole_round()])
    assert made is not None
    return made


class Parts(HTMLParser):
    """Elements of a page, and the text of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._in = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = str(dict(attrs).get("type") or tag)

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._in] = self.texts.get(self._in, "") + data


def test_report_holds_the_waterfall_as_it_is() -> None:
    parts = Parts(html_report(waterfall()))
    data = parts.texts["application/json"]
    assert msgspec.json.decode(data.strip(), type=Waterfall) == waterfall()
    assert "Round v7 of minilm, version 7" in parts.texts["title"]


def test_report_names_nothing_outside_itself() -> None:
    page = html_report(waterfall())
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']""", page.partition("<script")[0])
    assert not re.findall(r"https?://|@import|url\(", page)
    assert not re.findall(r"^import\b", page, re.MULTILINE)


def test_scripts_can_be_one_script() -> None:
    """Each imports, in lines of their own, from those before it; no two have a name in common."""
    named: dict[str, str] = {}
    for place, script in enumerate(SCRIPTS):
        text = files("weightbus.tracing.exports").joinpath("static", script).read_text("utf-8")
        assert len(text.splitlines()) <= 500, script
        imports = re.findall(r"^import\b.*", text, re.MULTILINE)
        sources = re.findall(r"""^import \{ .* \} from "\./(.*)";$""", text, re.MULTILINE)
        assert len(imports) == len(sources), script
        assert set(sources) <= set(SCRIPTS[:place]), script
        for name in re.findall(
            r"^(?:export )?(?:const|let|class|function) (\w+)", text, re.MULTILINE
        ):
            assert named.setdefault(name, script) == script, name


def test_policy_lets_only_its_own_script_and_style_run() -> None:
    parts = Parts(html_report(waterfall()))
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in parts.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert f"script-src '{_hash(parts.texts['module'])}'" in policy
    assert f"style-src '{_hash(parts.texts['style'])}'" in policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_hostile_text_ends_no_script_and_comes_back_as_it_was() -> None:
    engine = structs.replace(waterfall().engines[0], reason=HOSTILE)
    hostile = structs.replace(
        waterfall(), engines=(engine,), critical_told=HOSTILE, producer=HOSTILE
    )
    page = html_report(hostile)
    parts = Parts(page)
    assert [tag for tag, _ in parts.elements].count("script") == 2
    data = json.loads(parts.texts["application/json"])
    assert (data["engines"][0]["reason"], data["critical_told"]) == (HOSTILE, HOSTILE)
    assert "<script>alert" not in page
