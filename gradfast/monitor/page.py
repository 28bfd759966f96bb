"""Pages that need nothing beside themselves: style and pictures are inside the HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import Any

from gradfast.extras import require

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .5em 1em; overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } th, td { text-align: right; padding: .1em .8em; }
th:first-child, td:first-child, td:last-child { text-align: left; } tr:nth-child(even) { background: #f7f7f7; }
.error { border-left: 4px solid #c00; padding-left: 1em; } .warning { border-left: 4px solid #d90; padding-left: 1em; }
"""


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, in inches, that belongs to no window system."""
    require("matplotlib", "monitor", "drawing")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def embed(picture: Any, alternative: str) -> str:
    """An HTML image of a figure, or of PNG bytes, with the picture inside."""
    data = base64.b64encode(picture if isinstance(picture, bytes) else png(picture)).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def html_page(title: str, parts: Iterable[str]) -> str:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"{head}<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "</html>\n"
