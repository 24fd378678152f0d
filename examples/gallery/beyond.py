"""The cards of the pages beyond routing, each drawn from the rows of its page's study."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from k_subset.estimators import METHODS

from benchmarks.circuits.table import OURS, VMAP, best_of_klay, cases
from circuitroute.plots import COLORS, MARKERS

Row = dict[str, Any]
LIGHT = "#dddddd"


def logic(axes: Any, rows: Sequence[Row]) -> None:
    """Predicted paths: all edges right, wrong though they are paths, and no paths at all; means over the seeds."""
    names = {
        "sigmoid": "sigmoid",
        "sigmoid + semantic loss": "+ semantic loss",
        "sigmoid, mode at test time": "mode at test time",
        "ConstraintLayer": "constraint layer",
    }
    task = [row for row in rows if row["task"] == "paths"]
    right_M, broken_M = (
        np.array([100 * np.mean([row[key] for row in task if row["method"] == name]) for name in names])
        for key in ("exact", "violations")
    )
    lines = range(len(names))
    bars = axes.barh(lines, right_M, color=COLORS[0], height=0.7, label="right")
    axes.bar_label(bars, [f"{share:.0f}" for share in right_M], label_type="center", color="white")
    axes.barh(lines, 100 - right_M - broken_M, left=right_M, color=LIGHT, height=0.7, label="wrong path")
    bars = axes.barh(lines, broken_M, left=100 - broken_M, color=COLORS[1], height=0.7, label="breaks the rules")
    axes.bar_label(bars, [f"{share:.0f}" if share else "" for share in broken_M], label_type="center", color="white")
    axes.set_yticks(lines, list(names.values()))
    axes.invert_yaxis()
    axes.set(xlabel="% of predicted paths", xlim=(0, 100))
    _legend_above(axes, 3)


def cnf(axes: Any, rows: Sequence[Row]) -> None:
    """Products of the circuits of random 3-CNF over 30 variables: the median, and a mark per formula."""
    done = [row for row in rows if row["n"] == 30 and row["result"] == "circuit"]
    for color, marker, way in zip(COLORS, MARKERS, ("built-in", 'compiler="sdd"'), strict=False):
        own = [row for row in done if row["provider"] == way]
        ratios = sorted({row["ratio"] for row in own})
        axes.plot(ratios, [median(row["edges"] for row in own if row["ratio"] == x) for x in ratios], color=color)
        points = [row["ratio"] for row in own], [row["edges"] for row in own]
        axes.plot(*points, marker, color=color, markersize=4, alpha=0.6)
        axes.plot([], [], color=color, marker=marker, markersize=4, label=way)
    axes.set(yscale="log", xlabel="clauses per variable (30 variables)", ylabel="products in the circuit")
    axes.set_yticks([30, 100, 300, 1000, 3000, 10000], ["30", "100", "300", "1,000", "3,000", "10,000"])
    axes.set_xticks(ratios)
    axes.minorticks_off()
    axes.legend(loc="lower left")


def circuits(axes: Any, rows: Sequence[Row]) -> None:
    """CPU time of 256 rows on the eight public circuits: ours, KLay's fastest way for each, KLay under vmap."""
    found = [case for (collection, batch, _), case in cases(rows).items() if (collection, batch) == ("spl", 256)]
    found.sort(key=lambda case: -float(case[OURS]["edges"]))
    times_CP = np.array([[row["median_ms"] for row in (c[OURS], best_of_klay(c), c[VMAP]) if row] for c in found])
    lines = np.arange(len(found))
    axes.hlines(lines, times_CP.min(1), times_CP.max(1), color=LIGHT, linewidth=2, zorder=1)
    for i, label in enumerate(("circuitroute", "KLay's best", "KLay, vmap")):
        axes.scatter(times_CP[:, i], lines, s=26, marker=MARKERS[i], color=COLORS[i], label=label, zorder=2)
    names = [case[OURS]["constraint"].removesuffix("-all-pairs-sd").split("_")[0] for case in found]
    axes.set_yticks(lines, names)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="CPU ms, forward and backward, batch of 256")
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.minorticks_off()
    _legend_above(axes, 3, handletextpad=0.0)


def k_subset(axes: Any, rows: Sequence[Row]) -> None:
    """Mean error of a gradient over SIMPLE's ten problems, and its deviation, of what uses four evaluations."""
    names = {
        "simple": "SIMPLE",
        "gumbel-relaxed": "Gumbel relaxed",
        "score-taylor": "score, Taylor",
        "gumbel-st": "Gumbel ST",
        "score-simple": "score, SIMPLE",
        "imle": "I-MLE",
        "sfess-vr": "SFESS, baseline",
        "score": "score",
        "sfess": "SFESS",
    }
    setting = ("quadratic", 1.0, 4)
    found = [row for row in rows if (row.get("family"), row.get("scale"), row.get("evaluations")) == setting]
    errors = {name: np.array([row["error"] for row in found if row["method"] == name]) for name in names}
    nearest_first = sorted(names, key=lambda name: float(errors[name].mean()))
    whiskers = {"ecolor": "#333333", "elinewidth": 1}
    for line, name in enumerate(nearest_first):
        color = COLORS[0] if METHODS[name].ours else COLORS[1]
        axes.barh(line, errors[name].mean(), 0.7, xerr=errors[name].std(ddof=1), color=color, error_kw=whiskers)
    for color, label in ((COLORS[0], "exact samples"), (COLORS[1], "perturbed logits")):
        axes.barh(0, 0, color=color, label=label)
    axes.set_yticks(range(len(names)), [names[name] for name in nearest_first])
    axes.invert_yaxis()
    axes.set(xlabel="1 - cosine to the exact gradient, 4 evaluations", xlim=(0, 1))
    axes.legend(loc="upper right")


def survey(axes: Any, rows: Sequence[Row]) -> None:
    """CPU time of ours and of R's package sampling, for 100 of 1,000 units, and how many times ours R's is."""
    names = {
        "logits": "from pi to logits",
        "marginals": "from logits to pi",
        "joint": "joint pi",
        "sample": "a sample from pi",
    }
    found = {row["step"]: row for row in rows if row["op"] == "survey" and row["n"] == 1000}
    times_SP = 1000 * np.array([[found[step]["seconds"], found[step]["r_seconds"]] for step in names])
    lines = np.arange(len(names))
    axes.hlines(lines, times_SP[:, 0], times_SP[:, 1], color=LIGHT, linewidth=2, zorder=1)
    for i, label in enumerate(("circuitroute", "R, package sampling")):
        axes.scatter(times_SP[:, i], lines, s=36, marker=MARKERS[i], color=COLORS[i], label=label, zorder=2)
    for line, (ours, theirs) in enumerate(times_SP):
        axes.annotate(f"x {theirs / ours:.2g}", (theirs, line), (7, 0), textcoords="offset points", va="center")
    axes.set_yticks(lines, list(names.values()))
    axes.invert_yaxis()
    axes.margins(y=0.15)
    axes.set(xscale="log", xlabel="CPU ms, 100 of 1,000 units", xlim=(0.8, 1500))
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.minorticks_off()
    _legend_above(axes, 2)


def priors(axes: Any, rows: Sequence[Row]) -> None:
    """Held-out bits of a routing decision by latent states, means over layers, mean and deviation over the seeds."""
    own = [row for row in rows if row["part"] == "models" and row["layer"] >= 0]
    for i, (model, label) in enumerate({"prior": "prior", "prior times constraint": "prior x constraint"}.items()):
        fitted = [row for row in own if row["model"] == model and row.get("method") == "em"]
        states = sorted({row["states"] for row in fitted})
        bits_SR = np.array([_by_seed([row for row in fitted if row["states"] == each]) for each in states])
        spread_S = bits_SR.std(1, ddof=1)
        line = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4, "capsize": 2, "label": label}
        axes.errorbar(states, bits_SR.mean(1), spread_S, **line)
    for color, model, label in (
        (COLORS[2], "independent coins", "coins"),
        (COLORS[3], "coins times constraint", "coins x constraint"),
    ):
        level = np.mean(_by_seed([row for row in own if row["model"] == model]))
        axes.axhline(level, color=color, linestyle="--", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(states, [str(each) for each in states])
    axes.set(xlabel="latent states of the prior", ylabel="held-out bits per decision", ylim=(None, 14.4))
    axes.legend(loc="upper center", ncols=2, columnspacing=1.2)


def _legend_above(axes: Any, columns: int, handletextpad: float = 0.4) -> None:
    """To the right above the axes, where it hides nothing."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.04, 0.98),
        ncols=columns,
        columnspacing=0.9,
        handletextpad=handletextpad,
        borderaxespad=0,
    )


def _by_seed(rows: Sequence[Row]) -> list[float]:
    """Bits of every seed, the mean over its layers."""
    seeds = sorted({row["seed"] for row in rows})
    return [float(np.mean([row["bits"] for row in rows if row["seed"] == seed])) for seed in seeds]
