"""HTML of a report. Text becomes part of a page only as text of an element, so that labels cannot be markup."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

import numpy as np

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing but what the page holds. Scripts do not run."""
DPI = 130
"""Dots of a figure per inch."""
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1d2733; background: #fff;
  max-width: 1160px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; } h2 { font-size: 20px; margin: 44px 0 8px; padding-top: 14px;
  border-top: 1px solid #d8dee6; } h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0; max-width: 90ch; } .lead, figcaption, .legend { color: #4b5968; }
nav a { margin-right: 16px; } a { color: #0b5cad; }
.simulated { background: #fff3cd; border: 2px solid #8a6d00; padding: 10px 14px; margin: 14px 0; font-weight: 600; }
.scroll { overflow: auto; max-height: 560px; border: 1px solid #d8dee6; border-radius: 4px; margin: 8px 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th { position: sticky; top: 0; background: #eef2f6; text-align: left; vertical-align: bottom; padding: 6px 10px;
  font-weight: 600; } td { padding: 4px 10px; border-top: 1px solid #e8ecf1; vertical-align: top;
  overflow-wrap: break-word; max-width: 26em; } td:first-child { min-width: 13em; }
th.number, td.number { text-align: right; } td.number, td.name { white-space: nowrap; } td.wide { min-width: 16em; }
tbody tr:nth-child(even) td { background: #f8fafc; }
td.best { font-weight: 700; } td.worst { color: #5f6b78; font-style: italic; } small { color: #4b5968; }
figure { margin: 14px 0; } figure img { width: 100%; height: auto; border: 1px solid #e8ecf1; border-radius: 4px; }
figcaption { max-width: 100ch; } details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
@media print { .scroll { max-height: none; overflow: visible; } nav { display: none; } }
"""


def tag(name: str, *children: Element | str, **attributes: str) -> Element:
    """Make an element of text and elements; ``class_`` stands for ``class``."""
    element = Element(name, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def number(value: Any) -> str:
    """Write a number for readers: three decimals where they say something, fewer for large ones."""
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.3f}" if size >= 0.001 or size == 0 else f"{value:.1e}"


def table(heads: Sequence[Element | str], rows: Iterable[Sequence[Any]]) -> Element:
    """Make a table that scrolls in its own box; numbers are written by :func:`number`, elements stand as they are."""
    lines = [[cell if isinstance(cell, Element) else _cell(cell) for cell in row] for row in rows]
    first = lines[0] if lines else [_cell("")] * len(heads)
    head = [
        tag("th", each, scope="col", class_="number")
        if "number" in cell.get("class", "")
        else tag("th", each, scope="col")
        for each, cell in zip(heads, first, strict=True)
    ]
    body = tag("tbody", *(tag("tr", *line) for line in lines))
    return tag("div", tag("table", tag("thead", tag("tr", *head)), body), class_="scroll")


def _cell(value: Any) -> Element:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return tag("td", str(value), **({"class_": "wide"} if len(str(value)) > 60 else {}))
    return tag("td", number(value), class_="number")


def image(figure: Any, description: str, caption: str) -> Element:
    """Put a figure into the page as PNG, with a description for those who cannot see it."""
    import warnings

    import matplotlib

    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"savefig.bbox": None}):
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # of a label; tables show it
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    picture = tag("img", src=f"data:image/png;base64,{data}", alt=description)
    return tag("figure", picture, tag("figcaption", caption))


def download(text: str, name: str, label: str) -> Element:
    """Make a link to a CSV that the page itself holds."""
    data = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
    return tag("a", label, href=f"data:text/csv;charset=utf-8;base64,{data}", download=name)


def section(name: str, title: str, *children: Element) -> Element:
    """Make a part of the page that the head links to."""
    return tag("section", tag("h2", title), *children, id=name)


def page(title: str, head: Sequence[Element], sections: Sequence[Element]) -> bytes:
    """Put a page together.

    Parameters
    ----------
    title
        Of the page.
    head
        What stands under the title.
    sections
        From :func:`section`.

    Returns
    -------
    The file.
    """
    links = [tag("a", str(part[0].text), href=f"#{part.get('id')}") for part in sections]
    root = tag(
        "html",
        tag(
            "head",
            Element("meta", {"charset": "utf-8"}),
            Element("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
            Element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
            tag("title", title),
            tag("style", STYLE),
        ),
        tag("body", tag("h1", title), *head, tag("nav", *links), tag("main", *sections)),
        lang="en",
    )
    text = "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
    return text.encode("utf-8", "xmlcharrefreplace")
