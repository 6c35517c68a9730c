"""What the report and other pages of ours are made with: the style sheet, scripts, the chart library."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from pathlib import Path

from markupsafe import Markup
from plotly.offline import get_plotlyjs

_ASSETS = Path(__file__).parent / "assets"


@cache
def asset(name: str) -> Markup:
    """A file of the report's assets, to be put into a page as it is."""
    return Markup((_ASSETS / name).read_text(encoding="utf-8"))


@cache
def plotly() -> Markup:
    """The chart library, compressed: 2 MB in the page in place of 4.8 MB. The page's script unpacks it."""
    packed = gzip.compress(get_plotlyjs().encode("utf-8"), compresslevel=9, mtime=0)
    return Markup(base64.b64encode(packed).decode("ascii"))
