"""A waterfall as one HTML file that needs nothing else: no network, no server, no other file.

Does no I/O but to read its own parts. The same scripts and style draw the page of `weightbus ui`.
What came from the bus is data: it stands in the file as JSON without a character that ends a
script, and is only ever shown as text. A policy in the file lets nothing run but that script and
lets it load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import cache
from importlib.resources import files
from typing import Final

import msgspec

from weightbus.tracing.waterfall import Waterfall

__all__ = ("SCRIPTS", "html_report")

SCRIPTS: Final = ("elements.js", "rows.js", "told.js", "waterfall.js")
"""Files of the folder `static`, each importing only from those before it; no two name the same."""

_IMPORT: Final = re.compile(r"^import .*;\n", re.MULTILINE)

_START: Final = 'showReport(document.getElementById("report"), readReport());'

_DANGEROUS: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
"""In JSON these stand in strings only, where an escape means the same."""

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body class="wb report">
<main id="report"></main>
<noscript><p>{title}. {told} This report draws itself: allow it to run its script.</p></noscript>
<script type="application/json" id="waterfall">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def html_report(waterfall: Waterfall) -> str:
    """The whole file. Opens from disk in any browser of the last years."""
    style, script = _part("waterfall.css"), f"{_script()}\n{_START}\n"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    title = f"Round {waterfall.round} of {waterfall.model}, version {waterfall.version}"
    return _PAGE.format(
        policy=html.escape(policy),
        title=html.escape(title),
        told=html.escape(waterfall.critical_told),
        style=style,
        script=script,
        data=msgspec.json.encode(waterfall).decode().translate(_DANGEROUS),
    )


@cache
def _script() -> str:
    """All scripts as one: what one exports, the next ones have."""
    return "\n".join(_IMPORT.sub("", _part(name)) for name in SCRIPTS)


@cache
def _part(name: str) -> str:
    return files("weightbus.tracing.exports").joinpath("static", name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
