"""The facts as tables in the terminal."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from circuitroute.inference.circuit import describe

from .facts import Facts

BAR = 30  # characters of the longest bar
PREDICTED = ("nodes", "edges", "width")


def _optional(name: str) -> Any:
    """A module of the `cli` extra. Raises ImportError with the remedy where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"circuitroute explain needs rich ({error}): pip install 'circuitroute[cli]', or ask for --json",
            name="rich",
        ) from error


def print_tables(facts: Facts) -> None:
    """The circuit, its levels, and what the prediction is made of."""
    console = _optional("rich.console").Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # do not fold tables in files
    console.print(circuit_table(facts))
    console.print(level_table(facts))
    console.print(prediction(facts), soft_wrap=True)


def circuit_table(facts: Facts) -> Any:
    """A rich.table.Table of labels and values."""
    table = _table("The circuit")
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    told = facts.predicted
    expected = {} if told is None else {name: f" (predicted {getattr(told, name):,})" for name in PREDICTED}
    for label, value in describe(facts.circuit, facts.device).items():
        table.add_row(label, value + expected.get(label, ""))
    seconds = "" if told is None else f" (predicted {told.seconds:.2g})"
    table.add_row("seconds to compile", f"{facts.seconds:.2g}{seconds}")
    table.add_row("predicted share of a router", f"{facts.share:.2%} of its arithmetic")
    return table


def level_table(facts: Facts) -> Any:
    """A rich.table.Table with a row and a bar per level, the root's first."""
    table = _table("Its levels, from the root down")
    for heading in ("level", "sums", "elements", "widest"):
        table.add_column(heading, justify="right")
    table.add_column("elements of the level")
    most = max((level.elements for level in facts.levels), default=1)
    for level in reversed(facts.levels):
        bar = "█" * max(1, round(BAR * level.elements / most))
        table.add_row(f"{level.level}", f"{level.sums:,}", f"{level.elements:,}", f"{level.widest:,}", bar)
    return table


def prediction(facts: Facts) -> str:
    """What the predictions are based on."""
    sizes = "" if facts.predicted is None else "\nSizes in brackets were predicted before building, as upper bounds."
    ours, linear = f"{facts.multiply_adds:,}", f"{facts.router_multiply_adds:,}"
    return (
        f"share = circuit / (circuit + linear) = {ours} / ({ours} + {linear}) = {facts.share:.2%}\n"
        f"  circuit: multiply-adds per token of the marginals, an upward and a downward sweep over "
        f"{facts.circuit.num_edges:,} edges\n"
        f"  linear:  hidden x n = {facts.hidden:,} x {facts.circuit.n:,} multiply-adds, the router's linear layer\n"
        "Predicted from these counts alone; no engine was timed. Small operations on a CPU or GPU take longer than "
        "their arithmetic.\n"
        f"widest: the most sums of a level over the same variables.{sizes}"
    )


def _table(title: str) -> Any:
    boxes = _optional("rich.box")
    return _optional("rich.table").Table(
        title=title,
        title_justify="left",
        box=boxes.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=title != "The circuit",
    )
