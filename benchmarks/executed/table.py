"""The table of rows: a line per way and pass, a column per mean number of executed experts."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rows import Row


def table(rows: Sequence[Row]) -> str:
    """Markdown: milliseconds of the fixed top-k, and ratios to it; the last row of a way, pass and setting counts."""
    lines: dict[tuple[str, str, str], dict[tuple[float | None, bool], Row]] = {}
    for row in rows:
        line = lines.setdefault((row["stack"], row["way"], row["pass"]), {})
        line[row["asked"], row["padded"]] = row
    columns = {column for line in lines.values() for column in line if column[0] is not None}
    ordered = sorted(columns, key=lambda column: (column[1], -(column[0] or 0)))
    headings = [f"{asked:g}{', padded' if padded else ''}" for asked, padded in ordered]
    text = [_line(["stack", "way", "pass", "fixed top-k, ms", *headings])]
    text.append(_line(["---"] * 3 + ["---:"] * (1 + len(ordered))))
    for key, line in lines.items():
        cells = [f"{line[column]['ratio_to_fixed']:.2f}" if column in line else "" for column in ordered]
        text.append(_line([*key, f"{line[None, False]['median_ms']:.1f}", *cells]))
    return "\n".join(text)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
