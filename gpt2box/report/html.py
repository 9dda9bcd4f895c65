"""Pages of HTML that need no network: one file with its style, its scripts and its curves.

Whatever is put into a tag is escaped, unless `tag` itself has made it. Plots are drawn by uPlot (MIT;
web/uplot.min.js is its 1.6.32 as published) through web/page.js, which reads the curves from a block of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpt2box.runs.history import MAX_CURVE_POINTS, Curve

WEB = Path(__file__).parent / "web"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass(frozen=True)
class Line:
    """A curve of a chart. Drawn over tokens, too, where a step has them."""

    label: str
    curve: Curve
    tokens_per_step: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis."""

    title: str  # with the unit
    lines: list[Line]
    from_zero: bool = False  # the axis


def tag(name: str, *inside: str, **attributes: str) -> Html:
    """An element; attributes that Python has a word for end in _."""
    said = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{said}>{''.join(map(escape, inside))}</{name}>")


def escape(text: str) -> str:
    """HTML as it is, other text with nothing in it that a browser would take for HTML."""
    if isinstance(text, Html):
        return text
    whole = text.encode("utf-8", errors="replace").decode("utf-8")  # JSON can hold half a character
    return html.escape(whole.replace("\0", "\N{REPLACEMENT CHARACTER}"))


def join_html(parts: Iterable[str]) -> Html:
    """One after the other."""
    return Html("\n".join(map(escape, parts)))


def definition_list(rows: Iterable[tuple[str, str]]) -> Html:
    """Names with what they are; those of which nothing is known are left out."""
    return tag("dl", *(part for name, value in rows if value for part in (tag("dt", name), tag("dd", value))))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Html:
    """The first of each row is its name. A narrow screen scrolls it."""
    top = tag("tr", *(tag("th", cell) for cell in head))
    lines = (tag("tr", tag("th", name), *(tag("td", cell) for cell in cells)) for name, *cells in rows)
    return tag("div", tag("table", tag("thead", top), tag("tbody", *lines)), class_="wide")


def section(title: str, *inside: str) -> Html:
    """A part of a page."""
    return tag("section", tag("h2", title), *inside)


def plots_html(charts: list[Chart]) -> Html:
    """A place for each chart, and what is drawn there."""
    content = json.dumps([chart_data(chart) for chart in charts], allow_nan=False).replace("<", "\\u003c")
    note = "Drag over a plot to look closer, double-click for all of it. "
    most = max((len(line.curve.value) for chart in charts for line in chart.lines), default=0)
    if most > MAX_CURVE_POINTS:
        note += f"A curve is drawn with at most some {MAX_CURVE_POINTS:,} of its points (here of up to {most:,}): the "
        note += "lowest and the highest of each stretch, so no peak is lost."
    return join_html(
        [
            tag("div", tag("noscript", "The plots need JavaScript."), id="plots"),
            tag("p", note, class_="note"),
            tag("script", Html(content), type="application/json", id="curves"),
        ]
    )


def chart_data(chart: Chart) -> dict[str, object]:
    """What web/page.js reads."""
    lines = []
    for line in chart.lines:
        curve = line.curve.downsampled()
        lines.append(
            {
                "label": line.label,
                "dots": line.dots,
                "step": [int(step) for step in curve.step],
                "hours": [round(float(hours), 5) for hours in curve.hours],
                "value": [float(f"{value:.6g}") for value in curve.value],
                "tokens_per_step": line.tokens_per_step,
            }
        )
    return {"title": chart.title, "from_zero": chart.from_zero, "lines": lines}


def render_document(title: str, *body: str) -> str:
    """The whole page. Its policy lets it load nothing, and run no script but its own two."""
    styles = [(WEB / name).read_text(encoding="utf-8") for name in ("uplot.min.css", "page.css")]
    scripts = [(WEB / name).read_text(encoding="utf-8") for name in ("uplot.min.js", "page.js")]
    hashes = " ".join(f"'sha256-{csp_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="generator" content="gpt2box">',
        tag("title", title),
        *(tag("style", Html(style)) for style in styles),
    ]
    end = [tag("script", Html(script)) for script in scripts]
    return "\n".join(["<!doctype html>", '<html lang="en">', *head, tag("main", *body), *end, "</html>", ""])


def csp_hash(script: str) -> str:
    """As a policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
