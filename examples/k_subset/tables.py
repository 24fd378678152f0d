"""The tables, in Markdown: means ± standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import gradients, l2x
from .estimators import METHODS
from .pairing import Spread, best_peer, by_method, paired

Row = dict[str, Any]

BUDGET = gradients.BUDGET_OF_SCALES

# Read off the figure of bias, variance and average error in Ahmed et al. 2023, as it is in the notebook that they
# publish (UCLA-StarAI/SIMPLE, tractable_dist/k-subset_distribution.ipynb): bias, variance, error, error_spread.
PUBLISHED = {
    "simple": (0.035, 0.012, 0.24, 0.10),
    "score": (0.005, 0.132, 1.00, 0.36),
    "gumbel-relaxed": (0.085, 0.031, 0.27, 0.17),
    "imle": (0.46, 0.032, 0.57, 0.17),
}


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """All tables that there are rows for."""
    of = {name: [row for row in rows if row["table"] == name] for name in ("gradients", "l2x", "vae")}
    if of["gradients"]:
        yield from _gradient_tables(of["gradients"])
    for name in l2x.TASKS:
        found = [row for row in of["l2x"] if row["set"] == name]
        if found:
            yield _l2x_table(name, found)
    if of["vae"]:
        yield _vae_table(of["vae"])


def _gradient_tables(rows: Sequence[Row]) -> Iterator[str]:
    paper = [row for row in rows if (row["family"], row["scale"]) == ("quadratic", 1.0)]
    once = [row for row in paper if row["evaluations"] == 1]
    if once:
        yield _paper_table(once)
    at_one = [row for row in rows if row["scale"] == 1.0]
    yield _error_table("Error at scale 1, by loss and evaluations", at_one, ("family", "evaluations"))
    scaled = [row for row in rows if row["evaluations"] == BUDGET and row["family"] != "linear"]
    if len({row["scale"] for row in scaled}) > 1:
        yield _error_table(
            f"Error at {BUDGET} evaluations, by loss and scale of the logits", scaled, ("family", "scale")
        )


def _paper_table(rows: Sequence[Row]) -> str:
    """The paper's measures on the paper's problem, one sample."""
    lines = []
    for name, found in by_method(rows).items():
        bias, variance, error = (_mean(found, key) for key in ("bias", "variance", "error"))
        published = PUBLISHED.get(name)
        said = "" if published is None else "{:g}, {:g}, {:g} ± {:g}".format(*published)
        within = _mean(found, "error_spread")
        lengths = [f"{_mean(found, key):.2f}" for key in ("relative_bias", "relative_variance")]
        first = [bias.text(".3f"), variance.text(".3f"), f"{error:.3f} ± {within:.3f}"]
        lines.append([name, _setting(found), *first, said, *lengths])
    head = ["method", "setting", "bias", "variance", "error", "published", "relative bias", "relative variance"]
    return _table("The problem of SIMPLE's paper, one sample", head, lines)


def _error_table(title: str, rows: Sequence[Row], keys: tuple[str, str]) -> str:
    families = list(gradients.FAMILIES)
    found_columns = {(row[keys[0]], row[keys[1]]) for row in rows}
    columns = sorted(found_columns, key=lambda column: (families.index(column[0]), column[1]))
    lines = []
    for name, found in by_method(rows).items():
        cells = []
        for column in columns:
            chosen = [row for row in found if tuple(row[key] for key in keys) == column]
            cells.append(_mean(chosen, "error").text(".3f") if chosen else "")
        lines.append([name, *cells])
    return _table(title, ["method", *(f"{family}, {value:g}" for family, value in columns)], lines)


def _l2x_table(name: str, rows: Sequence[Row]) -> str:
    groups = by_method(rows)
    best = best_peer(groups, "loss")
    lines = []
    for method, found in groups.items():
        measures = [_mean(found, "recovery").text(".2f"), _mean(found, "median_rank").text(".2f")]
        measures += [_milli(found, "loss"), _mean(found, "accuracy").text(".3f")]
        lines.append([method, _setting(found), *measures, *_l2x_pairs(found, groups, best), _minutes(found)])
    head = ["method", "setting", "recovery", "median rank", "loss", "accuracy"]
    head += [] if best is None else [f"recovery minus {best}", f"loss minus {best}"]
    head += ["CPU minutes"]
    return _table(f"L2X, {name}: k = {l2x.TASKS[name].k} of {l2x.N}; losses in millinats", head, lines)


def _l2x_pairs(found: Sequence[Row], groups: dict[str, list[Row]], best: str | None) -> list[str]:
    if best is None:
        return []
    if found is groups[best]:
        return ["", ""]
    difference = paired(_thousandfold(found), _thousandfold(groups[best]), "loss")
    return [paired(found, groups[best], "recovery").text("+.2f"), difference.text("+.1f")]


def _vae_table(rows: Sequence[Row]) -> str:
    groups = by_method(rows)
    best = best_peer(groups, "elbo", -1)
    lines = []
    for method, found in groups.items():
        measures = [_mean(found, key).text(".2f") for key in ("elbo", "reconstruction", "kl")]
        pair = [] if best is None else [_difference(found, groups[best])]
        lines.append([method, _setting(found), *measures, *pair, _minutes(found)])
    head = ["method", "setting", "ELBO", "reconstruction", "KL"]
    head += ["CPU minutes"] if best is None else [f"ELBO minus {best}", "CPU minutes"]
    return _table("k-subset VAE on digits, held-out nats per image", head, lines)


def _difference(found: Sequence[Row], others: Sequence[Row]) -> str:
    return "" if found is others else paired(found, others, "elbo").text("+.2f")


def _mean(rows: Sequence[Row], key: str) -> Spread:
    return Spread.of([row[key] for row in rows])


def _milli(rows: Sequence[Row], key: str) -> str:
    return _mean(_thousandfold(rows), key).text(".1f")


def _thousandfold(rows: Sequence[Row]) -> list[Row]:
    return [{**row, "loss": 1000 * row["loss"]} for row in rows]


def _minutes(rows: Sequence[Row]) -> str:
    return f"{_mean(rows, 'cpu_seconds') / 60:.3f}"


def _setting(rows: Sequence[Row]) -> str:
    return ", ".join(f"{value}" for value in rows[0]["settings"].values() if not isinstance(value, bool)) + "".join(
        f", {name.replace('_', '-')}" for name, value in rows[0]["settings"].items() if value is True
    )


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def owner(line: Sequence[str]) -> str:
        return "ours" if METHODS[line[0].partition(",")[0]].ours else "theirs"

    table = [[head[0], "of", *head[1:]], ["---", "---", *["---:"] * (len(head) - 1)]]
    table += [[line[0], owner(line), *line[1:]] for line in lines]
    return f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table)
