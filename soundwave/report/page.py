"""One HTML file of data and the scripts that draw them.

The scripts insert every word of the data as text, never as markup, and the page's content security policy permits only
its own script and style, by their hashes.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

DIGITS = 6  # significant digits of a number


def page_of(title: str, data: dict[str, Any], scripts: Sequence[str]) -> str:
    """The HTML of a page.

    Args:
        data: what the scripts draw. A number that is not finite becomes null.
        scripts: files in this folder, which are joined to one script in this order.
    """
    style, script = _file("page.css"), "\n".join(map(_file, scripts))
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    )
    return Template(_file("page.html")).substitute(
        policy=policy,
        title=html.escape(title),
        style=style,
        script=script,
        # The data hold no `<` for the HTML parser, so nothing in them can end the script element.
        data=json.dumps(_plain(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _file(name: str) -> str:
    return files("soundwave.report").joinpath(name).read_text(encoding="utf-8")


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite becomes null, other floats are rounded."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
