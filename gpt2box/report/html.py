"""Build HTML pages that need no network: one file with its styles, scripts and curves.

`tag` escapes all text except what it has built itself. uPlot (MIT; web/uplot.min.js is release 1.6.32, unchanged)
draws the charts through web/page.js, which reads the curves from a block of JSON.
"""

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
    """Text that is already HTML."""

    __slots__ = ()


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    label: str
    curve: Curve
    tokens_per_step: int = 0  # 0: unknown, and no axis in tokens
    dots: bool = False  # mark each point


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis."""

    title: str  # with the unit
    lines: list[Line]
    from_zero: bool = False  # where the value axis starts


def tag(name: str, *inside: str, **attributes: str) -> Html:
    """Build an element. Attributes that are Python keywords end in _, such as class_."""
    rendered = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{rendered}>{''.join(map(escape, inside))}</{name}>")


def escape(text: str) -> str:
    """Escape text, but not Html."""
    if isinstance(text, Html):
        return text
    valid = text.encode("utf-8", errors="replace").decode("utf-8")  # JSON can hold lone surrogates
    return html.escape(valid.replace("\0", "\N{REPLACEMENT CHARACTER}"))


def definition_list(rows: Iterable[tuple[str, str]]) -> Html:
    """Build a list of names and values, without empty values."""
    return tag("dl", *(part for name, value in rows if value for part in (tag("dt", name), tag("dd", value))))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Html:
    """Build a table; each row starts with its name. It scrolls on a narrow screen."""
    top = tag("tr", *(tag("th", cell) for cell in head))
    lines = (tag("tr", tag("th", name), *(tag("td", cell) for cell in cells)) for name, *cells in rows)
    return tag("div", tag("table", tag("thead", top), tag("tbody", *lines)), class_="wide")


def section(title: str, *inside: str) -> Html:
    """Build a section with a heading."""
    return tag("section", tag("h2", title), *inside)


def plots_html(charts: list[Chart]) -> Html:
    """Build the element that web/page.js draws charts in, and their data."""
    content = json.dumps([chart_data(chart) for chart in charts], allow_nan=False).replace("<", "\\u003c")
    note = "Drag over a plot to zoom in, double-click to zoom out. "
    most = max((len(line.curve.value) for chart in charts for line in chart.lines), default=0)
    if most > MAX_CURVE_POINTS:
        note += f"A curve is drawn with at most some {MAX_CURVE_POINTS:,} of its points (here of up to {most:,}): the "
        note += "lowest and the highest of each stretch, so no peak is lost."
    plots = tag("div", tag("noscript", "The plots need JavaScript."), id="plots")
    data = tag("script", Html(content), type="application/json", id="curves")
    return Html("\n".join([plots, tag("p", note, class_="note"), data]))


def chart_data(chart: Chart) -> dict[str, object]:
    """Return a chart as web/page.js reads it."""
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
    """Build a page. Its content security policy lets it load nothing, and run only its own two scripts."""
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
    """Return the hash by which a content security policy admits a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
