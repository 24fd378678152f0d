"""What the rows say: tables in Markdown, and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from circuitroute.plots import COLORS, MARKERS, new_figure

Row: TypeAlias = dict[str, Any]
BASELINE = "coins times constraint"  # what differences are to


def _label(row: Row) -> str:
    """What a line of a table is about."""
    if row.get("states") is None:
        return str(row["model"])
    kind = "prior" if row["model"] == "prior" else "prior x constraint"
    return f"{kind}, S = {row['states']}, {row['method']}"


def _by_seed(rows: Iterable[Row], key: Callable[[Row], float]) -> dict[int, float]:
    """The mean over layers, seed by seed."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        found[row["seed"]].append(key(row))
    return {seed: fmean(values) for seed, values in found.items()}


def spread(values: Iterable[float], form: str) -> str:
    """Mean ± standard deviation."""
    listed = list(values)
    return format(fmean(listed), form) + (f" ± {stdev(listed):{form.lstrip('+')}}" if len(listed) > 1 else "")


def _differences(bits: dict[int, float], other: dict[int, float]) -> str:
    return spread([bits[seed] - other[seed] for seed in bits], "+.2f")


def _models(rows: list[Row], router: str) -> list[str]:
    """Bits per decision of one layer, mean over the layers."""
    own = [row for row in rows if row["part"] == "models" and row["router"] == router and row["layer"] >= 0]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in own:
        groups[_label(row)].append(row)
    reference = _by_seed(groups[BASELINE], lambda row: row["bits"])
    layers = len({row["layer"] for row in own})
    lines = [
        f"\n{router}: {layers} layers, {len(reference)} seeds\n",
        f"| distribution | bits per decision | minus {BASELINE}, paired | bytes per token, {layers} layers | CPU s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, group in groups.items():
        bits = _by_seed(group, lambda row: row["bits"])
        size, seconds = fmean(bits.values()) * layers / 8, fmean(row["seconds"] for row in group)
        cells = (spread(bits.values(), ".2f"), _differences(bits, reference), f"{size:.2f}", f"{seconds:.2f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _all_layers(rows: list[Row]) -> list[str]:
    """One prior over all layers of a token beside one per layer."""
    joint = [row for row in rows if row["part"] == "models" and row["layer"] < 0]
    if not joint:
        return []
    lines = [
        "\nOne prior over all layers of a token\n",
        "| distribution | bits per token | CPU s |",
        "| --- | ---: | ---: |",
    ]
    for kind in ("prior", "prior times constraint"):
        own = [row for row in joint if row["model"] == kind]
        bits = _by_seed(own, lambda row: row["bits"])
        lines.append(
            f"| {_label(own[0])} | {spread(bits.values(), '.2f')} | {fmean(row['seconds'] for row in own):.1f} |"
        )
    return lines


def _layers_of(rows: list[Row]) -> list[str]:
    """Bits of every layer."""
    picked = ["any allowed subset", "independent coins", BASELINE]
    own = [
        row
        for row in rows
        if row["part"] == "models"
        and row["layer"] >= 0
        and (row["model"] in picked or (row.get("method") == "em" and row["model"] != "prior"))
    ]
    numbers = sorted({row["layer"] for row in own})
    lines = ["\nLayer by layer\n", f"| router, distribution | {' | '.join(f'layer {i}' for i in numbers)} |"]
    lines.append("| --- |" + " ---: |" * len(numbers))
    for router, label in dict.fromkeys((row["router"], _label(row)) for row in own):
        group = [row for row in own if (row["router"], _label(row)) == (router, label)]
        cells = [spread([row["bits"] for row in group if row["layer"] == i], ".2f") for i in numbers]
        lines.append(f"| {router}, {label} | {' | '.join(cells)} |")
    return lines


def _choices(rows: list[Row]) -> list[str]:
    own = [row for row in rows if row["part"] == "choices" and row["model"] != "prior"]
    if not own:
        return []
    lines = ["\nLayers and vtree, prior x constraint\n", "| vtree | layers | S | bits per decision | CPU s |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for vtree, layers, states in dict.fromkeys((row["vtree"], row["layers"], row["states"]) for row in own):
        group = [row for row in own if (row["vtree"], row["layers"], row["states"]) == (vtree, layers, states)]
        bits = _by_seed(group, lambda row: row["bits"])
        seconds = fmean(row["seconds"] for row in group)
        lines.append(f"| {vtree} | {layers} | {states} | {spread(bits.values(), '.2f')} | {seconds:.2f} |")
    return lines


def _curves(rows: list[Row]) -> list[str]:
    own = [row for row in rows if row["part"] == "curves"]
    if not own:
        return []
    steps = [step for step in (1, 10, 20, 50, 100, 150) if step in {row["steps"] for row in own}]
    lines = [f"\nEM and gradients: bits of the prior after so many steps, S = {own[0]['states']}\n"]
    lines.append(f"| method | {' | '.join(map(str, steps))} | CPU s | x constraint |")
    lines.append("| --- |" + " ---: |" * (len(steps) + 2))
    for method in dict.fromkeys(row["method"] for row in own):
        group = [row for row in own if row["method"] == method]
        cells = [spread([row["bits"] for row in group if row["steps"] == step], ".2f") for step in steps]
        last = [row for row in group if row["steps"] == steps[-1]]
        cells += [f"{fmean(row['seconds'] for row in last):.2f}", spread([row["constrained"] for row in last], ".2f")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def tables(rows: list[Row]) -> str:
    """All of them."""
    routers = dict.fromkeys(row["router"] for row in rows)
    lines = [line for router in routers for line in _models(rows, router)]
    return "\n".join([*lines, *_layers_of(rows), *_all_layers(rows), *_choices(rows), *_curves(rows)]).strip()


def picture(rows: list[Row], path: Path) -> None:
    """Bits per decision over latent states, with what needs none as lines; letters to be read at 360 pixels."""
    router = rows[0]["router"]
    own = [row for row in rows if row["part"] == "models" and row["layer"] >= 0 and row["router"] == router]
    figure = new_figure(4.8, 3.6)
    axes = figure.subplots()
    for i, kind in enumerate(("prior", "prior times constraint")):
        states = sorted({row["states"] for row in own if row.get("method") == "em"})
        means, errors = [], []
        for S in states:
            group = [row for row in own if row["model"] == kind and row.get("method") == "em" and row["states"] == S]
            bits = list(_by_seed(group, lambda row: row["bits"]).values())
            means.append(fmean(bits))
            errors.append(stdev(bits) if len(bits) > 1 else 0.0)
        label = "prior" if i == 0 else "prior x constraint"
        axes.errorbar(states, means, errors, color=COLORS[i], marker=MARKERS[i], capsize=3, linewidth=2, label=label)
    names = {"independent coins": "coins", BASELINE: "coins x constraint"}
    for i, (name, label) in enumerate(names.items(), start=2):
        level = fmean(row["bits"] for row in own if row["model"] == name)
        axes.axhline(level, color=COLORS[i], linestyle="--", linewidth=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(states, [str(S) for S in states])
    axes.tick_params(labelsize=12)
    axes.set_xlabel("latent states", fontsize=13)
    axes.set_ylabel("held-out bits per decision", fontsize=13)
    axes.grid(alpha=0.3)
    axes.set_ylim(top=axes.get_ylim()[1] + 1.4)  # room for the legend above the lines
    axes.legend(frameon=False, fontsize=11, loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.5)
    figure.savefig(path, metadata={"Date": None})
