"""Puts a report into one HTML file that opens from disk: styles, scripts and data inside, nothing from a network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdar_verl._version import __version__
from sdar_verl.atomic import write_text_atomically
from sdar_verl.untrusted import whole_characters

_ASSETS = resources.files("sdar_verl.report") / "assets"
_LIBRARIES = ("vendor/d3.min.js", "vendor/plot.umd.min.js")


def page(title: str, body: str, data: dict[str, Any], scripts: Sequence[str], styles: Sequence[str]) -> str:
    """The whole document.

    Args:
        title: of the window.
        body: HTML of the body; everything from outside in it must be escaped already.
        data: JSON for the scripts, as ``window.REPORT``.
        scripts: names of files in ``assets``, in their order.
        styles: the same for styles.
    """
    css = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in styles)
    code = [
        f"window.REPORT = {embed(data)};",
        *((_ASSETS / name).read_text(encoding="utf-8") for name in (*_LIBRARIES, *scripts)),
    ]
    elements = "\n".join(f"<script>{text}</script>" for text in code)
    return whole_characters(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(code)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="sdar-verl {__version__}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{css}\n</style>\n</head>\n<body>\n{body}\n"
        f"{elements}\n</body>\n</html>\n"
    )


def _policy(scripts: Sequence[str]) -> str:
    """What a browser lets the page do: run these very scripts, and load nothing from anywhere.

    Texts of a run are escaped wherever they stand; should one slip through, it still can neither run nor send.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    sources = " ".join(f"'sha256-{one}'" for one in hashes)
    # Charts set styles on their elements.
    return f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def embed(data: Any) -> str:
    """JSON that may stand inside a script element: no tag and no comment can end or open in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write_page(path: Path, text: str) -> None:
    """Write the document, atomically; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text)
