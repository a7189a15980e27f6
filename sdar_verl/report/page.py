"""Puts a report into one HTML file that opens from disk: styles, scripts and data inside, nothing from a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdar_verl._version import __version__
from sdar_verl.report.layout import write_atomically

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
    css = "\n".join((_ASSETS / name).read_text() for name in styles)
    code = "\n".join(f"<script>\n{(_ASSETS / name).read_text()}\n</script>" for name in (*_LIBRARIES, *scripts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="sdar-verl {__version__}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{css}\n</style>\n</head>\n<body>\n{body}\n"
        f"<script>window.REPORT = {embed(data)};</script>\n{code}\n</body>\n</html>\n"
    )


def embed(data: Any) -> str:
    """JSON that may stand inside a script element: no tag and no comment can end or open in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write_page(path: Path, text: str) -> None:
    """Write the document, atomically; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
