"""The page: one HTML file with all pictures in it, which fetches nothing and runs nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape

from circuitroute.routing.runs import RunRecord
from circuitroute.routing.summary import ALL

from . import figures
from .series import Curves, Quantity, curves_of, layers_of, loss_of, quantities_of

# How a page begins, by which a later run knows that it may replace it.
MARK = "<!DOCTYPE html>\n<!-- circuitroute report -->\n"
MOST_LINES = 200  # of the table
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f6f4; color: #222; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0; }
p { margin: 0.25rem 0 0.75rem; color: #555; font-size: 0.9rem; overflow-wrap: anywhere; }
.note { border-left: 4px solid #d55e00; padding-left: 0.75rem; color: #222; }
.cards { display: grid; gap: 1rem; align-items: start; }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
section { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 0.75rem; min-width: 0; }
img { display: block; width: 100%; height: auto; }
.wide { margin-top: 1rem; overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
"""


def page_of(record: RunRecord, name: str) -> str:
    """The page of a log.

    name: of the file, for the title.
    """
    title = escape(record.run or name)
    first, last = record.steps[0].step, record.steps[-1].step
    layers = len(layers_of(record))
    cards = "\n".join(_cards(record))
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in record.notes)
    return f"""{MARK}<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{escape(name)}: {len(record.steps)} logged steps, from {first} to {last}; layers: {layers}. Lines are means over the
layers, bands the range of the layers where nothing else is said; maps have a row per layer.</p>
{notes}<div class="cards">
{cards}
</div>
{_table(record)}
</main>
</body>
</html>
"""


def _cards(record: RunRecord) -> Iterator[str]:
    loss = loss_of(record)
    if loss is not None:
        yield _card(Quantity("loss", "Loss", "As logged."), loss)
    for quantity in quantities_of(record):
        yield _card(quantity, curves_of(record, quantity))


def _card(quantity: Quantity, curves: Curves) -> str:
    pictures = [_image(figures.curve(curves), f"{quantity.title} over the steps")]
    if len(curves.layers) > 1:
        pictures.append(_image(figures.heat_map(curves), f"{quantity.title} over the steps, a row per layer"))
    heading = f"<h2>{escape(quantity.title)}</h2>\n<p>{escape(quantity.text)}</p>"
    return f'<section id="{escape(quantity.name)}">\n{heading}\n' + "\n".join(pictures) + "\n</section>"


def _image(svg: bytes, text: str) -> str:
    data = base64.b64encode(svg).decode("ascii")
    return f'<img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}">'


def _table(record: RunRecord) -> str:
    """The last step in numbers: a line per layer."""
    last = record.steps[-1]
    names = [q for q in quantities_of(record) if any(name == q.name for _, name in last.values)]
    layers = [layer for layer in (ALL, *layers_of(record)) if any(other == layer for other, _ in last.values)]
    if not names:
        return ""
    head = "".join(f"<th>{escape(quantity.title)}</th>" for quantity in names)
    rows = "\n".join(
        f"<tr><td>{escape(layer)}</td>"
        + "".join(f"<td>{_number(last.values.get((layer, quantity.name)))}</td>" for quantity in names)
        + "</tr>"
        for layer in layers[:MOST_LINES]
    )
    more = f"<p>{len(layers) - MOST_LINES} more layers are in the log.</p>" if len(layers) > MOST_LINES else ""
    return (
        f'<section class="wide">\n<h2>Step {last.step} in numbers</h2>\n'
        f"<table>\n<thead><tr><th>layer</th>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>{more}\n</section>"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
