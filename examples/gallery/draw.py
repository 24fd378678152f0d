"""The pictures of the front page's cards, to be read on a telephone, from rows, a log and a page's table.

Those of the pages beyond routing are in `beyond`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.plots import families, save
from benchmarks.rows import read
from circuitroute.plots import COLORS, new_figure

from . import beyond
from .command import ROOT
from .measure import MEAN

Row = dict[str, Any]
STUDIED, TIMED = ROOT / "examples" / "rows", ROOT / "benchmarks" / "rows"  # rows of pages of their own
WIDTH, HEIGHT = 4.0, 2.5  # inches; 384 pixels wide at its own size, and a card is hardly narrower
RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.3,
}
GREY = "#777777"


def write(rows: Path, log: Path, images: Path) -> Iterator[Path]:
    """Draws all cards; yields their files."""
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[1:]]
    cards: Mapping[str, Callable[[Any], None]] = {
        "learning": lambda axes: learning(axes, [row for row in found if row["op"] == "errors"]),
        "balance": lambda axes: balance(axes, [row for row in found if row["op"] == "loads"]),
        "budget": lambda axes: budget(axes, [row for row in found if row["op"] == "totals"]),
        "dynamic-k": lambda axes: dynamic_k(axes, (ROOT / "docs" / "dynamic-k.md").read_text(encoding="utf-8")),
        "cost": lambda axes: cost(axes, read(TIMED / "cpu-subset.jsonl")),
        "report": lambda axes: report(axes, steps),
        "logic": lambda axes: beyond.logic(axes, read(STUDIED / "logic-layers.jsonl")),
        "cnf": lambda axes: beyond.cnf(axes, read(TIMED / "cpu-cnf.jsonl")),
        "circuits": lambda axes: beyond.circuits(axes, read(TIMED / "cpu-circuits.jsonl")),
        "k-subset": lambda axes: beyond.k_subset(axes, read(STUDIED / "k-subset.jsonl")),
        "survey": lambda axes: beyond.survey(axes, read(TIMED / "cpu-survey.jsonl")),
        "priors": lambda axes: beyond.priors(axes, read(STUDIED / "learned-prior.jsonl")),
    }
    for name, draw in cards.items():
        with matplotlib.rc_context(RC):
            figure = new_figure(WIDTH, HEIGHT)
            draw(figure.add_subplot())
            path = images / f"card-{name}.svg"
            save(figure, path)
        yield path


def learning(axes: Any, rows: Sequence[Row]) -> None:
    """Held-out error while training, mean and standard deviation over the seeds."""
    names = {
        "sampled-1": "sampled, T = 1",
        "top-k": "top-k",
        "densemixer": "DenseMixer (runs all 16)",
        "probe-balance": "one probe, balance (runs 2)",
    }
    colors = dict(zip(names, (COLORS[3], "black", COLORS[1], COLORS[0]), strict=True))
    for name, label in names.items():
        errors_SP = np.array([row["errors"] for row in rows if row["method"] == name])
        steps_P = rows[0]["every"] * (1 + np.arange(errors_SP.shape[1]))
        mean_P, spread_P = errors_SP.mean(0), errors_SP.std(0, ddof=1)
        axes.fill_between(steps_P, mean_P - spread_P, mean_P + spread_P, color=colors[name], alpha=0.13, linewidth=0)
        axes.plot(steps_P, mean_P, color=colors[name], label=label)
    axes.set(xlabel="training step", ylabel="held-out error", xlim=(0, None))
    axes.legend(loc="upper right")


def balance(axes: Any, rows: Sequence[Row]) -> None:
    """Max violation over the steps, mean over the seeds."""
    names = {"none": "no bias", "LossFree": "by signs", "Quantile": "quantiles", "ExactBalance": "exact marginals"}
    for color, (name, label) in zip((GREY, COLORS[1], COLORS[2], COLORS[0]), names.items(), strict=True):
        mean_P = np.mean([row["violations"] for row in rows if row["controller"] == name], axis=0)
        axes.plot(1 + np.arange(mean_P.size), mean_P, color=color, label=label)
    axes.set(xscale="log", xlabel="training step", ylabel="largest load above the mean", ylim=(0, None))
    axes.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    axes.xaxis.minorticks_off()
    axes.legend(loc="center", bbox_to_anchor=(0.42, 0.5))


def budget(axes: Any, rows: Sequence[Row]) -> None:
    """Tokens by the experts that they execute in all layers."""
    total = round(4 * MEAN)
    for name, label, color in (
        ("range-probe", "a mean is held", COLORS[1]),
        ("budget-mode", f"a budget of {total} is kept", COLORS[0]),
    ):
        tokens = [row["tokens"] for row in rows if row["method"] == name]
        size = max(map(len, tokens))
        shares = np.sum([np.pad(each, (0, size - len(each))) for each in tokens], axis=0) / np.sum([*map(sum, tokens)])
        axes.bar(np.arange(size), shares, width=0.9, color=color, alpha=0.75, label=label)
    axes.axvline(total + 0.5, color=GREY, linestyle=":", linewidth=1.2)
    axes.set(xlabel="experts that a token runs in four layers", ylabel="share of the tokens", xlim=(0, 22))
    axes.set_xticks(range(0, 21, 5))
    axes.legend(loc="upper right")


def dynamic_k(axes: Any, page: str) -> None:
    """Difference to top-k at the same number of executed experts, in percent, from the page's first table."""
    number = r"([+-]?[\d.]+)"
    first = page[page.index("The teacher *rising*") : page.index("The teacher *falling*")]
    names = {"calibrated": "soft top-k, calibrated", "range-mode": "a range with a price", "budget-mode": "a budget"}
    axes.axhline(0, color="black", linewidth=1.2)
    axes.annotate("top-k", (2.8, 0), (0, -3), textcoords="offset points", va="top", ha="right")
    for color, (name, label) in zip((COLORS[0], COLORS[2], COLORS[1]), names.items(), strict=True):
        row = rf"^\| {name} \| [\d.]+ \| {number} \| [^|]+ \| [^|]+ \| {number} ± {number} \|"
        points = np.array(re.findall(row, first, re.MULTILINE), dtype=float)
        executed, percent, spread = points.T
        axes.errorbar(executed, percent, spread, color=color, label=label, marker="o", markersize=4, capsize=2)
    axes.set(xlabel="experts executed per token and layer", ylabel="percent of top-k's error", ylim=(None, 4.5))
    axes.legend(loc="upper center", ncols=2, columnspacing=1.0, bbox_to_anchor=(0.45, 1.12))


def cost(axes: Any, rows: Sequence[Row]) -> None:
    """CPU time of a step forward and back in units of top-k's, 8 of 64."""
    family = families(row for row in rows if row["op"] == "subset" and not row.get("predicted"))
    chosen = [
        row
        for row in family["bench-subset-cpu-exactly-T4096"]
        if (row["n"], row["k"], row["pass"]) == (64, 8, "forward+backward")
    ]
    names = {
        "topk": "softmax + topk",
        "circuitroute:numba": "circuitroute, numba",
        "circuitroute:torch": "circuitroute, torch",
        "sequential_dp:tuned": "research code, tuned",
        "sequential_dp": "research code",
    }
    ratios = [next(row["ratio_to_topk"] for row in chosen if row["provider"] == name) for name in names]
    colors = [GREY, COLORS[0], COLORS[0], COLORS[1], COLORS[1]]
    bars = axes.barh(range(len(names)), ratios, color=colors, height=0.7)
    axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()
    axes.set(xlabel="CPU time of a step, in units of top-k's", xlim=(0, 1.12 * max(ratios)))


def report(axes: Any, steps: Sequence[Row]) -> None:
    """Experts per token, layer by layer, as in the report of a run; the first step, before any price, is left out."""
    steps = steps[1:]
    layers = sorted({key for row in steps for key in row if re.fullmatch(r"layer\d+/experts_per_token", key)})
    counts_LS = np.array([[row[layer] for row in steps] for layer in layers])
    numbers = [row["step"] for row in steps]
    mesh = axes.pcolormesh(numbers, np.arange(len(layers)), counts_LS, cmap="viridis", rasterized=True)
    axes.invert_yaxis()
    axes.set_yticks(range(len(layers)), [f"layer {number}" for number in range(len(layers))])
    axes.set(xlabel="training step", title="experts per token")
    axes.title.set_fontsize(9)
    axes.figure.colorbar(mesh, ax=axes, pad=0.02).outline.set_visible(False)
